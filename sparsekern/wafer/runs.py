"""Published training runs with their speed, and the inputs fitted to them.

Of the published runs one fits `utilisation`, one `score_cycles`; the others are held out. Beside
that, each run is left out in turn and the inputs are fitted to the rest by least squares of the
relative errors. Other forms of what attention costs are fitted by naming another input.
"""

from collections.abc import Sequence
from dataclasses import asdict, dataclass, fields, replace
from functools import lru_cache
from pathlib import Path
from typing import get_args

import numpy as np

from ..files import as_path
from ..terminal import table
from .cost import step_cost
from .figures import Mark, mistake, read_toml
from .inputs import RANGES, Inputs
from .machine import Machine, machine
from .models import model_shape
from .shapes import GPTShape

PUBLISHED = Path(__file__).parent / "validation" / "published.toml"
HELD_OUT, RATIO = "held out", "ratio"
BOUNDS = {
    "utilisation": (0.01, 1.0),
    "score_cycles": (0.0, 1e4),
    "attention_efficiency": (0.01, 1.0),
    "element_cycles": (0.0, 1e4),
}
FITTED = tuple(BOUNDS)  # inputs that a run can fit
USES = (*FITTED, HELD_OUT, RATIO)
NUMBERS = ("systems", "batch", "samples_per_s", "tolerance")
LEAST_RUNS = 4  # to leave each out in turn
NEWTON_STEPS = 4
MOST_ROUNDS = 30  # of fitting one input after the other


@dataclass(frozen=True)
class Run:
    """A training run of dense GPTs and how fast it was."""

    name: str
    model: str  # a name, or the path of a config.json
    machine: str
    systems: int
    batch: int  # sequences of all systems
    samples_per_s: float  # sequences a second, all systems
    use: str  # one of USES
    source: str
    mark: Mark = "read"
    tolerance: float = 0.15
    id: str = ""
    note: str = ""
    sequence: int = 0  # 0: the model's

    @property
    def shape(self) -> GPTShape:
        return model_shape(self.model, self.sequence or None)

    def predicted(self, inputs: Inputs, known: Machine | None = None) -> float:
        """Sequences a second; `known` stands in for the run's machine where it is one like it."""
        ran_on = machine(self.machine)
        wafer = known if known and known.base == ran_on.name else ran_on
        found = step_cost(wafer, self.shape, 1.0, self.batch, self.systems, inputs)
        return self.batch / found.step_s

    def error(self, inputs: Inputs, known: Machine | None = None) -> float:
        """Predicted over published speed, less 1: above 0 the model is too fast."""
        return self.predicted(inputs, known) / self.samples_per_s - 1


@dataclass(frozen=True)
class Calibration:
    """Inputs fitted to some runs, and the relative errors of the speed of all."""

    inputs: Inputs
    errors: dict[Run, float]
    left_out: dict[Run, float]  # errors of each where the others were fitted; may be empty

    @property
    def held_out(self) -> dict[Run, float]:
        return {run: error for run, error in self.errors.items() if run.use == HELD_OUT}

    def as_dict(self) -> dict[str, object]:
        return {
            "inputs": self.inputs.as_dict(),
            "runs": [
                asdict(run) | {"error": error, "error_left_out": self.left_out.get(run)}
                for run, error in self.errors.items()
            ],
        }


def read_runs(path: Path = PUBLISHED) -> list[Run]:
    """The runs of a TOML file, tables named `run`. Raises ValueError, which names file and key."""
    given = read_toml(as_path("path", path), "runs")
    tables = given.pop("run", None)
    if given:
        raise mistake(
            path, next(iter(given)), "[[run]] tables alone", repr(next(iter(given))), "runs"
        )
    if not isinstance(tables, list) or not tables:
        raise mistake(path, "run", "[[run]] tables", "none", "runs")
    return [_run(path, index, table) for index, table in enumerate(tables, 1)]


def _run(path: Path, index: int, given: object) -> Run:
    def wrong(key: str, expected: str, got: object) -> ValueError:
        return mistake(path, f"run {index}: {key}", expected, repr(got), "runs")

    known = {field.name: field for field in fields(Run)}
    if not isinstance(given, dict):
        raise wrong("run", "a table", given)
    for key in given:
        if key not in known:
            raise wrong(key, f"one of {', '.join(known)}", key)
    for key in ("name", "model", "machine", "systems", "batch", "samples_per_s", "use", "source"):
        if key not in given:
            raise mistake(path, f"run {index}: {key}", "a value", "nothing", "runs")
    for key, value in given.items():
        if key in (*NUMBERS, "sequence"):
            is_count = key in ("systems", "batch", "sequence")
            if type(value) not in ((int,) if is_count else (int, float)) or not 0 < value < 1e20:
                raise wrong(key, f"a {'whole ' if is_count else ''}number above 0", value)
        elif not isinstance(value, str):
            raise wrong(key, "a text", value)
    run = Run(**given)
    if run.use not in USES:
        raise wrong("use", f"one of {', '.join(USES)}", run.use)
    if run.mark not in get_args(Mark):
        raise wrong("mark", f"one of {', '.join(get_args(Mark))}", run.mark)
    try:
        machine(run.machine)
        model_shape(run.model, run.sequence or None)
    except (ValueError, FileNotFoundError) as error:
        raise type(error)(f"runs: {path}: run {index}: {error}") from None
    return run


def calibrate(runs: Sequence[Run], inputs: Inputs | None = None) -> Calibration:
    """Fit each input to the run that names it, and test the others.

    Leaving out is done over the runs on the machine of the fitted ones. Raises ValueError where no
    run fits anything, where two fit the same, and where no value makes a run's speed."""
    inputs = inputs or Inputs()
    targets = {run.use: run for run in runs if run.use in FITTED}
    if not targets:
        raise ValueError(f"runs: expected a run whose use is one of {', '.join(FITTED)}, got none")
    for name in targets:
        if sum(other.use == name for other in runs) > 1:
            raise ValueError(f"runs: expected one run to fit {name}, got several")
    for _ in range(MOST_ROUNDS):
        before = inputs
        for name, run in targets.items():
            inputs = _fit_one(run, name, inputs)
        if inputs == before:
            break
    names = {run.machine for run in targets.values()}
    peers = [run for run in runs if run.use != RATIO and run.machine in names]
    left_out = {}
    if len(peers) >= LEAST_RUNS:
        for run in peers:
            others = [other for other in peers if other != run]
            left_out[run] = run.error(_least_squares(others, tuple(targets), inputs))
    return Calibration(inputs, {run: run.error(inputs) for run in runs}, left_out)


def _fit_one(run: Run, name: str, inputs: Inputs) -> Inputs:
    """Bisection: the speed is monotone in each input."""
    low, high = BOUNDS[name]
    sign = 1 if high == 1 else -1  # a share makes it faster, cycles slower

    def too_fast(value: float) -> float:
        return sign * run.error(replace(inputs, **{name: value}))

    if too_fast(low) > 0 or too_fast(high) < 0:
        raise ValueError(
            f"runs: {run.name}: no {name} from {low:g} to {high:g} makes {run.samples_per_s:g} "
            "samples/s"
        )
    while high - low > 1e-7 * high:
        middle = (low + high) / 2
        low, high = (middle, high) if too_fast(middle) < 0 else (low, middle)
    return replace(inputs, **{name: float(f"{middle:.4g}")})


def _least_squares(runs: Sequence[Run], names: Sequence[str], inputs: Inputs) -> Inputs:
    """Gauss-Newton from where the inputs are."""
    for _ in range(NEWTON_STEPS):
        errors = np.array([run.error(inputs) for run in runs])
        slopes = []
        for name in names:
            value = getattr(inputs, name)
            step = 0.01 * value or 1.0
            step = -step if value + step > BOUNDS[name][1] else step
            moved = replace(inputs, **{name: value + step})
            slopes.append((np.array([run.error(moved) for run in runs]) - errors) / step)
        moves, *_ = np.linalg.lstsq(np.array(slopes).T, errors, rcond=None)
        values = {
            name: float(np.clip(getattr(inputs, name) - move, *BOUNDS[name]))
            for name, move in zip(names, moves, strict=True)
        }
        inputs = replace(inputs, **values)
    return inputs


@lru_cache
def published_errors(inputs: Inputs, known: Machine | None = None) -> dict[Run, float]:
    """Errors of the published runs at these inputs, but in 16 bits, as they ran; those on WSE-2 or
    WSE-3 with that machine as `known` describes it, if it is one."""
    given = replace(inputs, precision="fp16")
    return {run: run.error(given, known) for run in read_runs() if run.use != RATIO}


def render_calibration(found: Calibration) -> str:
    """The fitted inputs, and each run's speed beside the predicted one."""
    rows = []
    for run, error in found.errors.items():
        alone = found.left_out.get(run)
        rows.append(
            [
                *(run.name, f"{run.systems} x {run.machine}", run.use),
                *(f"{run.samples_per_s:.4g}", f"{(1 + error) * run.samples_per_s:.4g}"),
                *(f"{error:+.1%}", "" if alone is None else f"{alone:+.1%}"),
                "" if run.use != HELD_OUT else "pass" if abs(error) <= run.tolerance else "FAIL",
            ]
        )
    header = ["run", "systems", "use", "samples/s", "predicted", "error", "left out", ""]
    used = {run.use for run in found.errors}
    flags = [
        f"--{name.replace('_', '-')} {getattr(found.inputs, name):g} "
        f"(range {RANGES[name].low:g} to {RANGES[name].high:g})"
        for name in FITTED
        if name in used
    ]
    parts = [table(header, rows, left=3), "fitted: " + ", ".join(flags)]
    for name, errors in (("held out", found.held_out), ("left out in turn", found.left_out)):
        if errors:
            sizes = [abs(error) for error in errors.values()]
            parts.append(
                f"{name}: {len(sizes)} runs, mean error {sum(sizes) / len(sizes):.1%}, worst "
                f"{max(sizes):.1%}"
            )
    if not found.left_out:
        parts.append(f"left out in turn: needs {LEAST_RUNS} runs on one kind of machine")
    return "\n\n".join(parts)
