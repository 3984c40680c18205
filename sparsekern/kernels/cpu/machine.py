"""This machine, as a plan sees it: vectors, caches, and what its inner loops are good at.

The rates are measured once in a process, in about a millisecond. Plans go by ratios of them, with
thresholds far from what any processor measured so far has: equal machines get equal plans, and so
equal bits.
"""

import time
import warnings
from collections.abc import Callable
from functools import lru_cache
from pathlib import Path
from typing import NamedTuple

import torch

# Why `_C` is None. The folder tells a checkout that Python found before what was installed.
NO_LIBRARY = f"the C++ library is not built in {Path(__file__).parents[2]}"
try:
    from ... import _C
except ImportError as error:  # the rows stay in the kernel table and say so
    _C = None
    if error.name != __name__.partition(".")[0]:  # it is there: the package does not lack a name
        NO_LIBRARY = f"the C++ library does not load ({error})"
    warnings.warn(f"sparsekern: {NO_LIBRARY}: on a CPU all products run dense", stacklevel=2)

ROUNDS = 9  # the best counts: others may be at work on the core
ADDS, PASSES = 4000, {1: 30, 2: 2}  # of a round: 10 to 50 us
# Of the rate on registers. With two loads a cycle, and ports that take a pair apart beside the
# multiply-adds: 0.8 to 1 both. With one load, and none: about 0.5.
L1_FEEDS = PAIRS_PAY = 0.66
DOTS_PAY = 1.2  # of the rate with floats, where L1 feeds: elsewhere they were not measured


class Machine(NamedTuple):
    """The properties of a machine that a plan depends on."""

    isa: str
    lanes: int  # floats in a vector, or tokens of what panels hold
    l1_bytes: int  # of one core; 0: unknown
    l2_bytes: int
    has_bf16_tiles: bool  # AMX: torch.mm multiplies bfloat16 at eight times the rate of float32
    has_bf16_products: bool = False  # AVX512-BF16: torch.mm multiplies it at twice that rate
    l1_feeds: bool = False  # multiply-adds read L1 as fast as registers; L2 is then far behind
    has_pairs: bool = False  # panels of bfloat16 are multiplied as fast as those of float32
    has_dots: bool = False  # dot products of bfloat16 in one instruction, faster than float32


class Rates(NamedTuple):
    """FLOP/s of one core's multiply-adds: on registers, and with a panel in a cache, of float32,
    of bfloat16 widened on the way, and dot products of bfloat16."""

    registers: float
    l1: float
    l2: float
    pairs: float
    dots: float | None  # None without an instruction for them


@lru_cache(maxsize=1)
def rates() -> Rates:
    panel = torch.zeros(2**20, dtype=torch.float32, device="cpu")
    sizes = {1: _C.cache_bytes(1) or 2**15, 2: min(_C.cache_bytes(2) or 2**19, 2**21)}

    def multiply(step: str, level: int) -> Callable[[], int]:
        size, step = sizes[level] // 2 // 1024 * 1024, getattr(_C.Step, step)
        return lambda: _C.multiply_panel(step, panel.data_ptr(), size, PASSES[level])

    loops = {
        "registers": lambda: _C.multiply_adds(ADDS, 1),
        "l1": multiply("floats", 1),
        "l2": multiply("floats", 2),
        "pairs": multiply("pairs", 1),
    }
    if _C.has_bf16_dots():
        loops["dots"] = multiply("dots", 1)
    best = dict.fromkeys(loops, 0.0)
    for _ in range(ROUNDS):  # in turn: a slow moment hits all alike
        for name, run in loops.items():
            began = time.perf_counter()
            flop = run()
            best[name] = max(best[name], flop / (time.perf_counter() - began))
    dots = best.pop("dots", None)
    return Rates(**best, dots=dots)


@lru_cache(maxsize=1)
def machine() -> Machine:
    """This machine, as its C++ library and torch see it."""
    found = rates()
    l1_feeds = found.l1 > L1_FEEDS * found.registers
    return Machine(
        _C.isa(),
        _C.lanes(),
        _C.cache_bytes(1),
        _C.cache_bytes(2),
        has_bf16_tiles=torch.cpu._is_amx_tile_supported(),
        has_bf16_products=torch.cpu._is_avx512_bf16_supported(),
        l1_feeds=l1_feeds,
        has_pairs=found.pairs > PAIRS_PAY * found.registers,
        has_dots=l1_feeds and found.dots is not None and found.dots > DOTS_PAY * found.l1,
    )


def machine_name(machine: Machine) -> str:
    """Key of the crossover table: machines with equal keys get equal plans."""
    traits = {
        "tiles": machine.has_bf16_tiles,
        "bf16": machine.has_bf16_products and not machine.has_bf16_tiles,
        "l1": machine.l1_feeds,
        "pairs": machine.has_pairs,
        "dots": machine.has_dots,
    }
    found = [name for name, has in traits.items() if has]
    return " ".join([machine.isa, f"{machine.l1_bytes}", f"{machine.l2_bytes}", *found])


def rates_in_words(found: Rates) -> str:
    """One line for `info`."""

    def in_words(rate: float) -> str:
        return f"{1e-9 * rate:.0f}"

    text = f"{in_words(found.registers)} GFLOP/s a core, with a panel in L1 {in_words(found.l1)}"
    text += f", in L2 {in_words(found.l2)}, of bfloat16 {in_words(found.pairs)}"
    return text if found.dots is None else f"{text}, its dot products {in_words(found.dots)}"
