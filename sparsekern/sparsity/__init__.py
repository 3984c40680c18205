"""Sparsity algorithms: `algorithm.apply(model)` makes its layers sparse, and
`algorithm.apply(optimizer)` lets it follow the training steps. Weights, gradients and optimizer
state are stored at nnz."""

from .algorithm import Algorithm
from .averages import match_patterns_
from .config import ALGORITHMS, Group, configure, get
from .dynamic import SET, RigL
from .files import load_config
from .gradual import GMP, IterativePruning
from .oneshot import Magnitude, SparseGPT, Wanda
from .optimizers import check_optimizer_state
from .pattern import check_same_patterns
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
    "check_optimizer_state",
    "check_same_patterns",
    "configure",
    "get",
    "load_config",
    "match_patterns_",
]
