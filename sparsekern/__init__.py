"""Unstructured sparse weights behind torch.matmul.

y[M, N] = x[M, K] @ W[N, K].T        M tokens, N out_features, K in_features
"""

import sys
from importlib import import_module
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from typing import Any

    from .public import (
        SparseLinear,
        SparseTensor,
        Static,
        accelerate_,
        densify_,
        explain,
        linear,
        matmul,
        parameter_groups,
        sddmm,
        sparsify_,
    )

    _C: Any  # csrc/bindings.cpp, where it is built

__version__ = "0.1.0"

__all__ = [
    "SparseLinear",
    "SparseTensor",
    "Static",
    "accelerate_",
    "densify_",
    "explain",
    "linear",
    "matmul",
    "parameter_groups",
    "sddmm",
    "sparsify_",
]


def _load() -> None:
    """Import torch and all public names, and register what torch's functions do with them."""
    public = import_module(".public", __name__)
    globals().update({name: getattr(public, name) for name in __all__})


def _runs_as_command() -> bool:
    """Whether Python is at the script `sparsekern` or at `python -m sparsekern`, which parse their
    arguments before they load."""
    if "sparsekern_script" in sys.modules:
        return True
    words = sys.orig_argv
    if sys.argv[:1] != ["-m"] or "-m" not in words:
        return False
    return words[words.index("-m") + 1] == __name__  # a later -m is an argument of some program


if not _runs_as_command():
    _load()


if not TYPE_CHECKING:  # type checkers shall know which names there are

    def __getattr__(name: str) -> object:
        """A public name that a sitecustomize.py, say, wants before the command has loaded it."""
        if name not in __all__:
            raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
        _load()
        return globals()[name]
