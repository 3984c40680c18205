"""A fair race: every competitor checked against fp64, then all of them timed side by side.

pytest-benchmark times one function in a row, and a machine's speed drifts. So each of its rounds is
preceded by one timed turn of every rival, on the same core, from the same cold caches.
"""

import itertools
import math
import os
import time
from collections.abc import Callable, Iterable
from dataclasses import asdict, dataclass, replace
from functools import lru_cache
from statistics import median

# Read when NumPy is loaded: OpenBLAS's threads would spin for 26 ms after their work, on the cores
# of whoever is next.
os.environ["OPENBLAS_THREAD_TIMEOUT"] = "4"

import cpuinfo  # comes with pytest-benchmark
import torch
from threadpoolctl import threadpool_limits
from torch import Tensor

from sparsekern import SparseTensor, Static
from sparsekern.kernels import cpu
from sparsekern.kernels.problem import Problem
from sparsekern.kernels.table import pick
from sparsekern.testing import random_mask, relative_error

SHAPES = ((768, 768), (3072, 768), (768, 3072), (2048, 2048), (8192, 2048))  # N x K
TWO_THREAD_SHAPES = ((3072, 768), (2048, 2048))
SPARSITIES = (0.5, 0.75, 0.9, 0.95, 0.98)

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
REST_S = 5e-3  # between competitors with two threads: pools spin after their work
COLD_BYTES = 160e6  # of the copies that a competitor with cold weights goes through
LOG_NORMAL_SIGMA = 0.5  # of the rows' scales in a magnitude-pruned W

DENSE = "dense"  # a call whose fastest is what all are held against
PACKED = "packed dense"  # a dense engine that lays out W beforehand: shown, not held against
SPARSE = "sparse"
OURS = "ours"

CORES = sorted(os.sched_getaffinity(0))  # at the start, before pin()


@dataclass(frozen=True)
class Workload:
    """One product: y[M, N] = x[M, K] @ W[N, K].T on `threads` cores."""

    M: int
    N: int
    K: int
    sparsity: float
    threads: int
    dtype: torch.dtype = torch.float32
    mask: str = "random"  # or "pruned": by magnitude, rows of unlike scales
    is_cold: bool = False  # W comes from memory, not from caches

    def __str__(self) -> str:
        name = f"{self.N}x{self.K}-M{self.M}-{self.sparsity:.0%}-{self.threads}T"
        dtype = "-bf16" if self.dtype == torch.bfloat16 else ""
        mask = "" if self.mask == "random" else f"-{self.mask}"
        return name + dtype + mask + ("-cold" if self.is_cold else "")


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

    def time(self, calls: int) -> float:
        """Seconds of one call, the mean of `calls` in a row."""
        if self.turn:
            return sum(self.turn() for _ in range(calls)) / calls
        start = time.perf_counter()
        for _ in range(calls):
            self.run()
        return (time.perf_counter() - start) / calls


def ours(run: Callable[[], Tensor], name: str = "sparsekern") -> Rival:
    return Rival(name, OURS, run)


def rotate(rivals: Iterable[Rival]) -> Rival:
    """One rival that goes through many, all alike but for their copy of the weights."""
    rivals = list(rivals)
    order = itertools.cycle(rivals)
    return replace(rivals[0], run=lambda: next(order).run(), copies=len(rivals))


def cpu_name() -> str:
    """The processor's name as it calls itself."""
    return cpuinfo.get_cpu_info().get("brand_raw", "unknown CPU")  # on some ARM there is none


def isa() -> str:
    """The instruction set of sparsekern's kernels."""
    return cpu._C.isa() if cpu._C else "none"


def workloads(
    quick: bool, *, tokens: Iterable[int], two_threads: Iterable[int] = (), **options
) -> list[Workload]:
    """The grid: all shapes with one thread, then the subset of shapes with two. Where there are
    more than two cores, all shapes with all of them too, if the grid has 1024 tokens.

    With quick one small shape, one sparsity and few tokens.
    """
    shapes, sparsities = (SHAPES[:1], (0.9,)) if quick else (SHAPES, SPARSITIES)
    parts = [(1, shapes, tokens)]
    if two_threads and len(CORES) > 1:
        parts.append((2, shapes if quick else TWO_THREAD_SHAPES, two_threads))
    if 1024 in tokens and len(CORES) > 2:
        parts.append((len(CORES), shapes, (1024,)))
    return [
        Workload(M, N, K, sparsity, threads, **options)
        for threads, shapes, tokens in parts
        for (N, K), sparsity, M in itertools.product(shapes, sparsities, tokens)
        if not quick or M <= 256
    ]


@lru_cache(maxsize=64)
def _weight(N: int, K: int, sparsity: float, mask: str) -> tuple[SparseTensor, Tensor]:
    generator = torch.Generator().manual_seed(0)
    dense = torch.randn(N, K, generator=generator)
    if mask == "pruned":
        dense *= torch.exp(LOG_NORMAL_SIGMA * torch.randn(N, 1, generator=generator))
        kept = Static(sparsity, "magnitude").mask("weight", dense)
    else:
        kept = random_mask(N, K, sparsity, generator)
    dense *= kept
    return SparseTensor.from_dense(dense, kept), dense


def weight(workload: Workload) -> tuple[SparseTensor, Tensor]:
    """W and the same as a dense tensor [N, K], both of the workload's dtype."""
    sparse, dense = _weight(workload.N, workload.K, workload.sparsity, workload.mask)
    if workload.dtype == torch.float32:
        return sparse, dense
    dtype = workload.dtype
    return with_values(sparse, sparse.values.to(dtype)), dense.to(dtype)


def with_values(W: SparseTensor, values: Tensor) -> SparseTensor:
    return SparseTensor(W.row_offsets, W.col_indices, values, W.shape)


def cold_copies(W: SparseTensor | Tensor) -> list[SparseTensor] | list[Tensor]:
    """As many copies as it takes to be cold at each use, if they are used in turn."""
    parts = [W] if isinstance(W, Tensor) else [W.row_offsets, W.col_indices, W.values]
    count = math.ceil(COLD_BYTES / sum(part.nbytes for part in parts))
    if isinstance(W, Tensor):
        return [W.clone() for _ in range(count)]
    return [SparseTensor(*(part.clone() for part in parts), W.shape) for _ in range(count)]


def normal(*shape: int) -> Tensor:
    """fp32, the same numbers each time."""
    return torch.randn(shape, generator=torch.Generator().manual_seed(1))


def pin(threads: int) -> None:
    """Use exactly `threads` cores. Also moves the pools' threads that are there already (Linux)."""
    threadpool_limits(threads)  # OpenBLAS, and MKL beside torch's own
    torch.set_num_threads(threads)
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


def describe(op: str, workload: Workload, W: SparseTensor) -> dict[str, object]:
    """What extra_info says of a product beside its workload."""
    M, N, K = workload.M, workload.N, workload.K
    problem = Problem(op, W.device.type, W.dtype, M, N, K, W.nnz)
    return {
        "nnz": W.nnz,
        "density": W.density,
        "kernel": pick(problem).name,
        "useful_flop": 2 * M * W.nnz,
        "dense_flop": 2 * M * N * K,
    }


def race(
    benchmark,
    quick: bool,
    workload,
    op: str,
    ours: Rival,
    rivals: list[Rival],
    info: dict[str, object],
    exact: tuple[Tensor, Tensor] | None = None,
    repeat: bool = False,
) -> None:
    """Time `ours` against its rivals. Times, errors and `info` go to extra_info.

    Nobody is timed before all are checked against `exact`: if we are wrong this fails, a rival that
    is wrong is marked. With `repeat` each turn is many calls: microseconds need it, and weights
    that are not cold are then in cache.
    """
    if workload.threads > 1:
        rivals = [rival for rival in rivals if rival.name not in OTHER_POOLS]
    tolerance = TOLERANCE[workload.dtype] if exact else math.inf
    checked = {r.name: check(r, exact) if exact else (0.0, 0.0) for r in (ours, *rivals)}
    errors = {name: error for name, (error, _) in checked.items()}
    assert errors[ours.name] < tolerance, f"error {errors[ours.name]:.1e} against fp64"

    contenders = [ours, *(rival for rival in rivals if rival.kind in (DENSE, OURS))]
    once_s = {rival.name: rival.time(1) for rival in contenders}
    calls = max(1, round(TURN_S / min(once_s.values()))) if repeat else 1
    least, most = (PEER_ROUNDS, PEER_ROUNDS) if quick else ROUNDS
    rounds = min(most, max(least, int(BUDGET_S / (calls * sum(once_s.values())))))

    seconds: dict[str, list[float]] = {rival.name: [] for rival in rivals}
    for rival in rivals:
        if rival not in contenders and checked[rival.name][1] > PEER_BUDGET_S:
            seconds[rival.name].append(checked[rival.name][1])  # so slow that once is enough

    def rest() -> None:
        if workload.threads > 1:
            time.sleep(REST_S)

    def time_rivals() -> None:
        for rival in rivals:
            samples = seconds[rival.name]
            is_enough = len(samples) >= PEER_ROUNDS or sum(samples) * calls > PEER_BUDGET_S
            if rival in contenders or not is_enough:
                rest()
                if repeat:
                    rival.run()  # back into its caches, or to its next copy
                samples.append(rival.time(calls))
        rest()
        if repeat:
            ours.run()

    def turn() -> None:
        for _ in range(calls):
            ours.run()

    benchmark.group = f"{op} {workload}"
    benchmark.pedantic(ours.run if calls == 1 else turn, setup=time_rivals, rounds=rounds)
    fields = {name: str(v) if name == "dtype" else v for name, v in asdict(workload).items()}
    benchmark.extra_info.update(op=op, **fields, **info, calls=calls, error=errors[ours.name])
    benchmark.extra_info["rivals"] = {
        rival.name: {
            "kind": rival.kind,
            "min_s": min(seconds[rival.name]),
            "median_s": median(seconds[rival.name]),
            "error": errors[rival.name],
            # Written so that NaN is wrong.
            "is_right": errors[rival.name] < tolerance,
        }
        for rival in rivals
    }


def derive_ratios(benchmark: dict) -> None:
    """Add to a benchmark of the JSON: seconds of a call, rates, and how many times faster than the
    best dense call we and all others are.

    Medians are compared: round by round, all competitors met the same machine. Nobody who is wrong
    is the best.
    """
    info = benchmark["extra_info"]
    if "rivals" not in info:
        return
    info["ours_s"] = benchmark["stats"]["median"] / info["calls"]
    rivals = info["rivals"].items()
    right = [(name, rival) for name, rival in rivals if rival["is_right"]]
    dense = {name: rival["median_s"] for name, rival in right if rival["kind"] == DENSE}
    info["best_dense"] = min(dense, key=dense.get)
    info["dense_s"] = dense[info["best_dense"]]
    info["speedup"] = info["dense_s"] / info["ours_s"]
    info["speedups"] = {
        name: info["dense_s"] / rival["median_s"] for name, rival in rivals if name not in dense
    }
    sparse = [info["speedups"][name] for name, rival in right if rival["kind"] == SPARSE]
    info["best_peer"] = max(sparse, default=None)
    for count in ("useful_flop", "dense_flop"):
        if count in info:
            info[f"{count}_per_s"] = info[count] / info["ours_s"]
