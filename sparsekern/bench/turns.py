"""The one timer: contenders take turns, so that a slow moment of the machine hits all alike.

A turn is a function that does the work and returns another, which tells the seconds it took: those
of a GPU are known only when it has come that far, and nobody waits for it between two turns.
"""

import time
from collections.abc import Callable
from statistics import median

import torch

from .noise import spread

Seconds = Callable[[], float]
Turn = Callable[[], Seconds]


def in_turns(
    turns: dict[str, Turn],
    rounds: int,
    warm_up: int = 0,
    before: Callable[[str], object] = lambda name: None,
    is_enough: Callable[[str, list[Seconds]], bool] = lambda name, taken: False,
) -> dict[str, list[float]]:
    """Seconds of the turns of each, one number a round, without the first `warm_up` rounds.

    `before` gets the name of who is next, outside of the time; who has had enough is left out."""
    taken: dict[str, list[Seconds]] = {name: [] for name in turns}
    for i in range(-warm_up, rounds):
        for name, turn in turns.items():
            if not is_enough(name, taken[name]):
                before(name)
                seconds = turn()
                if i >= 0:
                    taken[name].append(seconds)
    return {name: [seconds() for seconds in each] for name, each in taken.items()}


def on_host(
    run: Callable[[], object], calls: int = 1, clock: Callable[[], float] = time.perf_counter
) -> Turn:
    """Seconds of a call, the mean of `calls` in a row."""

    def turn() -> Seconds:
        began = clock()
        for _ in range(calls):
            run()
        took = (clock() - began) / calls
        return lambda: took

    return turn


# A kernel that waits goes first, so that all is queued before the GPU comes to it: no time holds a
# wait for Python.
CYCLES_PER_S = 2e9


def on_gpu(run: Callable[[], object], ahead_s: float) -> Turn:
    """Seconds on the current stream of what `run` queues there within `ahead_s`."""

    def turn() -> Seconds:
        begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        torch.cuda._sleep(int(ahead_s * CYCLES_PER_S))
        begin.record()
        run()
        end.record()

        def seconds() -> float:
            end.synchronize()
            return 1e-3 * begin.elapsed_time(end)

        return seconds

    return turn


def way(kind: str, seconds: list[float], error: float, tolerance: float) -> dict[str, object]:
    """What was found of a contender, as fields of its record, and the seconds of each round."""
    found = {"median_s": median(seconds), "min_s": min(seconds), "spread": spread(seconds)}
    is_right = error < tolerance  # written so that NaN is wrong
    return {"kind": kind, **found, "error": error, "is_right": is_right, "seconds": seconds}
