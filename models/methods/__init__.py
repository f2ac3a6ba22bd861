"""The methods on one page. A new one is a file here and a line in METHODS; all else follows from that line."""

from models.method import Method
from models.methods.fastfill import FastFill
from models.methods.fct import Fct
from models.methods.xbt import Xbt

METHODS: dict[str, type[Method]] = {
    Fct.name: Fct,
    FastFill.name: FastFill,
    Xbt.name: Xbt,
}
