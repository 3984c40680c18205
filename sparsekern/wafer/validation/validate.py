"""Every public point that the model can be held against, and an exit code that tells."""

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from ...terminal import table
from ..runs import Calibration
from .arithmetic import arithmetic_points
from .data import measured_points
from .mesh import mesh_calibration, mesh_points
from .plausible import plausible_points
from .points import CLASSES, Point
from .speeds import speed_points

FATAL = ("A", "B", "S")
# Points that are known not to hold, and why. They stay red, and fail nothing else.
KNOWN_FAILURES = {
    "V37": "it holds where a score costs 27 cycles at most, V31 of 256M where it costs 35 at "
    "least, so that no one value serves both. The sources contradict each other: arXiv 2409.00287 "
    "has 590M 11% faster, in the units of this table, and its 256M, which fits score_cycles, is "
    "slower than this 111M. The table at first hand could decide: it is quoted from notes",
}
SPARSE = (
    "Sparse speed-ups are not validated on a machine: no measured one is public (V25-V27, V46).\n"
    "They are printed as ranges: a score at no and at its highest cost."
)


@dataclass(frozen=True)
class Validation:
    points: list[Point]
    calibration: list[Point]
    speeds: Calibration
    is_recomputed: bool = False  # the fits to measured cycles; else they are stored ones

    @property
    def failed(self) -> list[Point]:
        """Failed points of the classes that must hold."""
        return [point for point in self.points if point.kind in FATAL and point.is_pass is False]

    @property
    def is_as_known(self) -> bool:
        """Whether nothing failed but what is known to."""
        return all(point.id in KNOWN_FAILURES for point in self.failed)

    @property
    def held_out_mean_and_worst(self) -> tuple[float, float]:
        """Over all held-out measurements of PE cycles and of imbalance."""
        errors = [point.held_out_errors for point in self.points if point.held_out_errors]
        return sum(mean for mean, _ in errors) / len(errors), max(worst for _, worst in errors)

    def as_dict(self) -> dict[str, object]:
        mean, worst = self.held_out_mean_and_worst
        return {
            "points": [point.as_dict() for point in self.points],
            "calibration": [point.as_dict() for point in self.calibration],
            "held_out_mean": mean,
            "held_out_worst": worst,
            "failed": [point.id for point in self.failed],
            "known_failures": KNOWN_FAILURES,
            "speeds": self.speeds.as_dict(),
        }


def validate(data: Path | None = None, advance: Callable[[], None] = lambda: None) -> Validation:
    """`data`: the folder with the four CSV files of pe_kernels.py. `advance`: see mesh_errors,
    which takes the time."""
    held_out, calibration = measured_points(data)
    speeds, fitted, found = speed_points()
    points = [*arithmetic_points(), *held_out, *plausible_points(), *mesh_points(advance), *speeds]
    points.sort(key=lambda point: int(point.id[1:3]))
    return Validation(points, [*calibration, mesh_calibration(), *fitted], found, bool(data))


def render(validation: Validation) -> str:
    def lines(points: list[Point]) -> str:
        header = ["id", "class", "quantity", "predicted", "published", "delta", "tolerance", ""]
        rows = [
            [p.id, p.kind, p.quantity, p.predicted, p.published, p.delta, p.tolerance, p.verdict]
            for p in points
        ]
        return table(header, rows, left=3)

    notes = dict.fromkeys(
        f"{p.id}: {p.source}{'; ' + p.note if p.note else ''}"
        for p in (*validation.points, *validation.calibration)
    )
    mean, worst = validation.held_out_mean_and_worst
    failed = dict.fromkeys(point.id for point in validation.failed)
    known = "".join(
        f"\n  {id}, known: {KNOWN_FAILURES[id]}" for id in failed if id in KNOWN_FAILURES
    )
    return "\n\n".join(
        [
            "Calibration: what was fitted, not evidence. `stored`: a result of when it was fitted; "
            "with --data\nthose of V11-V14 are computed again. All other lines were computed now.",
            lines(validation.calibration),
            "Validation: " + "; ".join(f"{kind} {what}" for kind, what in CLASSES.items()) + ".",
            lines(validation.points),
            "Sources and notes:\n" + "\n".join(f"  {note}" for note in notes),
            "Held-out errors of measured cycles and imbalance (V11-V14"
            f"{'' if validation.is_recomputed else ', stored'}): "
            f"mean {mean:.1%}, worst {worst:.1%}.\n"
            f"Failed points of classes {', '.join(FATAL)}: {', '.join(failed) or 'none'}.{known}",
            _speeds(validation.speeds),
            SPARSE,
        ]
    )


def _speeds(found: Calibration) -> str:
    names = {run.machine for run in found.left_out}
    rows = {run: abs(error) for run, error in found.held_out.items() if run.machine in names}
    left_out = [abs(error) for error in found.left_out.values()]
    return (
        f"Dense training speeds of CS-2: {len(rows)} held-out runs, mean error "
        f"{sum(rows.values()) / len(rows):.1%}, worst {max(rows.values()):.1%}; each of "
        f"{len(left_out)} left out in turn, mean {sum(left_out) / len(left_out):.1%}, worst "
        f"{max(left_out):.1%}."
    )
