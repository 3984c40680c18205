"""Pruning during training: gradual magnitude pruning, and rounds of it with rewinding."""

import warnings
from collections.abc import Mapping
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from ..nn import SparseLinear
from ..nn.linear import layers_of
from ..nn.optimizers import holders
from .algorithm import Updating
from .checks import whole as whole_number
from .pattern import hashes_of, is_distributed, places_of, set_pattern, whole
from .schedules import EXAMPLE, Constant, Every
from .select import generator
from .static import SLACK
from .undo import layers_unchanged_on_failure


@dataclass
class GMP(Updating):
    """Gradual magnitude pruning: at each update the smallest weights go, until the sparsity is what
    its schedule says. Where the schedule falls, new weights start at zero in random places.

    On its way to a two-way mask it keeps one of half of all weights within what is stored.
    """

    _has_updated = False  # or goes on where another one has

    def __post_init__(self) -> None:
        super().__post_init__()
        if isinstance(self._schedule, Constant):
            self._check_constant(self._schedule.value)

    def _check_constant(self, value: float) -> None:
        raise ValueError(
            f"sparsity: GMP expected a schedule, as in sparsity: {EXAMPLE}, got {value:g} at every "
            "step, which is the algorithm static"
        )

    def check(self, steps: int) -> None:
        super().check(steps)
        self._check_end(self.target(max(self._update_steps.of_run(steps), default=0)))

    def _check_end(self, target: float) -> None:
        """ValueError if two-way masks are what it never comes to."""
        super()._check_density(target)

    def _check_density(self, target: float) -> None:
        """It may be denser on its way."""

    def update_pattern(self) -> None:
        if not self._has_updated:
            self._warn_of_growth()
        optimizers = self.all_optimizers
        with layers_unchanged_on_failure(self.layers.values(), optimizers):
            for name, places in self._new_places().items():
                self._set(name, places, optimizers)

    def _warn_of_growth(self) -> None:
        """Where the layers came sparser than the schedule has them by now, it would undo that."""
        self._has_updated = True
        target = self.target(self.steps)
        size = sum(layer.out_features * layer.in_features for layer in self.layers.values())
        density = 1 - max(target, self.target(0)) - SLACK
        if (1 - self.achieved) * size + len(self.layers) < density * size:
            warnings.warn(
                f"{type(self).__name__}: sparsity {self.achieved:.3g} of the layers falls to "
                f"{target:.3g}, as its schedule has it at step {self.steps}, with new weights that "
                "are zero: in a run that goes on, load the algorithm's state_dict; else let the "
                "schedule begin where the layers are",
                stacklevel=2,
            )

    def load_state_dict(self, state: dict) -> None:
        super().load_state_dict(state)
        self._has_updated = True

    def _new_places(self) -> dict[str, Tensor]:
        """All choices of this update, before any layer changes."""
        target = self.target(self.steps)
        sizes = {n: (m.out_features, m.in_features) for n, m in self.layers.items()}
        values = {name: whole(layer.values.detach()) for name, layer in self.layers.items()}
        scores = {n: (v.abs(), places_of(self.layers[n]), *sizes[n]) for n, v in values.items()}
        if self.distribution == "global":
            total = round((1 - target) * sum(n * k for n, k in sizes.values()))
            stored = sum(v.shape[0] for v in values.values())
            kept = self._family.largest_of_each(scores, total)
            free = {n: most - values[n].shape[0] for n, most in self._most(sizes, target).items()}
            missing = budgets_of_growth(free, max(0, total - stored))
            counts = {name: kept[name].shape[0] + missing[name] for name in values}
        else:
            counts = self._budgets(sizes, target)
            kept = {n: self._family.largest(*scores[n], counts[n]) for n in scores}
        chosen = {}
        for name, layer in self.layers.items():
            places = places_of(layer)[kept[name]]
            grown = counts[name] - places.shape[0]
            if grown:
                rng = generator(self.seed, name, self.steps)
                places = self._family.grown_at_random(places, *sizes[name], grown, rng)
            chosen[name] = places
        return chosen

    def _set(self, name: str, places: Tensor, optimizers: list[Optimizer]) -> None:
        set_pattern(self.layers[name], places, optimizers)


def budgets_of_growth(free: dict[str, int], count: int) -> dict[str, int]:
    """`count` new weights shared among layers in proportion to their free places, exactly."""
    free = {name: max(0, size) for name, size in free.items()}
    grown, left, total = {}, count, sum(free.values())
    for name, size in free.items():
        grown[name] = round(left * size / total) if total else 0
        left, total = left - grown[name], total - size
    return grown


@dataclass
class IterativePruning(GMP):
    """Rounds of training and magnitude pruning (Han et al. 2015; with rewinding, Frankle and Carbin
    2018). After each `freq` steps the density is multiplied by (1 - sparsity)^(1 / rounds).

    Args:
        sparsity: share of weights removed at the end, at least 0 and below 1.
        rounds: how many times it prunes.
        freq: optimizer steps before each pruning.
        rewind: None, or an optimizer step: after each pruning, all weights go back to what they
            were after this step, and the optimizer forgets its state.
    """

    rounds: int = 10
    freq: int = 1000
    rewind: int | None = None

    def __post_init__(self) -> None:
        super().__post_init__()
        if not isinstance(self._schedule, Constant):
            raise ValueError("sparsity: iterative pruning expected the number to end with")
        self._final = self._schedule.value
        self._check_end(self._final)
        self.rounds = whole_number("rounds", self.rounds, 1)
        self.freq = whole_number("freq", self.freq, 1)
        if self.update is not None:
            raise ValueError("update: iterative pruning has rounds and freq instead")
        if self.rewind is not None:
            self.rewind = whole_number("rewind", self.rewind, 0)
            if self.rewind > self.freq:
                raise ValueError(f"rewind: expected 0 to freq = {self.freq}, got {self.rewind}")
        self._schedule = partial(_sparsity_at, self._final, self.rounds, self.freq)
        self._update_steps = Every(self.freq, stop=self.freq * self.rounds + 1)
        self._early: dict[SparseLinear, Tensor] = {}  # values
        self._early_others: list[Tensor] = []
        self._early_patterns: list[int | None] = []  # of those that are values: their hashes
        self._early_of: list[nn.Parameter] = []  # whose these are; empty after load_state_dict

    def _check_constant(self, value: float) -> None:
        """The rounds make a schedule of it."""

    def check(self, steps: int) -> None:
        super().check(steps)
        if self.rounds * self.freq > steps:
            raise ValueError(
                f"rounds, freq: expected their product to be at most the run's {steps} steps, "
                f"got {self.rounds} x {self.freq}"
            )

    def _updates_before(self, step: int) -> int:
        return 0

    def _follow(self, optimizer: Optimizer) -> None:
        if self.rewind is not None and is_distributed():
            raise NotImplementedError("rewind: not available with several processes")
        super()._follow(optimizer)
        self._remember(self.steps)

    def _give_up(self, names: list[str]) -> None:
        gone = [self.layers[name] for name in names]
        super()._give_up(names)
        for layer in gone:
            self._early.pop(layer, None)
        if not self.layers:
            self._early_of, self._early_others, self._early_patterns = [], [], []

    def _after_step(self) -> None:
        self._remember(self.steps + 1)
        super()._after_step()

    def _remember(self, step: int) -> None:
        if step == self.rewind:
            self._early = {m: m.values.detach().clone() for m in self.layers.values()}
            self._early_of = self._others()
            self._early_others = [p.detach().clone() for p in self._early_of]
            self._early_patterns = hashes_of_values(self._early_of)

    def _others(self) -> list[nn.Parameter]:
        """The parameters that are not pruned."""
        ours = {id(layer.values) for layer in self.layers.values()}
        groups = [group for o in self.optimizers for group in o.param_groups]
        return [p for group in groups for p in group["params"] if id(p) not in ours]

    def _to_rewind(self) -> list[nn.Parameter]:
        """Those of the others that go back, in the order of their early values. RuntimeError where
        they, or layers, are not those that were there."""
        layers = self.layers.items()
        known = {m for m, t in self._early.items() if t.shape == m.values.shape}
        if unknown := [name for name, layer in layers if layer not in known]:
            raise RuntimeError(
                f"rewind: the weights of {', '.join(unknown)} at step {self.rewind} are not known"
            )
        others, early = self._others(), self._early_of
        if {id(p) for p in others} == {id(p) for p in early}:
            others = early  # another optimizer of the same ones may have them in another order
        shapes = [[tuple(t.shape) for t in of] for of in (self._early_others, others)]
        if shapes[0] != shapes[1] or (early and others is not early):
            raise RuntimeError(
                f"rewind: expected the other parameters that the optimizers had at step "
                f"{self.rewind}, of the shapes {shapes[0]}, they have others, of {shapes[1]}"
            )
        if early_patterns := self._early_patterns:
            now = zip(hashes_of_values(others), early_patterns, layers_of(others), strict=True)
            if moved := [layer for a, b, layer in now if a != b]:
                raise RuntimeError(
                    f"rewind: the values of {moved[0]} have another pattern than at step "
                    f"{self.rewind}: give layers that another algorithm changes an optimizer of "
                    "their own, which this one does not follow"
                )
        return others

    def _check_can_update(self) -> None:
        super()._check_can_update()
        if self.rewind is not None and self.rewind <= self.steps:  # else it remembers them before
            self._to_rewind()

    @torch.no_grad()
    def update_pattern(self) -> None:
        if self.rewind is None:
            return super().update_pattern()
        others, early = self._to_rewind(), dict(self._early)
        try:
            super().update_pattern()
        except BaseException:
            self._early = early
            raise
        for layer in self.layers.values():
            layer.values.copy_(self._early[layer])
        for parameter, value in zip(others, self._early_others, strict=True):
            parameter.copy_(value)
        for optimizer in holders(self.all_optimizers):
            optimizer.state.clear()

    def _set(self, name: str, places: Tensor, optimizers: list[Optimizer]) -> None:
        layer = self.layers[name]
        follow = set_pattern(layer, places, optimizers)
        if layer in self._early:
            self._early[layer] = follow(self._early[layer])

    def state_dict(self) -> dict:
        names = {layer: name for name, layer in self.layers.items()}
        early = {names[layer]: t for layer, t in self._early.items() if layer in names}
        return super().state_dict() | {
            "early": early,
            "early_others": self._early_others,
            "early_patterns": self._early_patterns,
        }

    def _checked_steps(self, state: dict) -> int:
        steps = super()._checked_steps(state)
        early = state.get("early")
        if not isinstance(early, Mapping) or not isinstance(state.get("early_others"), list):
            raise ValueError("algorithm: its state has no 'early' and 'early_others' to rewind to")
        if others := [name for name in early if name not in self.layers]:
            there = ", ".join(self.layers) or "no layer, as apply(model) comes first"
            raise ValueError(f"early: expected values of {there}, got some of {others[0]}")
        return steps

    def load_state_dict(self, state: dict) -> None:
        self._checked_steps(state)
        # A checkpoint is read onto the CPU; follow() needs the values where the pattern is.
        layers, early = self.layers, state["early"]
        self._early = {layers[n]: t.to(layers[n].values.device) for n, t in early.items()}
        self._early_others, self._early_of = state["early_others"], []
        self._early_patterns = state.get("early_patterns", [])  # of versions before: unknown
        super().load_state_dict(state)


def hashes_of_values(parameters: list[nn.Parameter]) -> list[int | None]:
    """Those of the patterns, None for what is no values of a SparseLinear."""
    layers = layers_of(parameters)
    hashes = iter(hashes_of([layer for layer in layers if layer is not None]))
    return [None if layer is None else next(hashes) for layer in layers]


def round_sparsity(final: float, done: int, rounds: int) -> float:
    """The sparsity after `done` of `rounds` rounds that each remove the same share of the rest."""
    return 1 - (1 - final) ** (min(done, rounds) / rounds)


def _sparsity_at(final: float, rounds: int, freq: int, step: int) -> float:
    return round_sparsity(final, step // freq, rounds)
