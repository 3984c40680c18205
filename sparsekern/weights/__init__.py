"""Weights of a model in files, and from the ways in which others store sparse ones."""

from .bitmasks import from_bitmasks
from .foreign import from_masks, from_zeros
from .store import load_metadata, load_weights, save_weights, set_weights_, weights_of

__all__ = [
    "from_bitmasks",
    "from_masks",
    "from_zeros",
    "load_metadata",
    "load_weights",
    "save_weights",
    "set_weights_",
    "weights_of",
]
