"""Dynamic sparse training: the smallest weights go, as many others grow elsewhere."""

import warnings
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from ..kernels.observed import Observation, is_observed
from ..nn import SparseLinear
from .algorithm import Updating
from .balance import Balance
from .checks import whole as whole_number
from .pattern import is_distributed, local, of_all_ranks, places_of, set_pattern, whole
from .schedules import Constant, schedule, value_at
from .select import generator
from .undo import layers_unchanged_on_failure


@dataclass
class SET(Updating):
    """Sparse evolutionary training (Mocanu et al. 2018, arXiv 1707.04780): new weights in random
    places.

    Each update drops a share of a layer's weights and grows as many as its sparsity leaves room
    for: none, where the schedule of the sparsity rises faster than weights are dropped. Frozen
    layers keep their patterns, with a warning where all are frozen.

    Args:
        drop_fraction: share of a layer's weights that is dropped at each update, or a schedule.
    """

    drop_fraction: Any = 0.3

    def __post_init__(self) -> None:
        super().__post_init__()
        self._drop = schedule("drop_fraction", self.drop_fraction)
        if self.distribution == "global":
            raise ValueError("distribution: expected uniform or erk for a dynamic pattern")
        self._drop_fraction(0)
        if self.starts_sparse:
            self._check_density(self.target(0))

    @property
    def resizes(self) -> bool:
        return not (isinstance(self._schedule, Constant) and self.starts_sparse)

    def _check_update(self, step: int) -> None:
        super()._check_update(step)
        self._check_density(self.target(step))
        self._drop_fraction(step)

    def _drop_fraction(self, step: int) -> float:
        # Nothing was dropped when the first pattern was made.
        updates = max(0, self._updates_before(step) - self.starts_sparse)
        fraction = value_at("drop_fraction", self._drop, step, updates)
        if not 0 <= fraction <= 1:
            raise ValueError(
                f"drop_fraction: expected a number in [0, 1], got {fraction} at step {step}"
            )
        return fraction

    def update_pattern(self) -> None:
        if not any(layer.values.requires_grad for layer in self.layers.values()):
            warnings.warn(
                f"{type(self).__name__}: all its layers are frozen (requires_grad=False), as those "
                "under LoRA adapters, and keep their patterns: what grows would stay zero",
                stacklevel=2,
            )
            return
        fraction = self._drop_fraction(self.steps)
        sizes = {n: (m.out_features, m.in_features) for n, m in self.layers.items()}
        counts = self._budgets(sizes, self.target(self.steps))
        # All choices first: if one fails, or a rank's, no layer has changed.
        chosen = {}
        for name, layer in self.layers.items():
            if not layer.values.requires_grad:  # frozen: what grows would stay zero
                continue
            if 0 in sizes[name]:
                continue
            values = whole(layer.values.detach())
            nnz = values.shape[0]
            places, stay = places_of(layer), nnz - round(fraction * nnz)
            survivors = places[self._family.largest(values.abs(), places, *sizes[name], stay)]
            # A layer that is still denser than its target grows nothing, as in cstorch.sparse.
            count = max(0, counts[name] - survivors.shape[0])
            grown = self._grow(name, layer, survivors, count)
            if grown is not None:
                chosen[name] = grown
        optimizers = self.all_optimizers
        with layers_unchanged_on_failure(self.layers.values(), optimizers):
            for name, places in chosen.items():
                set_pattern(self.layers[name], places, optimizers)

    def _grow(self, name: str, layer: SparseLinear, survivors: Tensor, count: int) -> Tensor | None:
        """The survivors and `count` other places; None leaves the layer as it is."""
        n, k = layer.out_features, layer.in_features
        rng = generator(self.seed, name, self.steps)
        return self._family.grown_at_random(survivors, n, k, count, rng)


@dataclass
class RigL(SET):
    """Rigged lottery (Evci et al. 2020, arXiv 1911.11134): new weights where the gradient of the
    dense weight is largest.

    That gradient is computed on the update steps alone, from the inputs and output gradients of
    their backward pass, which are kept until then: `block_elems` of its elements at a time, summed
    over the micro-batches and ranks, in float32 (float64 for such a model). It leaves out what
    zero_grad() threw away before another backward pass, and autograd.grad of other tensors. A layer
    that had no gradient keeps its pattern; so do all where one is not finite, with a warning.
    RuntimeError if values have gradients and none was seen (a replayed CUDA graph hides them),
    NotImplementedError before the first step where ranks have different layers.
    Two-way masks need the gradient of one whole layer at a time.

    Args:
        balance_in_groups, balance_out_groups: of these many runs of columns or of rows, such as the
            heads of attention, each has the same number of weights, always.
        block_elems: elements of a dense gradient that are in memory at a time.
    """

    block_elems: int = 2**22
    balance_in_groups: int | None = None
    balance_out_groups: int | None = None

    def __post_init__(self) -> None:
        super().__post_init__()
        self.block_elems = whole_number("block_elems", self.block_elems, 1)
        balance = Balance.of(self.balance_in_groups, self.balance_out_groups)
        if balance and self.family != "unstructured":
            raise ValueError(
                f"family: {self.family} masks have no groups, got {balance.setting} too"
            )
        self._family = balance or self._family
        self._seen: dict[str, Observation] = {}

    def _check_ranks(self) -> None:
        if not is_distributed():
            return
        layers = [set(names) for names in of_all_ranks(list(self.layers))]
        if some := set.union(*layers) - set.intersection(*layers):
            raise NotImplementedError(
                "RigL: adds up dense gradients over all ranks, and expected the same layers on "
                f"each, got {', '.join(sorted(some))} on some of them; take SET where ranks hold "
                "different layers"
            )

    def _before_step(self) -> None:
        self._seen = {}
        if not self.is_due:
            return
        for name, layer in self.layers.items():
            if is_observed(layer.row_offsets):  # it shares its indices with another layer
                layer.row_offsets = layer.row_offsets.clone()
            self._seen[name] = Observation(layer.row_offsets, layer.values)

    def _give_up(self, names: list[str]) -> None:
        super()._give_up(names)
        self._seen = {n: seen for n, seen in self._seen.items() if n not in names}

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
                f"{text}, so no weight could grow: a replayed CUDA graph hides them, and so do "
                "hooks that copy saved tensors, as save_on_cpu; take the steps where "
                "algorithm.is_due without them"
            )

    def update_pattern(self) -> None:
        self._check_seen()
        try:
            super().update_pattern()
        except FloatingPointError as error:
            warnings.warn(f"{error}; the patterns stay", stacklevel=2)

    def _grow(self, name: str, layer: SparseLinear, survivors: Tensor, count: int) -> Tensor | None:
        n, k = layer.out_features, layer.in_features
        return self._family.grown(survivors, self._scores(name, layer), n, k, count)

    def _scores(self, name: str, layer: SparseLinear) -> Iterator[tuple[int, Tensor]]:
        """The absolute dense gradient, `block_elems` at a time: a row, and [rows, K] from there."""
        n, rows = layer.out_features, max(1, self.block_elems // layer.in_features)
        for first in range(0, n, rows):
            score = self._block(name, layer, first, min(first + rows, n)).abs_()
            if not score.isfinite().all():
                raise FloatingPointError(f"RigL: the dense gradient of {name} is not finite")
            yield first, score

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
    return gradient is not None and bool(local(gradient).any())
