"""W written out and torch.mm, on a GPU: the table rows `expand`, and packed weights of many tokens.

All in the dtype of the operands. Places are those of a bitmap (bitmap.py). A zero that is written
out makes NaN of an infinity or a NaN in x; one more launch (mend) computes such tokens anew from
the stored values, without a look at the result from here, so that a CUDA graph can capture it. It
reads the caller's indices; csrc/cuda/mend.cu says what a write that nobody counted may do. With
neither nvcc nor CuPy, torch's indexing takes the place of the kernels, and Triton's launch that of
the last one; float64, or a machine without Triton, then keeps what the zeros have made.

Calls from C++ multiply in 16 bits through cublaslt.py, which takes the host two thirds of the time;
in the last bit results may differ from those of torch.mm.
"""

import torch
from torch import Tensor

from ..problem import Kernel, Problem
from ..reference import mm, places_of
from ..steps import COL_INDICES, ROW_OFFSETS, VALUES, Asked, Slot, Steps
from ..triton import rows as triton_rows
from . import bitmap as bitmaps
from . import library as cuda_library
from .bitmap import bitmap_of
from .cublaslt import product_of
from .layout import LANES, TYPES, Packed

THREADS, COLUMNS = 256, 4096  # of a block, of a row of dx at a time
WARPS = THREADS // LANES
MOST_TOKENS, BLOCKS = 256, 256  # of a block; those that look at many tokens
MEND_SMEM_BYTES = 4 * (MOST_TOKENS + 1)
ALL_TYPES = {**TYPES, torch.float32: "f32", torch.float64: "f64"}


def spmm_expanded(x: Tensor, packed: Packed, bias: Tensor | None) -> Tensor:
    """y [M, N] = x [M, K] @ W.T + bias [N] of a packed weight."""
    if packed.row_scales is not None:
        y = _multiply_expanded(x, packed, None).float() * packed.row_scales
        return (y if bias is None else y + bias).to(x.dtype)
    return _multiply_expanded(x, packed, bias)


def _multiply_expanded(x: Tensor, packed: Packed, bias: Tensor | None) -> Tensor:
    """The same without scales."""
    w = packed.expand()
    y = mm(x, w.t(), bias)
    is_full = packed.nnz == w.numel() and packed.row_scales is None
    if y.numel() == 0 or is_full:
        return y
    m, name = x.shape[0], f"sk_expand_mend_{TYPES[y.dtype]}"
    tensors = w, x.contiguous(), None if bias is None else bias.contiguous(), y
    sizes = m, packed.n, packed.k
    cuda_library.start(name, _mend_blocks(m), THREADS, MEND_SMEM_BYTES, tensors, *sizes)
    return y


def _mend_blocks(m: int) -> int:
    """A token for each warp of a block, or more where those would be many blocks: to look at all
    takes less time then."""
    return max(min(-(-m // WARPS), BLOCKS), -(-m // MOST_TOKENS))


def write_out(row_offsets: Tensor, col_indices: Tensor, values: Tensor, n: int, k: int) -> Tensor:
    """W [N, K], dense."""
    if cuda_library.refusal():
        w = values.new_zeros(n * k)
        w[places_of(row_offsets, col_indices, n, k)] = values
        return w.view(n, k)
    return bitmaps.write_out(bitmap_of(row_offsets, col_indices, n, k), values, n, k)


def collect(row_offsets: Tensor, col_indices: Tensor, w: Tensor) -> Tensor:
    """The entries of w [N, K] at the places of the pattern."""
    n, k = w.shape
    if cuda_library.refusal():
        return w.view(-1)[places_of(row_offsets, col_indices, n, k)]
    return bitmaps.collect(bitmap_of(row_offsets, col_indices, n, k), w, len(col_indices))


def mend(op, row_offsets, col_indices, values, n, k, x, bias, y, checked=1):
    """y, a product `op` that multiplied places which are not stored by 0, without what an infinity
    or NaN in x has made there. A token where that is so has one in its first `checked` results."""
    m, nnz = x.shape[0], len(values)
    if y.numel() == 0 or nnz == n * k:
        return y
    if cuda_library.refusal():
        if triton_rows.can_mend(x.dtype):
            with_triton = triton_rows.mend if op == "spmm" else triton_rows.mend_t
            with_triton(row_offsets, col_indices, values, n, k, x, bias, y)
        return y
    tensors = row_offsets, col_indices, values, x, bias, y
    cuda_library.start(*_mend_launch(op, x.dtype, tensors, m, n, k, nnz, checked))
    return y


def _mend_launch(op: str, dtype: torch.dtype, tensors: tuple, m: int, *sizes: int) -> tuple:
    name, smem_bytes = f"sk_mend_{ALL_TYPES[dtype]}", MEND_SMEM_BYTES
    if op == "spmm_t":
        name = f"sk_mend_t_{ALL_TYPES[dtype]}"
        smem_bytes += COLUMNS * max(4, dtype.itemsize)
    return name, _mend_blocks(m), THREADS, smem_bytes, tensors, m, *sizes


def spmm(row_offsets, col_indices, values, n, k, x, bias=None):
    weight = row_offsets, col_indices, values, n, k
    return mend("spmm", *weight, x, bias, mm(x, write_out(*weight).t(), bias))


def spmm_t(row_offsets, col_indices, values, n, k, dy, bias=None):
    weight = row_offsets, col_indices, values, n, k
    return mend("spmm_t", *weight, dy, bias, mm(dy, write_out(*weight), bias))


def sddmm(row_offsets, col_indices, n, k, dy, x):
    return collect(row_offsets, col_indices, mm(dy.t(), x))


def prepare_mend(steps: Steps, asked: Asked, a: Slot, b: Slot | None, y: Slot, checked=1) -> None:
    """The step that mend() is."""
    p = asked.problem
    if p.nnz < p.N * p.K:
        tensors = ROW_OFFSETS, COL_INDICES, VALUES, a, b, y
        steps.start(*_mend_launch(p.op, p.dtype, tensors, p.M, p.N, p.K, p.nnz, checked))


def _prepare(steps: Steps, asked: Asked, a: Slot, b: Slot | None) -> Slot | None:
    p = asked.problem
    if cuda_library.refusal():
        return None
    bitmap = bitmap_of(asked.row_offsets, asked.col_indices, p.N, p.K)
    if p.op == "sddmm":
        assert b is not None
        dw = _prepare_gradient(steps, asked, a, b)
        dvalues = steps.empty(a, p.nnz)
        steps.start(*bitmaps.collect_launch(bitmap, dw, dvalues, p.dtype.itemsize, p.K))
        return dvalues
    if p.op == "spmm_t" and asked.has_bias:
        return None
    bias = b if asked.has_bias else None
    if product := product_of(p, asked.a.device.index, asked.has_bias):
        w = steps.scratch(VALUES, product.scratch_elements)
        steps.start(*bitmaps.write_out_launch(bitmap, VALUES, w, p.dtype.itemsize, p.K))
        y = steps.empty(a, *asked.tokens, p.N if p.op == "spmm" else p.K)
        product.add_to(steps, w, a, y, bias, w)
        prepare_mend(steps, asked, a, bias, y)
        return y
    inputs, outputs = (p.K, p.N) if p.op == "spmm" else (p.N, p.K)
    if p.op == "spmm":
        w = steps.call(Tensor.new_empty_strided, VALUES, (p.K, p.N), (1, p.K))  # W^T
    else:
        w = steps.empty(VALUES, p.N, p.K)
    steps.start(*bitmaps.write_out_launch(bitmap, VALUES, w, p.dtype.itemsize, p.K))
    left = steps.rows(a, asked.tokens, inputs)
    multiply = (torch.mm,) if bias is None else (torch.addmm, bias)
    y = steps.call(*multiply, left, w)
    prepare_mend(steps, asked, a, bias, y)
    return steps.unfolded(y, asked.tokens, outputs)


def _prepare_gradient(steps: Steps, asked: Asked, dy: Slot, x: Slot) -> Slot:
    """dW [N, K], and maybe more behind it."""
    p, device, sums = asked.problem, asked.a.device.index, None
    product = product_of(p, device, True) if asked.wants_sums else None
    if product:
        sums = steps.sums = steps.empty(dy, p.N)
    if product := product or product_of(p, device):
        dw = steps.scratch(dy, product.scratch_elements)
        product.add_to(steps, x, dy, dw, sums, dw)
        return dw
    rows = steps.rows(dy, asked.tokens, p.N), steps.rows(x, asked.tokens, p.K)
    return steps.call(torch.mm, steps.call(Tensor.t, rows[0]), rows[1])


def _refuse(p: Problem) -> str | None:
    if p.dtype not in ALL_TYPES:
        return f"it takes floats of 16, 32 and 64 bits, not {str(p.dtype).removeprefix('torch.')}"
    return None


KERNELS = tuple(
    Kernel("expand", run.__name__, "cuda", _refuse, run, prepare=_prepare)
    for run in (spmm, spmm_t, sddmm)
)
