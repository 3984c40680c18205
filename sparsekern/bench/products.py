"""The products of a linear layer on a CPU, as a user calls them: operands, rivals, exact result.

Operands are token-major and the packing of x is inside the time. Rivals are every dense call that
torch and NumPy bring, with MKL, oneDNN and OpenBLAS behind them, and torch's own sparse CSR. oneDNN
also gets W laid out for it beforehand, as a user who only runs a model can have it.
"""

import math
from collections.abc import Callable, Iterable
from dataclasses import asdict, dataclass, replace
from functools import lru_cache, partial

import torch
import torch.nn.functional as F
from torch import Tensor

from .. import ops
from ..gpt.dense import by_numpy, onednn, packed
from ..gpt.dense import linear as linear_by
from ..indices import expand_rows
from ..kernels.cuda.ordered import recognised
from ..kernels.problem import Problem
from ..kernels.table import pick
from ..matmul import linear
from ..sparsity import Static
from ..tensor import SparseTensor
from ..testing import random_mask
from .race import TOLERANCE, Rival, exact, ours, race, rotate
from .records import DENSE, OTHER, SPARSE

COLD_BYTES = 160e6  # of the copies that a competitor with cold weights goes through
LOG_NORMAL_SIGMA = 0.5  # of the rows' scales in a magnitude-pruned W
UNEVEN_SIGMA = 1.0  # of the rows' densities, before none is more than 1
LARGE = 2**25  # places of a W of which only the last is kept


@dataclass(frozen=True)
class Workload:
    """One product: y[M, N] = x[M, K] @ W[N, K].T on `threads` cores."""

    M: int
    N: int
    K: int
    sparsity: float
    threads: int
    dtype: torch.dtype = torch.float32
    mask: str = "random"  # a key of MASKS
    is_cold: bool = False  # W comes from memory, not from caches

    def __str__(self) -> str:
        name = f"{self.N}x{self.K}-M{self.M}-{self.sparsity:.0%}-{self.threads}T"
        dtype = "-bf16" if self.dtype == torch.bfloat16 else ""
        mask = "" if self.mask == "random" else f"-{self.mask}"
        return name + dtype + mask + ("-cold" if self.is_cold else "")

    def fields(self) -> dict[str, object]:
        """Of its records."""
        return asdict(self) | {"dtype": str(self.dtype).removeprefix("torch.")}


# The products in an op.
PASSES = {op: (op,) for op in ("spmm", "spmm_t", "sddmm")}
PASSES |= {"linear": tuple(PASSES), "train_step": tuple(PASSES)}


def kernels(passes: Iterable[str], device: str, dtype: torch.dtype, *sizes: tuple[int, ...]) -> str:
    """The names of the kernels that run these products, of each (M, N, K, nnz)."""
    problems = (Problem(op, device, dtype, *each) for op in passes for each in sizes)
    return ", ".join(dict.fromkeys(pick(problem).name for problem in problems))


def kernels_of(
    passes: Iterable[str], dtype: torch.dtype, M: int, weights: list[SparseTensor]
) -> str:
    """The same for products of M tokens with these W on a GPU, as their patterns have it."""
    problems = (
        recognised(Problem(op, "cuda", dtype, M, W.n, W.k, W.nnz), W.row_offsets, W.col_indices)
        for op in passes
        for W in weights
    )
    return ", ".join(dict.fromkeys(pick(problem).name for problem in problems))


@dataclass(frozen=True)
class Product:
    """The product that a race is about."""

    op: str
    workload: Workload
    W: SparseTensor
    x: Tensor  # the activations that W meets: x [M, K], or dy [M, N]
    ours: Rival
    rivals: list[Rival]
    exact: tuple[Tensor, Tensor]

    def race(self, peers: list[Rival] = (), **options) -> dict:
        """What a race found, with the fields of the product and our kernels' names."""
        w = self.workload
        rivals, few = [*self.rivals, *peers], w.M == 1
        ways = race(self.ours, rivals, w.threads, self.exact, TOLERANCE[w.dtype], few, **options)
        sizes = w.M, w.N, w.K, self.W.nnz
        ways[self.ours.name]["kernel"] = kernels(PASSES[self.op], "cpu", w.dtype, sizes)
        return {"op": self.op, "device": "cpu", **w.fields(), "nnz": self.W.nnz, "ways": ways}


# W


def _random(dense: Tensor, sparsity: float, generator: torch.Generator) -> Tensor:
    return random_mask(*dense.shape, sparsity, generator)


def _pruned(dense: Tensor, sparsity: float, generator: torch.Generator) -> Tensor:
    """By magnitude, rows of unlike scales."""
    dense *= torch.exp(LOG_NORMAL_SIGMA * torch.randn(dense.shape[0], 1, generator=generator))
    return Static(sparsity, "magnitude").mask("weight", dense)


def _banded(dense: Tensor, sparsity: float, generator: torch.Generator) -> Tensor:
    """As many neighbours in each row, around the diagonal; a band that leaves W comes back on the
    other side."""
    N, K = dense.shape
    width = round((1 - sparsity) * K)
    centres = torch.arange(N)[:, None] * K // N
    return (torch.arange(K)[None] - centres + width // 2) % K < width


def _uneven(dense: Tensor, sparsity: float, generator: torch.Generator) -> Tensor:
    """Rows of log-normal densities, of which none is more than 1."""
    scales = torch.exp(UNEVEN_SIGMA * torch.randn(dense.shape[0], 1, generator=generator))
    low, high = 0.0, 1e3
    for _ in range(50):
        middle = (low + high) / 2
        is_more = (scales * middle).clamp(max=1).mean() > 1 - sparsity
        low, high = (low, middle) if is_more else (middle, high)
    return torch.rand(dense.shape, generator=generator) < scales * low


MASKS: dict[str, Callable[[Tensor, float, torch.Generator], Tensor]] = {
    "random": _random,
    "pruned": _pruned,
    "banded": _banded,
    "uneven": _uneven,
}


@lru_cache(maxsize=64)
def _weight(N: int, K: int, sparsity: float, mask: str) -> tuple[SparseTensor, Tensor]:
    generator = torch.Generator().manual_seed(0)
    dense = torch.randn(N, K, generator=generator)
    return stored(dense, MASKS[mask](dense, sparsity, generator))


_large_weight = lru_cache(maxsize=1)(_weight.__wrapped__)


def stored(dense: Tensor, kept: Tensor) -> tuple[SparseTensor, Tensor]:
    """W and the same as a dense tensor [N, K]: `dense` where `kept`, else 0."""
    dense = dense * kept
    return SparseTensor.from_dense(dense, kept), dense


def weight(workload: Workload) -> tuple[SparseTensor, Tensor]:
    """W and the same as a dense tensor [N, K], both of the workload's dtype."""
    w = workload
    make = _large_weight if w.N * w.K > LARGE else _weight
    sparse, dense = make(w.N, w.K, w.sparsity, w.mask)
    if w.dtype == torch.float32:
        return sparse, dense
    return with_values(sparse, sparse.values.to(w.dtype)), dense.to(w.dtype)


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


# Rivals


@lru_cache
def onednn_runs(dtype: torch.dtype) -> bool:
    """Whether this torch brings a oneDNN that multiplies this type here."""
    x = torch.ones(2, 16, dtype=dtype)
    try:
        onednn(x, x)
        packed(x, 2)(x)
    except (AttributeError, RuntimeError, NotImplementedError):
        return False
    return True


def dense_calls(x: Tensor) -> list[Callable[[Tensor], Rival]]:
    """Every dense call for x [M, K], each as a function of W [N, K] in the dtype of x."""
    dtype = "" if x.dtype == torch.float32 else " bf16"
    calls: list[Callable[[Tensor], Rival]] = [
        lambda W: Rival(f"F.linear{dtype}", DENSE, lambda: F.linear(x, W)),
        lambda W: Rival(f"torch.mm{dtype}", DENSE, lambda: torch.mm(W, x.t()), torch.t),
    ]
    if x.shape[0] == 1:
        v = x[0]
        calls.append(
            lambda W: Rival(f"torch.mv{dtype}", DENSE, lambda: torch.mv(W, v), lambda y: y[None])
        )
    if x.dtype == torch.float32:
        calls.append(lambda W: openblas(x, W.t()))
    if onednn_runs(x.dtype):
        calls.append(
            lambda W: Rival(f"oneDNN packed{dtype}", DENSE, partial(packed(W, x.shape[0]), x))
        )
        if x.dtype == torch.float32:  # for bfloat16 it is what F.linear calls
            calls.append(lambda W: by_onednn(x, W))
    return calls


def by_onednn(x: Tensor, W: Tensor, result: Callable[[Tensor], Tensor] = lambda y: y) -> Rival:
    """x [M, K] @ W [N, K].T by torch's oneDNN, as it gets both."""
    return Rival("oneDNN", DENSE, lambda: onednn(x, W), result)


def openblas(a: Tensor, b: Tensor) -> Rival:
    """NumPy's a @ b."""
    a, b = a.numpy(), b.numpy()
    if a.shape[0] == 1:
        return Rival("OpenBLAS", DENSE, lambda: a[0] @ b, lambda y: torch.from_numpy(y)[None])
    return Rival("OpenBLAS", DENSE, lambda: a @ b, torch.from_numpy)


def feature_major(x: Tensor) -> Tensor:
    """[K, M], or the vector [K] of a single token: their own matrix-vector product is faster."""
    return x[0].clone() if x.shape[0] == 1 else x.t().contiguous()


def torch_csr(W: SparseTensor, x: Tensor) -> Rival:
    """x W^T by torch's CSR product, which is MKL's; x is feature-major, which is not timed."""
    matrix, x_fm = W.to_torch(), feature_major(x)
    if x_fm.ndim == 1:
        return Rival("torch CSR", SPARSE, lambda: torch.mv(matrix, x_fm), lambda y: y[None])
    return Rival("torch CSR", SPARSE, lambda: torch.mm(matrix, x_fm), torch.t)


def sampled_addmm(W: SparseTensor, dy: Tensor, x: Tensor) -> Rival:
    """The values' gradient (dy^T x) at the pattern of W: among peers torch alone has it."""
    matrix, dy_fm = W.to_torch(), dy.t().contiguous()
    return Rival(
        "torch CSR",
        SPARSE,
        lambda: torch.sparse.sampled_addmm(matrix, dy_fm, x, beta=0),
        lambda dw: dw.values(),
    )


def transpose(W: SparseTensor) -> SparseTensor:
    """W^T in CSR of its own: peers without a transposed product get it ready made."""
    return SparseTensor.from_torch(W.T.to_torch())


# The products


def forward(workload: Workload) -> Product:
    """y = x W^T.

    Warm, the weights of a single layer, called again and again, stay in cache. Cold, as in
    decoding, everyone goes through copies of its own, and between two uses of one all competitors
    read theirs. In bf16 also against dense and our own in fp32.
    """
    W, Wd = weight(workload)
    x = normal(workload.M, workload.K).to(workload.dtype)
    rivals = _dense(workload, x, Wd)
    if workload.dtype != torch.float32:
        wide_W, wide_x = with_values(W, W.values.float()), x.float()
        rivals += _dense(workload, wide_x, Wd.float())
        rivals.append(replace(_ours(workload, wide_x, wide_W, "sparsekern fp32"), kind=OTHER))
    correct = exact(lambda x, W: x @ W.t(), x, Wd)
    return Product("spmm", workload, W, x, _ours(workload, x, W), rivals, correct)


def _ours(workload: Workload, x: Tensor, W: SparseTensor, name: str = "sparsekern") -> Rival:
    copies = cold_copies(W) if workload.is_cold else [W]
    return rotate(ours(partial(linear, x, each), name) for each in copies)


def _dense(workload: Workload, x: Tensor, W: Tensor) -> list[Rival]:
    copies = partial(cold_copies, W) if workload.is_cold else lambda: [W]
    return [rotate(call(each) for each in copies()) for call in dense_calls(x)]


def input_gradient(workload: Workload) -> Product:
    """dx = dy W."""
    W, Wd = weight(workload)
    N, K, dy = workload.N, workload.K, normal(workload.M, workload.N)
    rivals = [
        Rival("torch.mm", DENSE, lambda: torch.mm(dy, Wd)),
        Rival("torch.mm of transposes", DENSE, lambda: torch.mm(Wd.t(), dy.t()), torch.t),
        openblas(dy, Wd),
        *([by_onednn(dy, Wd.t())] if onednn_runs(dy.dtype) else []),
    ]
    run = ours(partial(ops.spmm_t, W.row_offsets, W.col_indices, W.values, N, K, dy))
    return Product("spmm_t", workload, W, dy, run, rivals, exact(lambda dy, W: dy @ W, dy, Wd))


def values_gradient(workload: Workload) -> Product:
    """(dy^T x) at the pattern of W. Dense calls make the whole gradient, without the mask."""
    W, _ = weight(workload)
    N, K = workload.N, workload.K
    x, dy = normal(workload.M, K), normal(workload.M, N)
    at = expand_rows(W.row_offsets, W.nnz), W.col_indices
    rivals = [
        Rival("torch.mm", DENSE, lambda: torch.mm(dy.t(), x), lambda dw: dw[at]),
        Rival("torch.mm of transposes", DENSE, lambda: torch.mm(x.t(), dy), lambda dw: dw.t()[at]),
        replace(openblas(dy.t(), x), result=lambda dw: torch.from_numpy(dw)[at]),
        *([by_onednn(dy.t(), x.t(), lambda dw: dw[at])] if onednn_runs(x.dtype) else []),
        sampled_addmm(W, dy, x),
    ]
    run = ours(partial(ops.sddmm, W.row_offsets, W.col_indices, N, K, dy, x))
    correct = exact(lambda dy, x: (dy.t() @ x)[at], dy, x)
    return Product("sddmm", workload, W, dy, run, rivals, correct)


def training_step(workload: Workload) -> Product:
    """Forward and both gradients of a linear layer, through autograd; dense by each library."""
    W, Wd = weight(workload)
    x, dy = normal(workload.M, workload.K), normal(workload.M, workload.N)
    at = expand_rows(W.row_offsets, W.nnz), W.col_indices
    x, Wd = x.requires_grad_(), Wd.clone().requires_grad_()
    W = with_values(W, W.values.clone().requires_grad_())

    def step(y: Tensor, weights: Tensor) -> tuple[Tensor, Tensor]:
        with torch.enable_grad():
            return torch.autograd.grad(y(), (x, weights), dy)

    def flat(dx: Tensor, dvalues: Tensor) -> Tensor:
        return torch.cat([dx.flatten(), dvalues.flatten()])

    def product(dy: Tensor, x: Tensor, W: Tensor) -> Tensor:
        return flat(dy @ W, (dy.t() @ x)[at])

    def dense(name: str, library: Callable[..., Tensor]) -> Rival:
        result = lambda g: flat(g[0], g[1][at])  # noqa: E731
        return Rival(name, DENSE, lambda: step(lambda: library(x, Wd), Wd), result)

    rivals = [dense("F.linear", F.linear)]
    rivals.append(dense("OpenBLAS", partial(linear_by, bias=None, library=by_numpy)))
    if onednn_runs(x.dtype):
        rivals.append(dense("oneDNN", partial(linear_by, bias=None, library=onednn)))

    return Product(
        "linear",
        workload,
        W,
        x.detach(),
        replace(ours(lambda: step(lambda: linear(x, W), W.values)), result=lambda g: flat(*g)),
        rivals,
        exact(product, dy, x.detach(), Wd.detach()),
    )


PRODUCTS = {
    "spmm": forward,
    "spmm_t": input_gradient,
    "sddmm": values_gradient,
    "linear": training_step,
}
