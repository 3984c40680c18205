"""How a number (sparsity, drop fraction) changes over training steps, and which steps update.

In code a schedule is any callable step -> float. In configs it is a number, a list of numbers
(which cycle) or {type: ..., ...} with the fields of one of the classes below.
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, fields
from typing import Any

Schedule = Callable[[int], float]
UpdateSteps = Callable[[int], bool]


@dataclass(frozen=True)
class Constant:
    value: float

    def __call__(self, step: int) -> float:
        return self.value


@dataclass(frozen=True)
class Linear:
    init: float
    slope: float

    def __call__(self, step: int) -> float:
        return self.init + self.slope * step


@dataclass(frozen=True)
class Cubic:
    """Gradual pruning (Zhu and Gupta, arXiv 1710.01878): fast at first, slow towards the end."""

    init: float
    final: float
    steps: int
    start: int = 0

    def __call__(self, step: int) -> float:
        left = 1 - min(max((step - self.start) / self.steps, 0.0), 1.0)
        return self.final + (self.init - self.final) * left**3


@dataclass(frozen=True)
class Exponential:
    init: float
    gamma: float
    final: float = 1.0

    def __call__(self, step: int) -> float:
        return self.final + (self.init - self.final) * math.exp(self.gamma * step)


@dataclass(frozen=True)
class Power:
    init: float
    beta: float

    def __call__(self, step: int) -> float:
        return self.init * self.beta**step


@dataclass(frozen=True)
class Cosine:
    """From init to minimum over half_period steps, and back again over as many."""

    init: float
    half_period: float
    minimum: float = 0.0

    def __call__(self, step: int) -> float:
        high = (1 + math.cos(math.pi * step / self.half_period)) / 2
        return self.minimum + (self.init - self.minimum) * high


@dataclass(frozen=True)
class Cycling:
    """Each value for one step, from the start again after the last."""

    values: Sequence[float]

    def __call__(self, step: int) -> float:
        return self.values[step % len(self.values)]


SCHEDULES = {
    "constant": Constant,
    "linear": Linear,
    "cubic": Cubic,
    "exp": Exponential,
    "exponential": Exponential,
    "power": Power,
    "cosine": Cosine,
    "cycling": Cycling,
}


def schedule(name: str, value: Any) -> Schedule:
    """The schedule of the setting `name`, from any of its forms. ValueError names what is wrong."""
    if callable(value):
        return value
    if isinstance(value, (int, float)) and not isinstance(value, bool):
        return Constant(float(value))
    if isinstance(value, (list, tuple)) and value:
        return Cycling(tuple(float(v) for v in value))
    if not isinstance(value, dict):
        raise ValueError(
            f"{name}: expected a number, a list of numbers or {{type: ...}}, got {value!r}"
        )
    settings = dict(value)
    kind = settings.pop("type", None)
    if kind not in SCHEDULES:
        known = ", ".join(sorted(SCHEDULES))
        raise ValueError(f"{name}: expected a type of {known}, got {kind!r}")
    return make(f"{name} of type {kind}", SCHEDULES[kind], settings)


@dataclass(frozen=True)
class Every:
    """Steps start, start + freq, ... up to stop inclusive. Step 0 is before any training."""

    freq: int = 1
    start: int = 0
    stop: int | None = None

    def __post_init__(self):
        if self.freq < 1:
            raise ValueError(f"freq: expected at least 1, got {self.freq}")

    def __call__(self, step: int) -> bool:
        if step < self.start or (self.stop is not None and step > self.stop):
            return False
        return (step - self.start) % self.freq == 0


@dataclass(frozen=True)
class At:
    steps: Sequence[int]

    def __call__(self, step: int) -> bool:
        return step in self.steps


def update_steps(value: Any) -> UpdateSteps:
    """Of {freq, start, stop}, {steps: [...]}, a callable, or None for every step."""
    if callable(value):
        return value
    if value is None:
        return Every()
    if not isinstance(value, dict):
        raise ValueError(f"update: expected {{freq, start, stop}} or {{steps}}, got {value!r}")
    return make("update", At if "steps" in value else Every, value)


def make(name: str, kind: type, settings: dict) -> Any:
    """kind(**settings) of a dataclass, or a ValueError that says which key is wrong."""
    known = [field.name for field in fields(kind) if field.init]
    for key in settings:
        if key not in known:
            raise ValueError(f"{name}: expected the keys {', '.join(known)}, got {key!r}")
    try:
        return kind(**settings)
    except TypeError as error:
        missing = ", ".join(key for key in known if key not in settings)
        raise ValueError(f"{name}: some of {missing} missing, got {settings}") from error
