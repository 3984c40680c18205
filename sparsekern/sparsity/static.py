"""Static sparsity: a pattern chosen once and kept."""

from dataclasses import dataclass

from .algorithm import Algorithm


@dataclass
class Static(Algorithm):
    """Keeps exactly round((1 - sparsity) * N * K) weights of each layer, or of all layers together
    where the distribution is "erk" or "global"."""
