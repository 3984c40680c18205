"""The product of two SparseTensors: a SparseTensor. torch.sparse.mm computes it."""

import torch
from torch import Tensor
from torch.autograd import Function, forward_ad
from torch.autograd.function import once_differentiable

from .indices import count_rows
from .ops import in_functorch
from .tensor import SparseTensor


def sparse_times_sparse(a: SparseTensor, b: SparseTensor) -> SparseTensor:
    """a [N, K] @ b [K, L], an entry wherever the two patterns make one. Both have one dtype.

    Differentiable once: a second derivative raises.
    """
    if in_functorch() or forward_ad._current_level >= 0:
        raise NotImplementedError(
            "matmul: a product of two SparseTensors has no torch.func and no forward mode; "
            "write W1 @ W2.to_dense(), whose second factor is dense"
        )
    if not torch.compiler.is_compiling():  # a graph cannot look
        a._checked(), b._checked()  # torch would read where any wrong column leads
    rows, cols, values = _Product.apply(*_coo(a), a.values, *_coo(b), b.values)
    n, k = a.shape[0], b.shape[1]
    return SparseTensor(count_rows(rows, n), cols, values, (n, k))


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
    @staticmethod
    def forward(ctx, *args):
        ctx.shapes = args[1], args[4]
        ctx.save_for_backward(args[0], args[2], args[3], args[5])
        y = _mm(*args)
        # Copies: autograd refuses writes to views that a Function returns.
        rows, cols, values = (t.clone() for t in (*y.indices(), y.values()))
        ctx.mark_non_differentiable(rows, cols)
        return rows, cols, values

    # torch's own double backward of torch.sparse.mm is silently zero.
    @staticmethod
    @once_differentiable
    def backward(ctx, _rows, _cols, h):
        a_places, a_values, b_places, b_values = ctx.saved_tensors
        a_values, b_values = (t.detach().requires_grad_() for t in (a_values, b_values))
        with torch.enable_grad():
            y = _mm(a_places, ctx.shapes[0], a_values, b_places, ctx.shapes[1], b_values)
            da, db = torch.autograd.grad(y.values(), (a_values, b_values), h)
        return None, None, da, None, None, db
