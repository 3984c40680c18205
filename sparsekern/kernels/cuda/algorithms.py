"""Which of cuSPARSELt's algorithms multiplies a shape the fastest on this GPU.

The library numbers them, and its own choice is not the fastest. So the first product of a shape
times some of them on random numbers, and keeps the fastest that gives the right result, the same
one each time: some of some versions do not (pytorch/pytorch#155333). What was chosen stands in the
user's cache folder, by GPU and version.
"""

import json
import statistics
import warnings
from collections.abc import Callable
from contextlib import suppress
from functools import cache

import torch
from torch import Tensor

from ...files import read_cached, write_cached
from .cusparselt import Algorithm, Error, Plan, loaded

RUNS, FINAL_RUNS, REPEATED = 3, 9, 20
FINALISTS = 3
NONE_RIGHT = Algorithm(-1)
# Those that were the fastest of some shape on an H100 or H200, by versions 0.8.0 and 0.8.1. Others
# are not tried: of those for float16 one ended in an illegal instruction.
CANDIDATES = tuple(map(Algorithm, (8, 11, 12, 15, 16, 17, 20)))
# Of an element and of the root mean square of all: a rounding, and what the order of sums makes.
TOLERANCE = 2**-7


@cache
def _chosen(device: int) -> dict[str, Algorithm]:
    """By the key of a shape."""
    content = read_cached(_file(device))
    return {key: Algorithm(*found) for key, found in json.loads(content or b"{}").items()}


def _file(device: int) -> str:
    name = "-".join(torch.cuda.get_device_name(device).lower().split())
    return f"cusparselt-2-{'.'.join(map(str, loaded().version))}-{name}.json"


def algorithm_of(
    n: int,
    k: int,
    m: int,
    device: int,
    make: Callable[[], tuple[Tensor, Tensor]],
) -> Algorithm | None:
    """The algorithm for x [m, k] and W [n, k], or NONE_RIGHT. make(): an operand with random values
    and W itself. While a CUDA graph is captured nothing is timed, and the library chooses (None)
    where nothing is known."""
    # Neighbouring numbers of tokens share one, or a served model would time each prompt.
    key = f"{n} {k} {1 << (m - 1).bit_length()}"
    chosen = _chosen(device)
    if key not in chosen:
        if torch.cuda.is_current_stream_capturing():
            return None
        chosen[key] = fastest(m, device, *make())
        with suppress(OSError):  # the next process times it again
            write_cached(_file(device), json.dumps(chosen).encode())
    return chosen[key]


def fastest(m: int, device: int, operand: Tensor, w: Tensor) -> Algorithm:
    """The fastest algorithm that is right; NONE_RIGHT, and a warning, if none is."""
    n, k = w.shape
    x = torch.randn(m, k, generator=torch.Generator(w.device).manual_seed(0), device=w.device)
    x = x.to(w.dtype)
    want = x.float() @ w.t().float()
    bound = TOLERANCE * (want.abs() + want.square().mean().sqrt())
    times: list[tuple[float, Algorithm]] = []
    for algorithm in CANDIDATES:
        try:
            plan = Plan(n, k, m, device, algorithm)
            y = plan.multiply(operand, x)
        except Error:
            continue  # it does not take the shape
        if ((y.float() - want).abs() <= bound).all():
            times.append((_seconds(plan, operand, x, RUNS), algorithm))
    finals = []
    for _, algorithm in sorted(times)[:FINALISTS]:
        plan = Plan(n, k, m, device, algorithm)
        y = plan.multiply(operand, x)
        if all(torch.equal(plan.multiply(operand, x), y) for _ in range(REPEATED)):
            finals.append((_seconds(plan, operand, x, FINAL_RUNS), algorithm))
    if not finals:
        warnings.warn(
            f"cuSPARSELt: no algorithm multiplies [{m}, {k}] and [{n}, {k}] right: W is written "
            "out for such products",
            stacklevel=2,
        )
        return NONE_RIGHT
    return min(finals)[1]


def _seconds(plan: Plan, operand: Tensor, x: Tensor, runs: int) -> float:
    times = []
    for _ in range(runs):
        begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        begin.record()
        plan.multiply(operand, x)
        end.record()
        end.synchronize()
        times.append(begin.elapsed_time(end) / 1e3)
    return statistics.median(times)
