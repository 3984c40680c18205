"""The product of two SparseTensors: a SparseTensor. torch.sparse.mm computes it."""

import torch
from torch import Tensor
from torch.autograd import Function, forward_ad

from .indices import count_rows
from .ops import in_functorch
from .tensor import SparseTensor


def sparse_times_sparse(a: SparseTensor, b: SparseTensor) -> SparseTensor:
    """a [N, K] @ b [K, L], an entry wherever the two patterns make one. Both have one dtype."""
    if in_functorch() or forward_ad._current_level >= 0:
        raise NotImplementedError(
            "matmul: a product of two SparseTensors has no torch.func and no forward mode; "
            "write W1 @ W2.to_dense(), whose second factor is dense"
        )
    if not torch.compiler.is_compiling():  # a graph cannot look
        a._checked(), b._checked()  # torch would read where any wrong column leads
    places, values = _Product.apply(*_coo(a), a.values, *_coo(b), b.values)
    n, k = a.shape[0], b.shape[1]
    return SparseTensor(count_rows(places[0], n), places[1], values, (n, k))


def _coo(a: SparseTensor) -> tuple[Tensor, torch.Size]:
    return torch.stack(a._coordinates()), a.shape


def _mm(a_places, a_shape, a_values, b_places, b_shape, b_values) -> Tensor:
    dtype = a_values.dtype
    if dtype.itemsize == 2 and not a_values.is_cuda:  # torch has no such product on a CPU
        a_values, b_values = a_values.float(), b_values.float()
    # The places are not those of a file any more, but somebody may have written to them.
    a, b = (
        torch.sparse_coo_tensor(*parts, device=parts[1].device, check_invariants=True)
        for parts in ((a_places, a_values, a_shape), (b_places, b_values, b_shape))
    )
    return torch.sparse.mm(a, b).coalesce().to(dtype)


class _Product(Function):
    """Places int64 [2, nnz] and values of a product; its gradients are such products, so all
    orders of derivative are there."""

    @staticmethod
    def forward(ctx, a_places, a_shape, a_values, b_places, b_shape, b_values):
        y = _mm(a_places, a_shape, a_values, b_places, b_shape, b_values)
        # Copies: autograd refuses writes to views that a Function returns.
        places, values = y.indices().clone(), y.values().clone()
        ctx.shapes = a_shape, b_shape
        ctx.mark_non_differentiable(places)
        ctx.save_for_backward(a_places, a_values, b_places, b_values, places)
        return places, values

    @staticmethod
    def backward(ctx, _, h):
        a_places, a_values, b_places, b_values, places = ctx.saved_tensors
        a_shape, b_shape = ctx.shapes
        y = places, torch.Size((a_shape[0], b_shape[1])), h
        da = db = None
        if ctx.needs_input_grad[2]:  # dA = dY B^T at the pattern of A
            b_t = b_places.flip(0), b_shape[::-1], b_values
            da = _values_at(a_places, a_shape[1], *_Product.apply(*y, *b_t))
        if ctx.needs_input_grad[5]:  # dB = A^T dY at the pattern of B
            a_t = a_places.flip(0), a_shape[::-1], a_values
            db = _values_at(b_places, b_shape[1], *_Product.apply(*a_t, *y))
        return None, None, da, None, None, db


def _values_at(wanted: Tensor, k: int, places: Tensor, values: Tensor) -> Tensor:
    """The values at `wanted` of what has `values` at ascending `places`, in rows of k; 0 where it
    has none."""
    sought, known = (rows * k + cols for rows, cols in (wanted, places))
    at = torch.searchsorted(known, sought)  # up to one place beyond the last
    known = torch.cat([known, known.new_tensor([-1])])
    values = torch.cat([values, values.new_zeros(1)])
    return values[torch.where(known[at] == sought, at, len(values) - 1)]
