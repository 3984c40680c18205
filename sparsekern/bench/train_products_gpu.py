"""The three products of a training step alone: forward, dX and dW of many tokens, 75 or 90 % zeros.

What dispatch makes of a free and of a two-way mask, against every dense call of cuBLAS and
cuBLASLt, and beside them dense FP8, which is other work. Then the kernels between the stored values
and what tensor cores read: the bytes that each moves are known.
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor

from .. import ops
from ..indices import expand_rows
from ..kernels.cuda import bitmap as bitmaps
from ..kernels.cuda import library as cuda_library
from ..kernels.cuda.packs import share_packs
from ..kernels.cuda.two_of_four import with_free_places
from ..tensor import SparseTensor
from .gpt_gpu import FREE
from .measure_gpu import TOLERANCE, attempt, copies_of, dense_contenders, weight
from .peers_gpu import clone
from .products import PASSES, kernels_of
from .products_gpu import NAME, dense_gradients
from .records import OTHER, OURS
from .replay_gpu import Clock, Contender, Runner, race
from .two_way_mask import TWO_WAY

OPS = ("spmm", "spmm_t", "sddmm")
FP8, FP8_CAST = "fp8", "fp8, with its casts"
NOTE = "other work: 8 bits an operand, one scale a tensor"
E4M3_MOST = 448.0
# Copies of each operand: what the others read and write meanwhile is larger than L2.
COPIES = 3
LAUNCHES, ROUNDS = 10, 5
WRITE_LAUNCHES = 40
WRITTEN_OUT = TWO_WAY, 0.75  # the mask of what is written out


@dataclass(frozen=True)
class Sizes:
    """The products, all of M tokens, the W whose values are also written out, and the masks, each
    with its sparsity."""

    shapes: tuple[tuple[int, int], ...]  # N x K
    M: int
    write_outs: tuple[tuple[int, int], ...]
    masks: tuple[tuple[str, float], ...] = ((FREE, 0.75), (TWO_WAY, 0.75), (FREE, 0.9))
    dtype: torch.dtype = torch.bfloat16

    @property
    def count(self) -> int:
        """Of cases: three products of each W and mask, and four kernels."""
        return 3 * len(self.masks) * len(self.shapes) + 4 * len(self.write_outs)


# The linears of GPT-3 XL, and of a GPT twice as wide.
SIZES = Sizes(
    (
        *((6144, 2048), (2048, 2048), (8192, 2048), (2048, 8192)),
        *((12288, 4096), (4096, 4096), (16384, 4096), (4096, 16384)),
    ),
    8192,
    ((8192, 2048), (16384, 4096)),
)
QUICK = Sizes(((1024, 2048),), 1024, ((1024, 2048),))
# The same rows of the table as in bfloat16: fewer shapes, and what moves 16 bits is known.
FLOAT16 = Sizes(((6144, 2048), (2048, 8192), (4096, 4096)), 8192, (), dtype=torch.float16)


def cases(sizes: Sizes, clock: Clock, generator: torch.Generator) -> Iterator[dict]:
    """A record for each product and mask, then for each kernel that writes out."""
    for N, K in sizes.shapes:
        masks = {mask: _weight(N, K, mask, sizes, generator) for mask in sizes.masks}
        yield from _products(masks, sizes, clock, generator)
        del masks
        if generator.device.type == "cuda":
            torch.cuda.empty_cache()  # of the graphs' own pools
    for N, K in sizes.write_outs:
        W = _weight(N, K, WRITTEN_OUT, sizes, generator)
        yield from _write_outs(SparseTensor.from_dense(*W), clock)


Mask = tuple[str, float]  # its kind and its sparsity
Weight = tuple[Tensor, Tensor]  # dense, with its zeros, and the bool mask


def _weight(N: int, K: int, mask: Mask, sizes: Sizes, generator: torch.Generator) -> Weight:
    kind, sparsity = mask
    return weight(N, K, sparsity, kind, sizes.dtype, generator)


def _products(
    masks: dict[Mask, Weight], sizes: Sizes, clock: Clock, generator: torch.Generator
) -> Iterator[dict]:
    """One race for all masks: the dense calls multiply the first one's W, zeros and all."""

    def normal(columns: int) -> Tensor:
        empty = torch.empty(sizes.M, columns, dtype=sizes.dtype, device=generator.device)
        return empty.normal_(generator=generator)

    first = sizes.masks[0]
    dense = masks[first][0]
    N, K = dense.shape
    x, dy = normal(K), normal(N)
    sparse = {mask: SparseTensor.from_dense(*W) for mask, W in masks.items()}
    names = {mask: f"{NAME} {mask[1]:.0%} {mask[0]}" for mask in masks}
    for op in OPS:
        exact, contenders = _contenders(op, dense, x, dy)
        failed: dict[str, dict] = {}
        for mask, W in sparse.items():
            own = exact if mask == first else None
            contenders.append(_ours(op, names[mask], W, masks[mask][0], x, dy, own))
        runners = [
            runner
            for each in contenders
            for runner in attempt(failed, each, partial(Runner, each, LAUNCHES, exact, clock))
        ]
        found = race(runners, exact, TOLERANCE[sizes.dtype], clock, ROUNDS) | failed
        own_ways = {mask: found.pop(name) for mask, name in names.items()}
        for mask, way in own_ways.items():
            W = sparse[mask]
            if "median_s" in way:
                way["kernel"] = kernels_of(PASSES[op], sizes.dtype, sizes.M, [W])
            yield _case(op, mask, W) | {
                "M": sizes.M,
                "ways": {NAME: way} | {name: dict(other) for name, other in found.items()},
            }


def _case(op: str, mask: Mask, W: SparseTensor) -> dict:
    return {
        **{"op": op, "device": "cuda", "N": W.n, "K": W.k, "nnz": W.nnz, "mask": mask[0]},
        **{"sparsity": mask[1], "dtype": str(W.dtype).removeprefix("torch."), "threads": 0},
        "is_cold": True,
    }


def _contenders(op: str, W: Tensor, x: Tensor, dy: Tensor) -> tuple[Tensor, list[Contender]]:
    """The exact result of the dense product, and all that compute it."""
    if op == "sddmm":
        pairs = [(dy.clone(), x.clone()) for _ in range(COPIES)]
        exact, found = dy.double().t() @ x.double(), dense_gradients(pairs)
        return exact, [*found, *_fp8(lambda dy, x: (dy.t(), x.t()), dy, x)]
    operand, stored = (x, W) if op == "spmm" else (dy, W.t())
    exact = operand.double() @ stored.double().t()
    copies, turned = (
        [t.clone(memory_format=torch.contiguous_format) for _ in range(COPIES)]
        for t in (stored, stored.t())
    )
    found = dense_contenders(operand, copies, turned)
    return exact, [*found, *_fp8(lambda a, b: (a, b), operand, stored)]


def _ours(
    op: str, name: str, W: SparseTensor, Wd: Tensor, x: Tensor, dy: Tensor, exact: Tensor | None
) -> Contender:
    """Each call has copies of its own of W, or of x and dy. exact: of the dense product with the
    same W, where it is known."""
    indices, sizes = (W.row_offsets, W.col_indices), (W.n, W.k)
    if op == "sddmm":
        pairs = [(dy.clone(), x.clone()) for _ in range(COPIES)]
        calls = [partial(ops.sddmm, *indices, *sizes, *pair) for pair in pairs]
        at = expand_rows(W.row_offsets, W.nnz), W.col_indices
        if exact is None:
            exact = dy.double().t() @ x.double()
        return Contender(name, OURS, calls, exact=exact[at])
    product, operand = (ops.spmm, x) if op == "spmm" else (ops.spmm_t, dy)
    call = partial(_multiply, product, operand)
    call(W)  # whose packs the copies share out
    copies = [W, *(clone(W) for _ in range(COPIES - 1))]
    for copy in copies[1:]:
        share_packs(W, copy)
    if exact is None:
        exact = operand.double() @ (Wd.t() if op == "spmm" else Wd).double()
    return Contender(name, OURS, [partial(call, copy) for copy in copies], exact=exact)


def _multiply(product: Callable[..., Tensor], operand: Tensor, W: SparseTensor) -> Tensor:
    return product(W.row_offsets, W.col_indices, W.values, W.n, W.k, operand)


# FP8


def _fp8(
    layout: Callable[[Tensor, Tensor], tuple[Tensor, Tensor]], a: Tensor, b: Tensor
) -> list[Contender]:
    """a [M, R] b [O, R]^T of what `layout` makes of two operands: with what it takes to get them
    into 8 bits, and from 8 bits on. Its error is that of so few bits."""
    pairs = [(a.clone(), b.clone()) for _ in range(COPIES)]

    def cast(a: Tensor, b: Tensor) -> tuple[Tensor, ...]:
        a, b = layout(a, b)
        return *in_fp8(a), *in_fp8(b)

    casts = [cast(*pair) for pair in pairs]
    info = {"note": NOTE}
    return [
        Contender(FP8, OTHER, [partial(_scaled, *each) for each in casts], info=info),
        Contender(FP8_CAST, OTHER, [lambda p=p: _scaled(*cast(*p)) for p in pairs], info=info),
    ]


def in_fp8(t: Tensor) -> tuple[Tensor, Tensor]:
    """t [R, C] in E4M3, row by row in memory, and what to multiply it with."""
    scale = torch.linalg.vector_norm(t, float("inf")).float() / E4M3_MOST
    return (t.contiguous() / scale).to(torch.float8_e4m3fn), scale


def _scaled(a: Tensor, scale_a: Tensor, b: Tensor, scale_b: Tensor) -> Tensor:
    return torch._scaled_mm(
        a, b.t(), scale_a, scale_b, out_dtype=torch.bfloat16, use_fast_accum=True
    )


# Between values and what tensor cores read


def _write_outs(W: SparseTensor, clock: Clock) -> Iterator[dict]:
    """Each kernel reads and writes other memory at each call, far more than L2 holds. The operand
    of 2:4 products has a tail of an eighth of its slots."""
    if cuda_library.refusal():
        return
    n, k, nnz = W.n, W.k, W.nnz
    bitmap = bitmaps.make_bitmap(W.row_offsets, W.col_indices, n, k)
    dense = W.to_dense()
    tail = torch.zeros(n * k // 8, dtype=torch.uint8, device=W.device)
    operand = W.values.new_empty((n * k + len(tail)) // W.values.itemsize)
    count = copies_of(operand.nbytes, WRITE_LAUNCHES)
    values, copies, operands = (
        [t.clone() for _ in range(count)] for t in (W.values, dense, operand)
    )
    map_bytes = sum(t.nbytes for t in bitmap.tensors)
    sides_bytes = map_bytes + W.values.nbytes + dense.nbytes
    filled_bytes = map_bytes + W.values.nbytes + len(tail) + operand.nbytes

    def fill(kernel: Callable[..., None], i: int) -> Tensor:
        kernel(bitmap, values[i], tail, operands[i], n, k)
        return operands[i]

    def slots(w: Tensor) -> Tensor:
        return w[with_free_places(w.bool())].double()

    def first(operand: Tensor) -> Tensor:
        return operand[: n * k // 2]

    for name, call, result, exact, nbytes in (
        (
            "write_out",
            lambda i: bitmaps.write_out(bitmap, values[i], n, k),
            lambda w: w,
            dense.double(),
            sides_bytes,
        ),
        (
            "collect",
            lambda i: bitmaps.collect(bitmap, copies[i], nnz),
            lambda values: values,
            W.values.double(),
            sides_bytes,
        ),
        ("fill", partial(fill, bitmaps.fill), first, slots(dense), filled_bytes),
        (
            "fill_transposed",
            partial(fill, bitmaps.fill_transposed),
            first,
            slots(dense.t().contiguous()),
            filled_bytes,
        ),
    ):
        kept: dict[int, Tensor] = {}  # results, so that each call has memory of its own

        def keep(i: int, call=call, kept=kept) -> Tensor:
            kept[i] = call(i)
            return kept[i]

        calls = [partial(keep, i) for i in range(count)]
        contender = Contender(NAME, OURS, calls, result, info={"bytes": nbytes})
        runner = Runner(contender, WRITE_LAUNCHES, exact, clock)
        ways = race([runner], exact, TOLERANCE[W.dtype], clock, ROUNDS)
        yield _case(name, WRITTEN_OUT, W) | {"ways": ways}
