"""Dynamic sparse training: the smallest weights go, as many others grow elsewhere."""

import warnings
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from ..kernels.observed import Observation, is_observed
from ..nn import SparseLinear
from .algorithm import Updating
from .budget import budgets
from .pattern import is_distributed, places_of, set_pattern, whole
from .schedules import Constant, schedule
from .select import generator, largest, random_outside


@dataclass
class SET(Updating):
    """Sparse evolutionary training (Mocanu et al. 2018, arXiv 1707.04780): new weights in random
    places.

    Args:
        drop_fraction: share of a layer's weights that is replaced at each update, or a schedule.
    """

    drop_fraction: Any = 0.3

    def __post_init__(self) -> None:
        super().__post_init__()
        self._drop = schedule("drop_fraction", self.drop_fraction)
        if self.distribution == "global":
            raise ValueError("distribution: expected uniform or erk for a dynamic pattern")
        self._drop_fraction(0)

    @property
    def resizes(self) -> bool:
        return not isinstance(self._schedule, Constant)

    def _drop_fraction(self, step: int) -> float:
        fraction = self._drop(step)
        if not 0 <= fraction <= 1:
            raise ValueError(
                f"drop_fraction: expected a number in [0, 1], got {fraction} at step {step}"
            )
        return fraction

    def update_pattern(self) -> None:
        fraction = self._drop_fraction(self.steps)
        sizes = {n: (m.out_features, m.in_features) for n, m in self.layers.items()}
        counts = budgets(sizes, self.target(self.steps), self.distribution)
        # All choices first: if one fails, or a rank's, no layer has changed.
        chosen = {}
        for name, layer in self.layers.items():
            values = whole(layer.values.detach())
            nnz = values.shape[0]
            stay = min(nnz - round(fraction * nnz), counts[name])
            survivors = places_of(layer)[largest(values.abs(), stay)]
            grown = self._grow(name, layer, survivors, counts[name] - stay)
            if grown is not None:
                chosen[name] = torch.cat([survivors, grown]).sort().values
        for name, places in chosen.items():
            set_pattern(self.layers[name], places, self.optimizers)

    def _grow(self, name: str, layer: SparseLinear, survivors: Tensor, count: int) -> Tensor | None:
        """`count` places outside `survivors`; None leaves the layer as it is."""
        size = layer.out_features * layer.in_features
        return random_outside(survivors, size, count, generator(self.seed, name, self.steps))


@dataclass
class RigL(SET):
    """Rigged lottery (Evci et al. 2020, arXiv 1911.11134): new weights where the gradient of the
    dense weight is largest.

    That gradient is computed on the update steps alone, from the inputs and output gradients of
    their backward pass, which are kept until then: `block_elems` of its elements at a time, summed
    over the micro-batches and ranks, in float32 (float64 for such a model). A layer that had no
    gradient keeps its pattern; so do all where one is not finite, with a warning. RuntimeError if
    values have gradients and none was seen (a replayed CUDA graph hides them).
    """

    block_elems: int = 2**22

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.block_elems < 1:
            raise ValueError(f"block_elems: expected at least 1, got {self.block_elems}")
        self._seen: dict[str, Observation] = {}

    def _before_step(self) -> None:
        self._seen = {}
        if not self.is_due:
            return
        for name, layer in self.layers.items():
            if is_observed(layer.row_offsets):  # it shares its indices with another layer
                layer.row_offsets = layer.row_offsets.clone()
            self._seen[name] = Observation(layer.row_offsets)

    def _check_seen(self) -> None:
        """RuntimeError if values have gradients, but no layer saw where they come from."""
        flags = [(bool(o.pairs), _has_gradient(self.layers[n])) for n, o in self._seen.items()]
        if is_distributed() and flags:
            device = next(iter(self.layers.values())).col_indices.device
            of_all = torch.tensor(flags, dtype=torch.int32, device=device)
            dist.all_reduce(of_all, dist.ReduceOp.MAX)
            flags = of_all.tolist()
        both = zip(self._seen, flags, strict=True)
        unseen = [name for name, (was_seen, has_gradient) in both if has_gradient and not was_seen]
        if not unseen:
            return
        text = (
            f"RigL: the values of {', '.join(unseen)} have gradients, but the products that they "
            "come from were not seen in this step"
        )
        if any(was_seen for was_seen, _ in flags):
            warnings.warn(f"{text}; these layers keep their patterns", stacklevel=2)
        else:
            raise RuntimeError(
                f"{text}, so no weight could grow: a replayed CUDA graph hides them, for one; take "
                "the steps where algorithm.is_due without it"
            )

    def update_pattern(self) -> None:
        self._check_seen()
        try:
            super().update_pattern()
        except FloatingPointError as error:
            warnings.warn(f"{error}; the patterns stay", stacklevel=2)

    def _grow(self, name: str, layer: SparseLinear, survivors: Tensor, count: int) -> Tensor | None:
        n, k = layer.out_features, layer.in_features
        best = torch.empty(0, device=survivors.device)
        where = survivors[:0]
        rows = max(1, self.block_elems // k)
        for first in range(0, n, rows):
            last = min(first + rows, n)
            score = self._block(name, layer, first, last).abs_().flatten()
            if not score.isfinite().all():
                raise FloatingPointError(f"RigL: the dense gradient of {name} is not finite")
            bounds = torch.tensor([first * k, last * k], device=survivors.device)
            low, high = torch.searchsorted(survivors, bounds).tolist()
            score[survivors[low:high] - first * k] = -1.0  # below every other
            top = largest(score, count)
            best = torch.cat([best.to(score.dtype), score[top]])
            where = torch.cat([where, top + first * k])
            keep = largest(best, count)  # ascending in `where`, so ties still go to the first
            best, where = best[keep], where[keep]
        return where if count == 0 or best.max() > 0 else None

    def _block(self, name: str, layer: SparseLinear, first: int, last: int) -> Tensor:
        """Rows first:last of the gradient of the dense weight, [last - first, K]."""
        dtype = torch.float64 if layer.values.dtype == torch.float64 else torch.float32
        device = layer.col_indices.device
        block = torch.zeros(last - first, layer.in_features, dtype=dtype, device=device)
        with torch.autocast(device.type, enabled=False):
            for x, dy in self._seen[name].pairs:
                block.addmm_(dy[:, first:last].t().to(dtype), x.to(dtype))
        if is_distributed():
            dist.all_reduce(block)
        return block


def _has_gradient(layer: SparseLinear) -> bool:
    gradient = layer.values.grad
    if gradient is None:
        return False
    own = gradient.to_local() if hasattr(gradient, "to_local") else gradient
    return bool(own.any())
