"""Which of cuSPARSELt's algorithms multiplies a shape the fastest on this GPU.

The library numbers them, and its own choice is not the fastest. So the first product of a shape
times all of them on random numbers, with and without its way to split the columns, and keeps the
fastest that gives the right result, the same one each time: some numbers of some versions do not
(pytorch/pytorch#155333). What was chosen stands in the user's cache folder, by GPU and version.
"""

import json
import statistics
from collections.abc import Callable
from functools import cache

import torch
from torch import Tensor

from ...files import read_cached, write_cached
from .cusparselt import Error, Plan, Way, library

SPLITS = (1, -1)
RUNS, FINAL_RUNS, REPEATED = 3, 9, 20
FINALISTS = 3
# Of an element, beside that of the root mean square: two roundings.
TOLERANCE = {torch.bfloat16: 2**-7, torch.float16: 2**-10}


@cache
def _chosen(device: int) -> dict[str, list[int]]:
    """By the key of a shape: number of the algorithm, split_k."""
    content = read_cached(_file(device))
    return json.loads(content) if content else {}


def _file(device: int) -> str:
    name = "-".join(torch.cuda.get_device_name(device).lower().split())
    return f"cusparselt-{'.'.join(map(str, library().version))}-{name}.json"


def way_of(
    n: int,
    k: int,
    m: int,
    dtype: torch.dtype,
    device: int,
    make: Callable[[], tuple[Tensor, Tensor]],
) -> Way:
    """The way to multiply x [m, k] and W [n, k]. make(): an operand with random values and W
    itself. While a CUDA graph is captured nothing is timed, and the library chooses what is not
    known."""
    # Neighbouring numbers of tokens share one, or a served model would time each prompt.
    key = f"{n} {k} {1 << (m - 1).bit_length()} {str(dtype).removeprefix('torch.')}"
    chosen = _chosen(device)
    if key in chosen:
        return Way(*chosen[key])
    if torch.cuda.is_current_stream_capturing():
        return Way(None, 1)
    way = fastest(m, device, *make())
    chosen[key] = list(way)
    try:
        write_cached(_file(device), json.dumps(chosen).encode())
    except OSError:
        pass  # it is measured again by the next process
    return way


def fastest(m: int, device: int, operand: Tensor, w: Tensor) -> Way:
    """The fastest way that is right, by measurements on the current stream. RuntimeError if none
    is."""
    n, k = w.shape
    x = torch.randn(m, k, generator=torch.Generator(w.device).manual_seed(0), device=w.device)
    x = x.to(w.dtype)
    want = torch.mm(x, w.t())
    times: list[tuple[float, Way]] = []
    numbers = Plan(n, k, m, w.dtype, device).algorithms()
    for way in [Way(number, split) for split in SPLITS for number in range(numbers)]:
        try:
            plan = Plan(n, k, m, w.dtype, device, way)
            y = plan.multiply(operand, x)
            if _is_right(y, want):
                times.append((_seconds(plan, operand, x, RUNS), way))
        except Error:
            continue  # the shape is not for this one
    finals = []
    for _, way in sorted(times)[:FINALISTS]:
        plan = Plan(n, k, m, w.dtype, device, way)
        y = plan.multiply(operand, x)
        if all(torch.equal(plan.multiply(operand, x), y) for _ in range(REPEATED)):
            finals.append((_seconds(plan, operand, x, FINAL_RUNS), way))
    if not finals:
        raise RuntimeError(f"cuSPARSELt: no algorithm multiplies [{m}, {k}] and [{n}, {k}] right")
    return min(finals)[1]


def _is_right(y: Tensor, want: Tensor) -> bool:
    want = want.float()
    bound = TOLERANCE[y.dtype] * (want.abs() + want.square().mean().sqrt())
    return bool(((y.float() - want).abs() <= bound).all())


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
