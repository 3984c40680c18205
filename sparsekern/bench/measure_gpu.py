"""Decode on one NVIDIA GPU: every way to y = x W^T checked against fp64, then timed side by side.

Every call reads another copy of W, and the copies together are far larger than the L2 cache: the
weights come from memory, as in decoding. All competitors take turns, replay by replay, on the same
W and the same x. Needs torch and sparsekern alone, and no GPU to be imported.
"""

import math
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from ..tensor import SparseTensor
from ..testing import frobenius_error
from .records import DENSE
from .replay_gpu import Clock, Contender, Runner, race
from .two_way_mask import TWO_WAY, TwoWayMask

SHAPES = (  # N x K
    (6144, 2048),
    (8192, 2048),
    (2048, 8192),
    (11008, 4096),
    (4096, 11008),
    (28672, 8192),
    (12288, 12288),
)
SPARSITIES = (0.5, 0.7, 0.8, 0.9, 0.95)
TOKENS = (1, 8, 16, 32, 64)
MASKS = ("random", "pruned")
# Of a pruned W's rows and columns: log-normal scales.
ROW_SIGMA, COLUMN_SIGMA = 0.15, 0.3
SAMPLE_STEP = 17  # a threshold of magnitudes is read off every 17th of them

# Relative Frobenius norm against fp64. Rounding the result alone gives 1.7e-3 and 2e-4.
TOLERANCE = {torch.bfloat16: 5e-3, torch.float16: 1e-3}
COLD_BYTES = 210e6  # of the copies of W that a competitor goes through; L2 holds 60e6
LAUNCHES = 40, 160  # of one replay, at least and at most
ROUNDS = 7
NEAR_BEST = 1.15  # a dense call slower than this times the best is timed for one W only


@dataclass(frozen=True)
class Grid:
    """The products to measure: all combinations."""

    shapes: Sequence[tuple[int, int]] = SHAPES
    tokens: Sequence[int] = TOKENS
    sparsities: Sequence[float] = SPARSITIES
    masks: Sequence[str] = MASKS
    dtype: torch.dtype = torch.bfloat16


QUICK = Grid(((512, 1024),), (1, 16), (0.5, 0.9), ("random",))


@dataclass(frozen=True)
class Way:
    """A way to the product that has its own layout of W.

    Neither lay_out(W), nor the copies that clone makes of it, nor prepare(x) is timed. `where`
    says for which (M, sparsity, mask) it runs.
    """

    name: str
    kind: str
    lay_out: Callable[[SparseTensor], Any]
    clone: Callable[[Any], Any]
    multiply: Callable[[Any, Any], Any]  # (prepared x, layout) -> y
    nbytes: Callable[[Any], int]  # of a layout, as much of it as a call reads at least
    where: Callable[[int, float, str], bool] = lambda M, sparsity, mask: True
    prepare: Callable[[Tensor], Any] = lambda x: x
    result: Callable[[Any], Tensor] = lambda y: y
    is_graphed: bool = True
    note: str = ""  # what sets it apart from the others
    missing: str | None = None  # why it cannot run here
    # Of a way that multiplies another W or x than the others: these.
    dense_of: Callable[[Any], Tensor] | None = None
    x_of: Callable[[Tensor], Tensor] | None = None


def weight(
    N: int, K: int, sparsity: float, mask: str, dtype: torch.dtype, generator: torch.Generator
) -> tuple[Tensor, Tensor]:
    """W [N, K] with its zeros, and the bool mask of what is stored, of fresh random numbers."""

    def normal(*shape: int) -> Tensor:
        return torch.empty(shape, device=generator.device).normal_(generator=generator)

    W = normal(N, K)
    if mask == "pruned":
        W *= torch.exp(ROW_SIGMA * normal(N, 1)) * torch.exp(COLUMN_SIGMA * normal(1, K))
        magnitude = W.abs()
        sample = magnitude.flatten()[::SAMPLE_STEP].sort().values
        kept = magnitude >= sample[int(sparsity * len(sample))]
    elif mask == TWO_WAY:
        kept = TwoWayMask(sparsity).mask("W", W)
    else:
        kept = torch.empty_like(W).uniform_(generator=generator) >= sparsity
    return (W * kept).to(dtype), kept


@contextmanager
def blas(library: str) -> Iterator[None]:
    before = torch.backends.cuda.preferred_blas_library()
    torch.backends.cuda.preferred_blas_library(library)
    try:
        yield
    finally:
        torch.backends.cuda.preferred_blas_library(before)


def in_blas(library: str, call: Callable[..., Tensor], *operands: Tensor) -> Tensor:
    with blas(library):
        return call(*operands)


def dense_contenders(x: Tensor, copies: list[Tensor], turned: list[Tensor]) -> list[Contender]:
    """Every dense call: both libraries, both layouts of the result and of W ([N, K] and [K, N])."""

    def contender(name: str, library: str, call: Callable, weights: list[Tensor], result=None):
        calls = [partial(in_blas, library, call, W) for W in weights]
        return Contender(f"{name} {library}", DENSE, calls, result or (lambda y: y))

    found = []
    for library in ("cublas", "cublaslt"):
        found += [
            contender("F.linear", library, lambda W: F.linear(x, W), copies),
            contender("mm(W, x.t())", library, lambda W: torch.mm(W, x.t()), copies, torch.t),
            contender("mm(x, W[K, N])", library, lambda W: torch.mm(x, W), turned),
        ]
    if x.shape[0] == 1:
        v = x[0]
        found.append(contender("mv", "cublas", lambda W: torch.mv(W, v), copies, lambda y: y[None]))
    return found


def copies_of(nbytes: int, launches: int) -> int:
    """How many copies of `nbytes` it takes to be cold at each use, if they are used in turn."""
    return min(launches, max(2, math.ceil(COLD_BYTES / max(1, nbytes))))


def launches_of(N: int, K: int, grid: Grid) -> int:
    """The same for all competitors: enough for each to go through all of its copies."""
    density = max(1e-3, 1 - max(grid.sparsities))
    fewest, most = LAUNCHES
    return min(most, max(fewest, math.ceil(COLD_BYTES / (N * K * density * grid.dtype.itemsize))))


def cells(
    grid: Grid,
    ways: Sequence[Way],
    clock: Clock,
    generator: torch.Generator,
    rounds: int = ROUNDS,
    deadline: float = math.inf,
) -> Iterator[dict]:
    """A record for each product, in the order of masks, shapes, sparsities, tokens.

    All numbers come from `generator`, on its device: one of our own, which a capture that failed
    cannot upset. No new W is begun after `deadline`, a time.monotonic().
    """
    ways = [way for way in ways if way.missing is None]
    for mask in grid.masks:
        for N, K in grid.shapes:
            shape = Shape(N, K, grid, clock, generator, rounds)
            for sparsity in grid.sparsities:
                if time.monotonic() > deadline:
                    return
                yield from shape.cells(sparsity, mask, ways)
            if generator.device.type == "cuda":
                del shape
                torch.cuda.empty_cache()  # of the graphs' own pools


class Shape:
    """The dense copies of W, the tokens, and the dense calls captured over them.

    They are filled with new numbers for every mask, so the graphs stay and the contents change.
    """

    def __init__(
        self,
        N: int,
        K: int,
        grid: Grid,
        clock: Clock,
        generator: torch.Generator,
        rounds: int,
    ):
        self.N, self.K, self.grid = N, K, grid
        self.clock, self.generator, self.rounds = clock, generator, rounds
        self.launches = launches_of(N, K, grid)
        count = copies_of(N * K * grid.dtype.itemsize, self.launches)
        self.copies = [self._empty(N, K) for _ in range(count)]
        self.turned = [self._empty(K, N) for _ in range(count)]
        self.x = {M: self._empty(M, K) for M in grid.tokens}
        self.dense: dict[int, list[Runner]] = {}

    def _empty(self, *shape: int) -> Tensor:
        return torch.empty(shape, dtype=self.grid.dtype, device=self.generator.device)

    def cells(self, sparsity: float, mask: str, ways: list[Way]) -> Iterator[dict]:
        dtype = self.grid.dtype
        W, kept = weight(self.N, self.K, sparsity, mask, dtype, self.generator)
        for copy, turned in zip(self.copies, self.turned, strict=True):
            copy.copy_(W)
            turned.copy_(W.t())
        sparse, wide = SparseTensor.from_dense(W, kept), W.double()
        del W, kept
        layouts: dict[int, list] = {}  # by id of the way
        for M in self.grid.tokens:
            x = self.x[M].normal_(generator=self.generator)
            exact = x.double() @ wide.t()
            failed: dict[str, dict] = {}
            if M not in self.dense:
                self.dense[M] = [
                    runner
                    for each in dense_contenders(x, self.copies, self.turned)
                    for runner in attempt(failed, each, partial(self._check, each, exact))
                ]
            runners = list(self.dense[M])
            for way in ways:
                if way.where(M, sparsity, mask):
                    make = partial(self._runner, way, sparse, x, exact, layouts)
                    runners += attempt(failed, way, make)
            records = race(runners, exact, TOLERANCE[dtype], self.clock, self.rounds)
            self._keep_near_best(M, records)
            yield {
                **{"op": "spmm", "device": "cuda", "M": M, "N": self.N, "K": self.K},
                **{"sparsity": sparsity, "nnz": sparse.nnz, "mask": mask, "threads": 0},
                **{"dtype": str(dtype).removeprefix("torch."), "is_cold": True},
                "ways": records | failed,
            }

    def _runner(
        self, way: Way, sparse: SparseTensor, x: Tensor, exact: Tensor, layouts: dict[int, list]
    ) -> Runner:
        if id(way) not in layouts:
            first = way.lay_out(sparse)
            count = copies_of(way.nbytes(first), self.launches)
            layouts[id(way)] = [first, *(way.clone(first) for _ in range(count - 1))]
        copies = layouts[id(way)]
        operand = way.prepare(x)
        calls = [lambda copy=copy: way.multiply(operand, copy) for copy in copies]
        info = {"bytes": way.nbytes(copies[0])} | ({"note": way.note} if way.note else {})
        own = None
        if way.dense_of:
            own = (way.x_of or (lambda x: x))(x).double() @ way.dense_of(copies[0]).double().t()
            info["rounding"] = frobenius_error(own, exact)
        contender = Contender(way.name, way.kind, calls, way.result, way.is_graphed, info, own)
        return self._check(contender, exact)

    def _check(self, contender: Contender, exact: Tensor) -> Runner:
        return Runner(contender, self.launches, exact, self.clock)

    def _keep_near_best(self, M: int, records: dict[str, dict]) -> None:
        """The other dense calls need no more timing: their graphs and turns would cost the most."""
        timed = [(runner, records[runner.contender.name]) for runner in self.dense[M]]
        times = {runner: record["median_s"] for runner, record in timed if record["is_right"]}
        limit = NEAR_BEST * min(times.values(), default=0)
        self.dense[M] = [runner for runner, taken in times.items() if taken <= limit]


def attempt(
    failed: dict[str, dict], contender: Contender | Way, make: Callable[[], Runner]
) -> list[Runner]:
    """Call `make`; where it fails, note the reason in `failed`, and the others go on."""
    try:
        return [make()]
    except Exception as error:
        reason = f"{type(error).__name__}: {error}".splitlines()[0]
        failed[contender.name] = {"kind": contender.kind, "failed": reason, "is_right": False}
        return []
