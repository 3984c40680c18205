"""Algorithms from settings: the vocabulary of published configs.

    sparsity: 0.75                       # static, random

    sparsity:
      algorithm: rigl
      sparsity: 0.75
      init_method: random
      drop_fraction: {type: cosine, init: 0.3, half_period: 3584}
      update: {freq: 100, stop: 3584}
      param_filter: ["*qkv.weight", "*mlp*"]

A list of such blocks is a Group. Old names: `type` of `algorithm`, `schedule` of `sparsity`.
"""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from torch import nn
from torch.optim import Optimizer

from ..extras import require
from .algorithm import Algorithm
from .dynamic import SET, RigL
from .gradual import GMP, IterativePruning
from .oneshot import Magnitude, SparseGPT, Wanda
from .optimizers import held_layers, unwrapped
from .schedules import make
from .static import Static

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
ALIASES = {"type": "algorithm", "schedule": "sparsity"}


class Group:
    """Several algorithms on one model, each on its own layers.

    Args:
        algorithms: a list of algorithms with a `param_filter` each, or {glob: algorithm}. A layer
            goes to the first that matches it.
    """

    def __init__(self, algorithms: list[Algorithm] | Mapping[str, Algorithm]):
        if isinstance(algorithms, Mapping):
            for glob, algorithm in algorithms.items():
                algorithm.param_filter = [glob]
            algorithms = list(algorithms.values())
        if not algorithms:
            raise ValueError("Group: expected at least one algorithm")
        self.algorithms = algorithms

    def apply(self, target: nn.Module | Optimizer) -> nn.Module | Optimizer:
        """As Algorithm.apply, for each of them."""
        taken: set[str] = set()
        optimizer = unwrapped(target)
        held = held_layers(optimizer, self.layers) if optimizer is not None else []
        for algorithm in self.algorithms:
            if optimizer is not None:
                if held_layers(optimizer, algorithm.layers) or not held:
                    algorithm.apply(target)
            else:
                target = algorithm._take(target, taken)
                taken |= algorithm.layers.keys()
        return target

    @property
    def layers(self) -> dict:
        return {k: v for algorithm in self.algorithms for k, v in algorithm.layers.items()}

    @property
    def resizes(self) -> bool:
        return any(algorithm.resizes for algorithm in self.algorithms)

    def state_dict(self) -> dict:
        return {"algorithms": [algorithm.state_dict() for algorithm in self.algorithms]}

    def load_state_dict(self, state: dict) -> None:
        for algorithm, part in zip(self.algorithms, state["algorithms"], strict=True):
            algorithm.load_state_dict(part)


def get(name: str, **settings: Any) -> Algorithm:
    """The algorithm of this name, made with `settings`. ValueError if there is none."""
    if name not in ALGORITHMS:
        known = ", ".join(sorted(ALGORITHMS))
        raise ValueError(f"algorithm: expected one of {known}, got {name!r}")
    return make(name, ALGORITHMS[name], settings)


def configure(settings: Any, **defaults: Any) -> Algorithm | Group:
    """The algorithm of a config: a number, a dict, or a list of dicts.

    `defaults` are settings that each block takes where it gives none of its own, as seed=1.
    """
    if isinstance(settings, (int, float)) and not isinstance(settings, bool):
        return get("static", **(defaults | {"sparsity": settings}))
    if isinstance(settings, list) and all(isinstance(block, Mapping) for block in settings):
        return Group([configure(block, **defaults) for block in settings])
    if not isinstance(settings, Mapping):
        raise ValueError(f"sparsity: expected a number, a block or a list of them, got {settings}")
    block: dict[str, Any] = {}
    for key, value in settings.items():
        name = ALIASES.get(key, key)
        if name in block:
            raise ValueError(f"sparsity: {key!r} and {name!r} are the same setting, got both")
        block[name] = value
    if "sparsity" not in block:
        raise ValueError(f"sparsity: a block needs the key 'sparsity', got {sorted(block)}")
    return get(block.pop("algorithm", "static"), **(defaults | block))


def load_config(path: str | Path) -> Any:
    """The settings in a .json or YAML file, for `configure`: all of it, or its key `sparsity`."""
    path = Path(path)
    if not path.is_file():
        raise FileNotFoundError(f"sparsity config: {path} does not exist")
    text = path.read_text()
    if path.suffix == ".json":
        settings = json.loads(text)
    else:
        yaml = require("yaml", "gpt")
        try:
            settings = yaml.safe_load(text)
        except yaml.YAMLError as error:
            raise ValueError(f"sparsity config: {path} is not YAML: {error}") from error
    inner = settings.get("sparsity") if isinstance(settings, dict) else None
    is_block = isinstance(inner, dict) and inner.keys() & {"sparsity", "schedule"}
    is_group = isinstance(inner, list) and any(isinstance(part, dict) for part in inner)
    return inner if is_block or is_group else settings
