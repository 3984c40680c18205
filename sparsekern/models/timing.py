"""Times of a layer, dense and sparse in turn, with the cache as it is in the model.

Between two calls of a layer the others pass: their weights push its own out of the cache, as far as
they do not fit beside it. `Rest` does that; without it a large model's layers look faster than they
are, the dense ones more than the sparse.
"""

import time
from collections.abc import Callable
from statistics import median

import torch
from torch import Tensor, nn

from ..nn import SparseLinear

ROUNDS = 7
IN_A_ROW = 2  # the last counts: the first finds a cache that the other contenders have left
ENOUGH_S = 0.03  # of timed calls: no more rounds then, but for the least
LEAST_ROUNDS = 3
CACHE_BYTES = 2**26  # more than this pushes out all of a CPU's cache
IN_L2_BYTES = 2**19  # less than this disturbs nothing
SMALL = 16  # features of a layer that takes its call's time alone

Run = Callable[[], object]


def clock(is_gpu: bool = False) -> tuple[Callable[[], float], Callable[[list[float]], float]]:
    """A clock, and which of several times counts.

    Of one thread its own time, in which nobody else's work on the core counts, and the median: a
    model has no moment that is the best one for all its layers. Of several threads the time of the
    wall, and the least, since a thread that others hold up holds up all."""
    if torch.get_num_threads() == 1 and not is_gpu:
        return time.thread_time, median
    return time.perf_counter, median if is_gpu else min


class Rest:
    """What the other layers of a model do to the cache between two calls of one: their weights go
    through it, while the code and the small things that all layers use stay there."""

    def __init__(self, device: torch.device, dtype: torch.dtype):
        self._data = torch.zeros(CACHE_BYTES // 4, device=device)
        small = nn.Linear(SMALL, SMALL, device=device, dtype=dtype)
        self._small = small, SparseLinear.from_linear(small)
        self._x = torch.zeros(1, SMALL, device=device, dtype=dtype)

    def passes(self, size_bytes: float, hot: tuple[Tensor, ...], twin: Run | None) -> None:
        """The others are called, who hold so much, and `twin` at last, whose code is that of the
        layer, but not its weights; `hot` is what the layer gets from the one before it."""
        if size_bytes > IN_L2_BYTES:
            self._data[: int(size_bytes) // 4].sum()
            for t in hot:
                t.sum()
            for layer in self._small:
                layer(self._x)
            if twin:
                twin()


def usual_seconds(
    runs: dict[str, Run],
    rest: Rest,
    others_bytes: dict[str, float],
    hot: tuple[Tensor, ...],
    twins: dict[str, Run],
) -> dict[str, float]:
    """The time of a call of each; they take turns."""
    is_gpu = any(t.is_cuda for t in hot)
    now, usual = clock(is_gpu)
    taken: dict[str, list[float]] = {name: [] for name in runs}
    for run in runs.values():  # packing, allocation
        run()
    for i in range(ROUNDS):
        if i >= LEAST_ROUNDS and sum(map(sum, taken.values())) > ENOUGH_S:
            break
        for name, run in runs.items():
            for _ in range(1 if others_bytes[name] >= CACHE_BYTES else IN_A_ROW):
                rest.passes(others_bytes[name], hot, twins.get(name))
                seconds = _gpu_seconds(run) if is_gpu else _host_seconds(run, now)
            taken[name].append(seconds)
    return {name: usual(each) for name, each in taken.items()}


def _host_seconds(run: Run, now: Callable[[], float]) -> float:
    began = now()
    run()
    return now() - began


def _gpu_seconds(run: Run) -> float:
    """As an eager call takes: with its launch, where the GPU waits for that."""
    begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    torch.cuda.synchronize()
    begin.record()
    run()
    end.record()
    end.synchronize()
    return 1e-3 * begin.elapsed_time(end)
