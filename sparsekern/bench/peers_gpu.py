"""The sparse ways to y = x W^T on a GPU: ours, and the libraries that run there."""

import importlib
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import lru_cache
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from ..kernels import table
from ..kernels.cuda import library as cuda_library
from ..kernels.cuda.choose import Packed, choose_layout, like, pack
from ..kernels.cuda.few_tokens import MOST_TOKENS, spmm_packed
from ..kernels.cuda.packs import share_packs
from ..tensor import SparseTensor
from .measure_gpu import Way
from .records import OTHER, OURS, SPARSE

BSR_BLOCK = (16, 16)


def absent(name: str, kind: str, reason: str) -> Way:
    def never(*_: object) -> Any:
        raise NotImplementedError(reason)

    return Way(name, kind, never, never, never, never, missing=reason)


def few_tokens(tokens: int, lay_out: Callable[[SparseTensor, int], Packed] = pack) -> Way:
    """Weights packed for so many tokens, beforehand, and the CUDA kernels that read them."""
    return Way(
        "few_tokens",
        OURS,
        lambda W: lay_out(W, tokens),
        lambda W: W.clone(),
        spmm_packed,
        lambda W: W.nbytes,
        where=lambda M, sparsity, mask: M <= MOST_TOKENS and like(M) == like(tokens),
        missing=cuda_library.refusal(),
    )


def every_few_tokens() -> list[Way]:
    """For each number of tokens that W is laid out for. A layout that suits two of them is made
    once: a cover takes the CPU up to a second."""
    every = (1, 16, 32, MOST_TOKENS)
    packed = lru_cache(maxsize=len(every))(pack)

    def lay_out(W: SparseTensor, tokens: int) -> Packed:
        layout = choose_layout(tokens, W.density)
        return packed(W, next(t for t in every if choose_layout(t, W.density) is layout))

    return [few_tokens(tokens, lay_out) for tokens in every]


@dataclass(frozen=True)
class Copy:
    """W in CSR for one of the calls, cloned from `origin`."""

    W: SparseTensor
    origin: SparseTensor

    def clone(self) -> "Copy":
        return replace(self, W=clone(self.W))


def in_csr(name: str, multiply: Callable[[Tensor, SparseTensor], Tensor]) -> Way:
    """Our product multiply(x, W) of a W in CSR, a copy of it for each call. Where it derives a
    layout, the first call does, which is not timed, and each copy of W gets a copy of that."""

    def call(x: Tensor, each: Copy) -> Tensor:
        share_packs(each.origin, each.W)
        return multiply(x, each.W)

    def lay_out(W: SparseTensor) -> Copy:
        origin = clone(W)  # no other way's packs
        return Copy(origin, origin)

    return Way(name, OURS, lay_out, Copy.clone, call, lambda each: each.W.values.nbytes)


def row(name: str) -> Way:
    """A row of the kernel table."""
    rows = [r for r in table.KERNELS if (r.name, r.op) == (name, "spmm") and r.device != "cpu"]
    run = next((r.run for r in rows), None)
    if run is None:
        return absent(name, OURS, f"the kernel table has no row {name}")
    return in_csr(name, lambda x, W: run(W.row_offsets, W.col_indices, W.values, W.n, W.k, x))


def clone(W: SparseTensor) -> SparseTensor:
    parts = (W.row_offsets, W.col_indices, W.values)
    return SparseTensor(*(part.clone() for part in parts), W.shape)


# Peers get x feature-major, [K, M], or the vector [K] of one token: not timed.


def torch_csr() -> Way:
    return Way(
        "torch CSR",
        SPARSE,
        SparseTensor.to_torch,
        torch.Tensor.clone,
        lambda x, W: torch.mv(W, x) if x.ndim == 1 else torch.mm(W, x),
        lambda W: sum(t.nbytes for t in (W.crow_indices(), W.col_indices(), W.values())),
        prepare=lambda x: x[0].clone() if x.shape[0] == 1 else x.t().contiguous(),
        result=lambda y: y[None] if y.ndim == 1 else y.t(),
        is_graphed=False,
        note="queued calls, no graph",
    )


def torch_bsr() -> Way:
    return Way(
        "torch BSR",
        SPARSE,
        lambda W: W.to_dense().to_sparse_bsr(BSR_BLOCK),
        torch.Tensor.clone,
        lambda x, W: torch.mm(W, x),
        lambda W: sum(t.nbytes for t in (W.crow_indices(), W.col_indices(), W.values())),
        prepare=lambda x: x.t().contiguous(),
        result=torch.t,
        is_graphed=False,
        note=f"blocks of {BSR_BLOCK[0]} x {BSR_BLOCK[1]}; queued calls, no graph",
    )


def two_of_four() -> Way:
    """cuSPARSELt on the two largest of each four values of W: another product, at a density of 0.5
    whatever W's, and the most that structure gives."""
    pack = torch.sparse.to_sparse_semi_structured
    return Way(
        "2:4",
        OTHER,
        lambda W: pack(largest_two_of_four(W.to_dense())),
        lambda W: pack(W.to_dense()),
        F.linear,
        lambda W: W.packed.nbytes,
        is_graphed=False,
        note="other work: two of four weights; queued calls, no graph",
        dense_of=lambda W: W.to_dense(),
    )


def largest_two_of_four(W: Tensor) -> Tensor:
    fours = W.view(-1, 4)
    smallest = fours.abs().argsort(dim=1)[:, :2]
    return fours.scatter(1, smallest, 0).view_as(W)


def cupy_csr() -> Way:
    try:
        cupy = importlib.import_module("cupy")
        sparse = importlib.import_module("cupyx.scipy.sparse")
        cusparse = importlib.import_module("cupyx.cusparse")
    except ImportError as error:
        return absent("CuPy CSR", SPARSE, str(error))

    def on_stream(function: Callable[..., Any]) -> Callable[..., Any]:
        """CuPy has a current stream of its own."""

        def call(*operands: Any) -> Any:
            with cupy.cuda.ExternalStream(torch.cuda.current_stream().cuda_stream):
                return function(*operands)

        return call

    def lay_out(W: SparseTensor) -> Any:
        parts = (W.values.float(), W.col_indices.clone(), W.row_offsets.clone())
        parts = tuple(cupy.from_dlpack(part) for part in parts)
        return sparse.csr_matrix(parts, shape=tuple(W.shape))

    def prepare(x: Tensor) -> Any:
        x = x.float()
        return cupy.from_dlpack(x[0]) if x.shape[0] == 1 else cupy.from_dlpack(x).T

    def multiply(x: Any, W: Any) -> Any:
        return cusparse.spmv(W, x) if x.ndim == 1 else cusparse.spmm(W, x)

    def result(y: Any) -> Tensor:
        y = torch.from_dlpack(y)
        return y[None] if y.ndim == 1 else y.t()

    return Way(
        "CuPy CSR",
        SPARSE,
        on_stream(lay_out),
        on_stream(lambda W: W.copy()),
        on_stream(multiply),
        lambda W: W.data.nbytes + W.indices.nbytes + W.indptr.nbytes,
        prepare=on_stream(prepare),
        result=result,
        is_graphed=False,
        note="fp32; queued calls, no graph",
    )


def decode_ways() -> list[Way]:
    """Ours on every product; Triton and the peers, which are slow, on some."""

    def on_few(M: int, sparsity: float, mask: str) -> bool:
        return M in (1, 16) and sparsity in (0.5, 0.8, 0.95) and mask == "random"

    return [
        *every_few_tokens(),
        replace(row("triton"), where=lambda M, sparsity, mask: (M, mask) == (16, "random")),
        replace(torch_csr(), where=on_few),
        replace(torch_bsr(), where=on_few),
        replace(cupy_csr(), where=on_few),
        replace(two_of_four(), where=on_few),
    ]


def prompt_ways() -> list[Way]:
    """Weights packed for 1, 16 and 64 tokens, which multiply more; W in CSR."""

    def packed(tokens: int) -> Way:
        return replace(
            few_tokens(tokens),
            name=f"packed for {tokens}",
            where=lambda M, sparsity, mask: True,
        )

    return [*map(packed, (1, 16, MOST_TOKENS)), row("expand")]


def crossover_ways() -> list[Way]:
    return [*every_few_tokens(), row("triton"), row("expand")]
