"""The three products in plain torch, through a dense W: the truth for tests, and the `dense` rows.

    spmm    Y  = X W^T + bias                 [M, K] -> [M, N]
    spmm_t  dX = dY W + bias                  [M, N] -> [M, K]
    sddmm   dV = (dY^T X) at the pattern      [M, N], [M, K] -> [nnz]

bias may be None. row_offsets int32 [N+1] and col_indices int32 [nnz] are CSR with strictly
increasing columns in a row; values [nnz] have the dtype of x and dy. 16-bit types are multiplied
and summed in float32 and rounded once; on a GPU by its tensor cores, as torch.mm does. Right for
any dtype and device, and fastest where W is nearly full. It allocates N x K elements. A stored W
has no product at a missing entry, so an infinite or NaN x gives NaN here (0 * inf, as in
torch.matmul) where a sparse kernel skips it.
"""

import torch
from torch import Tensor

from ..tensor import expand_rows
from .derived import derived, ensure_checked


def spmm(
    row_offsets: Tensor,
    col_indices: Tensor,
    values: Tensor,
    n: int,
    k: int,
    x: Tensor,
    bias: Tensor | None = None,
) -> Tensor:
    """y [M, N] = x [M, K] @ W.T + bias [N]."""
    w = _densify(row_offsets, col_indices, values, n, k)
    return _mm(x, w.t(), bias).to(x.dtype)


def spmm_t(
    row_offsets: Tensor,
    col_indices: Tensor,
    values: Tensor,
    n: int,
    k: int,
    dy: Tensor,
    bias: Tensor | None = None,
) -> Tensor:
    """dx [M, K] = dy [M, N] @ W + bias [K]."""
    w = _densify(row_offsets, col_indices, values, n, k)
    return _mm(dy, w, bias).to(dy.dtype)


def sddmm(
    row_offsets: Tensor, col_indices: Tensor, n: int, k: int, dy: Tensor, x: Tensor
) -> Tensor:
    """dvalues [nnz] = (dy [M, N].T @ x [M, K]) at the stored entries."""
    dw = _mm(dy.t(), x).to(x.dtype)
    return dw.view(-1)[places_of(row_offsets, col_indices, n, k)]


def places_of(row_offsets: Tensor, col_indices: Tensor, n: int, k: int) -> Tensor:
    """Where each stored value lies in a row-major [N, K] matrix: int64 [nnz].

    The indices are checked when they have changed (derived.py). On a CPU they are read as they are,
    so that a write that nobody counts (a collective's) is seen: torch checks its own accesses. On a
    GPU an index out of range would be an assertion that ends the context: a checked copy is read.
    """

    def make(row_offsets: Tensor, col_indices: Tensor) -> Tensor:
        return expand_rows(row_offsets, col_indices.shape[0]) * k + col_indices

    if col_indices.is_cuda:
        return derived("places", row_offsets, col_indices, n, k, make)
    ensure_checked(row_offsets, col_indices, n, k)
    return make(row_offsets, col_indices)


def _densify(row_offsets: Tensor, col_indices: Tensor, values: Tensor, n: int, k: int) -> Tensor:
    values = values.to(_product_dtype(values))
    places = places_of(row_offsets, col_indices, n, k)
    # Strictly increasing columns: as many values as places means every place, in row-major order.
    if values.shape[0] == n * k:
        return values.view(n, k)
    return values.new_zeros(n * k).scatter_(0, places, values).view(n, k)


def _mm(a: Tensor, b: Tensor, bias: Tensor | None = None) -> Tensor:
    dtype = _product_dtype(a)
    # An op's implementation runs under the caller's autocast, which would round these operands.
    with torch.autocast(a.device.type, enabled=False):
        if bias is None:
            return torch.mm(a.to(dtype), b.to(dtype))
        return torch.addmm(bias.to(dtype), a.to(dtype), b.to(dtype))


def _product_dtype(t: Tensor) -> torch.dtype:
    # Tensor cores add up in float32 whatever they multiply; a CPU's float32 is as fast as any.
    return torch.float32 if t.itemsize == 2 and not t.is_cuda else t.dtype
