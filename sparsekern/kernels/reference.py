"""The three products in plain torch, through a dense W: the truth for tests, and the `dense` rows.

    spmm    Y  = X W^T + bias                 [M, K] -> [M, N]
    spmm_t  dX = dY W + bias                  [M, N] -> [M, K]
    sddmm   dV = (dY^T X) at the pattern      [M, N], [M, K] -> [nnz]

bias may be None. row_offsets int32 [N+1] and col_indices int32 [nnz] are CSR with strictly
increasing columns in a row; values [nnz] have the dtype of x and dy. 16-bit types are multiplied
and summed in float32 and rounded once; on a GPU by its tensor cores, as torch.mm does. Right for
any dtype and device, and fastest where W is nearly full. It allocates N x K elements. A place that
is not stored takes no part: an infinite or NaN x reaches the outputs that a stored value connects
it to, and no other. (On other devices than a CPU its whole token becomes NaN, as in torch.matmul.)
"""

from collections.abc import Callable

import torch
from torch import Tensor

from ..indices import check_pattern, expand_rows
from .derived import derived
from .operands import check_pattern_arrays


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
    y = _mm(x, w.t(), bias)
    if y.is_cpu:
        rows = expand_rows(row_offsets, col_indices.shape[0])
        y = skip_missing(y, x, lambda few: _stored(few, w.t(), bias, values, col_indices, rows))
    return y.to(x.dtype)


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
    dx = _mm(dy, w, bias)
    if dx.is_cpu:
        rows = expand_rows(row_offsets, col_indices.shape[0])
        dx = skip_missing(dx, dy, lambda few: _stored(few, w, bias, values, rows, col_indices))
    return dx.to(dy.dtype)


def sddmm(
    row_offsets: Tensor, col_indices: Tensor, n: int, k: int, dy: Tensor, x: Tensor
) -> Tensor:
    """dvalues [nnz] = (dy [M, N].T @ x [M, K]) at the stored entries."""
    dw = _mm(dy.t(), x).to(x.dtype)
    return dw.view(-1)[places_of(row_offsets, col_indices, n, k)]


def places_of(row_offsets: Tensor, col_indices: Tensor, n: int, k: int) -> Tensor:
    """Where each stored value lies in a row-major [N, K] matrix: int64 [nnz].

    On a CPU the indices are read and checked by each call, so that a write that nobody counts (a
    collective's) is seen. On a GPU that would wait: a copy is read, which is checked and made when
    the indices have changed (derived.py).
    """

    def make(row_offsets: Tensor, col_indices: Tensor) -> Tensor:
        return expand_rows(row_offsets, col_indices.shape[0]) * k + col_indices

    if col_indices.is_cuda:
        return derived("places", row_offsets, col_indices, n, k, make)
    check_pattern_arrays(row_offsets, col_indices, n, col_indices.device)
    check_pattern(row_offsets, col_indices, n, k)
    return make(row_offsets, col_indices)


def _densify(row_offsets: Tensor, col_indices: Tensor, values: Tensor, n: int, k: int) -> Tensor:
    values = values.to(_product_dtype(values))
    places = places_of(row_offsets, col_indices, n, k)
    # Strictly increasing columns: as many values as places means every place, in row-major order.
    if values.shape[0] == n * k:
        return values.view(n, k)
    return values.new_zeros(n * k).scatter_(0, places, values).view(n, k)


def _stored(
    x: Tensor, w: Tensor, bias: Tensor | None, values: Tensor, sources: Tensor, targets: Tensor
) -> Tensor:
    """x @ w + bias of stored values alone: values[p] multiplies x[:, sources[p]] and is added to
    output targets[p].

    Every infinity and NaN of x has a stand-in of its sign in the dense product, which vanishes
    where W stores nothing; what they make of the other outputs is then added there.
    """
    x, values = x.to(w.dtype), values.to(w.dtype)
    is_bad = ~x.isfinite()
    y = _mm(torch.where(is_bad, x.sign().nan_to_num(1.0), x), w, bias)
    places = is_bad.any(dim=0)[sources].nonzero().flatten()
    for p in places.split(max(1, 2**24 // x.shape[0])):
        source = sources[p]
        products = torch.where(is_bad[:, source], x[:, source] * values[p], 0)
        y.index_add_(1, targets[p], products)
    return y


def mm(a: Tensor, b: Tensor, bias: Tensor | None = None) -> Tensor:
    """a @ b + bias in the dtype of the operands: an op runs under the caller's autocast, which
    would round them."""
    device = a.device.type
    if device == "meta" or not torch.is_autocast_enabled(device):
        return torch.mm(a, b) if bias is None else torch.addmm(bias, a, b)
    torch.set_autocast_enabled(device, False)  # torch.autocast takes 8 us for it
    try:
        return torch.mm(a, b) if bias is None else torch.addmm(bias, a, b)
    finally:
        torch.set_autocast_enabled(device, True)


def skip_missing(y: Tensor, x: Tensor, product: Callable[[Tensor], Tensor]) -> Tensor:
    """y [M, out] of a product of x [M, in] with a W that was written out, as if nothing had been
    multiplied where W stores nothing: product(x of some tokens) computes those tokens anew.

    A written-out zero makes NaN of an infinity or a NaN in x (0 * inf), in every output of its
    token. So a token whose first output is finite is right, and of the others those whose x is
    finite. For a CPU: the branch depends on data.
    """
    if y.numel() == 0:
        return y
    suspects = (~y[:, 0].isfinite()).nonzero().flatten()
    if suspects.numel():
        tokens = suspects[~x[suspects].isfinite().all(dim=1)]
        if tokens.numel():
            y[tokens] = product(x[tokens])
    return y


def _mm(a: Tensor, b: Tensor, bias: Tensor | None = None) -> Tensor:
    dtype = _product_dtype(a)
    return mm(a.to(dtype), b.to(dtype), None if bias is None else bias.to(dtype))


def _product_dtype(t: Tensor) -> torch.dtype:
    # Tensor cores add up in float32 whatever they multiply; a CPU's float32 is as fast as any.
    return torch.float32 if t.itemsize == 2 and not t.is_cuda else t.dtype
