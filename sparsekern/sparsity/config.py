"""Algorithms from settings, in the vocabulary of published configs (cstorch.sparse).

    sparsity: 0.75                       # static, random

    sparsity:
      algorithm: rigl
      sparsity: 0.75
      init_method: random
      drop_fraction: {type: cosine, init: 0.3, half_period: 3584}
      update: {freq: 100, stop: 3584}
      param_filter: ["*qkv.weight", "*mlp*"]

A list of such blocks, or {groups: [...]}, is a Group; null is a dense model. published.py has the
words of older releases. Names of algorithms, types and methods may be in any case.
"""

from collections.abc import Iterable, Mapping
from dataclasses import fields
from typing import Any

from torch import nn
from torch.optim import Optimizer

from ..nn import adopt_values_
from .algorithm import Algorithm, checked_model
from .checks import check_state, known_keys, nearest, shown
from .dynamic import SET, RigL
from .filters import filter_parts
from .following import unwrapped
from .gradual import GMP, IterativePruning
from .oneshot import Magnitude, SparseGPT, Wanda
from .optimizers import held_layers, known_holders, take_over
from .published import flattened, modern
from .schedules import make
from .static import Static
from .undo import unchanged_on_failure

ALGORITHMS = {
    "static": Static,
    "gmp": GMP,
    "set": SET,
    "rigl": RigL,
    "iterative": IterativePruning,
    "magnitude": Magnitude,
    "wanda": Wanda,
    "sparsegpt": SparseGPT,
}


class Group:
    """Several algorithms on one model, each on its own layers.

    Args:
        algorithms: a list of algorithms with a `param_filter` each, or {glob: algorithm}. A layer
            goes to the first that matches it.
    """

    def __init__(self, algorithms: list[Algorithm] | Mapping[str, Algorithm]):
        parts = algorithms.values() if isinstance(algorithms, Mapping) else algorithms
        self.algorithms = list(parts) if isinstance(parts, Iterable) else [parts]
        for part in self.algorithms:
            if not isinstance(part, Algorithm):
                got = type(part).__name__
                raise TypeError(f"Group: expected algorithms of sparsekern.sparsity, got {got}")
        if not self.algorithms:
            raise ValueError("Group: expected at least one algorithm")
        if isinstance(algorithms, Mapping):
            filters = [filter_parts(glob) for glob in algorithms]
            for algorithm, param_filter in zip(self.algorithms, filters, strict=True):
                algorithm.param_filter = param_filter

    def apply(
        self, target: nn.Module | Optimizer, *, prune_again: bool = False
    ) -> nn.Module | Optimizer:
        """As Algorithm.apply, for each of them: all, or where one fails none."""
        optimizer = unwrapped(target)
        if optimizer is not None:
            if self.layers:
                adopt_values_(optimizer)
            held = held_layers(optimizer, self.layers)
            chosen = [a for a in self.algorithms if held_layers(optimizer, a.layers) or not held]
            for algorithm in chosen:
                algorithm._check_optimizer(optimizer)
            for algorithm in chosen:
                algorithm.apply(target)
            return target
        model: Any = checked_model(target)
        before = [dict(vars(algorithm)) for algorithm in self.algorithms]
        optimizers = known_holders(dict(model.named_modules()))
        taken: set[str] = set()
        try:
            with unchanged_on_failure(model, optimizers):
                for algorithm in self.algorithms:
                    model = algorithm._take(model, taken, prune_again)
                    taken |= algorithm.layers.keys()
        except BaseException:
            for algorithm, attributes in zip(self.algorithms, before, strict=True):
                vars(algorithm).update(attributes)
            raise
        for algorithm in self.algorithms:
            take_over(algorithm)
        return model

    def check(self, steps: int) -> None:
        """As Algorithm.check, for each of them."""
        for algorithm in self.algorithms:
            algorithm.check(steps)

    @property
    def layers(self) -> dict:
        return {k: v for algorithm in self.algorithms for k, v in algorithm.layers.items()}

    @property
    def resizes(self) -> bool:
        return any(algorithm.resizes for algorithm in self.algorithms)

    def state_dict(self) -> dict:
        return {"algorithms": [algorithm.state_dict() for algorithm in self.algorithms]}

    def load_state_dict(self, state: dict) -> None:
        check_state("Group", state)
        states = state.get("algorithms")
        if not isinstance(states, list | tuple) or len(states) != len(self.algorithms):
            count = len(self.algorithms)
            raise ValueError(f"algorithms: expected a list of {count} states, got {shown(states)}")
        parts = list(zip(self.algorithms, states, strict=True))
        for algorithm, part in parts:
            algorithm._checked_steps(part)
        for algorithm, part in parts:
            algorithm.load_state_dict(part)


def get(name: str, **settings: Any) -> Algorithm:
    """The algorithm of this name, made with `settings`. ValueError if there is none."""
    key = name.lower() if isinstance(name, str) else ""
    if key not in ALGORITHMS:
        known = ", ".join(sorted(ALGORITHMS))
        raise ValueError(
            f"algorithm: expected one of {known}, got {shown(name)}{nearest(name, ALGORITHMS)}"
        )
    if key in ("wanda", "sparsegpt") and "calibration" not in settings:
        raise ValueError(
            f"algorithm: {key} prunes a trained model with calibration text, which no config can "
            f"give; use `sparsekern prune --method {key}`"
        )
    return make(key, ALGORITHMS[key], settings)


def configure(settings: Any, **defaults: Any) -> Algorithm | Group | None:
    """The algorithm of a config: a number, a dict, or a list of dicts; None for a dense model.

    `defaults` are settings that each block takes where it gives none of its own, as seed=1.
    """
    if settings is None:
        return None
    if isinstance(settings, (int, float)) and not isinstance(settings, bool):
        return configure({"sparsity": settings}, **defaults)
    if isinstance(settings, list) and settings:
        return Group([_member(i, block, defaults) for i, block in enumerate(settings)])
    if not isinstance(settings, Mapping):
        raise ValueError(
            f"sparsity: expected a number, a block or a list of blocks, got {shown(settings)}"
        )
    if "groups" in settings:
        return configure(flattened(settings), **defaults)
    block = modern(settings)
    if isinstance(block, list):
        return configure(block, **defaults)
    is_named = "algorithm" in block
    algorithm = block.pop("algorithm", "static")
    if not is_named:
        _check_algorithm_key(block)
    if "sparsity" not in block:
        _check_keys(algorithm, block)
        raise ValueError(f"sparsity: a block needs the key 'sparsity', got {shown(list(settings))}")
    if block["sparsity"] is None:
        _check_keys(algorithm, block)
        return None
    made = get(algorithm, **{**defaults, **_named(block)})
    made.is_published = True
    return made


def _member(index: int, block: Any, defaults: dict[str, Any]) -> Algorithm:
    if not isinstance(block, Mapping):
        raise ValueError(f"sparsity: expected a list of blocks, got {shown(block)} at {index}")
    made = configure(block, **defaults)
    if not isinstance(made, Algorithm):
        raise ValueError(
            f"sparsity: expected a block with one sparsity at {index} of the list, "
            f"got {shown(dict(block))}"
        )
    return made


def _named(block: dict[Any, Any]) -> dict[str, Any]:
    for key in block:
        if not isinstance(key, str):
            raise ValueError(f"sparsity: expected names of settings, got {shown(key)}")
    return block


def _check_algorithm_key(block: dict[Any, Any]) -> None:
    """A misspelt `algorithm` would leave a static one, which knows none of the other keys."""
    own = {part.name for part in fields(Static) if part.init}
    for key in block.keys() - own:
        if nearest(key, ["algorithm"]):
            raise ValueError(
                f"sparsity: {shown(key)} is no key of a block{nearest(key, ['algorithm'])}"
            )


def _check_keys(algorithm: Any, block: dict[Any, Any]) -> None:
    kind = ALGORITHMS.get(algorithm.lower() if isinstance(algorithm, str) else "", RigL)
    known_keys("sparsity", block, (part.name for part in fields(kind) if part.init))
