"""The public names. To import them registers what torch's functions do with a SparseTensor."""

from .matmul import explain, linear, matmul
from .nn import SparseLinear, densify_, parameter_groups, sparsify_
from .sparsity import Static
from .surface import contractions, elementwise, functions  # noqa: F401
from .surface.products import sddmm
from .tensor import SparseTensor

__all__ = [
    "SparseLinear",
    "SparseTensor",
    "Static",
    "densify_",
    "explain",
    "linear",
    "matmul",
    "parameter_groups",
    "sddmm",
    "sparsify_",
]
