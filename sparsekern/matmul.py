"""matmul() and linear(): torch.matmul and F.linear with one sparse operand.

Shapes, dtypes, autocast, `out=` and error texts are torch's own. The leading dimensions are folded
to x [M, K], one of the ops in ops.py runs, and the dimensions come back; every result is contiguous
as torch's is. torch.matmul, torch.mm, torch.mv, F.linear, the methods of Tensor and the operator @
come here through SparseTensor.__torch_function__.
"""

import operator
from collections.abc import Callable
from typing import NoReturn

import torch
import torch.nn.functional as F
from torch import Tensor

from . import ops
from .kernels.problem import Problem
from .kernels.table import describe, pick
from .tensor import TORCH_FUNCTIONS, SparseTensor


def matmul(
    input: Tensor | SparseTensor, other: Tensor | SparseTensor, *, out: Tensor | None = None
) -> Tensor:
    """torch.matmul(input, other, out=out) where one of the two may be a SparseTensor.

    Two dense arguments go to torch.matmul unchanged. Wrong arguments raise what torch.matmul
    raises; NotImplementedError where torch.matmul could and this cannot, as for two sparse ones.
    """
    return _matmul(torch.matmul, input, other, out)


def linear(input: Tensor, weight: Tensor | SparseTensor, bias: Tensor | None = None) -> Tensor:
    """F.linear: input [..., K] @ weight [N, K].T + bias [N] -> [..., N]."""
    if isinstance(input, SparseTensor) or isinstance(bias, SparseTensor):
        raise NotImplementedError("linear: only the weight may be a SparseTensor")
    if not isinstance(weight, SparseTensor):
        return F.linear(input, weight, bias)
    x, values, b = _autocast(input, weight.values, bias)
    n, k = weight.shape
    if not _fits(x, -1, k, values) or not (b is None or (_fits(b, -1, n, values) and b.ndim == 1)):
        _raise_as_torch(F.linear, input, weight, bias)
    return _times(x, weight.T, values, b)


def explain(x: Tensor, W: SparseTensor) -> str:
    """Which kernel runs each pass of linear(x, W), or of x @ W.T if given W.T, and why not others.

    Raises ValueError if the last dimension of x is not K.
    """
    if x.ndim == 0 or x.shape[-1] != W.k:
        raise ValueError(f"x: expected a last dimension of K = {W.k}, got shape {tuple(x.shape)}")
    lines = []
    for name, op in (("forward", "spmm"), ("dx", "spmm_t"), ("dvalues", "sddmm")):
        m = x.shape[:-1].numel()
        problem = Problem(op, x.device.type, x.dtype, m, W.n, W.k, W.nnz)
        lines.append(f"{name}: {describe(problem, pick(problem))}")
    return "\n".join(lines)


def _matmul(func: Callable, a, b, out: Tensor | None) -> Tensor:
    """`func` is torch.matmul or a stricter form of it: the one whose errors are raised."""
    if isinstance(a, SparseTensor) and isinstance(b, SparseTensor):
        raise NotImplementedError(
            f"{func.__name__}: expected a dense operand, got two SparseTensors"
        )
    if isinstance(a, SparseTensor):
        return _sparse_dense(func, a, b, out)
    if isinstance(b, SparseTensor):
        return _dense_sparse(func, a, b, out)
    return func(a, b) if out is None else func(a, b, out=out)


def _dense_sparse(func: Callable, a, b: SparseTensor, out: Tensor | None) -> Tensor:
    x, values = _operands(func, a, b.values, out)
    if not _fits(x, -1, b.shape[0], values):
        _raise_as_torch(func, a, b)
    y = _times(x, b, values)
    if out is None:
        return y
    return _write(func, out, y, x[..., :0], values[:0].view(0, b.shape[1]))


def _sparse_dense(func: Callable, a: SparseTensor, b, out: Tensor | None) -> Tensor:
    x, values = _operands(func, b, a.values, out)
    dim = -2 if isinstance(x, Tensor) and x.ndim > 1 else -1
    if not _fits(x, dim, a.shape[1], values):
        _raise_as_torch(func, a, b)
    if dim == -1:
        y = _times(x, a.T, values)
    else:  # A x = (x^T A^T)^T
        y = _times(x.mT, a.T, values).mT.contiguous()
    if out is None:
        return y
    return _write(func, out, y, values[:0].view(a.shape[0], 0), x.narrow(dim, 0, 0))


def _times(x: Tensor, b: SparseTensor, values: Tensor, bias: Tensor | None = None) -> Tensor:
    """x [..., I] @ b [I, O] + bias [O] -> [..., O], contiguous. `values` stand in for b's own."""
    op = ops.spmm if b.is_transposed else ops.spmm_t
    rows = x.unsqueeze(0) if x.ndim == 1 else x.flatten(0, -2)
    y = op(b.row_offsets, b.col_indices, values, b.n, b.k, rows, bias)
    return y if x.ndim == 2 else y.view(*x.shape[:-1], y.shape[1])


def _fits(x, dim: int, size: int, values: Tensor) -> bool:
    return (
        isinstance(x, Tensor)
        and x.ndim > 0
        and x.shape[dim] == size
        and x.dtype == values.dtype
        and x.device == values.device
        and x.layout == torch.strided
    )


def _operands(func: Callable, x, values: Tensor, out: Tensor | None) -> tuple:
    # torch's autocast leaves calls with out= alone, and on a CPU also mv.
    if out is not None or (func is torch.mv and values.device.type == "cpu"):
        return x, values
    return _autocast(x, values)


def _autocast(*tensors):
    """The operands as torch's autocast hands them to matmul: float64 is exempt."""
    device = tensors[1].device.type
    if not torch.is_autocast_enabled(device):
        return tensors
    dtype = torch.get_autocast_dtype(device)
    return tuple(
        t.to(dtype)
        if isinstance(t, Tensor) and t.is_floating_point() and t.dtype != torch.float64
        else t
        for t in tensors
    )


def _raise_as_torch(func: Callable, *args) -> NoReturn:
    """Raise torch's own error: call `func` with a dense twin, one element large, of each W."""

    def twin(a):
        if not isinstance(a, SparseTensor):
            return a
        return torch.zeros((), dtype=a.dtype, device=a.device).expand(a.shape)

    func(*(twin(a) for a in args))
    # torch can do it.
    got = ", ".join(
        f"{tuple(a.shape)} {a.dtype} {a.layout} on {a.device}"
        for a in map(twin, args)
        if a is not None
    )
    raise NotImplementedError(f"{func.__name__}: not supported with a SparseTensor, got {got}")


def _write(func: Callable, out: Tensor, y: Tensor, a: Tensor, b: Tensor) -> Tensor:
    """y to `out`, as func(.., out=out) would. a and b are the operands without their inner
    dimension: torch itself checks, warns and resizes, and computes nothing."""
    func(a, b, out=out)
    return out.copy_(y)


def _mm(input, mat2, *, out=None):
    return _strict(torch.mm, 2, 2, input, mat2, out)


def _mv(input, vec, *, out=None):
    return _strict(torch.mv, 2, 1, input, vec, out)


def _strict(func, a_ndim, b_ndim, a, b, out):
    if (getattr(a, "ndim", None), getattr(b, "ndim", None)) != (a_ndim, b_ndim):
        _raise_as_torch(func, a, b)
    return _matmul(func, a, b, out)


def _operator(input, other):
    """x @ W and x.matmul(W)."""
    # torch.compile (torch 2.13) passes W @ x here with its operands swapped. Where that could be
    # meant we refuse: the graph breaks, and the eager call has the right order.
    if torch.compiler.is_dynamo_compiling() and isinstance(other, SparseTensor):
        if input.shape[-2:][:1] == other.shape[1:]:
            raise NotImplementedError(
                "torch.compile cannot tell x @ W from W @ x if both fit: write torch.matmul"
            )
    return matmul(input, other)


def _reflected_operator(input, other):
    return matmul(other, input)


TORCH_FUNCTIONS.update(
    {
        torch.matmul: matmul,
        torch.mm: _mm,
        torch.mv: _mv,
        F.linear: linear,
        Tensor.matmul: _operator,
        Tensor.__matmul__: _operator,
        Tensor.__rmatmul__: _reflected_operator,
        Tensor.mm: _mm,
        Tensor.mv: _mv,
        operator.matmul: matmul,  # torch.export has this one
    }
)
