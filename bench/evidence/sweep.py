"""Which rate a sweep tries next, by the losses of those that were tried."""

import math
from collections.abc import Sequence


def finite(loss: float | None) -> float:
    """Of a run that diverged, whatever it is written as: more than any other."""
    return loss if loss is not None and math.isfinite(loss) else math.inf


def rounded(rate: float) -> float:
    return float(f"{rate:.3g}")


def best(losses: dict[float, float]) -> float:
    """The rate with the least loss."""
    return min(losses, key=lambda rate: finite(losses[rate]))


def beyond_the_end(losses: dict[float, float], factor: float) -> float | None:
    """The next rate on the side where the best one is the last; None where it is inside."""
    found = best(losses)
    if found == min(losses):
        return rounded(found / factor)
    return rounded(found * factor) if found == max(losses) else None


def one_more(
    first: Sequence[float], losses: dict[float, float], least: float, most: float
) -> float | None:
    """The first rates, then further ones by half an order of magnitude, between `least` and `most`,
    until the best is inside. None where the sweep is done."""
    if missing := [rate for rate in first if rate not in losses]:
        return missing[0]
    beyond = beyond_the_end(losses, math.sqrt(10))
    return beyond if beyond and least <= beyond <= most else None
