"""The three products as torch ops, with autograd.

    pass     formula                               op        shapes
    forward  Y  = X W^T + bias                     spmm      [M, K] -> [M, N]
    dX       dX = dY W + bias                      spmm_t    [M, N] -> [M, K]
    dW       dV = (dY^T X) at the pattern of W     sddmm     [M, N], [M, K] -> [nnz]

The three are closed under differentiation: the gradients of each are the other two, so any order of
derivative is there. W is row_offsets int32 [N+1], col_indices int32 [nnz], values [nnz]; values, x,
dy and bias have one dtype, which the result has too; bias may be None. The gradient of W is that of
its stored values.

Each op is one opaque node for torch.compile and picks its kernel when it runs, never at trace time.
Autograd is an autograd.Function outside of the op, skipped when nobody asks for a gradient: 4 us a
call against 16 us for torch.library.custom_op. The Functions with a `setup_context` cost 40 us and
serve functorch (vmap, func.grad) alone.
"""

import torch
from torch import Tensor
from torch.autograd import Function
from torch.utils.flop_counter import register_flop_formula

from .kernels import cuda, observed
from .kernels.packed import LAYOUTS
from .kernels.problem import Problem
from .kernels.table import pick

# Implementations: contiguous operands, one look-up, the kernel.


def _run_spmm(row_offsets, col_indices, values, n, k, x, bias=None):
    problem = Problem("spmm", x.device.type, x.dtype, x.shape[0], n, k, col_indices.shape[0])
    run = pick(problem).run
    bias = None if bias is None else bias.contiguous()
    return run(row_offsets, col_indices, values.contiguous(), n, k, x.contiguous(), bias)


def _run_spmm_t(row_offsets, col_indices, values, n, k, dy, bias=None):
    problem = Problem("spmm_t", dy.device.type, dy.dtype, dy.shape[0], n, k, col_indices.shape[0])
    run = pick(problem).run
    bias = None if bias is None else bias.contiguous()
    return run(row_offsets, col_indices, values.contiguous(), n, k, dy.contiguous(), bias)


def _run_sddmm(row_offsets, col_indices, n, k, dy, x):
    observed.note(row_offsets, dy, x)
    problem = Problem("sddmm", x.device.type, x.dtype, x.shape[0], n, k, col_indices.shape[0])
    return pick(problem).run(row_offsets, col_indices, n, k, dy.contiguous(), x.contiguous())


# Fakes: the shapes, for tracing.


def _fake_spmm(row_offsets, col_indices, values, n, k, x, bias=None):
    torch._check(x.shape[1] == k, lambda: f"spmm: expected x [M, {k}], got {tuple(x.shape)}")
    return x.new_empty(x.shape[0], n)


def _fake_spmm_t(row_offsets, col_indices, values, n, k, dy, bias=None):
    torch._check(dy.shape[1] == n, lambda: f"spmm_t: expected dy [M, {n}], got {tuple(dy.shape)}")
    return dy.new_empty(dy.shape[0], k)


def _fake_sddmm(row_offsets, col_indices, n, k, dy, x):
    torch._check(
        dy.shape[0] == x.shape[0],
        lambda: f"sddmm: expected as many rows in dy as in x, got {dy.shape[0]} and {x.shape[0]}",
    )
    return x.new_empty(col_indices.shape[0])


_W = "Tensor row_offsets, Tensor col_indices, Tensor values, SymInt n, SymInt k"
_PATTERN = "Tensor row_offsets, Tensor col_indices, SymInt n, SymInt k"

_library = torch.library.Library("sparsekern", "DEF")
for _name, _arguments, _run, _fake in (
    ("spmm", f"{_W}, Tensor x, Tensor? bias=None", _run_spmm, _fake_spmm),
    ("spmm_t", f"{_W}, Tensor dy, Tensor? bias=None", _run_spmm_t, _fake_spmm_t),
    ("sddmm", f"{_PATTERN}, Tensor dy, Tensor x", _run_sddmm, _fake_sddmm),
):
    _library.define(f"{_name}({_arguments}) -> Tensor", tags=(torch.Tag.pt2_compliant_tag,))
    _library.impl(_name, _run, "CPU")
    _library.impl(_name, _run, "CUDA")
    torch.library.register_fake(f"sparsekern::{_name}", _fake, lib=_library)

# Packed weights (kernels/packed.py), for inference: no gradient, GPU alone. `layout` names one of
# LAYOUTS, `numbers` and `tensors` are what it consists of.


def _run_spmm_packed(x, layout, n, k, nnz, numbers, tensors, bias=None):
    return cuda.spmm_packed(x, LAYOUTS[layout](n, k, nnz, *numbers, *tensors), bias)


def _fake_spmm_packed(x, layout, n, k, nnz, numbers, tensors, bias=None):
    torch._check(x.shape[1] == k, lambda: f"spmm_packed: expected x [M, {k}], got {tuple(x.shape)}")
    return x.new_empty(x.shape[0], n)


_library.define(
    "spmm_packed(Tensor x, str layout, SymInt n, SymInt k, SymInt nnz, int[] numbers, "
    "Tensor[] tensors, Tensor? bias=None) -> Tensor",
    tags=(torch.Tag.pt2_compliant_tag,),
)
_library.impl("spmm_packed", _run_spmm_packed, "CUDA")
torch.library.register_fake("sparsekern::spmm_packed", _fake_spmm_packed, lib=_library)

spmm_packed = torch.ops.sparsekern.spmm_packed.default
_spmm = torch.ops.sparsekern.spmm.default
_spmm_t = torch.ops.sparsekern.spmm_t.default
_sddmm = torch.ops.sparsekern.sddmm.default


@register_flop_formula([torch.ops.sparsekern.spmm, torch.ops.sparsekern.spmm_t])
def _flop_spmm(row_offsets, col_indices, values, n, k, x, *args, **kwargs) -> int:
    """A multiplication and an addition for each token and stored value. Arguments are shapes."""
    return 2 * x[0] * values[0]


@register_flop_formula(torch.ops.sparsekern.sddmm)
def _flop_sddmm(row_offsets, col_indices, n, k, dy, x, *args, **kwargs) -> int:
    return 2 * x[0] * col_indices[0]


# The router: what callers use.

# Private in torch, so its absence must not break the import.
in_functorch = getattr(torch._C, "_are_functorch_transforms_active", lambda: False)


def _wants_grad(values: Tensor, x: Tensor, bias: Tensor | None) -> bool:
    return values.requires_grad or x.requires_grad or (bias is not None and bias.requires_grad)


def spmm(
    row_offsets: Tensor,
    col_indices: Tensor,
    values: Tensor,
    n: int,
    k: int,
    x: Tensor,
    bias: Tensor | None = None,
) -> Tensor:
    """y [M, N] = x [M, K] @ W.T + bias [N], differentiable in values, x and bias."""
    args = row_offsets, col_indices, values, n, k, x, bias
    if in_functorch():
        return _SpMMFunctorch.apply(*args)
    if torch.is_grad_enabled() and _wants_grad(values, x, bias):
        return _SpMM.apply(*args)
    return _spmm(*args)


def spmm_t(
    row_offsets: Tensor,
    col_indices: Tensor,
    values: Tensor,
    n: int,
    k: int,
    dy: Tensor,
    bias: Tensor | None = None,
) -> Tensor:
    """dx [M, K] = dy [M, N] @ W + bias [K], differentiable in values, dy and bias."""
    args = row_offsets, col_indices, values, n, k, dy, bias
    if in_functorch():
        return _SpMMTFunctorch.apply(*args)
    if torch.is_grad_enabled() and _wants_grad(values, dy, bias):
        return _SpMMT.apply(*args)
    return _spmm_t(*args)


def sddmm(
    row_offsets: Tensor, col_indices: Tensor, n: int, k: int, dy: Tensor, x: Tensor
) -> Tensor:
    """dvalues [nnz] = (dy [M, N].T @ x [M, K]) at the pattern, differentiable in dy and x."""
    if in_functorch():
        return _SDDMMFunctorch.apply(row_offsets, col_indices, n, k, dy, x)
    if torch.is_grad_enabled() and (dy.requires_grad or x.requires_grad):
        return _SDDMM.apply(row_offsets, col_indices, n, k, dy, x)
    return _sddmm(row_offsets, col_indices, n, k, dy, x)


# Gradients, written once for both kinds of Function. They call the router, so that the gradient is
# itself differentiable, in functorch too. Each saves an operand only if the other one's gradient
# needs it: frozen values keep no activations alive.


def _save_product(ctx, row_offsets, col_indices, values, n, k, x, bias):
    ctx.sizes = n, k
    values_grad, x_grad = ctx.needs_input_grad[2], ctx.needs_input_grad[5]
    ctx.save_for_backward(
        row_offsets, col_indices, values if x_grad else None, x if values_grad else None
    )


def _spmm_backward(ctx, h):
    row_offsets, col_indices, values, x = ctx.saved_tensors
    n, k = ctx.sizes
    dvalues = dx = None
    if ctx.needs_input_grad[2]:
        dvalues = sddmm(row_offsets, col_indices, n, k, h, x)
    if ctx.needs_input_grad[5]:
        dx = spmm_t(row_offsets, col_indices, values, n, k, h)
    return None, None, dvalues, None, None, dx, _bias_gradient(ctx, h)


def _spmm_t_backward(ctx, h):
    row_offsets, col_indices, values, dy = ctx.saved_tensors
    n, k = ctx.sizes
    dvalues = ddy = None
    if ctx.needs_input_grad[2]:
        dvalues = sddmm(row_offsets, col_indices, n, k, dy, h)
    if ctx.needs_input_grad[5]:
        ddy = spmm(row_offsets, col_indices, values, n, k, h)
    return None, None, dvalues, None, None, ddy, _bias_gradient(ctx, h)


def _bias_gradient(ctx, h):
    return h.sum(0) if ctx.needs_input_grad[6] else None


def _save_sddmm(ctx, row_offsets, col_indices, n, k, dy, x):
    ctx.sizes = n, k
    dy_grad, x_grad = ctx.needs_input_grad[4:]
    ctx.save_for_backward(row_offsets, col_indices, dy if x_grad else None, x if dy_grad else None)


def _sddmm_backward(ctx, h):
    row_offsets, col_indices, dy, x = ctx.saved_tensors
    n, k = ctx.sizes
    ddy = dx = None
    if ctx.needs_input_grad[4]:
        ddy = spmm(row_offsets, col_indices, h, n, k, x)
    if ctx.needs_input_grad[5]:
        dx = spmm_t(row_offsets, col_indices, h, n, k, dy)
    return None, None, None, None, ddy, dx


class _SpMM(Function):
    @staticmethod
    def forward(ctx, *args):
        _save_product(ctx, *args)
        return _spmm(*args)

    backward = staticmethod(_spmm_backward)


class _SpMMT(Function):
    @staticmethod
    def forward(ctx, *args):
        _save_product(ctx, *args)
        return _spmm_t(*args)

    backward = staticmethod(_spmm_t_backward)


class _SDDMM(Function):
    @staticmethod
    def forward(ctx, *args):
        _save_sddmm(ctx, *args)
        return _sddmm(*args)

    backward = staticmethod(_sddmm_backward)


# The same for functorch.


def _vmap_product(product, info, in_dims, row_offsets, col_indices, values, n, k, x, bias):
    """vmap of spmm and spmm_t: with one W and bias, the batch is more tokens."""
    args = row_offsets, col_indices, values, n, k
    if any(dim is not None for dim in (*in_dims[:5], in_dims[6])):
        return _vmap_loop(product, info, in_dims, *args, x, bias)
    x = x.movedim(in_dims[5], 0)  # [B, M, K]
    y = product(*args, x.flatten(0, 1), bias)
    return y.unflatten(0, x.shape[:2]), 0


def _vmap_loop(product, info, in_dims, *args):
    results = [
        product(
            *(a if dim is None else a.select(dim, i) for a, dim in zip(args, in_dims, strict=True))
        )
        for i in range(info.batch_size)
    ]
    return torch.stack(results), 0


class _SpMMFunctorch(Function):
    forward = staticmethod(_spmm)

    @staticmethod
    def setup_context(ctx, inputs, output):
        _save_product(ctx, *inputs)

    backward = staticmethod(_spmm_backward)

    @staticmethod
    def vmap(info, in_dims, *args):
        return _vmap_product(spmm, info, in_dims, *args)


class _SpMMTFunctorch(Function):
    forward = staticmethod(_spmm_t)

    @staticmethod
    def setup_context(ctx, inputs, output):
        _save_product(ctx, *inputs)

    backward = staticmethod(_spmm_t_backward)

    @staticmethod
    def vmap(info, in_dims, *args):
        return _vmap_product(spmm_t, info, in_dims, *args)


class _SDDMMFunctorch(Function):
    forward = staticmethod(_sddmm)

    @staticmethod
    def setup_context(ctx, inputs, output):
        _save_sddmm(ctx, *inputs)

    backward = staticmethod(_sddmm_backward)

    @staticmethod
    def vmap(info, in_dims, *args):
        return _vmap_loop(sddmm, info, in_dims, *args)
