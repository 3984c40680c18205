"""Times of layers while their model runs, and of the model as a whole.

What a layer takes depends on what the others leave in the cache and in the allocator: called alone
it seems faster or slower than it is. Clocks before and after each layer see it in its place. Runs
with and without clocks take turns: of one without is the time of the whole model, and a moment in
which the machine is slow hits both.
"""

import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from statistics import median

import torch
from torch import nn

ROUNDS = 9
ENOUGH_S = 0.3  # of timed runs: no more rounds then, but for a second one
NEAR = 0.05  # relative difference of runs with clocks and without, beyond which there is one
LONG_S = 0.3  # of a run, in which clocks are nothing
ALONE = 3  # calls by which a layer is timed alone

Run = Callable[[], object]


@dataclass
class Times:
    """Seconds of a run of a model."""

    whole_s: float  # without clocks
    rest_s: float  # with clocks, less the layers
    layers_s: list[float]  # of each layer, all its calls together

    def plus(self, times: int, other: "Times", between_s: float) -> "Times":
        """This run and so many of another, each after so many seconds."""
        both = zip(self.layers_s, other.layers_s, strict=True)
        return Times(
            self.whole_s + times * (other.whole_s + between_s),
            self.rest_s + times * (other.rest_s + between_s),
            [a + times * b for a, b in both],
        )


def times_of(
    ready: Callable[[], Run],
    layers: Sequence[nn.Module],
    device: torch.device,
    is_whole_apart: bool = True,
) -> Times:
    """The times of what `ready` prepares: runs of a model that holds the layers. Without
    `is_whole_apart` a long run with clocks gives the whole too. Long runs are timed once, and once
    more where with clocks they took another time than without: a moment of the machine."""
    is_gpu = device.type == "cuda"
    now, usual = clock(is_gpu)
    wholes: list[float] = []
    rests: list[float] = []
    parts: list[list[float]] = [[] for _ in layers]
    spent, is_near = 0.0, False
    while len(wholes) < ROUNDS and (spent < ENOUGH_S or (len(wholes) == 1 and not is_near)):
        clocked = 0.0
        if layers:
            with _clocks(layers, now, is_gpu) as read:
                clocked = _seconds(ready(), now, is_gpu)
            seconds = read()
            rests.append(clocked - sum(seconds))
            for part, s in zip(parts, seconds, strict=True):
                part.append(s)
            spent += clocked
        if is_whole_apart or clocked < LONG_S:
            wholes.append(_seconds(ready(), now, is_gpu))
            spent += wholes[-1]
        else:
            wholes.append(clocked)
        is_near = not layers or abs(clocked - wholes[-1]) <= NEAR * wholes[-1]
    return Times(usual(wholes), usual(rests) if rests else 0.0, [usual(part) for part in parts])


def seconds_alone(runs: dict[str, Run], device: torch.device) -> dict[str, float]:
    """A first look: the time of a call of each; they take turns."""
    is_gpu = device.type == "cuda"
    now, usual = clock(is_gpu)
    taken: dict[str, list[float]] = {name: [] for name in runs}
    for i in range(ALONE + 1):
        for name, run in runs.items():
            seconds = _seconds(run, now, is_gpu)
            if i:  # the first packs and allocates
                taken[name].append(seconds)
    return {name: usual(each) for name, each in taken.items()}


def clock(is_gpu: bool) -> tuple[Callable[[], float], Callable[[list[float]], float]]:
    """A clock, and which of several times counts.

    Of one thread its own time, in which nobody else's work on the core counts, and the median.
    Of several threads the time of the wall, and the least, since a thread that others hold up holds
    up all."""
    if torch.get_num_threads() == 1 and not is_gpu:
        return time.thread_time, median
    return time.perf_counter, median if is_gpu else min


def _seconds(run: Run, now: Callable[[], float], is_gpu: bool) -> float:
    wait(is_gpu)
    began = now()
    run()
    wait(is_gpu)
    return now() - began


@contextmanager
def _clocks(
    layers: Sequence[nn.Module], now: Callable[[], float], is_gpu: bool
) -> Iterator[Callable[[], list[float]]]:
    """Inside, the calls of each layer are timed; what is yielded reads the sums afterwards. On a
    GPU marks in its queue are the clock: as a call takes there, launch included where it waits."""
    began: dict[int, list] = {i: [] for i in range(len(layers))}
    ended: dict[int, list] = {i: [] for i in range(len(layers))}

    def mark():
        if not is_gpu:
            return now()
        event = torch.cuda.Event(enable_timing=True)
        event.record()
        return event

    def clocked(i: int, layer: nn.Module) -> list:
        def before(module: nn.Module, args: tuple) -> None:
            began[i].append(mark())

        def after(module: nn.Module, args: tuple, output: object) -> None:
            ended[i].append(mark())

        return [
            layer.register_forward_pre_hook(before),
            layer.register_forward_hook(after, prepend=True),
        ]

    def read() -> list[float]:
        pairs = [zip(began[i], ended[i], strict=True) for i in range(len(layers))]
        if is_gpu:
            return [sum(1e-3 * a.elapsed_time(b) for a, b in pair) for pair in pairs]
        return [sum(b - a for a, b in pair) for pair in pairs]

    handles: list = []
    try:
        for i, layer in enumerate(layers):
            handles += clocked(i, layer)
        yield read
    finally:
        for handle in handles:
            handle.remove()


def wait(is_gpu: bool) -> None:
    if is_gpu:
        torch.cuda.synchronize()
