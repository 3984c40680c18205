"""One line of the validation table: what the model says beside what is published."""

from dataclasses import asdict, dataclass

CLASSES = {
    "A": "arithmetic, must hold",
    "B": "held-out data",
    "C": "plausibility",
    "S": "closed form against our own simulator",
    "X": "wanted, source not readable",
}


@dataclass(frozen=True)
class Point:
    id: str
    kind: str  # one of CLASSES
    quantity: str
    predicted: str
    published: str
    delta: str
    tolerance: str
    is_pass: bool | None  # None: not checked
    source: str
    note: str = ""
    held_out_errors: tuple[float, ...] = ()  # mean and worst, of measured cycles
    is_stored: bool = False  # not computed now

    @property
    def verdict(self) -> str:
        verdict = {True: "pass", False: "FAIL", None: "not checked"}[self.is_pass]
        return f"{verdict}, stored" if self.is_stored else verdict

    def as_dict(self) -> dict[str, object]:
        return asdict(self) | {"verdict": self.verdict}


def ratio_point(
    id: str,
    kind: str,
    quantity: str,
    predicted: float,
    published: float,
    tolerance: float,
    source: str,
    note: str = "",
) -> Point:
    """Passes where the relative difference is within `tolerance`."""
    delta = predicted / published - 1
    return Point(
        id,
        kind,
        quantity,
        f"{predicted:.4g}" if tolerance else f"{predicted:,.0f}",
        f"{published:.4g}" if tolerance else f"{published:,.0f}",
        f"{delta:+.1%}",
        f"{tolerance:.0%}" if tolerance else "exact",
        abs(delta) <= tolerance,
        source,
        note,
    )


def error_point(
    id: str,
    kind: str,
    quantity: str,
    errors: tuple[float, float],
    tolerances: tuple[float, float],
    source: str,
    note: str = "",
    is_held_out: bool = True,
    is_stored: bool = False,
) -> Point:
    """Passes where the mean and the worst relative error are within their tolerances."""
    mean, worst = errors
    return Point(
        id,
        kind,
        quantity,
        "-",
        "-",
        f"mean {mean:.1%}, worst {worst:.1%}",
        f"mean {tolerances[0]:.0%}, worst {tolerances[1]:.0%}",
        mean <= tolerances[0] and worst <= tolerances[1],
        source,
        note,
        errors if kind == "B" and is_held_out else (),
        is_stored,
    )
