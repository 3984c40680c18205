"""The products of `bench --device cuda`: forward with cold weights, and a training step.

What dispatch makes of a SparseTensor, against every dense call of cuBLAS and cuBLASLt and against
torch's CSR.
"""

from collections.abc import Callable, Iterator
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor

from ..kernels.problem import Problem
from ..kernels.table import pick
from ..matmul import linear
from ..tensor import SparseTensor, expand_rows
from .measure_gpu import TOLERANCE, Grid, Way, attempt, cells, weight
from .peers_gpu import clone, torch_csr
from .replay_gpu import DENSE, OURS, Clock, Contender, CudaClock, Runner, race

NAME = "sparsekern"
GRID = Grid(((6144, 2048), (4096, 11008), (12288, 12288)), (1, 8, 32, 512), masks=("random",))
STEP_GRID = Grid(((6144, 2048), (12288, 12288)), (1024, 4096), (0.5, 0.8, 0.95), ("random",))
QUICK = Grid(((512, 1024),), (1, 16), (0.5, 0.9), ("random",))
QUICK_STEP = Grid(((512, 1024),), (256,), (0.9,), ("random",))
STEP_LAUNCHES = 20
ROUNDS = 7


def work(quick: bool) -> list[Callable[[], dict]]:
    """Each makes the next benchmark of the JSON."""
    forward, steps = (QUICK, QUICK_STEP) if quick else (GRID, STEP_GRID)
    count = sum(len(g.shapes) * len(g.sparsities) * len(g.tokens) for g in (forward, steps))
    found = _in_turn(forward, steps)
    return [lambda: next(found)] * count


def _in_turn(forward: Grid, steps: Grid) -> Iterator[dict]:
    clock, generator = CudaClock(), torch.Generator("cuda")
    ways = [dispatch(), torch_csr()]
    # Graphs cannot be captured on the default stream.
    stream = torch.cuda.Stream()
    products = cells(forward, ways, clock, generator)
    for made in (products, training_steps(steps, clock, generator)):
        while True:
            with torch.no_grad(), torch.cuda.stream(stream):
                cell = next(made, None)
            if cell is None:
                break
            yield benchmark(cell)


def dispatch() -> Way:
    """sparsekern.linear with a copy of W for each call: the first call of each also packs it."""
    return Way(NAME, OURS, lambda W: W, clone, linear, lambda W: W.values.nbytes)


def training_steps(grid: Grid, clock: Clock, generator: torch.Generator) -> Iterator[dict]:
    """Forward and both gradients of a linear layer through autograd, as queued calls."""

    def normal(*shape: int) -> Tensor:
        empty = torch.empty(shape, dtype=grid.dtype, device=generator.device)
        return empty.normal_(generator=generator)

    for N, K in grid.shapes:
        for sparsity in grid.sparsities:
            dense, kept = weight(N, K, sparsity, "random", grid.dtype, generator)
            W = SparseTensor.from_dense(dense, kept)
            for M in grid.tokens:
                cell = _training_step(W, dense, normal(M, K), normal(M, N), clock)
                yield cell | {"sparsity": sparsity}


def _training_step(W: SparseTensor, Wd: Tensor, x: Tensor, dy: Tensor, clock: Clock) -> dict:
    (N, K), M = W.shape, x.shape[0]
    at = expand_rows(W.row_offsets, W.nnz), W.col_indices
    x, Wd = x.requires_grad_(), Wd.detach().requires_grad_()
    values = W.values.detach().requires_grad_()
    W = SparseTensor(W.row_offsets, W.col_indices, values, W.shape)

    def step(forward: Callable[[], Tensor], weights: Tensor) -> tuple[Tensor, Tensor]:
        with torch.enable_grad():
            return torch.autograd.grad(forward(), (x, weights), dy)

    def flat(dx: Tensor, dvalues: Tensor) -> Tensor:
        return torch.cat([dx.flatten(), dvalues.flatten()])[None]

    wide = [t.detach().double() for t in (dy, x, Wd)]
    exact = flat(wide[0] @ wide[2], (wide[0].t() @ wide[1])[at])
    contenders = [
        Contender(
            NAME,
            OURS,
            [lambda: step(lambda: linear(x, W), W.values)],
            lambda grads: flat(*grads),
            is_graphed=False,
        ),
        Contender(
            "F.linear",
            DENSE,
            [lambda: step(lambda: F.linear(x, Wd), Wd)],
            lambda grads: flat(grads[0], grads[1][at]),
            is_graphed=False,
        ),
    ]
    failed: dict[str, dict] = {}
    runners = [
        runner
        for each in contenders
        for runner in attempt(failed, each, partial(Runner, each, STEP_LAUNCHES, exact, clock))
    ]
    return {
        "op": "linear",
        "M": M,
        "N": N,
        "K": K,
        "mask": "random",
        "dtype": str(x.dtype),
        "nnz": W.nnz,
        "ways": race(runners, exact, TOLERANCE[x.dtype], clock, ROUNDS) | failed,
    }


def benchmark(cell: dict) -> dict:
    """A cell as a benchmark of the JSON. ArithmeticError where ours failed or is wrong."""
    ways = dict(cell["ways"])
    own = ways.pop(NAME)
    place = f"{cell['op']} {cell['N']}x{cell['K']}-M{cell['M']}-{cell['sparsity']:.0%}"
    if not own["is_right"]:
        reason = own.get("failed") or f"error {own['error']:.1e} against fp64"
        raise ArithmeticError(f"{place}: {reason}")
    dtype = getattr(torch, cell["dtype"].removeprefix("torch."))
    M, N, K, nnz, is_step = *(cell[name] for name in ("M", "N", "K", "nnz")), cell["op"] == "linear"
    passes = ("spmm", "spmm_t", "sddmm") if is_step else ("spmm",)
    kernels = [pick(Problem(op, "cuda", dtype, M, N, K, nnz)).name for op in passes]
    # Values, a byte for each column, and the activations of both sides, each once.
    moved = nnz * (dtype.itemsize + 1) + M * (N + K) * dtype.itemsize
    group = f"{place}-{cell['mask']}-{cell['dtype'].removeprefix('torch.')}-cuda"
    return {
        "group": group,
        "name": group,
        "stats": {
            "min": own["min_s"],
            "median": own["median_s"],
            "max": own["max_s"],
            "rounds": ROUNDS,
        },
        "extra_info": {
            **{key: value for key, value in cell.items() if key != "ways"},
            "device": "cuda",
            "threads": 0,
            "is_cold": not is_step,
            "density": nnz / (N * K),
            "kernel": ", ".join(dict.fromkeys(kernels)),
            "passes": len(passes),
            "useful_flop": len(passes) * 2 * M * nnz,
            "dense_flop": len(passes) * 2 * M * N * K,
            "moved_bytes": len(passes) * moved,
            "calls": 1,
            "error": own["error"],
            "rivals": {
                name: {"kind": _KINDS.get(way["kind"], way["kind"])}
                | {key: way[key] for key in ("min_s", "median_s", "error", "is_right")}
                for name, way in ways.items()
                if "failed" not in way
            },
            "failed": {name: way["failed"] for name, way in ways.items() if "failed" in way},
        },
    }


_KINDS = {"peer": "sparse"}  # as race.py calls them
