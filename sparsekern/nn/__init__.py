"""Modules with sparse weights, and the functions that put them into a model and take them out."""

from .convert import densify_, forget_graphs_, replace_modules, sparsifiable, sparsify_
from .groups import parameter_groups
from .linear import SparseLinear
from .packed import PackedLinear, pack_
from .replaced import adopt_values_

__all__ = [
    "PackedLinear",
    "SparseLinear",
    "adopt_values_",
    "densify_",
    "forget_graphs_",
    "pack_",
    "parameter_groups",
    "replace_modules",
    "sparsifiable",
    "sparsify_",
]
