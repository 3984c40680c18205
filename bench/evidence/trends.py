"""What docs/quality.md says of differences that stand in a row: the cost of zeros by sparsity, by
size, and of zeros in a trained model by how long it is trained on. Whether it goes one way is told
by the change from each point to the next, with an interval of its own."""

import itertools
import math
from collections.abc import Sequence
from dataclasses import dataclass

from scipy import stats

from sparsekern.terminal import table

from .answer import digits_beside, order_of, shown, signed
from .differences import (
    Difference,
    Interval,
    by_seed,
    difference,
    interval,
    is_diverged,
    is_unstable,
    standing,
)
from .plan import ARMS, PLAN, SIZES, Prediction
from .tables import bare

METRIC = "held-out"


@dataclass(frozen=True)
class Point:
    """Arm a less arm b of this size."""

    name: str
    a: str
    b: str
    size: str = "S"


@dataclass(frozen=True)
class Trend:
    """`number`: of the order that asks for it; `it`: what grows or shrinks; `rates`: what a reader
    must know of them."""

    number: int
    title: str
    it: str
    points: tuple[Point, ...]
    rates: str


TRENDS = (
    Trend(
        4,
        "Cost by sparsity",
        "The cost",
        (
            Point("50 %", "50-normed", "dense-normed"),
            Point("75 % (section 10)", "75-normed", "dense-normed"),
            Point("90 %", "90-normed", "dense-normed"),
        ),
        "50 % and 90 % have the best rate of 75 %, dense its own: a part of their cost may be that "
        "of the rate.",
    ),
    Trend(
        6,
        "Cost of 75 % zeros by size",
        "The cost",
        (
            Point(f"{SIZES['S'].shape.in_words} (section 10)", "75-normed", "dense-normed"),
            Point(SIZES["M"].shape.in_words, "75-normed", "dense-normed", "M"),
        ),
        "The larger models have half of the best rates of the smaller ones, none of their own; the "
        "interval of the change is that of two samples (Welch).",
    ),
    Trend(
        8,
        "Dense pruned to 83.8 %, beside dense trained on as long",
        "The difference",
        tuple(
            Point(f"{share} % longer", f"pruned-84-{share}-normed", f"more-{share}-normed")
            for share in (10, 25, 50)
        ),
        "Rates were tried for 25 % longer alone, dense and pruned.",
    ),
    Trend(
        8,
        "Dense pruned and trained on for 25 %, by sparsity, beside dense trained on as long",
        "The difference",
        tuple(
            Point(name, f"pruned-{arm}-25-normed", "more-25-normed")
            for name, arm in (("75 %", "75"), ("83.8 %", "84"), ("90 %", "90"))
        ),
        "75 % and 90 % have the best rate of 83.8 %.",
    ),
)


@dataclass(frozen=True)
class Change:
    """From a point to the next: the mean, and its 95 % interval."""

    mean: float
    of_95: Interval | None

    @property
    def is_clear(self) -> bool:
        return self.of_95 is not None and not self.of_95[0] <= 0 <= self.of_95[1]


def found_of(point: Point, results: list[dict]) -> Difference | None:
    return difference(results, point.size, point.a, point.b, METRIC)


def is_begun(trend: Trend, results: list[dict]) -> bool:
    """A point has a difference that no other section tells."""
    own = order_of(trend.number)
    return any(
        p.size == own.size and p.a in own.arms and found_of(p, results) for p in trend.points
    )


def prediction_of(point: Point) -> Prediction | None:
    return next(
        (
            p
            for order in PLAN
            for p in order.predictions
            if (order.size, p.a, p.b, p.metric) == (point.size, point.a, point.b, METRIC)
        ),
        None,
    )


def begun(number: int, results: list[dict]) -> list[Trend]:
    return [t for t in TRENDS if t.number == number and is_begun(t, results)]


def holds(number: int, results: list[dict]) -> str:
    """Of an order: whether each of its rows goes one way, in a list."""
    told = [(trend, changes(trend, results)) for trend in begun(number, results)]
    return "\n".join(
        f"- {trend.title}: {verdict(trend.it, steps)} (not planned)."
        for trend, steps in told
        if all(steps)
    )


def section(number: int, results: list[dict]) -> str:
    """Of an order: its rows of points, and whether each goes one way."""
    found = begun(number, results)
    parts = [part for trend in found for part in (points(trend, results), way(trend, results))]
    return "\n\n".join(filter(None, [*parts, not_stable(found, results)]))


def points(trend: Trend, results: list[dict]) -> str:
    """Where they lie beside the margin, and how far from the one before."""
    steps = ["-", *(change_shown(step) for step in changes(trend, results))]
    rows = [[p.name, *beside(p, results), x] for p, x in zip(trend.points, steps, strict=True)]
    header = ["at", "it is", "found, 95 % interval", "less the one above (not planned)"]
    told = f"{trend.title}, in nats a token of held-out text:"
    return f"{told}\n\n{table(header, rows, left=2)}"


def beside(point: Point, results: list[dict]) -> tuple[str, str]:
    """What it is, and the difference."""
    if not (found := found_of(point, results)):
        return "not known yet", "-"
    planned = prediction_of(point)
    seeds = max(len(o.seeds) for o in PLAN if o.size == point.size and point.a in o.arms)
    says = standing(found, METRIC, planned.margin if planned else None)
    return f"**{says}**", shown(found, seeds, planned)


def changes(trend: Trend, results: list[dict]) -> list[Change | None]:
    """From each point to the next."""
    return [change(a, b, results) for a, b in itertools.pairwise(trend.points)]


def way(trend: Trend, results: list[dict]) -> str:
    """Whether it grows or shrinks from each point to the next, where all are known."""
    steps = changes(trend, results)
    says = f"{verdict(trend.it, steps)} (not planned). " if all(steps) else ""
    return f"{says}{trend.rates}"


def verdict(it: str, steps: Sequence[Change]) -> str:
    clear = [step.mean > 0 for step in steps if step.is_clear]
    each = "" if len(steps) == 1 else " from each to the next"
    if len({*clear}) == 2:
        return f"**{it} does not go one way**"
    if len(clear) == len(steps):
        return f"**{it} {'grows' if clear[0] else 'shrinks'}{each}**"
    if clear:
        return f"**{it} {'grows' if clear[0] else 'shrinks'} where the change is clear**"
    return f"**Whether {it[0].lower()}{it[1:]} grows or shrinks{each} is open**"


def change(first: Point, then: Point, results: list[dict]) -> Change | None:
    """By seeds, where both are of one size: they share first weights, order of the text and dense
    model. Else of two samples (Welch)."""
    found = found_of(first, results), found_of(then, results)
    if None in found:
        return None
    of = [dict(zip(d.seeds, d.values, strict=True)) for d in found]
    if first.size != then.size:
        x, y = (list(values.values()) for values in of)
        mean = sum(y) / len(y) - sum(x) / len(x)
        if min(len(x), len(y)) < 2:
            return Change(mean, None)
        ends = stats.ttest_ind(y, x, equal_var=False).confidence_interval(0.95)
        return Change(mean, (float(ends.low), float(ends.high)))
    apart = [of[1][seed] - of[0][seed] for seed in of[0] if seed in of[1]]
    return Change(math.fsum(apart) / len(apart), interval(apart, 0.95)) if apart else None


def change_shown(step: Change | None) -> str:
    if not step:
        return "-"
    ends = [signed(x, digits_beside(x, (0.0,), 3)) for x in step.of_95 or ()]
    return f"{signed(step.mean, 3)} ({' to '.join(ends) or 'no interval'})"


def not_stable(trends: Sequence[Trend], results: list[dict]) -> str:
    """Runs of these that were not, or diverged. A new warm-up raises the loss of what is trained
    on."""
    named = dict.fromkeys((p.size, arm) for t in trends for p in t.points for arm in (p.b, p.a))
    is_sized = len({size for size, _ in named}) > 1
    runs = [
        f"{bare(arm)}{f' ({SIZES[size].shape.in_words})' * is_sized}, seed {seed}"
        + " (diverged: in no figure)" * is_diverged(result)
        for size, arm in named
        for seed, result in by_seed(results, size, arm).items()
        if (is_diverged(result) if ARMS[arm].start else is_unstable(result))
    ]
    return f"Of these, training was not stable: {'; '.join(runs)}." if runs else ""
