"""From times to the data that dispatch reads: up to which density is a kernel the fastest choice?

sparsekern/kernels/crossover.json holds, by compute capability and dtype,

    {"sm_90": {"measured": "...", "tokens": [1, 8, ...],
               "bfloat16": {"few_tokens": {"dense": [0.74, ...], "expand": [...]}, ...}}}

for each kernel and each alternative one density for each number of tokens: the kernel is no slower
than the alternative up to there, by the geometric mean of the shapes. `dense` is the best dense
call on a W that is dense already. null: not measured, or noise, or the kernel does not take so
many tokens.
"""

import itertools
import math
from collections.abc import Sequence
from statistics import geometric_mean

from . import noise
from .measure_gpu import Grid
from .records import DENSE, OURS, groups, select

GRID = Grid(
    shapes=((6144, 2048), (4096, 11008), (12288, 12288)),
    tokens=(1, 8, 16, 32, 64, 256, 2048),
    sparsities=(0.0, 0.3, 0.5, 0.7, 0.8, 0.9, 0.95, 0.98),
    masks=("random",),
)
EXPAND = "expand"


def summarize(cells: list[dict], measured: str) -> dict:
    """The entry for the GPU's compute capability."""
    tokens = sorted({cell["M"] for cell in cells})
    entry: dict[str, object] = {"measured": measured, "tokens": tokens}
    for (dtype,), chosen in groups(cells, lambda c: c["dtype"]).items():
        names = dict.fromkeys(
            name for c in chosen for name, way in c["ways"].items() if way["kind"] == OURS
        )
        entry[dtype] = {
            name: {
                other: [limit(select(chosen, M=M), name, other) for M in tokens]
                for other in (EXPAND, DENSE)
                if other != name and (other in names or other == DENSE)
            }
            for name in names
        }
    return entry


def limit(cells: Sequence[dict], name: str, other: str) -> float | None:
    """The density up to which `name` is no slower than `other`, from the sparsest on; nothing where
    one of the measurements is noise."""
    ratios = {}
    if any(is_noisy(c, each) for c in cells for each in (name, other)):
        return None
    for (sparsity,), chosen in groups(cells, lambda c: c["sparsity"]).items():
        times = [(seconds(c, other), seconds(c, name)) for c in chosen]
        if all(None not in pair for pair in times):
            ratios[1 - sparsity] = geometric_mean([theirs / ours for theirs, ours in times])
    return crossing(ratios) if ratios else None


def seconds(cell: dict, name: str) -> float | None:
    """Nothing for who did not run, failed, or was wrong."""
    if name == DENSE:
        return cell["dense_s"]
    way = cell["ways"].get(name)
    return way["median_s"] if way and way["is_right"] else None


def is_noisy(cell: dict, name: str) -> bool:
    way = cell["ways"].get(cell["best_dense"] if name == DENSE else name) or {}
    return way.get("spread", 0.0) > noise.LIMIT


def crossing(ratios: dict[float, float]) -> float:
    """The limit under which {density: times faster} gains most in all, so that one disturbed
    measurement does not decide: 0 if nothing is gained, the last density if all is. Between two
    points a straight line in the logarithms says where it crosses 1."""
    points = sorted(ratios.items())
    gains = list(itertools.accumulate((math.log(r) for _, r in points), initial=0.0))
    count = gains.index(max(gains))  # of densities at which it is the choice
    if count in (0, len(points)):
        return round(points[-1][0], 3) if count else 0.0
    (d0, r0), (d1, r1) = points[count - 1 : count + 1]
    return round(d0 * (d1 / d0) ** (math.log(r0) / (math.log(r0) - math.log(r1))), 3)
