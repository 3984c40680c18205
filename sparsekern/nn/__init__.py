"""Modules with sparse weights, and the functions that put them into a model and take them out."""

from .convert import densify_, forget_graphs_, replace_modules, sparsifiable, sparsify_
from .groups import parameter_groups
from .linear import SparseLinear
from .packed import PackedLinear, pack_

__all__ = [
    "PackedLinear",
    "SparseLinear",
    "densify_",
    "forget_graphs_",
    "pack_",
    "parameter_groups",
    "replace_modules",
    "sparsifiable",
    "sparsify_",
]
