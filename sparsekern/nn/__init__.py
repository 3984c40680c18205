"""Modules with sparse weights, and the functions that put them into a model and take them out."""

from .convert import forget_graphs_, replace_modules, sparsifiable, sparsify_
from .densify import densify_
from .groups import parameter_groups
from .linear import SparseLinear
from .pack import pack_
from .packed import PackedLinear
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
