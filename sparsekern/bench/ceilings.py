"""Ceilings of this very machine: arithmetic, and the memory at each distance.

CPU: loops in C++ (csrc/bench/bench_loops.h) of the instruction set that the kernels use. GPU:
torch's own dense product and copies, the best that a program meets there.
"""

import time
from collections.abc import Callable
from statistics import median

import torch

from ..kernels.cpu import panel

ROUNDS = 5
FMA_ROUNDS = 200_000
CHAIN_ROUNDS = 500_000
READ_BYTES = 2**28  # of one timing, by as many passes as it takes
MEMORY_BYTES = 2**29  # far beyond the part of a shared cache that one machine gets
L2_COPIES = 50
GPU_DENSE = 8192  # M, N and K of the dense product


def of_cpu(threads: int) -> dict[str, object]:
    """flop_per_s of multiply-adds, bytes_per_s and bytes of what is read by level, clock_hz.

    Empty without the C++ library. l3: eight times L2, which is memory where there is no third
    cache. Each thread reads a part of its own.
    """
    if panel._C is None:
        return {}
    panel._C.multiply_adds(FMA_ROUNDS, threads)  # threads wake up
    l1_bytes, l2_bytes = panel._C.cache_bytes(1) or 2**15, panel._C.cache_bytes(2) or 2**20
    sizes = {
        "l1": threads * l1_bytes // 2,
        "l2": threads * l2_bytes // 2,
        "l3": threads * l2_bytes * 8,
        "memory": MEMORY_BYTES,
    }
    memory = torch.ones(max(sizes.values()) // 4)
    return {
        "threads": threads,
        "clock_hz": _best_rate(lambda: panel._C.add_chain(CHAIN_ROUNDS)),
        "flop_per_s": _best_rate(lambda: panel._C.multiply_adds(FMA_ROUNDS, threads)),
        "bytes_per_s": {
            level: _best_rate(lambda size=size: _read(memory, size, threads))
            for level, size in sizes.items()
        },
        "bytes": sizes,
    }


def _read(memory: torch.Tensor, size_bytes: int, threads: int) -> int:
    """The bytes read."""
    rounds = max(1, READ_BYTES // size_bytes)
    panel._C.read_memory(memory.data_ptr(), size_bytes // 4, rounds, threads)
    return rounds * size_bytes


def _best_rate(work: Callable[[], int]) -> float:
    """Amount that `work` says it did, per second, in its best round."""
    best = 0.0
    for _ in range(ROUNDS):
        start = time.perf_counter()
        done = work()
        best = max(best, done / (time.perf_counter() - start))
    return best


def of_gpu(dtype: torch.dtype) -> dict[str, object]:
    """flop_per_s of a large dense product, bytes_per_s of copies in L2 and in memory."""
    from .replay_gpu import CudaClock, copy_bytes_per_s

    def copy_in_l2() -> None:
        for _ in range(L2_COPIES):
            target.copy_(source)

    a, b = (torch.randn(GPU_DENSE, GPU_DENSE, device="cuda", dtype=dtype) for _ in range(2))
    l2_bytes = torch.cuda.get_device_properties(0).L2_cache_size // 5
    source, target = (torch.zeros(l2_bytes, dtype=torch.uint8, device="cuda") for _ in range(2))
    clock, seconds = CudaClock(), {}
    for name, work in (("dense", lambda: torch.mm(a, b)), ("l2", copy_in_l2)):
        work()
        seconds[name] = median(clock.once(work) for _ in range(ROUNDS))
    return {
        "flop_per_s": 2 * GPU_DENSE**3 / seconds["dense"],
        "bytes_per_s": {
            "l2": L2_COPIES * 2 * l2_bytes / seconds["l2"],
            "memory": copy_bytes_per_s(),
        },
        "bytes": {"l2": 2 * l2_bytes, "memory": 2**32},
    }
