"""The methods on one page. A new one is a file here and a line in METHODS; CONTRIBUTING.md says what else names it."""

from models.method import Method
from models.methods.affine import Affine
from models.methods.bct import Bct
from models.methods.bt2 import Bt2
from models.methods.fastfill import FastFill
from models.methods.fct import Fct
from models.methods.l2 import L2
from models.methods.lambda_orthogonality import LambdaOrthogonality
from models.methods.low_rank import LowRank
from models.methods.mixbct import MixBct
from models.methods.oca import Oca
from models.methods.procrustes import Procrustes
from models.methods.residual_mlp import ResidualMlp
from models.methods.xbt import Xbt

METHODS: dict[str, type[Method]] = {
    Fct.name: Fct,
    FastFill.name: FastFill,
    Xbt.name: Xbt,
    Bct.name: Bct,
    MixBct.name: MixBct,
    Bt2.name: Bt2,
    Oca.name: Oca,
    Procrustes.name: Procrustes,
    Affine.name: Affine,
    LowRank.name: LowRank,
    ResidualMlp.name: ResidualMlp,
    L2.name: L2,
    LambdaOrthogonality.name: LambdaOrthogonality,
}
