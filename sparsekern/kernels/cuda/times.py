"""How long a product takes with W in each layout, as a share of the best dense call: measured data.

packed_times.json holds, for some shapes [N, K], rising densities and rising numbers of tokens,

    {"machine": "NVIDIA H200, ...", "tokens": [1, 4, ...], "shapes": [[2048, 2048], ...],
     "densities": [0.1, ...], "shares": {"gather": [[[0.4, ...], ...], ...], "dense": ...}}

shares[layout][shape][density][tokens], null where that was not measured. "dense" is the copy of W
that is kept (kept.py), which torch's default library reads: the best call may be another. One GPU's
numbers serve all of them. `python bench/run_gpu.py layouts` measures them and writes the file.
"""

import json
import math
from functools import cache, lru_cache
from pathlib import Path
from typing import NamedTuple

FILE = Path(__file__).parents[1] / "packed_times.json"


class Times(NamedTuple):
    machine: str
    tokens: list[int]
    shapes: list[list[int]]
    densities: list[float]
    shares: dict[str, list]


@cache
def measured() -> Times:
    return Times(**json.loads(FILE.read_text()))


def nearest_shape(n: int, k: int) -> int:
    """Place of the measured shape that is most like [N, K]."""

    def distance(shape: list[int]) -> float:
        return math.dist(map(math.log, shape), (math.log(max(1, n)), math.log(max(1, k))))

    shapes = measured().shapes
    return min(range(len(shapes)), key=lambda place: distance(shapes[place]))


@lru_cache(maxsize=4096)
def share(layout: str, m: int, n: int, k: int, density: float) -> float | None:
    """Time of a product of m tokens with W [n, k] in this layout over that of the best dense call;
    None where it was not measured.

    As measured on the shape that is most like W. Between two numbers of tokens the larger counts,
    above the largest that one. Bytes grow with the density, and so does the time, along a line.
    """
    data = measured()
    if layout not in data.shares:
        return None
    at = next((i for i, most in enumerate(data.tokens) if m <= most), -1)
    by_density = data.shares[layout][nearest_shape(n, k)]
    points = [
        (d, each[at])
        for d, each in zip(data.densities, by_density, strict=True)
        if each[at] is not None
    ]
    if len(points) < 2:
        return points[0][1] if points else None
    # The two around it, or the last two on its side.
    right = next((i for i, (d, _) in enumerate(points) if i and density <= d), len(points) - 1)
    (d0, t0), (d1, t1) = points[right - 1 : right + 1]
    if density < points[0][0]:
        return t0  # launches and x stay, however empty W is
    return t0 + (t1 - t0) * (density - d0) / (d1 - d0)
