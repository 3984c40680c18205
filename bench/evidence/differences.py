"""Differences of two arms in one metric, with intervals over seeds and items.

A seed changes first weights, the order of the text and the mask, so arms are compared by seeds.
Where items are scored one by one, the interval covers other items too: the half-widths of both are
added in quadrature. (A bootstrap of both is far too narrow with two or three seeds.) Equivalence
within a margin: the 90 % interval lies inside it (two one-sided tests at 5 %).
"""

import itertools
import math
import statistics
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import numpy as np
from scipy import stats

from .arms import unpacked
from .plan import SWEEP_SEED, Prediction

TASK_LOSSES = ("code", "webnlg")
WITH_ITEMS = ("sentiment", "cloze")  # BLiMP has so many that seeds alone count
METRICS = {
    "held-out": "nats a token, held-out text",
    "code": "nats a token, code, after fine-tuning",
    "webnlg": "nats a token, WebNLG, after fine-tuning",
    "sentiment": "% right, sentiment, after fine-tuning",
    "blimp": "% right, BLiMP",
    "cloze": "% right, cloze",
}

LEAST_RISE = 0.02  # nats, of a run that was not stable; by their text its stretches vary less

Interval = tuple[float, float]


def value(result: dict, metric: str, way: str = "dense") -> float | None:
    """Of one run; None where it has none, or none that is finite."""
    if metric in TASK_LOSSES or metric == "sentiment":
        tuned = result.get("tuned", {}).get(f"{metric} {way}", {})
        found = tuned.get("loss") if metric != "sentiment" else tuned.get("items")
    else:
        found = result.get("pretrained", {}).get(metric)
    found = found.get("percent") if isinstance(found, dict) else found
    return found if found is not None and math.isfinite(found) else None


def items_of(result: dict, metric: str) -> np.ndarray:
    if metric == "sentiment":
        return unpacked(result["tuned"]["sentiment dense"]["items"])
    return unpacked(result["pretrained"][metric])


def rise(result: dict) -> float:
    """By how much the loss of pre-training was at most above what it had been before."""
    curve = result.get("pretrained", {}).get("curve", [])
    lowest = itertools.accumulate(curve, min)
    return max((loss - low for loss, low in zip(curve, lowest, strict=True)), default=0.0)


def is_diverged(result: dict) -> bool:
    return value(result, "held-out") is None


def is_unstable(result: dict) -> bool:
    """Its loss rose in training, or it has none."""
    return is_diverged(result) or rise(result) >= LEAST_RISE


def by_seed(results: Iterable[dict], size: str, arm: str) -> dict[int, dict]:
    """The runs of an arm but those of its sweep."""
    found = {r["seed"]: r for r in results if (r["size"], r["arm"]) == (size, arm)}
    return {seed: found[seed] for seed in sorted(found) if seed != SWEEP_SEED}


@dataclass
class Difference:
    """Arm a less arm b: of each seed that both have, and intervals of the mean."""

    seeds: list[int]
    values: list[float]
    of_95: Interval | None
    of_90: Interval | None

    @property
    def mean(self) -> float:
        return statistics.mean(self.values)

    def is_within(self, margin: float) -> bool:
        return self.of_90 is not None and -margin < self.of_90[0] and self.of_90[1] < margin

    @property
    def is_clear(self) -> bool:
        """Zero lies outside of the 95 % interval."""
        return self.of_95 is not None and not self.of_95[0] <= 0 <= self.of_95[1]


def difference(
    results: Iterable[dict], size: str, a: str, b: str, metric: str
) -> Difference | None:
    """None where no seed has both."""
    results = list(results)
    of_a, of_b = (
        {s: r for s, r in by_seed(results, size, arm).items() if value(r, metric) is not None}
        for arm in (a, b)
    )
    seeds = [seed for seed in of_a if seed in of_b]
    if not seeds:
        return None
    values = [value(of_a[s], metric) - value(of_b[s], metric) for s in seeds]
    of_items = 0.0
    if metric in WITH_ITEMS:
        apart = [
            100.0 * items_of(of_a[s], metric) - 100.0 * items_of(of_b[s], metric) for s in seeds
        ]
        of_items = float(stats.sem(np.mean(apart, 0)))
    return Difference(
        seeds, values, interval(values, 0.95, of_items), interval(values, 0.90, of_items)
    )


def interval(values: Sequence[float], share: float, of_items: float = 0.0) -> Interval | None:
    """Of the mean over seeds: Student's, and of the items that have this standard error the normal
    one, in quadrature. None of one value."""
    if len(values) < 2:
        return None
    t, z = (float(d.ppf((1 + share) / 2)) for d in (stats.t(len(values) - 1), stats.norm))
    half = math.hypot(t * statistics.stdev(values) / math.sqrt(len(values)), z * of_items)
    return statistics.mean(values) - half, statistics.mean(values) + half


def is_loss(metric: str) -> bool:
    """Less of it is better."""
    return METRICS[metric].startswith("nats")


def kind(found: Difference, metric: str, margin: float | None) -> str:
    """What arm a is beside arm b: equal (within the margin), worse, better, or open."""
    if margin is not None and found.is_within(margin):
        return "equal"
    if not found.is_clear:
        return "open"
    return "worse" if (found.mean > 0) == is_loss(metric) else "better"


def standing(found: Difference, metric: str, margin: float | None) -> str:
    """The same with the margin: 'equal within 0.02', 'worse by more than 0.02', 'worse', 'open'."""
    says = kind(found, metric, margin)
    if found.of_95 is None:
        return f"{says}, one seed"
    if says == "equal":
        return f"equal within {margin:g}"
    is_beyond = margin is not None and min(map(abs, found.of_95)) > margin
    return f"{says} by more than {margin:g}" if says != "open" and is_beyond else says


def is_as_predicted(prediction: Prediction, found: Difference) -> bool:
    return prediction.low <= found.mean <= prediction.high
