"""Contenders in turns: each checked against fp64, then timed by replays of a CUDA graph.

A call takes microseconds, so what is timed is a graph of many calls, which go through copies of W
in turn.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass, field
from statistics import median
from typing import Any, Protocol

import torch
from torch import Tensor

from ..testing import frobenius_error
from .turns import Turn, in_turns, on_gpu, way

LOOP_LAUNCHES = 60  # of a replay of a competitor that no graph can hold
REPLAY_S = 20e-3  # a replay takes no longer, but for the fewest launches
FEWEST_LAUNCHES = 3


@dataclass
class Contender:
    """One call for each copy of W. `result` brings what a call returns into [M, N]."""

    name: str
    kind: str
    calls: list[Callable[[], Any]]
    result: Callable[[Any], Tensor] = lambda y: y
    is_graphed: bool = True
    info: dict[str, object] = field(default_factory=dict)  # further fields of its record
    exact: Tensor | None = None  # where it computes another product than the others


class Clock(Protocol):
    def once(self, call: Callable[[], object]) -> float:
        """Seconds of one call on the device."""

    def capture(self, calls: list[Callable[[], Any]]) -> tuple[Callable[[], None], Any]:
        """A function that replays all calls, and where the last one puts its result."""

    def race(self, runners: list["Runner"], rounds: int) -> list[list[float]]:
        """Seconds of a replay of each runner, one number a round, after a round of warm-up."""


class CudaClock:
    """CUDA graphs and events on the current stream, which may not be the default one."""

    GRAPH_AHEAD_S = 50e-6
    CALL_AHEAD_S = 100e-6  # for each call of a loop

    def __init__(self, frees_cache: bool = False):
        """frees_cache: before each capture, whose memory is then the GPU's; else what earlier calls
        have left stays in torch's hands. It takes some milliseconds."""
        self._frees_cache = frees_cache
        self.captured_bytes = 0  # of the last graph: its pool

    def once(self, call: Callable[[], object]) -> float:
        torch.cuda.synchronize()
        return on_gpu(call, 10 * self.CALL_AHEAD_S)()()

    def capture(self, calls: list[Callable[[], Any]]) -> tuple[Callable[[], None], Any]:
        # Without torch.cuda.graph, which may collect garbage and empty the allocator's cache.
        graph = torch.cuda.CUDAGraph()
        torch.cuda.synchronize()
        if self._frees_cache:
            torch.cuda.empty_cache()
        before = torch.cuda.memory_reserved()
        graph.capture_begin(capture_error_mode="thread_local")
        try:
            for call in calls:
                y = call()
        finally:
            graph.capture_end()
        self.captured_bytes = torch.cuda.memory_reserved() - before
        return graph.replay, y

    def race(self, runners: list["Runner"], rounds: int) -> list[list[float]]:
        def turn(runner: Runner) -> Turn:
            ahead_s = self.CALL_AHEAD_S * runner.launches
            is_graphed = runner.contender.is_graphed
            return on_gpu(runner.replay, self.GRAPH_AHEAD_S if is_graphed else ahead_s)

        turns = {runner.contender.name: turn(runner) for runner in runners}
        return list(in_turns(turns, rounds, warm_up=1).values())


class Runner:
    """A contender ready to be timed: checked with every copy of W, and captured."""

    def __init__(self, contender: Contender, launches: int, exact: Tensor, clock: Clock):
        self.contender = contender
        # The first run of each also compiles, loads and allocates.
        errors = [self._error(call(), exact) for call in contender.calls]
        self.error = torch.tensor(errors).max().item()  # a NaN is the maximum
        once_s = clock.once(contender.calls[0])
        if once_s * launches > REPLAY_S:
            launches = min(launches, max(FEWEST_LAUNCHES, int(REPLAY_S / once_s)))
        self.launches = launches if contender.is_graphed else min(launches, LOOP_LAUNCHES)
        self._order = [contender.calls[i % len(contender.calls)] for i in range(self.launches)]
        if contender.is_graphed:
            self.replay, self.y = clock.capture(self._order)
        else:
            self.replay, self.y = self._loop, None

    def _loop(self) -> None:
        for call in self._order:
            self.y = call()

    def _error(self, y: Any, exact: Tensor) -> float:
        own = self.contender.exact
        return frobenius_error(self.contender.result(y), exact if own is None else own)

    def poison(self) -> None:
        """A replay that writes nothing shall not pass for a right one."""
        if self.contender.is_graphed:
            for y in [self.y] if isinstance(self.y, Tensor) else self.y:
                y.fill_(math.nan)

    def last_error(self, exact: Tensor) -> float:
        """Error of the last call of the last replay."""
        return self._error(self.y, exact)


def race(
    runners: list[Runner], exact: Tensor, tolerance: float, clock: Clock, rounds: int
) -> dict[str, dict]:
    """name -> seconds of a call, its error, and whether it is right."""
    for runner in runners:
        runner.poison()
    records = {}
    for runner, seconds in zip(runners, clock.race(runners, rounds), strict=True):
        error = torch.tensor([runner.error, runner.last_error(exact)]).max().item()
        calls = [s / runner.launches for s in seconds]
        found = way(runner.contender.kind, calls, error, tolerance)
        records[runner.contender.name] = found | runner.contender.info
    return records


def copy_bytes_per_s(nbytes: int = 2**31, repeats: int = 15) -> float:
    """Bytes read and written per second by a copy on the GPU: the limit of what reads W."""
    source = torch.empty(nbytes // 8, dtype=torch.int64, device="cuda").random_()
    target = torch.empty_like(source)
    clock = CudaClock()
    target.copy_(source)
    return 2 * nbytes / median(clock.once(lambda: target.copy_(source)) for _ in range(repeats))
