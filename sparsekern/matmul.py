"""matmul() and linear(): torch.matmul and F.linear with a sparse operand.

Shapes, dtypes, autocast, `out=` and error texts are torch's own. The leading dimensions are folded
to x [M, K], one of the ops in ops.py runs, and the dimensions come back; every result is contiguous
as torch's is. torch.matmul, torch.mm, torch.mv, F.linear, the methods and the operator @ come here
through SparseTensor.__torch_function__. Two SparseTensors make a third one.
"""

import operator
from collections.abc import Callable
from typing import Any, NoReturn

import torch
import torch.nn.functional as F
from torch import Tensor

from . import calls as calls  # sets them up
from . import ops
from .casts import autocast, is_any_autocast_enabled, without_autocast
from .kernels.cuda.ordered import recognised
from .kernels.problem import Problem
from .kernels.table import describe, pick
from .sparse_sparse import sparse_times_sparse
from .tensor import REFLECTED, TORCH_FUNCTIONS, SparseTensor, register

_PLAIN = (Tensor, torch.nn.Parameter)
_is_compiling = torch.compiler.is_compiling


def matmul(
    input: Tensor | SparseTensor, other: Tensor | SparseTensor, *, out: Tensor | None = None
) -> Tensor | SparseTensor:
    """torch.matmul(input, other, out=out) where one or both may be a SparseTensor.

    Two dense arguments go to torch.matmul unchanged, two sparse ones give a SparseTensor. Wrong
    arguments raise what torch.matmul raises; NotImplementedError where torch.matmul could and this
    cannot.
    """
    if isinstance(other, SparseTensor) and not isinstance(input, SparseTensor):
        return _dense_sparse(torch.matmul, input, other, out)
    return _matmul(torch.matmul, input, other, out)


def linear(
    input: Tensor | SparseTensor, weight: Tensor | SparseTensor, bias: Tensor | None = None
) -> Tensor:
    """F.linear: input [..., K] @ weight [N, K].T + bias [N] -> [..., N]."""
    if isinstance(input, SparseTensor) or isinstance(bias, SparseTensor):
        return _linear_of_sparse(input, weight, bias)
    if not isinstance(weight, SparseTensor):
        return F.linear(input, weight, bias)
    if not weight.is_transposed:
        parts = weight.row_offsets, weight.col_indices, weight.values, weight.n, weight.k
        y = quick_linear(input, *parts, bias)
        if y is not None:
            return y
    x, values, b = autocast(input, weight.values, bias)
    n, k = weight.shape
    if not fits(x, -1, k, values) or not (b is None or (fits(b, -1, n, values) and b.ndim == 1)):
        raise_as_torch(F.linear, input, weight, bias)
    return times(x, weight.T, values, b)


def quick_linear(
    x, row_offsets: Tensor, col_indices: Tensor, values: Tensor, n: int, k: int, bias
) -> Tensor | None:
    """linear() of x [..., M, K] where there is nothing to convert or refuse; None where there is. A
    small layer pays for every line of Python."""
    if _is_compiling():
        return None
    if is_any_autocast_enabled():
        x, values, bias = autocast(x, values, bias)
    y = ops.call(ops.SPMM, row_offsets, col_indices, values, n, k, x, bias)
    if y is not None:
        return y
    if (
        type(x) not in _PLAIN
        or x.layout is not torch.strided
        or x.dim() < 2
        or x.shape[-1] != k
        or x.device != values.device
        or x.dtype is not values.dtype
        or (bias is not None and (bias.shape != (n,) or bias.dtype is not x.dtype))
    ):
        return None
    if x.dim() == 2:
        return ops.spmm(row_offsets, col_indices, values, n, k, x, bias)
    y = ops.spmm(row_offsets, col_indices, values, n, k, x.flatten(0, -2), bias)
    return y.view(*x.shape[:-1], n)


def _linear_of_sparse(input, weight, bias) -> Tensor:
    if isinstance(weight, SparseTensor) or isinstance(bias, SparseTensor):
        raise NotImplementedError(
            "linear: only one of input and weight may be a SparseTensor; torch.matmul(input, W.T) "
            "gives the sparse product of two"
        )
    x, values, b = autocast(weight, input.values, bias)
    fitting = fits(x, -1, input.shape[1], values) and x.ndim <= 2
    if b is not None:
        fitting = fitting and x.ndim == 2 and fits(b, -1, x.shape[0], values) and b.ndim == 1
    if not fitting:
        raise_as_torch(F.linear, input, weight, bias)
    y = times(x, input.T, values)
    y = y if x.ndim == 1 else y.mT.contiguous()
    return y if b is None else y + b


def _linear(input, weight, bias=None, *, out=None) -> Tensor:
    """The function behind F.linear: torch's takes out=, too."""
    if out is None:
        return linear(input, weight, bias)
    with without_autocast(out):
        y = linear(input, weight, bias)
    F.linear(y[..., :0], y.new_empty(y.shape[-1], 0), out=out)  # type: ignore[call-arg]
    return out.copy_(y)


def explain(x: Tensor | int, W: SparseTensor | torch.nn.Module) -> str:
    """Which kernel runs each pass of linear(x, W), which is x @ W.T, and why not others for the
    device of x. `explain(x, W.T)` is that of linear(x, W.T), which is x @ W.

    Of a PackedLinear, or of all in a model that pack_ has made: a line each, with what is held and
    what a call runs, and one about their bytes; x may then be a number of tokens. ValueError or
    TypeError where the product would raise, ValueError for a model without such layers.
    """
    if isinstance(W, torch.nn.Module):
        return _explain_packed(x, W)
    if not isinstance(W, SparseTensor):
        raise TypeError(f"W: expected a SparseTensor or a packed layer, got {type(W).__name__}")
    if not isinstance(x, Tensor):
        raise TypeError(f"x: expected a Tensor beside a SparseTensor, got {x!r:.60}")
    operand, values = autocast(x, W.values)
    return _explain_sparse(operand, values, W)


def _explain_sparse(x: Tensor, values: Tensor, W: SparseTensor) -> str:
    n, k = W.shape
    if x.ndim == 0 or x.shape[-1] != k:
        other = "; explain(x, W.T) is that of x @ W" if x.ndim and x.shape[-1] == n else ""
        raise ValueError(
            f"x: expected a last dimension of K = {k}, as W is {n} x {k} and its product "
            f"x @ W.T, got shape {tuple(x.shape)}{other}"
        )
    if not fits(x, -1, k, values):
        wanted, got = (f"{t.dtype} on {t.device}" for t in (values, x))
        layout = "" if x.layout is torch.strided else f", {x.layout}"
        raise TypeError(f"x: expected {wanted} as W is, got {got}{layout}")
    lines = []
    products = ("spmm_t", "spmm") if W.is_transposed else ("spmm", "spmm_t")
    for name, op in zip(("forward", "dx", "dvalues"), (*products, "sddmm"), strict=True):
        m = x.shape[:-1].numel()
        problem = Problem(op, x.device.type, x.dtype, m, W.n, W.k, W.nnz)
        if x.is_cuda:
            problem = recognised(problem, W.row_offsets, W.col_indices)
        lines.append(f"{name}: {describe(problem, pick(problem))}")
    return "\n".join(lines)


def _explain_packed(x: Tensor | int, model: torch.nn.Module) -> str:
    if not isinstance(x, Tensor) and (type(x) is not int or x < 0):
        raise ValueError(f"x: expected a Tensor or a number of tokens of at least 0, got {x!r}")
    packed: dict[Any, list[str]] = {}
    for name, m in model.named_modules(remove_duplicate=False):
        if hasattr(m, "packed_bytes"):  # of a group: in the places of all that share it
            packed.setdefault(m, []).append(name.removesuffix("shared.whole").removesuffix("."))
    if not packed:
        raise ValueError(
            f"W: expected layers that pack_ has made, {type(model).__name__} has none; of a "
            "SparseLinear give its weight, as explain(x, layer.weight)"
        )
    lines = [
        f"{', '.join(names)}: {m.explain(x)}".removeprefix(": ") for m, names in packed.items()
    ]
    if len(packed) > 1:
        held = sum(m.packed_bytes for m in packed)
        dense = sum(  # which has at least 16 bits
            max(2, m.dtype.itemsize) * m.in_features * m.out_features for m in packed
        )
        lines.append(
            f"all {len(packed)}: {held / 1e6:.3g} MB ({held / max(1, dense):.2f} of dense)"
        )
    return "\n".join(lines)


def _matmul(func: Callable, a, b, out: Tensor | None) -> Tensor | SparseTensor:
    """`func` is torch.matmul or a stricter form of it: the one whose errors are raised."""
    if isinstance(a, SparseTensor):
        if isinstance(b, SparseTensor):
            return _sparse_sparse(func, a, b, out)
        return _sparse_dense(func, a, b, out)
    if isinstance(b, SparseTensor):
        return _dense_sparse(func, a, b, out)
    return func(a, b) if out is None else func(a, b, out=out)


def _dense_sparse(func: Callable, a, b: SparseTensor, out: Tensor | None) -> Tensor:
    x, values = a, b.values
    if _is_compiling() or is_any_autocast_enabled():
        x, values = operands(func, x, values, out)
    if (  # times() of a matrix that fits(): a small product pays for every call of Python
        out is None
        and type(x) in _PLAIN
        and x.dim() == 2
        and x.shape[1] == (b.k if b.is_transposed else b.n)
        and x.dtype is values.dtype
        and x.device == values.device
        and x.layout is torch.strided
    ):
        op = ops.spmm if b.is_transposed else ops.spmm_t
        return op(b.row_offsets, b.col_indices, values, b.n, b.k, x)
    if not fits(x, -1, b.k if b.is_transposed else b.n, values):
        raise_as_torch(func, a, b)
    y = times(x, b, values)
    if out is None:
        return y
    return write(func, out, y, x[..., :0], values[:0].view(0, b.shape[1]))


def _sparse_dense(func: Callable, a: SparseTensor, b, out: Tensor | None) -> Tensor:
    x, values = operands(func, b, a.values, out)
    dim = -2 if isinstance(x, Tensor) and x.ndim > 1 else -1
    if not fits(x, dim, a.shape[1], values):
        raise_as_torch(func, a, b)
    if dim == -1:
        y = times(x, a.T, values)
    else:  # A x = (x^T A^T)^T
        y = times(x.mT, a.T, values).mT.contiguous()
    if out is None:
        return y
    return write(func, out, y, values[:0].view(a.shape[0], 0), x.narrow(dim, 0, 0))


def _sparse_sparse(func: Callable, a: SparseTensor, b: SparseTensor, out) -> SparseTensor:
    if out is not None:
        raise NotImplementedError(f"{func.__name__}: out= takes no product of two SparseTensors")
    a_values, b_values = operands(func, a.values, b.values, None)
    if a.shape[1] != b.shape[0] or not fits(a_values, -1, a.nnz, b_values):
        raise_as_torch(func, a, b)
    a, b = a._with_values(a_values, a.is_transposed), b._with_values(b_values, b.is_transposed)
    return sparse_times_sparse(a, b)


def times(x: Tensor, b: SparseTensor, values: Tensor, bias: Tensor | None = None) -> Tensor:
    """x [..., I] @ b [I, O] + bias [O] -> [..., O], contiguous. `values` stand in for b's own."""
    op = ops.spmm if b.is_transposed else ops.spmm_t
    if x.ndim == 2:
        return op(b.row_offsets, b.col_indices, values, b.n, b.k, x, bias)
    rows = x.unsqueeze(0) if x.ndim == 1 else x.flatten(0, -2)
    y = op(b.row_offsets, b.col_indices, values, b.n, b.k, rows, bias)
    return y.view(*x.shape[:-1], y.shape[1])


def fits(x, dim: int, size: int, values: Tensor) -> bool:
    return (
        isinstance(x, Tensor)
        and x.ndim > 0
        and x.shape[dim] == size
        and x.dtype is values.dtype
        and x.device == values.device
        and x.layout is torch.strided
    )


def operands(func: Callable, x, values: Tensor, out: Tensor | None) -> tuple:
    # torch's autocast leaves calls with out= alone, and on a CPU also mv and addmv.
    if out is not None or (func in _VECTOR_FUNCTIONS and values.is_cpu):
        return x, values
    return autocast(x, values)


_VECTOR_FUNCTIONS = (torch.mv, torch.addmv)


def raise_as_torch(func: Callable, *args, **kwargs) -> NoReturn:
    """Raise torch's own error: call `func` with a dense twin, one element large, of each W."""

    def twin(a):
        if isinstance(a, (list, tuple)):
            return [twin(t) for t in a]
        if not isinstance(a, SparseTensor):
            return a
        zeros = torch.zeros((), dtype=a.dtype, device=a.device).expand(a.shape)
        if a.requires_grad and not (_is_compiling() or ops.in_functorch()):
            zeros.requires_grad_()  # by which torch folds dimensions, or not
        return zeros

    func(*(twin(a) for a in args), **kwargs)
    # torch can do it.
    got = ", ".join(
        f"{tuple(a.shape)} {a.dtype} {a.layout} on {a.device}"
        for a in map(twin, args)
        if isinstance(a, Tensor)
    )
    raise NotImplementedError(f"{func.__name__}: not supported with a SparseTensor, got {got}")


def write(func: Callable, out: Tensor, y: Tensor, a: Tensor, b: Tensor) -> Tensor:
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
        raise_as_torch(func, a, b)
    return _matmul(func, a, b, out)


def _operator(input, other):
    """x @ W and x.matmul(W)."""
    if torch.compiler.is_dynamo_compiling() and isinstance(other, SparseTensor):
        _keep_order_in_dynamo()
    return matmul(input, other)


def _reflected_operator(input, other):
    return matmul(other, input)


def _keep_order_in_dynamo() -> None:
    """While torch.compile traces: make it hand over W @ x as Tensor.__rmatmul__(x, W).

    torch 2.13 does so for every other operator; for this one it passes x @ W, with the operands
    swapped, which cannot be told from a real x @ W. Its table of reflected operators lacks the
    entry: we add it and let the trace begin anew.
    """
    from torch._dynamo import exc
    from torch._dynamo.variables import builtin

    reflected = builtin.BUILTIN_TO_TENSOR_RFN_MAP
    if reflected.get(operator.matmul) is not Tensor.__rmatmul__:
        reflected[operator.matmul] = Tensor.__rmatmul__
        raise exc.UnspecializeRestartAnalysis(restart_reason="the order of W @ x")


# It runs when traced, and is not traced.
_keep_order_in_dynamo.__dict__["_dynamo_marked_constant"] = True

register("matmul", matmul)
register("mm", _mm)
register("mv", _mv)
TORCH_FUNCTIONS.update(
    {
        torch.linalg.matmul: matmul,
        torch.sparse.mm: matmul,
        F.linear: _linear,
        Tensor.matmul: _operator,
        Tensor.__matmul__: _operator,
        operator.matmul: matmul,  # torch.export has this one
    }
)
REFLECTED["__rmatmul__"] = _reflected_operator
