"""How a number (sparsity, drop fraction) changes over training, and which steps update.

In code a schedule is any callable step -> float. In configs it is a number, a list of numbers (the
next one at each update) or {type: ..., ...} with the fields of one of the classes below. Those that
cstorch.sparse has too mean what they mean there; cubic is not among them.
"""

import math
from bisect import bisect_right
from collections.abc import Callable, Iterable, Sequence
from dataclasses import MISSING, dataclass, field, fields
from typing import Any

from .checks import known_keys, nearest, number, share, shown, whole

Schedule = Callable[[int], float]
EXAMPLE = "{type: cubic, init: 0.0, final: 0.75, steps: 1000}"
MAX_CHECKED = 100_000  # update steps of a run that are looked at before it begins


@dataclass(frozen=True)
class _OfNumbers:
    """The fields of a schedule are finite numbers."""

    def __post_init__(self) -> None:
        for part in fields(self):
            number(part.name, getattr(self, part.name))


@dataclass(frozen=True)
class Constant(_OfNumbers):
    value: float

    def __call__(self, step: int) -> float:
        return self.value


@dataclass(frozen=True)
class Linear(_OfNumbers):
    init: float
    slope: float

    def __call__(self, step: int) -> float:
        return self.init + self.slope * step


@dataclass(frozen=True)
class Cubic(_OfNumbers):
    """Gradual pruning (Zhu and Gupta, arXiv 1710.01878): fast at first, slow towards the end."""

    init: float
    final: float
    steps: int
    start: int = 0

    def __post_init__(self) -> None:
        super().__post_init__()
        whole("steps", self.steps, 1)

    def __call__(self, step: int) -> float:
        left = 1 - min(max((step - self.start) / self.steps, 0.0), 1.0)
        return self.final + (self.init - self.final) * left**3


@dataclass(frozen=True)
class Exponential(_OfNumbers):
    init: float
    gamma: float
    final: float = 1.0

    def __call__(self, step: int) -> float:
        return self.final + (self.init - self.final) * math.exp(self.gamma * step)


@dataclass(frozen=True)
class Power(_OfNumbers):
    init: float
    beta: float

    def __call__(self, step: int) -> float:
        return self.init * self.beta**step


@dataclass(frozen=True)
class Cosine(_OfNumbers):
    """From init to minimum over half_period steps, and back again over as many."""

    init: float
    half_period: float
    minimum: float = 0.0

    def __post_init__(self) -> None:
        super().__post_init__()
        if not self.half_period:
            raise ValueError("half_period: expected a number of steps, got 0")

    def __call__(self, step: int) -> float:
        high = (1 + math.cos(math.pi * step / self.half_period)) / 2
        return self.minimum + (self.init - self.minimum) * high


@dataclass(frozen=True)
class Cycling:
    """The next value at each update, from the start again after the last: it is called with the
    number of updates before, not with the step."""

    values: Sequence[float]

    def __post_init__(self) -> None:
        if not isinstance(self.values, (list, tuple)) or not self.values:
            raise ValueError(f"values: expected a list of numbers, got {shown(self.values)}")
        object.__setattr__(self, "values", tuple(share("values", v) for v in self.values))

    def __call__(self, updates: int) -> float:
        return self.values[updates % len(self.values)]


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
        made = value
    elif isinstance(value, (list, tuple)) and value:
        made = make(name, Cycling, {"values": value})
    elif isinstance(value, dict):
        made = _of_type(name, value)
    elif isinstance(value, (str, bytes, bool)) or value is None or not hasattr(value, "__float__"):
        raise ValueError(
            f"{name}: expected a number, a list of numbers or {{type: ...}}, as in {EXAMPLE}, "
            f"got {shown(value)}"
        )
    else:
        made = Constant(share(name, value))
    if isinstance(made, Constant):
        share(name, made.value)
    return made


def _of_type(name: str, value: dict) -> Schedule:
    settings = dict(value)
    kind = settings.pop("type", None)
    key = kind.lower() if isinstance(kind, str) else kind
    if not isinstance(key, str) or key not in SCHEDULES:
        known = ", ".join(sorted(SCHEDULES))
        raise ValueError(
            f"{name}: expected a type of {known}, as in {EXAMPLE}, "
            f"got {shown(kind)}{nearest(kind, SCHEDULES)}"
        )
    return make(f"{name} of type {key}", SCHEDULES[key], settings)


def value_at(name: str, at: Schedule, step: int, updates: int) -> float:
    """The value at a step that `updates` updates came before. ValueError unless it is finite."""
    try:
        value = float(at(updates if isinstance(at, Cycling) else step))
    except (OverflowError, ZeroDivisionError):
        value = math.inf
    if not math.isfinite(value):
        raise ValueError(f"{name}: expected a finite number, got {value} at step {step}")
    return value


@dataclass(frozen=True)
class Every:
    """Steps start, start + freq, ... before stop. Step 0 is before any training."""

    freq: int = 1
    start: int | None = 0
    stop: int | None = None

    def __post_init__(self) -> None:
        first = whole("start", self.start or 0, 0)
        stop = None if self.stop is None else whole("stop", self.stop, 0)
        if stop is not None and stop <= first:
            raise ValueError(f"stop: expected a step after start, {first}, got {stop}")
        object.__setattr__(self, "freq", whole("freq", self.freq, 1))
        object.__setattr__(self, "start", first)
        object.__setattr__(self, "stop", stop)

    def __call__(self, step: int) -> bool:
        # Arithmetic that dynamo can trace, where it sees the step of an optimizer.
        start = self.start or 0
        if step < start or (self.stop is not None and step >= self.stop):
            return False
        return (step - start) % self.freq == 0

    def through(self, step: int) -> int:
        """The number of update steps from 0 to `step`."""
        return len(self._until(step + 1))

    def of_run(self, steps: int) -> Sequence[int]:
        """The update steps of a run of `steps` optimizer steps."""
        return [step for step in self._until(steps + 1)[:MAX_CHECKED] if step]

    def _until(self, end: int) -> range:
        start, stop = self.start or 0, end if self.stop is None else min(end, self.stop)
        return range(start, max(stop, start), self.freq)


@dataclass(frozen=True)
class At:
    steps: Sequence[int]

    def __post_init__(self) -> None:
        if not isinstance(self.steps, Iterable) or isinstance(self.steps, (str, bytes, dict)):
            raise ValueError(f"steps: expected a list of steps, got {shown(self.steps)}")
        steps = sorted({whole("steps", step, 0) for step in self.steps})
        if not steps:
            raise ValueError("steps: expected at least one step, got none")
        object.__setattr__(self, "steps", tuple(steps))

    def __call__(self, step: int) -> bool:
        return step in self.steps

    def through(self, step: int) -> int:
        return bisect_right(self.steps, step)

    def of_run(self, steps: int) -> Sequence[int]:
        return [step for step in self.steps[: self.through(steps)] if step]


@dataclass
class When:
    """The steps that a function says."""

    is_update: Callable[[int], bool]
    _counted: list[int] = field(default_factory=list, repr=False, compare=False)

    def __call__(self, step: int) -> bool:
        return bool(self.is_update(step))

    def through(self, step: int) -> int:
        while len(self._counted) <= step:
            before = self._counted[-1] if self._counted else 0
            self._counted.append(before + self(len(self._counted)))
        return self._counted[step]

    def of_run(self, steps: int) -> Sequence[int]:
        return [step for step in range(1, min(steps, MAX_CHECKED) + 1) if self(step)]


UpdateSteps = Every | At | When
# Names in older releases.
UPDATE_ALIASES = {"begin": "start", "end": "stop"}


def update_steps(value: Any) -> UpdateSteps:
    """Update steps out of {freq, start, stop}, {steps: [...]}, a callable, or None (every step)."""
    if isinstance(value, UpdateSteps):
        return value
    if callable(value):
        return When(value)
    if value is None:
        return Every()
    if not isinstance(value, dict):
        raise ValueError(f"update: expected {{freq, start, stop}} or {{steps}}, got {shown(value)}")
    settings = {UPDATE_ALIASES.get(k, k) if isinstance(k, str) else k: v for k, v in value.items()}
    if len(settings) < len(value):
        raise ValueError(f"update: the same setting twice, got {shown(list(value))}")
    return make("update", At if "steps" in settings else Every, settings)


def make(name: str, kind: type, settings: dict) -> Any:
    """kind(**settings) of a dataclass, or a ValueError that says which key is wrong."""
    parts = [part for part in fields(kind) if part.init]
    known_keys(name, settings, (part.name for part in parts))
    needed = [p.name for p in parts if p.default is MISSING and p.default_factory is MISSING]
    missing = ", ".join(key for key in needed if key not in settings)
    if missing:
        raise ValueError(f"{name}: {missing} missing, got {shown(settings)}")
    try:
        return kind(**settings)
    except ValueError as error:
        if str(error).startswith(f"{name}:"):
            raise
        raise ValueError(f"{name}: {error}") from error
