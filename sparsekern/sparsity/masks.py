"""What every algorithm is told, and the masks that it makes of that: how many weights each layer
keeps, and which at first."""

import math
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from re import Pattern
from typing import Any

import torch
from torch import Tensor

from ..tensor import SparseTensor
from .budget import DISTRIBUTIONS, budgets
from .checks import one_of, whole
from .families import FAMILIES, Unstructured
from .filters import filter_parts
from .initial import INITS, checkerboard, first_places
from .schedules import Constant, Schedule, schedule, value_at


@dataclass
class Masking:
    """The settings of an algorithm, which algorithm.py describes, and the masks for weights."""

    sparsity: Any
    init_method: str = "random"
    seed: int = 0
    distribution: str = "uniform"
    param_filter: str | Pattern | Iterable[str | Pattern] | None = None
    family: str = field(default="unstructured", kw_only=True)

    def __post_init__(self) -> None:
        self._schedule: Schedule = schedule("sparsity", self.sparsity)
        if isinstance(self._schedule, Constant) and self._schedule.value == 1:
            raise ValueError(
                f"sparsity: expected a number below 1, got {self.sparsity}: no weight would be left"
            )
        self.init_method = one_of("init_method", self.init_method, INITS)
        self.distribution = one_of("distribution", self.distribution, DISTRIBUTIONS)
        self.seed = whole("seed", self.seed)
        self.family = one_of("family", self.family, FAMILIES)
        if self.distribution == "global" and self.init_method == "random":
            raise ValueError("distribution: global needs init_method magnitude, got random")
        if self.distribution != "uniform" and self.init_method in ("from_zeros", "checkerboard"):
            raise ValueError(
                f"distribution: {self.distribution} needs init_method random or magnitude, "
                f"got {self.init_method}"
            )
        self.param_filter = filter_parts(self.param_filter)
        self._family: Unstructured = FAMILIES[self.family]()

    def target(self, step: int) -> float:
        """The sparsity after `step` optimizer steps, held to [0, 1]."""
        value = value_at("sparsity", self._schedule, step, self._updates_before(step))
        return min(max(value, 0.0), 1.0)

    def _updates_before(self, step: int) -> int:
        """The updates before the last one that is not after `step`."""
        return 0

    def mask(self, name: str, weight: Tensor) -> Tensor:
        """bool [N, K], True where the weight [N, K] of the layer called `name` is kept."""
        if self.distribution != "uniform":
            raise ValueError(f"distribution: {self.distribution} needs all layers: use apply")
        return self.masks({name: weight})[name]

    def masks(self, weights: dict[str, Tensor]) -> dict[str, Tensor]:
        """The same for all layers together."""
        choose = self._chooser(weights)
        return {name: choose(name, weight) for name, weight in weights.items()}

    def _chooser(self, weights: dict[str, Tensor]) -> Callable[[str, Tensor], Tensor]:
        """A function that makes the mask of each of these layers, one at a time."""
        target = self.target(0)
        if self.distribution == "global":
            self._check_density(target)
            total = sum(w.numel() for w in weights.values())
            scores = {n: (w.detach().abs().flatten(), None, *w.shape) for n, w in weights.items()}
            kept = self._family.largest_of_each(scores, round((1 - target) * total))
            return lambda name, weight: mask_of(kept[name], weight)
        counts = self._budgets({n: (w.shape[0], w.shape[1]) for n, w in weights.items()}, target)
        return lambda name, weight: mask_of(self._first_places(name, weight, counts[name]), weight)

    def _first_places(self, name: str, weight: Tensor, count: int) -> Tensor:
        if self.init_method == "checkerboard":
            n, k = weight.shape
            places = checkerboard(n, k, self.target(0)).flatten().nonzero().flatten()
        else:
            places = first_places(self.init_method, name, weight, count, self.seed, self._family)
        if self.init_method in ("from_zeros", "checkerboard"):
            self._check_pattern(name, places, *weight.shape)
        return places

    def _budgets(self, shapes: Mapping[str, tuple[int, int]], target: float) -> dict[str, int]:
        """How many weights each layer of these shapes (N, K) keeps at this sparsity."""
        self._check_density(target)
        return budgets(shapes, target, self.distribution, self._most(shapes, target))

    def _most(self, shapes: Mapping[str, tuple[int, int]], target: float) -> dict[str, int]:
        """How many weights each layer may keep, where all together have this sparsity."""
        most = {name: self._family.most(n, k) for name, (n, k) in shapes.items()}
        return {
            name: max(most[name], math.ceil((1 - target) * n * k))
            for name, (n, k) in shapes.items()
        }

    def _check_density(self, target: float) -> None:
        """ValueError for a sparsity that no mask of the family has."""
        if 1 - target > self._family.densest:
            raise ValueError(
                f"sparsity: {self.family} masks keep at most half of the "
                f"weights, expected {1 - self._family.densest:g} or more, got {target:g}"
            )

    def _check_pattern(self, name: str, places: Tensor, n: int, k: int) -> None:
        """ValueError unless the places of a layer are a mask of the family, or become one."""
        if self._family.holds(places, n, k):
            return
        if self.resizes and self._family.leads_there(places, n, k):
            return
        raise ValueError(
            f"family: expected a {self.family} pattern of {name}, at most 2 of each 4 neighbours "
            f"along both axes; its {places.shape[0]} stored weights are none"
        )

    @property
    def resizes(self) -> bool:
        """Whether it changes the number of weights during training."""
        return False


class Masks:
    """A function (name, weight) -> mask, as an algorithm for `sparsify_`; `apply` has asked whether
    a pruned model is to be pruned again."""

    has_asked = True

    def __init__(self, mask: Callable[[str, Tensor], Tensor]) -> None:
        self.mask = mask


def mask_of(places: Tensor, weight: Tensor | SparseTensor) -> Tensor:
    mask = torch.zeros(math.prod(weight.shape), dtype=torch.bool, device=weight.device)
    mask[places.to(weight.device)] = True
    return mask.view(weight.shape)
