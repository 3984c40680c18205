"""A fair race on a CPU: every competitor checked against fp64, then all of them timed in turn.

A machine's speed drifts. So each of our own turns is preceded by one of every rival, on the same
core, from the same cold caches.
"""

import itertools
import math
import os
import time
from collections.abc import Callable, Iterable
from contextlib import suppress
from dataclasses import dataclass, replace
from statistics import median

import torch
from torch import Tensor

from ..testing import relative_error
from .machine import cores
from .noise import spread
from .records import DENSE, OTHER, OURS

# Relative to |x| @ |W|.T. fp32 rounds to 6e-8 and dense products of these sizes stay below 1e-6;
# bf16 rounds its result to 4e-3.
TOLERANCE = {torch.float32: 2e-6, torch.bfloat16: 8e-3}
BUDGET_S = 1.0  # of one measurement, without its peers
ROUNDS = (5, 50)  # at least and at most
PEER_ROUNDS, PEER_BUDGET_S = 3, 0.5  # at most: peers are slow, and beside the point where close
TURN_S = 1e-3  # of one competitor where a call takes microseconds: it then repeats its call
# Their threads go on spinning after their work, on the cores of whoever comes next: the median of a
# race of two threads was up to seven times its minimum. So they run with one thread only.
OTHER_POOLS = ("OpenBLAS", "onnxruntime dense", "DeepSparse", "sparse_dot_mkl")
REST_S = 5e-3  # between competitors with two threads: pools spin after their work

CORES = cores()  # at the start, before pin()


@dataclass(frozen=True)
class Rival:
    """A way to the product. `result` brings what `run` returns into our layout.

    `turn` gives the seconds of one run where this process cannot take them. With several `copies`
    of the weights, as many runs use each of them once.
    """

    name: str
    kind: str
    run: Callable[[], object]
    result: Callable[[object], Tensor] = lambda y: y
    turn: Callable[[], float] | None = None
    copies: int = 1
    exact: tuple[Tensor, Tensor] | None = None  # where it computes another product than the others

    def time(self, calls: int) -> float:
        """Seconds of one call, the mean of `calls` in a row."""
        if self.turn:
            return sum(self.turn() for _ in range(calls)) / calls
        start = time.perf_counter()
        for _ in range(calls):
            self.run()
        return (time.perf_counter() - start) / calls


def ours(run: Callable[[], Tensor], name: str = "sparsekern") -> Rival:
    return Rival(name, OURS, run)


def rotate(rivals: Iterable[Rival]) -> Rival:
    """One rival that goes through many, all alike but for their copy of the weights."""
    rivals = list(rivals)
    order = itertools.cycle(rivals)
    return replace(rivals[0], run=lambda: next(order).run(), copies=len(rivals))


def pin(threads: int) -> None:
    """Use exactly `threads` cores. Also moves the pools' threads that are there already (Linux)."""
    with suppress(ImportError):  # OpenBLAS, and MKL beside torch's own, where they take part
        from threadpoolctl import threadpool_limits

        threadpool_limits(threads)
    torch.set_num_threads(threads)
    if hasattr(os, "sched_setaffinity"):
        for thread in os.listdir("/proc/self/task"):
            os.sched_setaffinity(int(thread), CORES[-threads:])


def exact(product: Callable[..., Tensor], *operands: Tensor) -> tuple[Tensor, Tensor]:
    """The product in fp64, and the scale of its errors: the product of the absolute operands.

    Nothing cancels in the scale, so fp32 will do for it.
    """
    scale = product(*(t.float().abs() for t in operands))
    return product(*(t.double() for t in operands)), scale.double()


def check(rival: Rival, exact: tuple[Tensor, Tensor]) -> tuple[float, float]:
    """Relative error, the worst over the copies, and the seconds of a run. Also the warm-up."""
    errors, taken_s = [], []
    for _ in range(rival.copies):
        start = time.perf_counter()
        y = rival.run()
        taken_s.append(time.perf_counter() - start)
        errors.append(relative_error(rival.result(y), *(rival.exact or exact)))
    return torch.tensor(errors).max().item(), median(taken_s)  # a NaN is the maximum


class Race:
    """`ours` against its rivals: nobody is timed before all are checked against `exact`.

    ArithmeticError where we are wrong; a rival that is wrong is marked in run(). With `repeat`
    each turn is many calls: microseconds need it, and weights that are not cold are then in cache.
    Without `exact` nothing is checked.
    """

    def __init__(
        self,
        ours: Rival,
        rivals: list[Rival],
        threads: int,
        exact: tuple[Tensor, Tensor] | None = None,
        tolerance: float = math.inf,
        repeat: bool = False,
        most_rounds: int = ROUNDS[1],
    ):
        if threads > 1:
            rivals = [rival for rival in rivals if rival.name not in OTHER_POOLS]
        self.ours, self.rivals, self.threads, self.repeat = ours, rivals, threads, repeat
        self.tolerance = tolerance
        checked = {r.name: check(r, exact) if exact else (0.0, 0.0) for r in (ours, *rivals)}
        self.errors = {name: error for name, (error, _) in checked.items()}
        error = self.errors[ours.name]
        if not error < tolerance:
            raise ArithmeticError(f"{ours.name}: error {error:.1e} against fp64")

        self._contenders = [ours, *(rival for rival in rivals if rival.kind in (DENSE, OTHER))]
        once_s = {rival.name: rival.time(1) for rival in self._contenders}
        self.calls = max(1, round(TURN_S / min(once_s.values()))) if repeat else 1
        wanted = int(BUDGET_S / (self.calls * sum(once_s.values())))
        self.rounds = min(most_rounds, max(ROUNDS[0], wanted))
        self.seconds: dict[str, list[float]] = {rival.name: [] for rival in rivals}
        for rival in rivals:
            if rival not in self._contenders and checked[rival.name][1] > PEER_BUDGET_S:
                self.seconds[rival.name].append(checked[rival.name][1])  # once is enough

    def time_rivals(self) -> None:
        """A turn of each, before one of ours."""
        for rival in self.rivals:
            samples = self.seconds[rival.name]
            is_enough = len(samples) >= PEER_ROUNDS or sum(samples) * self.calls > PEER_BUDGET_S
            if rival in self._contenders or not is_enough:
                self._rest()
                if self.repeat:
                    rival.run()  # back into its caches, or to its next copy
                samples.append(rival.time(self.calls))
        self._rest()
        if self.repeat:
            self.ours.run()

    def run(self) -> dict[str, dict]:
        """All rounds -> name -> what was found of each, ours first."""
        ours_s = []
        for _ in range(self.rounds):
            self.time_rivals()
            ours_s.append(self.ours.time(self.calls))
        self.seconds[self.ours.name] = ours_s
        return {
            rival.name: {
                "kind": rival.kind,
                "median_s": median(self.seconds[rival.name]),
                "min_s": min(self.seconds[rival.name]),
                "spread": spread(self.seconds[rival.name]),
                "error": self.errors[rival.name],
                # Written so that NaN is wrong.
                "is_right": self.errors[rival.name] < self.tolerance,
            }
            for rival in (self.ours, *self.rivals)
        }

    def _rest(self) -> None:
        if self.threads > 1:
            time.sleep(REST_S)
