"""Products that add or sample: torch.addmm, addmv, sparse.addmm, sparse.sampled_addmm; sddmm."""

from collections.abc import Callable

import torch
from torch import Tensor

from .. import ops
from ..casts import without_autocast
from ..indices import VALUE_DTYPES
from ..matmul import autocast, fits, raise_as_torch, times
from ..tensor import ALTERNATIVES, TORCH_FUNCTIONS, SparseTensor, register


def sddmm(pattern: SparseTensor, a: Tensor, b: Tensor) -> SparseTensor:
    """a [N, M] @ b [M, K] where `pattern` [N, K] stores something, and nowhere else.

    As torch.sparse.sampled_addmm(pattern, a, b, beta=0): the values of `pattern` do not count.
    Differentiable in a and b, any number of times, with no N x K matrix in between.
    """
    if not isinstance(pattern, SparseTensor):
        raise TypeError(f"sddmm: pattern: expected a SparseTensor, got {type(pattern).__name__}")
    for name, t in (("a", a), ("b", b)):
        if not isinstance(t, Tensor) or t.layout != torch.strided:
            raise TypeError(f"sddmm: {name}: expected a dense tensor, got {type(t).__name__}")
        if t.ndim != 2:
            raise ValueError(f"sddmm: {name}: expected 2 dimensions, got shape {tuple(t.shape)}")
        if t.device != pattern.device:
            raise ValueError(f"sddmm: {name}: expected device {pattern.device}, got {t.device}")
    (n, k), m = pattern.shape, a.shape[1]
    if a.shape[0] != n:
        raise ValueError(f"sddmm: a: expected shape ({n}, M), got {tuple(a.shape)}")
    if b.shape != (m, k):
        raise ValueError(f"sddmm: b: expected shape ({m}, {k}), got {tuple(b.shape)}")
    if a.dtype not in VALUE_DTYPES or a.dtype != b.dtype:
        raise TypeError(
            "sddmm: expected a and b of one dtype, float32, bfloat16, float16 or float64, got "
            f"{a.dtype} and {b.dtype}"
        )
    dy, x = (b, a.T) if pattern.is_transposed else (a.T, b)  # [M, rows], [M, columns] of CSR
    values = ops.sddmm(pattern.row_offsets, pattern.col_indices, pattern.n, pattern.k, dy, x)
    return pattern._with_values(values, pattern.is_transposed)


def _sampled_addmm(input, mat1, mat2, *, beta=1.0, alpha=1.0, out=None):
    if out is not None or not isinstance(input, SparseTensor):
        raise NotImplementedError(
            "sampled_addmm: expected a SparseTensor as input, two dense matrices and no out="
        )
    product = sddmm(input, mat1, mat2)
    if product.dtype != input.dtype:
        raise TypeError(f"sampled_addmm: expected {input.dtype}, got {product.dtype}")
    values = _scaled_sum(input.values, product.values, beta, alpha)
    return input._with_values(values, input.is_transposed)


def _addmm(input, mat1, mat2, *, beta=1, alpha=1, out=None):
    return _add(torch.addmm, 2, input, mat1, mat2, beta, alpha, out)


def _addmv(input, mat, vec, *, beta=1, alpha=1, out=None):
    return _add(torch.addmv, 1, input, mat, vec, beta, alpha, out)


def _add(func: Callable, b_ndim: int, input, a, b, beta, alpha, out) -> Tensor:
    """beta * input + alpha * (a @ b) with one sparse factor."""
    sparse = [isinstance(t, SparseTensor) for t in (input, a, b)]
    if sparse[0] or all(sparse[1:]):
        raise NotImplementedError(
            f"{func.__name__}: expected a dense input and one sparse factor: with W1 + W2 and "
            "torch.matmul(W1, W2) sparse matrices add and multiply"
        )
    W, x = (a, b) if sparse[1] else (b, a)
    wanted = {"beta": beta, "alpha": alpha}
    if (getattr(a, "ndim", None), getattr(b, "ndim", None)) != (2, b_ndim):
        raise_as_torch(func, input, a, b, **wanted)
    if isinstance(beta, complex) or isinstance(alpha, complex):
        raise_as_torch(func, input, a, b, **wanted)
    summand, values = input, W.values
    # torch's autocast leaves calls with out= alone, and on a CPU also addmv.
    if out is None and not (func is torch.addmv and values.device.type == "cpu"):
        x, values, summand = autocast(x, values, input)
    dim = -1 if sparse[2] or b_ndim == 1 else -2
    if not fits(x, dim, W.shape[0 if sparse[2] else 1], values):
        raise_as_torch(func, input, a, b, **wanted)
    shape = (a.shape[0], b.shape[1]) if b_ndim == 2 else (a.shape[0],)
    if not _adds(summand, shape, values):
        raise_as_torch(func, input, a, b, **wanted)
    if sparse[2] and summand.shape == shape[1:] and alpha == beta == 1 and out is None:
        return times(x, W, values, summand)
    if sparse[2]:
        y = times(x, W, values)
    else:
        y = times(x.mT if b_ndim == 2 else x, W.T, values)
        y = y.mT if b_ndim == 2 else y
    result = _scaled_sum(summand, y, beta, alpha).contiguous()
    if out is None:
        return result
    # torch itself checks, warns and resizes, and computes nothing of size.
    func(input.expand(shape), y.new_empty(shape[0], 0), y[:0], out=out, **wanted)
    return out.copy_(result)


def _adds(summand, shape: tuple[int, ...], values: Tensor) -> bool:
    """Whether it can be added to a result of that shape."""
    return (
        isinstance(summand, Tensor)
        and summand.dtype == values.dtype
        and summand.device == values.device
        and summand.layout == torch.strided
        and summand.ndim <= len(shape)
        and all(s in (1, t) for s, t in zip(reversed(summand.shape), reversed(shape), strict=False))
    )


def _scaled_sum(summand: Tensor, y: Tensor, beta, alpha) -> Tensor:
    """beta * summand + alpha * y, rounded once; without the summand where beta is 0, as in torch,
    so that its NaN do not count."""
    if beta == 0:
        y = y if alpha == 1 else y * alpha
        if not summand.requires_grad:
            return y
        return torch.where(torch.zeros((), dtype=torch.bool, device=y.device), summand, y)
    if alpha == beta == 1:
        return summand + y
    wide = torch.float32 if y.dtype.itemsize == 2 else y.dtype
    return torch.add(summand.to(wide) * beta, y.to(wide), alpha=alpha).to(y.dtype)


def _in_place(func: Callable, in_place: Callable):
    def run(input, a, b, *, beta=1, alpha=1):
        with without_autocast(input):
            result = func(input, a, b, beta=beta, alpha=alpha)
        if result.shape != input.shape:
            raise_as_torch(in_place, input, a, b, beta=beta, alpha=alpha)
        return input.copy_(result)

    return run


# A SparseTensor is never the summand, so it has no such methods.
register("addmm", _addmm, method=False)
register("addmv", _addmv, method=False)
TORCH_FUNCTIONS.update(
    {
        torch.sparse.addmm: _addmm,
        torch.sparse.sampled_addmm: _sampled_addmm,
        Tensor.addmm_: _in_place(_addmm, Tensor.addmm_),
        Tensor.addmv_: _in_place(_addmv, Tensor.addmv_),
    }
)
for _name in ("bmm", "baddbmm", "addbmm"):
    ALTERNATIVES[_name] = "W has no batch; torch.matmul(x, W.T) and torch.matmul(W, x) take one"
ALTERNATIVES["addmm"] = ALTERNATIVES["addmv"] = "only its factors may be sparse"
