"""Static sparsity: a pattern chosen once and kept."""

import warnings
from dataclasses import dataclass

from torch import nn

from ..nn import SparseLinear, convert
from .algorithm import Algorithm, Layer
from .checks import shown
from .schedules import Constant

SLACK = 0.005  # of a sparsity, beside a weight of each layer: their numbers are whole


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
    where the distribution is "erk" or "global". Layers that are sparse already keep their pattern,
    with a warning where it has another sparsity."""

    def _sparsify(self, model: nn.Module, chosen: dict[str, Layer]) -> nn.Module:
        sparse = [layer for layer in chosen.values() if isinstance(layer, SparseLinear)]
        size = sum(layer.out_features * layer.in_features for layer in sparse)
        nnz = sum(layer.col_indices.shape[0] for layer in sparse)
        there, target = 1 - nnz / max(1, size), self.target(0)
        # Where others are dense, erk and global share the zeros out anew.
        is_asked = self.distribution == "uniform" or len(sparse) == len(chosen)
        is_asked = is_asked and self.init_method not in ("from_zeros", "checkerboard")
        if is_asked and abs(there - target) * size > SLACK * size + len(sparse):
            warnings.warn(
                f"Static: {target:.1%} zeros were asked for, but "
                + convert.KEEPS.format(f"{len(sparse)} layers with {there:.1%}")
                + "; Magnitude prunes them further",
                stacklevel=4,
            )
        if self.init_method == "from_zeros":
            dense = [m.weight.detach() for m in chosen.values() if isinstance(m, nn.Linear)]
            convert.refuse_unpruned("apply", dense)
        return super()._sparsify(model, chosen)
