"""Static sparsity: a pattern chosen once and kept."""

from dataclasses import dataclass

from .algorithm import Algorithm
from .checks import shown
from .schedules import Constant


@dataclass
class Fixed(Algorithm):
    """An algorithm with one sparsity, and no schedule of it."""

    def __post_init__(self) -> None:
        super().__post_init__()
        if not isinstance(self._schedule, Constant):
            raise ValueError(
                f"sparsity: {type(self).__name__} chooses its pattern once, expected a number, "
                f"got {shown(self.sparsity)}"
            )
        self._check_density(self.target(0))


@dataclass
class Static(Fixed):
    """Keeps exactly round((1 - sparsity) * N * K) weights of each layer, or of all layers together
    where the distribution is "erk" or "global"."""
