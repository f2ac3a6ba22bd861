"""The backends: every module of this folder that is not a helper. Adding one is adding its file."""

from __future__ import annotations

from functools import cache
from importlib import import_module
from pkgutil import iter_modules

from gallery import index
from gallery.index.base import Backend

# Modules that others import by name. Private helpers begin with an underscore and need no line here.
NOT_BACKENDS = frozenset(
    {"base", "choose", "device", "faiss_gpu", "quantizer", "registry", "scores", "selection", "stack"}
)


class UnknownBackend(ValueError):
    """There is no index backend of this name."""


@cache
def names() -> tuple[str, ...]:
    """The names of all backends, sorted; none is imported for it."""
    found = (module.name for module in iter_modules(index.__path__))
    return tuple(sorted(name for name in found if name not in NOT_BACKENDS and not name.startswith("_")))


def backend(name: str) -> Backend:
    """Import a backend on first use, so that a missing library hurts only its users.

    Raises:
        UnknownBackend: `name` is not one of `names()`.
        ImportError: the library it needs is not installed.
    """
    if name not in names():
        raise UnknownBackend(f"{name!r} is not an index backend; choose one of {', '.join(names())}")
    found: Backend = import_module(f"gallery.index.{name}").BACKEND
    return found
