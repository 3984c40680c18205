"""When a measurement is noise: it is then made again, and told and kept apart if it stays so.

Half of the rounds lie between the quartiles. Where these are further apart than LIMIT of the
median, others had the machine meanwhile: a ratio of such medians says more of them than of us.
"""

from collections.abc import Callable, Sequence
from statistics import median, quantiles
from typing import TypeVar

LIMIT = 0.2
REPEATS = 2

Found = TypeVar("Found")


def spread(seconds: Sequence[float]) -> float:
    """From the first to the third quartile, as a share of the median."""
    if len(seconds) < 2:
        return 0.0
    first, _, third = quantiles(seconds, n=4, method="inclusive")
    return (third - first) / median(seconds)


def quietest(measure: Callable[[], Found], noise: Callable[[Found], float]) -> Found:
    """The first measurement that is quiet, or the quietest of all."""
    found = measure()
    for _ in range(REPEATS):
        if noise(found) <= LIMIT:
            break
        found = min(found, measure(), key=noise)
    return found


def of_case(case: dict) -> float:
    """The larger spread of a derived case's two times: ours, and the best dense call's."""
    return max(case["ways"][case[who]].get("spread", 0.0) for who in ("ours", "best_dense"))
