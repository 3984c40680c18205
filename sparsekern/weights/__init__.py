"""Weights of a model in files, and from the ways in which others store sparse ones."""

from .bitmasks import from_bitmasks, to_bitmasks
from .fit import set_weights_
from .foreign import from_masks, from_zeros
from .layouts import weights_of
from .matrices import load_matrix
from .read import load_metadata, load_weights
from .store import save_weights, to_zeros

__all__ = [
    "from_bitmasks",
    "from_masks",
    "from_zeros",
    "load_matrix",
    "load_metadata",
    "load_weights",
    "save_weights",
    "set_weights_",
    "to_bitmasks",
    "to_zeros",
    "weights_of",
]
