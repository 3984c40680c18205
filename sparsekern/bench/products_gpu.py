"""The products of `bench --device cuda`: forward and gradients, and a training step of a linear.

What dispatch makes of a SparseTensor, against every dense call of cuBLAS and cuBLASLt and against
torch's CSR. Operands of the products come from memory.
"""

from collections.abc import Callable, Iterable, Iterator
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor

from .. import ops
from ..indices import expand_rows
from ..matmul import linear
from ..tensor import SparseTensor
from .measure_gpu import (
    LAUNCHES,
    ROUNDS,
    TOLERANCE,
    Grid,
    Way,
    attempt,
    copies_of,
    dense_contenders,
    in_blas,
    weight,
)
from .peers_gpu import clone, in_csr
from .products import sampled_addmm, transpose, with_values
from .records import DENSE, OURS, SPARSE
from .replay_gpu import Clock, Contender, Runner, race

NAME = "sparsekern"
STEP_LAUNCHES = 20
PEER_PRODUCTS = 1e10  # multiplications of a gradient: with more, a peer would take seconds


def dispatch() -> Way:
    """sparsekern.linear with a copy of W for each call."""
    return in_csr(NAME, linear)


def gradients(grid: Grid, clock: Clock, generator: torch.Generator) -> Iterator[dict]:
    """dx = dy W and (dy^T x) at the pattern of W, each in graphs of its own."""
    return _for_each(grid, generator, lambda *operands: _gradients(*operands, clock))


def training_steps(grid: Grid, clock: Clock, generator: torch.Generator) -> Iterator[dict]:
    """Forward and both gradients of a linear layer through autograd, as queued calls."""
    return _for_each(grid, generator, lambda *operands: [_training_step(*operands, clock)])


def _for_each(
    grid: Grid, generator: torch.Generator, measure: Callable[..., Iterable[dict]]
) -> Iterator[dict]:
    """Results of `measure` on W, the same dense, x and dy, for all of the grid."""

    def normal(*shape: int) -> Tensor:
        empty = torch.empty(shape, dtype=grid.dtype, device=generator.device)
        return empty.normal_(generator=generator)

    for N, K in grid.shapes:
        for sparsity in grid.sparsities:
            dense, kept = weight(N, K, sparsity, "random", grid.dtype, generator)
            W = SparseTensor.from_dense(dense, kept)
            for M in grid.tokens:
                for cell in measure(W, dense, normal(M, K), normal(M, N)):
                    yield cell | {"sparsity": sparsity}
        if generator.device.type == "cuda":
            torch.cuda.empty_cache()  # of the graphs' own pools


def _gradients(W: SparseTensor, Wd: Tensor, x: Tensor, dy: Tensor, clock: Clock) -> Iterator[dict]:
    at = expand_rows(W.row_offsets, W.nnz), W.col_indices
    has_peer = x.shape[0] * W.nnz <= PEER_PRODUCTS
    found = _input_gradient(W, Wd, dy)
    if has_peer:
        found.append(torch_input_gradient(W, dy))
    exact = dy.double() @ Wd.double()
    yield _cell("spmm_t", W, dy, found, LAUNCHES[0], exact, clock)
    found = _values_gradient(W, dy, x, at)
    if has_peer:
        found.append(torch_values_gradient(W, dy, x))
    exact = (dy.double().t() @ x.double())[at]
    yield _cell("sddmm", W, dy, found, LAUNCHES[0], exact, clock)


def _input_gradient(W: SparseTensor, Wd: Tensor, dy: Tensor) -> list[Contender]:
    """Each call reads another copy of W. Dense calls are those of a product with W^T, ready made
    where one wants it."""
    copies = [W, *(clone(W) for _ in range(copies_of(W.values.nbytes, LAUNCHES[0]) - 1))]
    calls = [
        partial(ops.spmm_t, V.row_offsets, V.col_indices, V.values, *V.shape, dy) for V in copies
    ]
    count = copies_of(Wd.nbytes, LAUNCHES[0])
    turned = [Wd.t().contiguous() for _ in range(count)]
    dense = dense_contenders(dy, turned, [Wd.clone() for _ in range(count)])
    return [Contender(NAME, OURS, calls), *dense]


def _values_gradient(
    W: SparseTensor, dy: Tensor, x: Tensor, at: tuple[Tensor, Tensor]
) -> list[Contender]:
    """Each call reads another copy of dy and x. Dense calls make the whole gradient."""
    count = copies_of(dy.nbytes + x.nbytes, LAUNCHES[0])
    pairs = [(dy.clone(), x.clone()) for _ in range(count)]
    calls = [partial(ops.sddmm, W.row_offsets, W.col_indices, *W.shape, *pair) for pair in pairs]
    return [Contender(NAME, OURS, calls), *dense_gradients(pairs, lambda dw: dw[at])]


def dense_gradients(
    pairs: list[tuple[Tensor, Tensor]], of: Callable[[Tensor], Tensor] = lambda dw: dw
) -> list[Contender]:
    """Every dense call for dy^T x, of which `of` takes the result, on these pairs in turn."""
    found = []
    for library in ("cublas", "cublaslt"):
        for name, call, result in (
            ("mm(dy.t(), x)", lambda dy, x: torch.mm(dy.t(), x), of),
            ("mm(x.t(), dy)", lambda dy, x: torch.mm(x.t(), dy), lambda dw: of(dw.t())),
        ):
            calls = [partial(in_blas, library, call, *pair) for pair in pairs]
            found.append(Contender(f"{name} {library}", DENSE, calls, result))
    return found


def torch_input_gradient(W: SparseTensor, dy: Tensor) -> Contender:
    """By a transposed W and a feature-major dy, ready made; one copy of each."""
    matrix, dy_fm = transpose(W).to_torch(), dy.t().contiguous()
    calls = [lambda: torch.mm(matrix, dy_fm)]
    return Contender("torch CSR", SPARSE, calls, torch.t, is_graphed=False)


def torch_values_gradient(W: SparseTensor, dy: Tensor, x: Tensor) -> Contender:
    """In fp32, since torch has it in no 16-bit type."""
    rival = sampled_addmm(with_values(W, W.values.float()), dy.float(), x.float())
    return Contender("torch CSR", SPARSE, [rival.run], rival.result, is_graphed=False)


def _training_step(W: SparseTensor, Wd: Tensor, x: Tensor, dy: Tensor, clock: Clock) -> dict:
    at = expand_rows(W.row_offsets, W.nnz), W.col_indices
    x, Wd = x.requires_grad_(), Wd.detach().requires_grad_()
    W = with_values(W, W.values.detach().requires_grad_())

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
    return _cell("linear", W, dy, contenders, STEP_LAUNCHES, exact, clock)


def _cell(
    op: str,
    W: SparseTensor,
    dy: Tensor,
    contenders: list[Contender],
    launches: int,
    exact: Tensor,
    clock: Clock,
) -> dict:
    (N, K), M, dtype = W.shape, dy.shape[0], dy.dtype
    failed: dict[str, dict] = {}
    runners = [
        runner
        for each in contenders
        for runner in attempt(failed, each, partial(Runner, each, launches, exact, clock))
    ]
    return {
        **{"op": op, "device": "cuda", "M": M, "N": N, "K": K, "nnz": W.nnz},
        **{"mask": "random", "dtype": str(dtype).removeprefix("torch."), "threads": 0},
        "is_cold": op != "linear",
        "ways": race(runners, exact, TOLERANCE[dtype], clock, ROUNDS) | failed,
    }
