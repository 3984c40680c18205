"""The base of all algorithms: the layers and optimizers that they follow, and when patterns change.

masks.py has what comes before: the settings, and the masks that they make."""

import warnings
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, ClassVar
from weakref import WeakKeyDictionary, WeakSet

import torch
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel
from torch.optim import Optimizer
from torch.optim.swa_utils import AveragedModel

from ..kernels.derived import note_passing
from ..nn import SparseLinear, adopt_values_, convert, sparsifiable, sparsify_
from ..nn.kinds import is_conv1d, is_experts
from ..nn.warned import warn_of_matrices, warn_of_others
from .checks import check_state, number, shown, whole
from .filters import matching
from .following import follow, let_go, unwrapped
from .masks import Masking, Masks
from .optimizers import held_layers, known_holders, note_model_of, note_waiting, take_over
from .pattern import check_can_change, check_same_on_all_ranks, places_of
from .published import is_sparse_by_default
from .schedules import update_steps
from .uneven import watch

Layer = nn.Linear | SparseLinear  # what an algorithm is given
SOON = 1000  # steps: what a kernel takes seconds to derive from all patterns pays off after as many


@dataclass
class Algorithm(Masking):
    """Sparsity for the linear layers of a model: `apply(model)`, then `apply(optimizer)`.

    Args:
        sparsity: share of weights removed, at least 0 and below 1, or a schedule of it
            (schedules.py), which is held to [0, 1].
        init_method: which weights are kept at first: "random", uniform over the layer;
            "magnitude" (also "topk"), the largest absolute values; "from_zeros", all that are not
            zero, whatever the sparsity; "checkerboard", evenly spread.
        seed: of all random choices. They depend on the seed, the layer's name and shape and the
            step alone, so every process and device makes the same.
        distribution: "uniform", "erk" or "global" (budget.py).
        param_filter: globs for the names of the weights ("*mlp*.weight"; the name of the layer does
            as well, and so do names of the published GPT models, published.py), or compiled regular
            expressions, which are searched for. Each must match a layer. By default those that
            `sparsify_` takes: every nn.Linear but the model's heads.
        family: "unstructured", any mask; or "two-way", at most 2 of each 4 neighbours along both
            axes (families.py), which needs a sparsity of at least 0.5.
    """

    layers: dict[str, SparseLinear] = field(init=False, repr=False, compare=False)
    moves: ClassVar[bool] = False  # whether it changes the pattern, or may, once it is chosen
    optimizers: list[Optimizer] = field(init=False, repr=False, compare=False)
    steps: int = field(init=False, repr=False, compare=False)  # of the optimizer, made so far

    def __post_init__(self) -> None:
        super().__post_init__()
        self.is_published = False  # made from a config: its default filter is the published one
        self.layers, self.optimizers, self.steps = {}, [], 0
        self._stepped: set[int] = set()  # the optimizers that have made the step after these
        self._is_begun = False  # that it follows an optimizer, or did
        self._is_checked = False  # that the optimizers and all ranks have what they should
        self._hooked: WeakSet[Optimizer] = WeakSet()  # those that it was applied to
        # Steps when an optimizer that it does not follow made its last.
        self._unfollowed: WeakKeyDictionary[Optimizer, int] = WeakKeyDictionary()
        # After the last step of each: the indices of each layer that it has state for, and that.
        self._patterns: WeakKeyDictionary[Optimizer, dict[str, tuple]] = WeakKeyDictionary()

    def check(self, steps: int) -> None:
        """ValueError for what a run of `steps` optimizer steps would meet only on its way."""
        self.target(0)

    # A model, an optimizer

    def apply(
        self, target: nn.Module | Optimizer, *, prune_again: bool = False
    ) -> nn.Module | Optimizer:
        """Make the chosen layers of a model sparse, in place; or follow an optimizer: its state
        moves with the weights, and its steps are counted. Returns what it was given; of a model
        that is one nn.Linear itself, the SparseLinear that takes its place.

        ValueError where more than 20 % of the weights are zero already and others would go, unless
        `prune_again` says that this is meant.

        Layers that are a SparseLinear already keep their pattern. An optimizer that was made before
        the model became sparse gets the values in the place of the dense weights. Where several
        optimizers share the layers, apply each: a step is counted when all of them have made it. A
        new one for the same values takes the place of the one before, until that steps again. Each
        model takes an algorithm of its own: ValueError for one that changes patterns and follows an
        optimizer of another model. Layers that another algorithm had are this one's from now on;
        those that `densify_` made dense, for the optimizer too, are nobody's.
        """
        optimizer = unwrapped(target)
        if optimizer is not None:
            self._follow(adopt_values_(optimizer) if self.layers else optimizer)
            return target
        model = self._take(checked_model(target), set(), prune_again)
        take_over(self)
        return model

    def _give_up(self, names: list[str]) -> None:
        """These layers are another's, or no longer there. Without any it rests."""
        for name in names:
            del self.layers[name]
        let_go(self)

    def _take(self, model: nn.Module, taken: set[str], prune_again: bool = False) -> nn.Module:
        """`apply` without the layers that another algorithm has taken."""
        there = sparsifiable(model, lambda module, name: True)
        parts, found = self.param_filter, self.chosen_in(model)
        names = [name for name in there if name in found and name not in taken]
        if not names:
            others = any(is_conv1d(m) or is_experts(m) for m in model.modules())
            hint = "; sparsekern.models.prune.prune_ takes Conv1D and experts" if others else ""
            if parts is None and not taken and not self.is_published:
                raise ValueError(f"apply: {convert.nothing_in(model)}{hint}")
            wanted = "any nn.Linear" if self.param_filter is None else shown(self.param_filter)
            listed = ", ".join(there) or "none"
            why = "" if self.param_filter is None else " that no block before it has"
            listed += hint
            raise ValueError(f"param_filter: {wanted} matches no layer{why}; there are: {listed}")
        if parts is None:
            warn_of_others("apply", model, is_conv1d, is_experts)
            warn_of_matrices("apply", model)
        convert.refuse_unserved({name: there[name] for name in names})
        mine = {id(layer) for layer in self.layers.values()}
        if self.moves and self._is_begun and mine.isdisjoint(id(there[name]) for name in names):
            raise ValueError(
                f"apply: this {type(self).__name__} follows the optimizer of other layers, and is "
                f"at their step {self.steps}: make one for each model"
            )
        for name in names:
            self._family.check(name, there[name].out_features, there[name].in_features)
        if self._prunes_at_first and not prune_again:
            dense = [m for m in (there[name] for name in names) if isinstance(m, nn.Linear)]
            convert.refuse_pruned("apply", [m.weight.detach() for m in dense])
        chosen = {name: there[name] for name in names}
        model = self._sparsify(model, chosen)
        now: dict[str, Any] = dict(model.named_modules())
        self.layers = {name: now[name] for name in names}
        note_model_of(self)
        watch()
        if self.optimizers:  # the same layers under other names, as in a wrapper
            self._before_step()
        return model

    def chosen_in(self, model: nn.Module) -> set[str]:
        """Names of the layers that it takes, by its `param_filter`. ValueError for a part of that
        which matches none."""
        parts: Any = self.param_filter  # as filter_parts made them
        if parts is not None:
            return matching(parts, sparsifiable(model, lambda module, name: True))
        found = set(sparsifiable(model))
        return {n for n in found if is_sparse_by_default(n)} if self.is_published else found

    @property
    def _prunes_at_first(self) -> bool:
        """Whether the first pattern may leave out weights that are not zero."""
        return self.init_method != "from_zeros"

    def _sparsify(self, model: nn.Module, chosen: dict[str, Layer]) -> nn.Module:
        for name, layer in chosen.items():
            if isinstance(layer, SparseLinear):
                n, k = layer.out_features, layer.in_features
                self._check_pattern(name, places_of(layer), n, k)
        dense = {n: m.weight.detach() for n, m in chosen.items() if type(m) is nn.Linear}
        masks = Masks(self._chooser(dense)) if dense else None
        return sparsify_(model, masks, lambda module, name: name in dense)

    def _follow(self, optimizer: Optimizer) -> None:
        self._check_optimizer(optimizer)
        follow(self, optimizer)
        self._note_passing()
        self._before_step()

    def __getstate__(self) -> dict[str, Any]:
        """Of a copy, which follows no optimizer: torch copies an optimizer without its hooks."""
        nothing = dict.fromkeys(("_unfollowed", "_patterns", "_hooked"))
        empty = {"optimizers": [], "_stepped": set(), "_is_begun": False}
        return self.__dict__ | nothing | empty

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state)
        self._unfollowed, self._patterns = WeakKeyDictionary(), WeakKeyDictionary()
        self._hooked = WeakSet()
        if self.layers:
            note_model_of(self)
            note_waiting(self)

    def _check_optimizer(self, optimizer: Optimizer) -> None:
        if not self.layers:
            raise ValueError("apply: expected the model before the optimizer")
        trained = [name for name, layer in self.layers.items() if layer.values.requires_grad]
        if trained and not held_layers(optimizer, self.layers):
            raise ValueError(
                f"apply: the optimizer does not hold the values of {trained[0]}; make it after "
                "applying the algorithm to the model, and give copies of a model and its optimizer "
                "the algorithm that was copied with them"
            )

    def _check_ranks(self) -> None:
        """Called before the first step, on all ranks together, whose patterns are the same."""

    def _before_step(self) -> None:
        """Called before the forward pass of each step."""

    def _after_step(self) -> None:
        self.steps += 1
        if self._updates(self.steps):
            check_can_change(self.layers, self.all_optimizers)
            self.update_pattern()
            check_same_on_all_ranks(self.layers)
            self._note_passing()
        self._before_step()

    def _check_can_update(self) -> None:
        """RuntimeError, before the step, where the update after it would fail."""
        check_can_change(self.layers, self.all_optimizers, will_step=True)

    def _note_passing(self) -> None:
        """Tell the kernels whether these patterns will change soon."""
        is_passing = any(self._updates(self.steps + i) for i in range(1, SOON))
        for layer in self.layers.values():
            note_passing(layer.row_offsets, is_passing)

    def _updates(self, step: int) -> bool:
        return False

    @property
    def is_due(self) -> bool:
        """Whether the next optimizer step changes the pattern."""
        return self._updates(self.steps + 1)

    def update_pattern(self) -> None:
        """Change the patterns as the algorithm says for the current step."""

    # What a checkpoint holds beside the model's and the optimizer's state

    def state_dict(self) -> dict:
        family = {} if self.family == "unstructured" else {"family": self.family}
        # With "from_zeros" the pattern says it all.
        is_asked = self.init_method != "from_zeros"
        sparsity = {"sparsity": float(self.target(self.steps))} if is_asked else {}
        return {"algorithm": type(self).__name__, "steps": self.steps} | sparsity | family

    def load_state_dict(self, state: dict) -> None:
        """ValueError for the state of another algorithm, or of another family or sparsity."""
        self.steps = self._checked_steps(state)
        note_waiting(self)
        self._note_passing()
        self._before_step()

    def _checked_steps(self, state: dict) -> int:
        check_state(type(self).__name__, state)
        if "steps" not in state:
            raise ValueError("algorithm: its state has no 'steps'")
        family = state.get("family", "unstructured")
        if family != self.family:
            raise ValueError(
                f"family: expected {self.family}, got the state of an algorithm with {family} masks"
            )
        steps = whole("steps", state["steps"], 0)
        target, saved = self.target(steps), state.get("sparsity")  # None: it was not kept
        if saved is None or self.init_method == "from_zeros":
            return steps
        if abs(target - number("sparsity", saved)) < 1e-6:
            return steps
        raise ValueError(
            f"sparsity: expected {target:g} after {steps} steps, got the state of an algorithm "
            f"with {saved:g}; to go on with another sparsity take the weights without its state"
        )

    @property
    def all_optimizers(self) -> list[Optimizer]:
        """Those whose state follows the patterns: with all that step the values, too."""
        others = [
            o for o in known_holders(self.layers) if all(o is not own for own in self.optimizers)
        ]
        return [*self.optimizers, *others]

    @property
    def achieved(self) -> float:
        """The sparsity of all chosen layers together."""
        sizes = [layer.in_features * layer.out_features for layer in self.layers.values()]
        nnz = sum(layer.col_indices.shape[0] for layer in self.layers.values())
        return 1 - nnz / sum(sizes) if sizes else 0.0


@dataclass
class Updating(Algorithm):
    """An algorithm that changes the pattern during training.

    Before the first update the layers are dense: with step 0 among the updates, as by default, they
    begin sparse.

    Args:
        update: the optimizer steps after which it does: {freq, start, stop}, which are start,
            start + freq, ... before stop; {steps: [...]}; a callable; or None for every step.
    """

    moves: ClassVar[bool] = True
    update: Any = None

    def __post_init__(self) -> None:
        super().__post_init__()
        self._update_steps = update_steps(self.update)

    @property
    def starts_sparse(self) -> bool:
        return self._updates_at(0)

    @property
    def _prunes_at_first(self) -> bool:
        return super()._prunes_at_first and self.starts_sparse

    def _updates_at(self, step: int) -> bool:
        return self._update_steps(step)

    def _updates(self, step: int) -> bool:
        return step > 0 and self._updates_at(step)

    def _updates_before(self, step: int) -> int:
        return max(0, self._update_steps.through(step) - 1)

    def check(self, steps: int) -> None:
        super().check(steps)
        for step in self._update_steps.of_run(steps):
            self._check_update(step)

    def _check_update(self, step: int) -> None:
        self.target(step)

    def _chooser(self, weights: dict[str, Tensor]) -> Callable[[str, Tensor], Tensor]:
        if self.starts_sparse:
            return super()._chooser(weights)
        if self.target(0):
            warnings.warn(
                f"{type(self).__name__}: dense until the first update, as in cstorch.sparse; to "
                "begin sparse make step 0 an update",
                stacklevel=2,
            )
        return lambda name, weight: torch.ones_like(weight, dtype=torch.bool)

    @property
    def resizes(self) -> bool:
        return True


def checked_model(target: Any) -> nn.Module:
    """`target`, to make its layers sparse. TypeError for what is no model, or wraps one."""
    if not isinstance(target, nn.Module):
        raise TypeError(f"apply: expected a model or an optimizer, got {type(target).__name__}")
    if isinstance(target, AveragedModel):
        raise TypeError(
            "apply: expected the model itself, got an AveragedModel, which follows the "
            "patterns of the model by itself"
        )
    if isinstance(target, DistributedDataParallel):
        raise TypeError(
            "apply: expected the model itself, got a DistributedDataParallel, which would not "
            "average the gradients of new Parameters; wrap the model after it became sparse"
        )
    return target
