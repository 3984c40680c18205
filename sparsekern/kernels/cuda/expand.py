"""W written out and torch.mm, on a GPU: the table rows `expand`, and packed weights of many tokens.

All in the dtype of the operands. Places are those of a bitmap (bitmap.py). A zero that is written
out makes NaN of an infinity or a NaN in x; one more launch (mend) computes such tokens anew from
the stored values, without a look at the result from here, so that a CUDA graph can capture it. It
reads the caller's indices; csrc/cuda/mend.cu says what a write that nobody counted may do. With
neither nvcc nor CuPy, torch's indexing takes the place of the kernels, and Triton's launch that of
the last one; float64, or a machine without Triton, then keeps what the zeros have made.
"""

import torch
from torch import Tensor

from ..problem import Kernel, Problem
from ..reference import mm, places_of
from ..triton import rows as triton_rows
from . import bitmap as bitmaps
from . import library as cuda_library
from .bitmap import bitmap_of
from .layout import LANES, TYPES, Packed

THREADS, COLUMNS = 256, 4096  # of a block, of a row of dx at a time
WARPS = THREADS // LANES
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
    if y.numel() == 0 or packed.nnz == w.numel():
        return y
    m, name = x.shape[0], f"sk_expand_mend_{TYPES[y.dtype]}"
    tensors = w, x.contiguous(), None if bias is None else bias.contiguous(), y
    cuda_library.start(name, -(-m // WARPS), THREADS, WARPS * 4, tensors, m, packed.n, packed.k)
    return y


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
    name, smem_bytes = "mend", WARPS * 4
    if op == "spmm_t":
        name, smem_bytes = "mend_t", smem_bytes + COLUMNS * max(4, x.element_size())
    tensors, sizes = (row_offsets, col_indices, values, x, bias, y), (m, n, k, nnz, checked)
    name = f"sk_{name}_{ALL_TYPES[x.dtype]}"
    cuda_library.start(name, -(-m // WARPS), THREADS, smem_bytes, tensors, *sizes)
    return y


def spmm(row_offsets, col_indices, values, n, k, x, bias=None):
    weight = row_offsets, col_indices, values, n, k
    return mend("spmm", *weight, x, bias, mm(x, write_out(*weight).t(), bias))


def spmm_t(row_offsets, col_indices, values, n, k, dy, bias=None):
    weight = row_offsets, col_indices, values, n, k
    return mend("spmm_t", *weight, dy, bias, mm(dy, write_out(*weight), bias))


def sddmm(row_offsets, col_indices, n, k, dy, x):
    return collect(row_offsets, col_indices, mm(dy.t(), x))


def _refuse(p: Problem) -> str | None:
    if p.dtype not in ALL_TYPES:
        return f"it takes floats of 16, 32 and 64 bits, not {str(p.dtype).removeprefix('torch.')}"
    return None


KERNELS = (
    Kernel("expand", "spmm", "cuda", _refuse, spmm),
    Kernel("expand", "spmm_t", "cuda", _refuse, spmm_t),
    Kernel("expand", "sddmm", "cuda", _refuse, sddmm),
)
