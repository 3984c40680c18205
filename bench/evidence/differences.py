"""Differences of two arms in one metric, with intervals over seeds and items.

A seed changes first weights, the order of the text and the mask, so arms are compared by seeds.
Where items are scored one by one, both seeds and items are drawn again and again (a bootstrap on
two levels). Equivalence within a margin: the 90 % interval lies inside it (two one-sided tests at
5 %).
"""

import math
import statistics
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import numpy as np
from scipy import stats

from .arms import unpacked
from .plan import SWEEP_SEED, Prediction

DRAWS = 2000
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

Interval = tuple[float, float]


def value(result: dict, metric: str, way: str = "dense") -> float | None:
    """Of one run; None where it has none."""
    if metric in TASK_LOSSES or metric == "sentiment":
        tuned = result.get("tuned", {}).get(f"{metric} {way}", {})
        return tuned.get("loss") if metric != "sentiment" else tuned.get("items", {}).get("percent")
    found = result.get("pretrained", {}).get(metric)
    return found["percent"] if isinstance(found, dict) else found


def items_of(result: dict, metric: str) -> np.ndarray:
    if metric == "sentiment":
        return unpacked(result["tuned"]["sentiment dense"]["items"])
    return unpacked(result["pretrained"][metric])


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
    if metric not in WITH_ITEMS:
        return Difference(seeds, values, of_seeds(values, 0.95), of_seeds(values, 0.90))
    apart = [items_of(of_a[s], metric) * 100.0 - items_of(of_b[s], metric) * 100.0 for s in seeds]
    means = of_two_levels(np.stack(apart)) if len(seeds) > 1 else None
    return Difference(seeds, values, _middle(means, 0.95), _middle(means, 0.90))


def of_seeds(values: Sequence[float], share: float) -> Interval | None:
    """Student's interval of the mean; None of one value."""
    if len(values) < 2:
        return None
    t = stats.t.ppf((1 + share) / 2, len(values) - 1)
    half = float(t) * statistics.stdev(values) / math.sqrt(len(values))
    return statistics.mean(values) - half, statistics.mean(values) + half


def of_two_levels(apart: np.ndarray) -> np.ndarray:
    """Means [DRAWS] of differences [seeds, items], both drawn again."""
    seeds, items = apart.shape
    rng = np.random.default_rng(0)
    means = np.empty(DRAWS)
    for i in range(DRAWS):
        rows = apart[rng.integers(seeds, size=seeds)].mean(0)
        # How often each item is drawn is as good as which: counts need no gathering.
        means[i] = rows @ rng.multinomial(items, np.full(items, 1 / items)) / items
    return means


def _middle(means: np.ndarray | None, share: float) -> Interval | None:
    if means is None:
        return None
    low, high = np.quantile(means, [(1 - share) / 2, (1 + share) / 2])
    return float(low), float(high)


def verdict(prediction: Prediction, found: Difference | None) -> str:
    """What a difference says of its prediction, in words."""
    if found is None:
        return "not run"
    said = "as predicted" if prediction.low <= found.mean <= prediction.high else "not as predicted"
    if prediction.margin is None:
        return said
    if found.of_90 is None:
        return f"{said}; one seed says nothing of {prediction.margin:g}"
    if found.is_within(prediction.margin):
        return f"{said}; **equal within {prediction.margin:g}**"
    if found.is_clear:
        return f"{said}; **different**"
    return f"{said}; open: neither equal within {prediction.margin:g} nor different"
