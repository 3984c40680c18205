"""Parameter groups of a model with sparse weights."""

import math
from numbers import Real

from torch import nn

from .checks import check_model
from .linear import SparseLinear, value_parameters


def parameter_groups(model: nn.Module, weight_decay: float = 0.1) -> list[dict]:
    """Parameter groups for an optimizer: weight decay for matrices and for the values of sparse
    ones, none for biases and norms.

    `values` are 1-D, so the usual rule "decay what has two dimensions" leaves every sparse weight
    without decay. For the same reason optimizers that look at rows and columns do not see them:
    Adafactor, Shampoo and SOAP keep a full state for `values` instead of a factored one (their
    numbers differ from those of the dense layer), LAMB takes the layer for a vector, and Muon,
    which makes matrices orthogonal, refuses them: give it the dense matrices, and AdamW these.
    """
    check_model(model)
    is_number = isinstance(weight_decay, Real) and not isinstance(weight_decay, bool)
    if not is_number or not 0 <= weight_decay < math.inf:
        raise ValueError(f"weight_decay: expected a number of 0 or more, got {weight_decay!r}")
    layers = [module for module in model.modules() if isinstance(module, SparseLinear)]
    values = {id(p) for layer in layers for p in value_parameters(layer)}
    groups: dict[bool, list[nn.Parameter]] = {True: [], False: []}
    for p in model.parameters():
        groups[p.ndim > 1 or id(p) in values].append(p)
    return [
        {"params": groups[True], "weight_decay": weight_decay},
        {"params": groups[False], "weight_decay": 0.0},
    ]
