"""What all algorithms share: which layers, how many weights in each, and when to change them."""

from collections.abc import Iterable
from dataclasses import dataclass, field
from fnmatch import fnmatchcase
from typing import Any
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn
from torch.optim import Optimizer
from torch.optim.swa_utils import AveragedModel

from ..nn import SparseLinear, sparsifiable, sparsify_
from .budget import DISTRIBUTIONS, budgets
from .optimizers import follow, held_layers, note_model_of, unwrapped
from .pattern import check_can_change, check_same_on_all_ranks
from .schedules import Constant, Schedule, schedule, update_steps
from .select import generator, largest, largest_of_each

INITS = ("random", "magnitude", "topk")  # topk: the name that published configs give to magnitude


@dataclass
class Algorithm:
    """Sparsity for the linear layers of a model: `apply(model)`, then `apply(optimizer)`.

    Args:
        sparsity: share of weights removed, in [0, 1], or a schedule of it (schedules.py).
        init_method: which weights are kept at first: "random", uniform over the layer, or
            "magnitude" (also "topk"), the largest absolute values.
        seed: of all random choices. They depend on the seed, the layer's name and shape and the
            step alone, so every process and device makes the same.
        distribution: "uniform", "erk" or "global" (budget.py).
        param_filter: globs for the names of the weights ("*mlp*.weight"; the name of the layer does
            as well). By default every nn.Linear but those named `head` or `lm_head`.
    """

    sparsity: Any
    init_method: str = "random"
    seed: int = 0
    distribution: str = "uniform"
    param_filter: str | Iterable[str] | None = None

    layers: dict[str, SparseLinear] = field(init=False, repr=False, compare=False)
    optimizers: list[Optimizer] = field(init=False, repr=False, compare=False)
    steps: int = field(init=False, repr=False, compare=False)  # of the optimizer, made so far

    def __post_init__(self) -> None:
        self._schedule: Schedule = schedule("sparsity", self.sparsity)
        if isinstance(self._schedule, Constant):
            self.target(0)
        if self.init_method not in INITS:
            raise ValueError(
                f"init_method: expected one of {', '.join(INITS)}, got {self.init_method!r}"
            )
        if self.distribution not in DISTRIBUTIONS:
            raise ValueError(
                f"distribution: expected one of {', '.join(DISTRIBUTIONS)}, "
                f"got {self.distribution!r}"
            )
        if self.distribution == "global" and self.init_method == "random":
            raise ValueError("distribution: global needs init_method magnitude, got random")
        if isinstance(self.param_filter, str):
            self.param_filter = [self.param_filter]
        self.layers, self.optimizers, self.steps = {}, [], 0
        self._stepped: set[int] = set()  # the optimizers that have made the step after these
        self._is_checked = False  # that the optimizers and all ranks have what they should
        # Steps when an optimizer that it does not follow made its last.
        self._unfollowed: WeakKeyDictionary[Optimizer, int] = WeakKeyDictionary()

    def target(self, step: int) -> float:
        """The sparsity after `step` optimizer steps. ValueError if the schedule leaves [0, 1]."""
        value = self._schedule(step)
        if not -1e-9 <= value <= 1 + 1e-9:  # a sum of floats may miss its end by a rounding
            at = "" if isinstance(self._schedule, Constant) else f" at step {step}"
            raise ValueError(f"sparsity: expected a number in [0, 1], got {value}{at}")
        return min(max(value, 0.0), 1.0)

    # The first pattern

    def mask(self, name: str, weight: Tensor) -> Tensor:
        """bool [N, K], True where the weight [N, K] of the layer called `name` is kept."""
        if self.distribution != "uniform":
            raise ValueError(f"distribution: {self.distribution} needs all layers: use apply")
        return self.masks({name: weight})[name]

    def masks(self, weights: dict[str, Tensor]) -> dict[str, Tensor]:
        """The same for all layers together."""
        target = self.target(0)
        if self.distribution == "global":
            total = sum(w.numel() for w in weights.values())
            scores = {name: w.detach().abs() for name, w in weights.items()}
            kept = largest_of_each(scores, round((1 - target) * total))
        else:
            counts = budgets({n: w.shape for n, w in weights.items()}, target, self.distribution)
            kept = {n: self._first_places(n, w, counts[n]) for n, w in weights.items()}
        return {name: mask_of(kept[name], weight) for name, weight in weights.items()}

    def _first_places(self, name: str, weight: Tensor, count: int) -> Tensor:
        if self.init_method == "random":
            order = torch.randperm(weight.numel(), generator=generator(self.seed, name))
            return order[:count].to(weight.device)
        return largest(weight.detach().abs().flatten(), count)

    # A model, an optimizer

    def apply(self, target: nn.Module | Optimizer) -> nn.Module | Optimizer:
        """Make the chosen layers of a model sparse, in place; or follow an optimizer: its state
        moves with the weights, and its steps are counted. Returns what it was given.

        Layers that are a SparseLinear already keep their pattern. Make the optimizer between the
        two calls: it must see the new Parameters. Where several optimizers share the layers, apply
        each: a step is counted when all of them have made it.
        """
        optimizer = unwrapped(target)
        if optimizer is not None:
            self._follow(optimizer)
            return target
        if not isinstance(target, nn.Module):
            raise TypeError(f"apply: expected a model or an optimizer, got {type(target).__name__}")
        if isinstance(target, AveragedModel):
            raise TypeError(
                "apply: expected the model itself, got an AveragedModel, which follows the "
                "patterns of the model by itself"
            )
        return self._take(target, set())

    def _take(self, model: nn.Module, taken: set[str]) -> nn.Module:
        """`apply` without the layers that another algorithm has taken."""
        chosen = sparsifiable(model, self._filter())
        names = [name for name in chosen if name not in taken]
        if not names:
            wanted = "any nn.Linear" if self.param_filter is None else list(self.param_filter)
            there = ", ".join(sparsifiable(model, lambda module, name: True)) or "none"
            raise ValueError(f"param_filter: {wanted} matches no layer; there are: {there}")
        model = self._sparsify(model, {name: chosen[name] for name in names})
        self.layers = {name: model.get_submodule(name) for name in names}
        note_model_of(self)
        return model

    def _sparsify(self, model: nn.Module, chosen: dict[str, nn.Module]) -> nn.Module:
        dense = {n: m.weight.detach() for n, m in chosen.items() if type(m) is nn.Linear}
        masks = self.masks(dense) if dense else {}
        return sparsify_(model, Masks(masks), lambda module, name: name in masks)

    def _filter(self):
        if self.param_filter is None:
            return None
        globs = list(self.param_filter)
        return lambda module, name: any(
            fnmatchcase(name, glob) or fnmatchcase(f"{name}.weight", glob) for glob in globs
        )

    def _follow(self, optimizer: Optimizer) -> None:
        if not self.layers:
            raise ValueError("apply: expected the model before the optimizer")
        trained = [name for name, layer in self.layers.items() if layer.values.requires_grad]
        if trained and not held_layers(optimizer, self.layers):
            raise ValueError(
                f"apply: the optimizer does not hold the values of {trained[0]}; make it after "
                "applying the algorithm to the model"
            )
        if not any(optimizer is other for other in self.optimizers):
            follow(self, optimizer)
        self._before_step()

    def _before_step(self) -> None:
        """Called before the forward pass of each step."""

    def _after_step(self) -> None:
        self.steps += 1
        if self._updates(self.steps):
            check_can_change(self.layers, self.optimizers)
            self.update_pattern()
            check_same_on_all_ranks(self.layers)
        self._before_step()

    def _updates(self, step: int) -> bool:
        return False

    @property
    def resizes(self) -> bool:
        """Whether it changes the number of weights during training."""
        return False

    @property
    def is_due(self) -> bool:
        """Whether the next optimizer step changes the pattern."""
        return self._updates(self.steps + 1)

    def update_pattern(self) -> None:
        """Change the patterns as the algorithm says for the current step."""

    # What a checkpoint holds beside the model's and the optimizer's state

    def state_dict(self) -> dict:
        return {"steps": self.steps}

    def load_state_dict(self, state: dict) -> None:
        self.steps = state["steps"]
        self._before_step()

    @property
    def achieved(self) -> float:
        """The sparsity of all chosen layers together."""
        sizes = [layer.in_features * layer.out_features for layer in self.layers.values()]
        nnz = sum(layer.col_indices.shape[0] for layer in self.layers.values())
        return 1 - nnz / max(1, sum(sizes))


@dataclass
class Updating(Algorithm):
    """An algorithm that changes the pattern during training.

    Args:
        update: the optimizer steps after which it does: {freq, start, stop}, {steps: [...]}, a
            callable, or None for every step.
    """

    update: Any = None

    def __post_init__(self) -> None:
        super().__post_init__()
        self._update_steps = update_steps(self.update)

    def _updates(self, step: int) -> bool:
        return step > 0 and self._update_steps(step)

    @property
    def resizes(self) -> bool:
        return True


class Masks:
    """Masks made before, as an algorithm for `sparsify_`."""

    def __init__(self, masks: dict[str, Tensor]) -> None:
        self._masks = masks

    def mask(self, name: str, weight: Tensor) -> Tensor:
        return self._masks[name]


def mask_of(places: Tensor, weight: Tensor) -> Tensor:
    mask = torch.zeros(weight.numel(), dtype=torch.bool, device=weight.device)
    mask[places] = True
    return mask.view(weight.shape)
