"""Sparsity algorithms: `algorithm.apply(model)` makes its layers sparse, and
`algorithm.apply(optimizer)` lets it follow the training steps. Weights, gradients and optimizer
state are stored at nnz."""

from .algorithm import Algorithm
from .config import ALGORITHMS, Group, configure, get
from .dynamic import SET, RigL
from .files import load_config
from .gradual import GMP, IterativePruning
from .oneshot import Magnitude, SparseGPT, Wanda
from .static import Static

__all__ = [
    "ALGORITHMS",
    "GMP",
    "SET",
    "Algorithm",
    "Group",
    "IterativePruning",
    "Magnitude",
    "RigL",
    "SparseGPT",
    "Static",
    "Wanda",
    "configure",
    "get",
    "load_config",
]
