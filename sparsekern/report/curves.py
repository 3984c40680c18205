"""Curves of speed-ups over sparsity out of records, and what can be said of them in words."""

import math
from collections.abc import Callable, Iterable
from statistics import geometric_mean

from ..bench.records import groups, select, sparsities_of

Curve = dict[float, float]  # sparsity -> times the best dense call


def speed(record: dict) -> float:
    return record["speedup"]


def plain(records: list[dict]) -> list[dict]:
    """Products on random masks, one dtype; one token with weights from memory, as in decoding."""
    found = [r for r in select(records, mask="random") if "N" in r]
    found = [r for r in found if r["M"] > 1 or r["is_cold"]]
    dtypes = list(dict.fromkeys(r["dtype"] for r in found))
    return select(found, dtype=dtypes[0]) if dtypes else []


def common(records: list[dict]) -> list[dict]:
    """Records of shapes that were run at every sparsity: means are of the same shapes."""
    everywhere = len(sparsities_of(records))
    shapes = groups(records, lambda r: r["M"], lambda r: r["N"], lambda r: r["K"]).values()
    return [r for alike in shapes if len(sparsities_of(alike)) == everywhere for r in alike]


def curve(records: Iterable[dict], value: Callable[[dict], float | None] = speed) -> Curve:
    """Geometric means over the shapes, where every record has the value."""
    records = list(records)
    found = {s: [value(r) for r in select(records, sparsity=s)] for s in sparsities_of(records)}
    return {s: geometric_mean(values) for s, values in found.items() if None not in values}


def curves(records: list[dict], key: Callable[[dict], object], name: Callable) -> dict[str, Curve]:
    """A curve for each key, in the order of the keys; those of a single sparsity are left out."""
    alike = groups(records, key)
    found = {name(k): curve(common(alike[k,])) for (k,) in sorted(alike)}
    return {label: each for label, each in found.items() if len(each) > 1}


def crossing(found: Curve) -> float | None:
    """The sparsity from which on the curve stays at 1 or above; None where its end is below.

    Between two points the logarithm is taken as straight over log2(1 / density)."""
    points = [(math.log2(1 / (1 - s)), math.log2(r)) for s, r in sorted(found.items()) if s < 1]
    if not points or points[-1][1] < 0:
        return None
    crossed = points[0][0]
    for (x0, y0), (x1, y1) in zip(points, points[1:], strict=False):
        if y0 < 0 <= y1:
            crossed = x0 + (x1 - x0) * -y0 / (y1 - y0)
    return 1 - 2**-crossed


def tokens(count: int) -> str:
    return f"{count:,} token{'s' * (count > 1)}"


def span(values: Iterable[float]) -> str:
    """'0.73 to 0.97', or one of them where both read alike."""
    values = list(values)
    low, high = f"{min(values):.2f}", f"{max(values):.2f}"
    return low if low == high else f"{low} to {high}"


def starts(found: dict[str, Curve]) -> str:
    """'gain from 63% zeros on', the last of them, or who never does."""
    points = {name: crossing(each) for name, each in found.items()}
    never = [name for name, at in points.items() if at is None]
    if never and len(never) == len(points):
        return "lose at every share of zeros measured"
    if never:
        return f"gain, but for {', '.join(never)}"
    return f"gain from {max(points.values()):.0%} zeros on"


def at_90(found: dict[str, Curve]) -> str:
    values = [each[0.9] for each in found.values() if 0.9 in each]
    return f", {span(values)} times dense at 90%" if values else ""
