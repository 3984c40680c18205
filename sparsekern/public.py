"""The public names, those of `__all__` in __init__.py. To import them registers what torch's
functions do with a SparseTensor."""

# ruff: noqa: F401

from .matmul import explain, linear, matmul
from .models import accelerate_
from .nn import SparseLinear, densify_, parameter_groups, sparsify_
from .sparsity import Static
from .surface import contractions, elementwise, functions
from .surface.products import sddmm
from .tensor import SparseTensor
