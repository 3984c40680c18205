"""A fair race: every competitor checked against fp64, then all of them timed side by side.

pytest-benchmark times one function in a row, and a machine's speed drifts. So each of its rounds is
preceded by one timed call of every rival, on the same core, from the same cold caches.
"""

import itertools
import os
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from functools import lru_cache
from statistics import median

import cpuinfo  # comes with pytest-benchmark
import torch
from torch import Tensor

from sparsekern import SparseTensor
from sparsekern.kernels import cpu
from sparsekern.kernels.problem import Problem
from sparsekern.kernels.table import pick
from sparsekern.testing import random_mask, relative_error

SHAPES = ((768, 768), (3072, 768), (768, 3072), (2048, 2048), (8192, 2048))  # N x K
SPARSITIES = (0.5, 0.75, 0.9, 0.95)

# Relative to |x| @ |W|.T; fp32 rounds to 6e-8 and dense products of these sizes stay below 1e-6.
TOLERANCE = 2e-6
BUDGET_S = 1.0  # of one measurement, without its peers
ROUNDS = (5, 50)  # at least and at most
PEER_ROUNDS = 3  # peers are slow, and beside the point where they are close

CORES = sorted(os.sched_getaffinity(0))  # at the start, before pin()


@dataclass(frozen=True)
class Workload:
    """One product: y[M, N] = x[M, K] @ W[N, K].T on `threads` cores."""

    M: int
    N: int
    K: int
    sparsity: float
    threads: int

    def __str__(self) -> str:
        return f"{self.N}x{self.K}-M{self.M}-{self.sparsity:.0%}-{self.threads}T"


@dataclass(frozen=True)
class Rival:
    """Another way to the same result. `result` brings what `run` returns into our layout."""

    name: str
    is_dense: bool
    run: Callable[[], object]
    result: Callable[[object], Tensor] = lambda y: y


def thread_counts() -> list[int]:
    return [threads for threads in (1, 2) if threads <= len(CORES)]


def cpu_name() -> str:
    """The processor's name as it calls itself."""
    return cpuinfo.get_cpu_info().get("brand_raw", "unknown CPU")  # on some ARM there is none


def isa() -> str:
    """The instruction set of sparsekern's kernels."""
    return cpu._C.isa() if cpu._C else "none"


def workloads(tokens: tuple[int, ...], quick: bool) -> list[Workload]:
    """All combinations, one thread first; with quick two shapes and the smaller M only."""
    shapes, sparsities = (SHAPES[:2], (0.75,)) if quick else (SHAPES, SPARSITIES)
    tokens = tuple(M for M in tokens if M <= 256) if quick else tokens
    grid = itertools.product(thread_counts(), shapes, tokens, sparsities)
    return [Workload(M, N, K, sparsity, t) for t, (N, K), M, sparsity in grid]


@lru_cache(maxsize=1)
def weight(N: int, K: int, sparsity: float) -> tuple[SparseTensor, Tensor]:
    """A random W and the same as a dense tensor [N, K], fp32."""
    generator = torch.Generator().manual_seed(0)
    mask = random_mask(N, K, sparsity, generator)
    dense = torch.randn(N, K, generator=generator) * mask
    return SparseTensor.from_dense(dense, mask), dense


def normal(*shape: int) -> Tensor:
    """fp32, the same numbers each time."""
    return torch.randn(shape, generator=torch.Generator().manual_seed(1))


def pin(threads: int) -> None:
    """Use exactly `threads` cores. Also moves the pools' threads that are there already (Linux)."""
    torch.set_num_threads(threads)
    for thread in os.listdir("/proc/self/task"):
        os.sched_setaffinity(int(thread), CORES[-threads:])


def exact(product: Callable[..., Tensor], *operands: Tensor) -> tuple[Tensor, Tensor]:
    """The product in fp64, and the scale of its errors: the product of the absolute operands."""
    wide = [t.double() for t in operands]
    return product(*wide), product(*(t.abs() for t in wide))


def check(ours: Callable[[], Tensor], rivals: list[Rival], exact: tuple[Tensor, Tensor]) -> None:
    """Nobody is timed who is wrong. Also the warm-up: every function has run once."""
    results = {rival.name: rival.result(rival.run()) for rival in rivals}
    for name, result in {"ours": ours(), **results}.items():
        error = relative_error(result, *exact)
        assert error < TOLERANCE, f"{name}: error {error:.1e} against fp64"


def describe(op: str, workload: Workload, W: SparseTensor) -> dict[str, object]:
    """What extra_info says of a product beside its workload."""
    M, N, K = workload.M, workload.N, workload.K
    problem = Problem(op, W.device.type, W.dtype, M, N, K, W.nnz)
    return {
        "nnz": W.nnz,
        "density": W.density,
        "dtype": str(W.dtype),
        "kernel": pick(problem).name,
        "useful_flop": 2 * M * W.nnz,
        "dense_flop": 2 * M * N * K,
    }


def race(
    benchmark,
    quick: bool,
    workload,
    op: str,
    ours: Callable[[], object],
    rivals: list[Rival],
    info: dict[str, object],
) -> None:
    """Time `ours` against its rivals, all of them warm. Times and `info` go to extra_info."""
    seconds: dict[str, list[float]] = {rival.name: [] for rival in rivals}

    def time_rivals() -> None:
        for rival in rivals:
            samples = seconds[rival.name]
            if rival.is_dense or len(samples) < PEER_ROUNDS:
                start = time.perf_counter()
                rival.run()
                samples.append(time.perf_counter() - start)

    start = time.perf_counter()
    for run in (ours, *(rival.run for rival in rivals if rival.is_dense)):
        run()
    once_s = time.perf_counter() - start
    least, most = ROUNDS
    rounds = PEER_ROUNDS if quick else min(most, max(least, int(BUDGET_S / once_s)))

    benchmark.group = f"{op} {workload}"
    benchmark.pedantic(ours, setup=time_rivals, rounds=rounds)
    benchmark.extra_info.update(op=op, **asdict(workload), **info)
    benchmark.extra_info["rivals"] = {
        rival.name: {
            "is_dense": rival.is_dense,
            "min_s": min(seconds[rival.name]),
            "median_s": median(seconds[rival.name]),
        }
        for rival in rivals
    }


def derive_ratios(benchmark: dict) -> None:
    """Add to a benchmark of the JSON: rates, and how many times the best dense call's time is ours.

    Medians are compared: round by round, all competitors met the same machine.
    """
    info, ours_s = benchmark["extra_info"], benchmark["stats"]["median"]
    rivals = info["rivals"].items()
    dense_s = min(times["median_s"] for _, times in rivals if times["is_dense"])
    info["speedup"] = dense_s / ours_s
    info["peer_speedups"] = {
        name: dense_s / times["median_s"] for name, times in rivals if not times["is_dense"]
    }
    for count in ("useful_flop", "dense_flop"):
        if count in info:
            info[f"{count}_per_s"] = info[count] / ours_s
