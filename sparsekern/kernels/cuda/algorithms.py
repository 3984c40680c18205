"""Which of cuSPARSELt's algorithms multiplies a shape the fastest on this GPU.

The library numbers them, and its own choice is not the fastest. So the first product of a shape
times some of them on random numbers, and keeps the fastest that gives the right result, the same
one each time: some of some versions do not (pytorch/pytorch#155333). One that was wrong once is
never tried again, of no shape of that type. What was found stands in the user's cache folder, by
GPU and version, as long as the same ones are tried.
"""

import json
import statistics
import warnings
from contextlib import suppress
from dataclasses import dataclass, field
from functools import cache

import torch
from torch import Tensor

from ...files import read_cached, write_cached
from . import e4m3
from .cusparselt import Plan, compress, loaded
from .vendor import Error

ROUNDS, FINAL_ROUNDS, REPEATED = 3, 9, 20
LAUNCHES = 6  # of a round, through as many copies of W
COLD_BYTES = 2**27  # of those copies, at most
AHEAD_CYCLES = 400_000  # for which the GPU waits while a round is queued
FINALISTS = 3
NONE_RIGHT = -1
# Those that were the fastest of some shape on an H100 or H200, by versions 0.8.0 and 0.8.1; in
# float16 also those that were right (docs/log.md). Others are not tried: of those for float16 one
# ended in an illegal instruction, after which a process can use its GPU no more. Of E4M3 all 26
# were tried on an H200.
CANDIDATES: dict[torch.dtype, tuple[int, ...]] = {
    torch.bfloat16: (0, 7, 8, 11, 12, 13, 15, 16, 17, 20),
    torch.float16: (1, 4, 7, 8, 11, 12, 13, 15, 16, 17, 20),
    e4m3.DTYPE: tuple(range(26)),
}
# Of an element and of the root mean square of all: a rounding, and what the order of sums makes; in
# E4M3 the tensor cores keep 14 bits of a sum.
TOLERANCE = {torch.bfloat16: 2**-7, torch.float16: 2**-7, e4m3.DTYPE: 2**-5}


@dataclass
class _Known:
    chosen: dict[str, int] = field(default_factory=dict)  # by the key of a shape
    wrong: dict[str, set[int]] = field(default_factory=dict)  # by type


@cache
def _known(device: int) -> _Known:
    content = json.loads(read_cached(_file(device)) or b"{}")
    if content.get("tried") != _tried():
        return _Known()
    return _Known(content["chosen"], {name: set(found) for name, found in content["wrong"].items()})


def _tried() -> dict[str, list[int]]:
    return {_name(dtype): [*found] for dtype, found in CANDIDATES.items()}


def _file(device: int) -> str:
    name = "-".join(torch.cuda.get_device_name(device).lower().split())
    return f"cusparselt-algorithms-{'.'.join(map(str, loaded().version))}-{name}.json"


def algorithm_of(n: int, k: int, m: int, dtype: torch.dtype, device: torch.device) -> int | None:
    """The algorithm for x [m, k] and W [n, k] of `dtype`, or NONE_RIGHT. While a CUDA graph is
    captured nothing is timed, and the library chooses (None) where nothing is known."""
    # Neighbouring numbers of tokens share one, or a served model would time each prompt.
    key = f"{_name(dtype)} {n} {k} {1 << (m - 1).bit_length()}"
    known = _known(device.index)
    if key not in known.chosen:
        if torch.cuda.is_current_stream_capturing():
            return None
        wrong = known.wrong.setdefault(_name(dtype), set())
        with torch.cuda.device(device):
            known.chosen[key] = fastest(n, k, m, dtype, device, wrong)
        found = {name: sorted(known.wrong[name]) for name in list(known.wrong)}  # others may add
        content = {"tried": _tried(), "chosen": known.chosen, "wrong": found}
        with suppress(OSError):  # the next process times it again
            write_cached(_file(device.index), json.dumps(content).encode())
    return known.chosen[key]


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def fastest(
    n: int, k: int, m: int, dtype: torch.dtype, device: torch.device, wrong: set[int]
) -> int:
    """The fastest algorithm that is right and not in `wrong`, which gets those that are;
    NONE_RIGHT, and a warning, if none is left."""
    generator = torch.Generator(device).manual_seed(0)

    def normal(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator, device=device)

    w = torch.where(two_of_four_mask(n, k, device), normal(n, k), 0).to(dtype)
    x = normal(m, k).to(dtype)
    want = x.float() @ w.t().float()
    bound = TOLERANCE[dtype] * (want.abs() + want.square().mean().sqrt())
    operand = compress(w)
    copies = max(1, min(LAUNCHES, COLD_BYTES // operand.nbytes))
    operands = [operand, *(operand.clone() for _ in range(copies - 1))]
    times: list[tuple[float, int]] = []
    plans: dict[int, Plan] = {}
    for algorithm in CANDIDATES[dtype]:
        if algorithm in wrong:
            continue
        try:
            plan = Plan(n, k, m, device.index, algorithm, dtype=dtype)
            y = plan.multiply(operand, x)
        except Error:
            continue  # it does not take the shape
        if ((y.float() - want).abs() <= bound).all():
            plans[algorithm] = plan
            times.append((_seconds(plan, operands, x, ROUNDS), algorithm))
        else:
            wrong.add(algorithm)
    finals = []
    for _, algorithm in sorted(times):
        plan = plans[algorithm]
        y = plan.multiply(operand, x)
        if any(not torch.equal(plan.multiply(operand, x), y) for _ in range(REPEATED)):
            wrong.add(algorithm)
            continue
        finals.append((_seconds(plan, operands, x, FINAL_ROUNDS), algorithm))
        if len(finals) == FINALISTS:
            break
    if not finals:
        warnings.warn(
            f"cuSPARSELt: no algorithm multiplies [{m}, {k}] and [{n}, {k}] right in "
            f"{_name(dtype)}",
            stacklevel=2,
        )
        return NONE_RIGHT
    return min(finals)[1]


def two_of_four_mask(n: int, k: int, device: torch.device) -> Tensor:
    """bool [n, k]: two of each four neighbours, all six pairs in turn."""
    pairs = torch.tensor([(0, 1), (0, 2), (0, 3), (1, 2), (1, 3), (2, 3)], device=device)
    fours = torch.zeros(6, 4, dtype=torch.bool, device=device).scatter_(1, pairs, True)
    turns = torch.arange(k // 4, device=device) + torch.arange(n, device=device).unsqueeze(1)
    return fours[turns % 6].view(n, k)


def _seconds(plan: Plan, operands: list[Tensor], x: Tensor, rounds: int) -> float:
    times = []
    for _ in range(rounds):
        begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        torch.cuda._sleep(AHEAD_CYCLES)
        begin.record()
        for i in range(LAUNCHES):
            plan.multiply(operands[i % len(operands)], x)
        end.record()
        end.synchronize()
        times.append(begin.elapsed_time(end) / 1e3)
    return statistics.median(times)
