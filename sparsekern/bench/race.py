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
from .records import DENSE, OTHER, OURS
from .turns import Seconds, Turn, in_turns, on_host, way

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
OTHER_POOLS += ("AOCL-Sparse", "OpenVINO dense")
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

    def takes_turn(self, calls: int) -> Turn:
        """Seconds of one call, the mean of `calls` in a row."""
        if self.turn is None:
            return on_host(self.run, calls)

        def turn() -> Seconds:
            took = sum(self.turn() for _ in range(calls)) / calls
            return lambda: took

        return turn


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


def race(
    ours: Rival,
    rivals: list[Rival],
    threads: int,
    exact: tuple[Tensor, Tensor] | None = None,
    tolerance: float = math.inf,
    repeat: bool = False,
    most_rounds: int = ROUNDS[1],
) -> dict[str, dict]:
    """Name -> what was found of each, ours first; each of our turns is preceded by one of every
    rival. Nobody is timed before all are checked against `exact`.

    ArithmeticError where we are wrong; a rival that is wrong is marked. With `repeat`
    each turn is many calls: microseconds need it, and weights that are not cold are then in cache.
    Without `exact` nothing is checked.
    """
    if threads > 1:
        rivals = [rival for rival in rivals if rival.name not in OTHER_POOLS]
    everyone = {rival.name: rival for rival in (*rivals, ours)}
    checked = {name: check(r, exact) if exact else (0.0, 0.0) for name, r in everyone.items()}
    errors = {name: error for name, (error, _) in checked.items()}
    if not errors[ours.name] < tolerance:
        raise ArithmeticError(f"{ours.name}: error {errors[ours.name]:.1e} against fp64")

    peers = {name for name, r in everyone.items() if r.kind not in (DENSE, OTHER, OURS)}
    once_s = [r.takes_turn(1)()() for name, r in everyone.items() if name not in peers]
    calls = max(1, round(TURN_S / min(once_s))) if repeat else 1
    rounds = min(most_rounds, max(ROUNDS[0], int(BUDGET_S / (calls * sum(once_s)))))
    # Of peers that take long once, as they were checked, is enough.
    known = {n: [s] for n, (_, s) in checked.items() if n in peers and s > PEER_BUDGET_S}

    def is_enough(name: str, taken: list[Seconds]) -> bool:
        if name not in peers:
            return False
        spent_s = sum(seconds() for seconds in taken) * calls
        return name in known or len(taken) >= PEER_ROUNDS or spent_s > PEER_BUDGET_S

    def before(name: str) -> None:
        if threads > 1:
            time.sleep(REST_S)
        if repeat:
            everyone[name].run()  # back into its caches, or to its next copy

    turns = {name: rival.takes_turn(calls) for name, rival in everyone.items()}
    seconds = in_turns(turns, rounds, before=before, is_enough=is_enough) | known
    return {
        rival.name: way(rival.kind, seconds[rival.name], errors[rival.name], tolerance)
        for rival in (ours, *rivals)
    }
