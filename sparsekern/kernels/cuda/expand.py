"""W written out and torch.mm, on a GPU: the table rows `expand`, and packed weights of many tokens.

All in the dtype of the operands. The kernels read the caller's indices, which were checked since
they last changed; csrc/cuda/csr.cu says what a write that nobody counted may do. A zero that is
written out makes NaN of an infinity or a NaN in x; one more launch computes such tokens anew from
the stored values, without a look at the result from here, so that a CUDA graph can capture it. With
neither nvcc nor CuPy, torch's indexing takes the place of the kernels, and Triton's launch that of
the last one; float64, or a machine without Triton, then keeps what the zeros have made.
"""

import torch
from torch import Tensor

from ..derived import ensure_checked
from ..problem import Kernel, Problem
from ..reference import mm, places_of
from ..triton import rows as triton_rows
from . import library as cuda_library
from .layout import LANES, TYPES, Packed

THREADS, ROW_BYTES, COLUMNS = 256, 48 * 1024, 4096  # of a block, of a row of W, of a row of dx
WARPS = THREADS // LANES
ALL_TYPES = {**TYPES, torch.float32: "f32", torch.float64: "f64"}


def spmm_expanded(x: Tensor, packed: Packed, bias: Tensor | None) -> Tensor:
    """y [M, N] = x [M, K] @ W.T + bias [N] of a packed weight."""
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
    ensure_checked(row_offsets, col_indices, n, k)
    w = values.new_empty(n, k)
    if w.numel():
        row_bytes = min(k * values.element_size(), ROW_BYTES)
        tensors = row_offsets, col_indices, values, w
        _start(f"write_out_{w.element_size()}", n, row_bytes, tensors, k, len(values))
    return w


def collect(row_offsets: Tensor, col_indices: Tensor, w: Tensor) -> Tensor:
    """The entries of w [N, K] at the places of the pattern."""
    n, k = w.shape
    if cuda_library.refusal():
        return w.view(-1)[places_of(row_offsets, col_indices, n, k)]
    ensure_checked(row_offsets, col_indices, n, k)
    values = w.new_empty(col_indices.shape[0])
    if len(values):
        tensors = row_offsets, col_indices, w, values
        _start(f"collect_{w.element_size()}", -(-n // WARPS), 0, tensors, n, k, len(values))
    return values


def _mend(op, row_offsets, col_indices, values, n, k, x, bias, y):
    """y, the product of W written out, without what an infinity or NaN in x has made of places that
    are not stored."""
    m, nnz = x.shape[0], len(values)
    if y.numel() == 0 or nnz == n * k:
        return y
    if cuda_library.refusal():
        if triton_rows.can_mend(x.dtype):
            mend = triton_rows.mend if op == "mend" else triton_rows.mend_t
            mend(row_offsets, col_indices, values, n, k, x, bias, y)
        return y
    smem_bytes = WARPS * 4
    if op == "mend_t":
        smem_bytes += COLUMNS * max(4, x.element_size())
    tensors = row_offsets, col_indices, values, x, bias, y
    _start(f"{op}_{ALL_TYPES[x.dtype]}", -(-m // WARPS), smem_bytes, tensors, m, n, k, nnz)
    return y


def _start(name: str, grid: int, smem_bytes: int, tensors: tuple[Tensor | None, ...], *sizes: int):
    cuda_library.start(f"sk_csr_{name}", grid, THREADS, smem_bytes, tensors, *sizes)


def spmm(row_offsets, col_indices, values, n, k, x, bias=None):
    weight = row_offsets, col_indices, values, n, k
    return _mend("mend", *weight, x, bias, mm(x, write_out(*weight).t(), bias))


def spmm_t(row_offsets, col_indices, values, n, k, dy, bias=None):
    weight = row_offsets, col_indices, values, n, k
    return _mend("mend_t", *weight, dy, bias, mm(dy, write_out(*weight), bias))


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
