"""Every public point that the model can be held against, and an exit code that tells."""

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from ...terminal import table
from .arithmetic import arithmetic_points
from .data import measured_points
from .mesh import mesh_calibration, mesh_points
from .plausible import plausible_points
from .points import CLASSES, Point

FATAL = ("A", "B", "S")
NOT_VALIDATED = (
    "Absolute time not validated: no time of a training step, no utilisation and no measured\n"
    "sparse speed-up of a CS-2 or CS-3 could be read (V25-V27). Ratios are predictions."
)


@dataclass(frozen=True)
class Validation:
    points: list[Point]
    calibration: list[Point]

    @property
    def failed(self) -> list[Point]:
        """Failed points of the classes that must hold."""
        return [point for point in self.points if point.kind in FATAL and point.is_pass is False]

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
            "absolute_time": "not validated",
        }


def validate(data: Path | None = None, advance: Callable[[], None] = lambda: None) -> Validation:
    """`data`: the folder with the four CSV files of pe_kernels.py. `advance`: see mesh_errors,
    which takes the time."""
    held_out, calibration = measured_points(data)
    points = [*arithmetic_points(), *held_out, *plausible_points(), *mesh_points(advance)]
    points.sort(key=lambda point: int(point.id[1:3]))
    return Validation(points, [*calibration, mesh_calibration()])


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
    failed = ", ".join(point.id for point in validation.failed) or "none"
    return "\n\n".join(
        [
            "Calibration: coefficients fitted on all rows, not evidence.",
            lines(validation.calibration),
            "Validation: " + "; ".join(f"{kind} {what}" for kind, what in CLASSES.items()) + ".",
            lines(validation.points),
            "Sources and notes:\n" + "\n".join(f"  {note}" for note in notes),
            "Held-out errors of measured cycles and imbalance (V11-V14): "
            f"mean {mean:.1%}, worst {worst:.1%}.\n"
            f"Failed points of classes {', '.join(FATAL)}: {failed}.",
            NOT_VALIDATED,
        ]
    )
