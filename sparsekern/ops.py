"""The three products with autograd: what callers use.

    pass     formula                               op        shapes
    forward  Y  = X W^T + bias                     spmm      [M, K] -> [M, N]
    dX       dX = dY W + bias                      spmm_t    [M, N] -> [M, K]
    dW       dV = (dY^T X) at the pattern of W     sddmm     [M, N], [M, K] -> [nnz]

The three are closed under differentiation: the gradients of each are the other two, so any order of
derivative is there. W is row_offsets int32 [N+1], col_indices int32 [nnz], values [nnz]; values, x,
dy and bias have one dtype, which the result has too; bias may be None. The gradient of W is that of
its stored values.

registered.py has the ops, calls.py the short way past all that is here. Autograd is an
autograd.Function outside of the ops, skipped when nobody asks for a gradient: 4 us a call against
16 us for torch.library.custom_op. The Functions with a `setup_context` cost 40 us and serve
functorch (vmap, func.grad) alone.
"""

from collections.abc import Callable

import torch
from torch import Tensor
from torch.autograd import Function, forward_ad, profiler

from .kernels.cpu.lanes import Lanes
from .kernels.operands import native
from .kernels.prepared import (
    SDDMM,
    SPMM,
    SPMM_BIAS_GRADIENTS,
    SPMM_GRADIENTS,
    SPMM_T,
    SPMM_T_GRADIENTS,
)
from .registered import (
    multiply_lanes,
    run_product,
    run_sddmm,
    sddmm_op,
    spmm_lanes_op,
    spmm_op,
    spmm_t_op,
)

# The router: what callers use. A small product costs less than the dispatcher, autograd's Python
# and functorch's do, so each of them is passed only where it has something to see.

# Private in torch, so its absence must not break the import.
in_functorch = getattr(torch._C, "_are_functorch_transforms_active", lambda: True)
_is_compiling = torch.compiler.is_compiling
_modes = torch._C._len_torch_dispatch_stack
_tracing_state = torch._C._get_tracing_state
_is_wrapped = torch._C._functorch.is_functorch_wrapped_tensor
_is_batched = torch._C._functorch.is_legacy_batchedtensor  # by is_grads_batched=True
_is_grad_enabled = torch.is_grad_enabled
_PLAIN = (Tensor, torch.nn.Parameter)


def _no_call(*operands) -> None:
    """Without the C++ library nothing is prepared."""


# A product, or the gradients of one, of operands that lie where kernels read them, while nothing
# looks on: one step in C++ (calls.py). None for all others. Not while torch.compile traces.
call = native.call if native else _no_call


def quick(op: int, row_offsets, col_indices, values, n: int, k: int, a, b):
    """The same, at any time."""
    return None if _is_compiling() else call(op, row_offsets, col_indices, values, n, k, a, b)


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
    if (y := quick(SPMM, *args)) is not None:
        return y
    function, is_direct = _route("spmm", values, x, bias)
    if is_direct:
        try:
            if function is None:
                return run_product("spmm", *args)
            args = row_offsets, col_indices, values.contiguous(), n, k, x.contiguous(), bias
            if (y := quick(SPMM, *args)) is not None:
                return y
        except (RuntimeError, ValueError):
            if not _is_any_lazy(values, x, bias):
                raise
    return (spmm_op if function is None else function.apply)(*args)


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
    if (y := quick(SPMM_T, *args)) is not None:
        return y
    function, is_direct = _route("spmm_t", values, dy, bias)
    if is_direct:
        try:
            if function is None:
                return run_product("spmm_t", *args)
            args = row_offsets, col_indices, values.contiguous(), n, k, dy.contiguous(), bias
            if (y := quick(SPMM_T, *args)) is not None:
                return y
        except (RuntimeError, ValueError):
            if not _is_any_lazy(values, dy, bias):
                raise
    return (spmm_t_op if function is None else function.apply)(*args)


def sddmm(
    row_offsets: Tensor, col_indices: Tensor, n: int, k: int, dy: Tensor, x: Tensor
) -> Tensor:
    """dvalues [nnz] = (dy [M, N].T @ x [M, K]) at the pattern, differentiable in dy and x."""
    if (dvalues := quick(SDDMM, row_offsets, col_indices, None, n, k, dy, x)) is not None:
        return dvalues
    args = row_offsets, col_indices, n, k, dy, x
    function, is_direct = _route("sddmm", dy, x, None)
    if is_direct:
        try:
            if function is None:
                return run_sddmm(*args)
            args = row_offsets, col_indices, n, k, dy.contiguous(), x.contiguous()
            dvalues = quick(SDDMM, row_offsets, col_indices, None, n, k, *args[4:])
            if dvalues is not None:
                return dvalues
        except (RuntimeError, ValueError):
            if not _is_any_lazy(dy, x, None):
                raise
    return (sddmm_op if function is None else function.apply)(*args)


def spmm_lanes(x: Tensor, packed: Lanes, bias: Tensor | None = None) -> Tensor:
    """y [M, N] = x [M, K] @ W.T + bias [N] of a W packed for a CPU; no gradient."""
    is_watched = in_functorch() or forward_ad._current_level >= 0
    if not is_watched and _is_direct(packed.values, x, bias):
        return multiply_lanes(x, packed, bias)
    return spmm_lanes_op(x, *packed, bias)


def _route(
    op: str, a: Tensor, b: Tensor, bias: Tensor | None
) -> tuple[type[Function] | None, bool]:
    """(the Function that must see this product, if any; whether nothing looks on below it)."""
    is_dual = forward_ad._current_level >= 0
    if in_functorch():
        return _FUNCTIONS[op][3 if is_dual else 2], False
    if is_dual:
        return _FUNCTIONS[op][1], False
    if _tracing_state() is not None:  # torch.jit.trace takes no Function; the op has its gradients
        return None, False
    wants_grad = _is_grad_enabled() and (
        a.requires_grad or b.requires_grad or (bias is not None and bias.requires_grad)
    )
    return _FUNCTIONS[op][0] if wants_grad else None, _is_direct(a, b, bias)


def _is_direct(a: Tensor, b: Tensor, bias: Tensor | None) -> bool:
    """Whether nothing looks on between the caller and the kernel: no tracer, mode or profiler, no
    subclass, and no negation that is still to be done, which only the dispatcher sees."""
    return (
        not _is_compiling()
        and (b.is_cpu or b.is_cuda)
        and type(a) in _PLAIN
        and type(b) in _PLAIN
        and not (a.is_neg() or b.is_neg())
        and (bias is None or (type(bias) in _PLAIN and not bias.is_neg()))
        and not _modes()
        and _tracing_state() is None
        and not profiler._is_profiler_enabled
    )


def _is_any_lazy(*tensors: Tensor | None) -> bool:
    """Whether one of them has no memory of its own, so that a direct call has failed: an efficient
    zero, what a functorch transform has left, or a batch of gradients."""
    return any(
        t is not None and (t._is_zerotensor() or _is_wrapped(t) or _is_batched(t)) for t in tensors
    )


# Derivatives, written once for both kinds of Function. They call the router, so that a derivative
# is itself differentiable, in functorch too. For the gradient each saves an operand only if the
# other one's gradient needs it: frozen values keep no activations alive. The products are bilinear:
# a tangent is one product for each operand that has one.


def _save_product(ctx, row_offsets, col_indices, values, n, k, x, bias):
    ctx.sizes = n, k
    needs = ctx.needs_input_grad
    ctx.save_for_backward(
        row_offsets, col_indices, values if needs[5] else None, x if needs[2] else None
    )


def _spmm_backward(ctx, h):
    needs = ctx.needs_input_grad
    dvalues, dx, dbias = gradients("spmm", ctx, h, (needs[2], needs[5], needs[6]))
    return None, None, dvalues, None, None, dx, dbias


def _spmm_t_backward(ctx, h):
    needs = ctx.needs_input_grad
    dvalues, ddy, dbias = gradients("spmm_t", ctx, h, (needs[2], needs[5], needs[6]))
    return None, None, dvalues, None, None, ddy, dbias


def gradients(op: str, ctx, h: Tensor, needs: tuple[bool, bool, bool]) -> tuple:
    """Those of values, of the operand and of the bias, of a product whose result has the gradient
    h [.., outputs]."""
    row_offsets, col_indices, values, a = ctx.saved_tensors
    n, k = ctx.sizes
    if needs[0] and needs[1] and (op == "spmm" or not needs[2]):
        all_of = SPMM_GRADIENTS if op == "spmm" else SPMM_T_GRADIENTS
        all_of = SPMM_BIAS_GRADIENTS if needs[2] else all_of
        made = quick(all_of, row_offsets, col_indices, values, n, k, h.contiguous(), a)
        if made is not None:
            return made[1], made[0], made[2] if needs[2] else None
    # flatten() takes no batch of them, and -1 is no number where there are no elements.
    tokens = h.shape[:-1]
    rows = h if h.dim() == 2 else h.reshape(tokens.numel(), h.shape[-1])
    dbias = rows.sum(0) if needs[2] else None
    dvalues = da = None
    if needs[0]:
        of = a if a.dim() == 2 else a.flatten(0, -2)
        dvalues = sddmm(
            row_offsets, col_indices, n, k, *((rows, of) if op == "spmm" else (of, rows))
        )
    if needs[1]:
        product = spmm_t if op == "spmm" else spmm
        da = product(row_offsets, col_indices, values, n, k, rows)
        da = da if h.dim() == 2 else da.reshape(*tokens, da.shape[-1])
    return dvalues, da, dbias


def _product_jvp(product, ctx, dvalues, dx, dbias):
    row_offsets, col_indices, values, x = ctx.saved_tensors
    pattern, sizes = (row_offsets, col_indices), ctx.sizes
    parts = []
    if dx is not None:
        parts.append(product(*pattern, values, *sizes, dx))
    if dvalues is not None:
        parts.append(product(*pattern, dvalues, *sizes, x))
    if dbias is not None:
        out = sizes[0] if product is spmm else sizes[1]
        parts.append(dbias.expand(x.shape[0], out))
    return sum(parts[1:], parts[0]) if parts else None


def _spmm_jvp(ctx, ro, ci, dvalues, n, k, dx, dbias):
    return _product_jvp(spmm, ctx, dvalues, dx, dbias)


def _spmm_t_jvp(ctx, ro, ci, dvalues, n, k, ddy, dbias):
    return _product_jvp(spmm_t, ctx, dvalues, ddy, dbias)


def save_sddmm(ctx, row_offsets, col_indices, n, k, dy, x):
    ctx.sizes = n, k
    dy_grad, x_grad = ctx.needs_input_grad[-2:]
    ctx.save_for_backward(row_offsets, col_indices, dy if x_grad else None, x if dy_grad else None)


def sddmm_backward(ctx, h):
    row_offsets, col_indices, dy, x = ctx.saved_tensors
    n, k = ctx.sizes
    dy_grad, x_grad = ctx.needs_input_grad[-2:]
    ddy = spmm(row_offsets, col_indices, h, n, k, x) if dy_grad else None
    dx = spmm_t(row_offsets, col_indices, h, n, k, dy) if x_grad else None
    return None, None, None, None, ddy, dx


def _sddmm_jvp(ctx, ro, ci, n, k, ddy, dx):
    row_offsets, col_indices, dy, x = ctx.saved_tensors
    pattern, sizes = (row_offsets, col_indices), ctx.sizes
    parts = []
    if ddy is not None:
        parts.append(sddmm(*pattern, *sizes, ddy, x))
    if dx is not None:
        parts.append(sddmm(*pattern, *sizes, dy, dx))
    return sum(parts[1:], parts[0]) if parts else None


class _SpMM(Function):
    @staticmethod
    def forward(ctx, *args):
        _save_product(ctx, *args)
        return spmm_op(*args)

    backward = staticmethod(_spmm_backward)


class _SpMMT(Function):
    @staticmethod
    def forward(ctx, *args):
        _save_product(ctx, *args)
        return spmm_t_op(*args)

    backward = staticmethod(_spmm_t_backward)


class _SDDMM(Function):
    @staticmethod
    def forward(ctx, *args):
        save_sddmm(ctx, *args)
        return sddmm_op(*args)

    backward = staticmethod(sddmm_backward)


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
    if info.batch_size == 0:  # the result of zeros has the shape of one
        zeros = (
            a if dim is None else a.sum(dim, dtype=a.dtype)
            for a, dim in zip(args, in_dims, strict=True)
        )
        return product(*zeros).unsqueeze(0)[:0], 0
    results = [
        product(
            *(a if dim is None else a.select(dim, i) for a, dim in zip(args, in_dims, strict=True))
        )
        for i in range(info.batch_size)
    ]
    return torch.stack(results), 0


class _SpMMFunctorch(Function):
    forward = staticmethod(spmm_op)

    @staticmethod
    def setup_context(ctx, inputs, output):
        _save_product(ctx, *inputs)

    backward = staticmethod(_spmm_backward)

    @staticmethod
    def vmap(info, in_dims, *args):
        return _vmap_product(spmm, info, in_dims, *args)


class _SpMMTFunctorch(Function):
    forward = staticmethod(spmm_t_op)

    @staticmethod
    def setup_context(ctx, inputs, output):
        _save_product(ctx, *inputs)

    backward = staticmethod(_spmm_t_backward)

    @staticmethod
    def vmap(info, in_dims, *args):
        return _vmap_product(spmm_t, info, in_dims, *args)


class _SDDMMFunctorch(Function):
    forward = staticmethod(sddmm_op)

    @staticmethod
    def setup_context(ctx, inputs, output):
        save_sddmm(ctx, *inputs)

    backward = staticmethod(sddmm_backward)

    @staticmethod
    def vmap(info, in_dims, *args):
        return _vmap_loop(sddmm, info, in_dims, *args)


# And where a level of forward-mode autograd is on. torch.compile refuses a Function that has a jvp,
# so these are classes of their own.


def _with_jvp(parent: type[Function], jvp: Callable, places: tuple[int, ...]) -> type[Function]:
    """The same Function with tangents; `places` are those of the arguments that jvp wants."""

    def forward(ctx, *args):
        ctx.save_for_forward(*(args[i] for i in places))
        return parent.forward(ctx, *args)

    def setup_context(ctx, inputs, output):
        ctx.save_for_forward(*(inputs[i] for i in places))
        parent.setup_context(ctx, inputs, output)

    method = setup_context if "setup_context" in vars(parent) else forward
    methods = {method.__name__: staticmethod(method), "jvp": staticmethod(jvp)}
    return type(parent.__name__, (parent,), methods)


_PRODUCT_PLACES, _SDDMM_PLACES = (0, 1, 2, 5), (0, 1, 4, 5)

# op -> its Functions: for autograd, with forward mode, for functorch, that with forward mode
_FUNCTIONS = {
    op: (plain, _with_jvp(plain, jvp, places), functorch, _with_jvp(functorch, jvp, places))
    for op, plain, functorch, jvp, places in (
        ("spmm", _SpMM, _SpMMFunctorch, _spmm_jvp, _PRODUCT_PLACES),
        ("spmm_t", _SpMMT, _SpMMTFunctorch, _spmm_t_jvp, _PRODUCT_PLACES),
        ("sddmm", _SDDMM, _SDDMMFunctorch, _sddmm_jvp, _SDDMM_PLACES),
    )
}


# An op that is called by its name, as a graph of torch.export or torch.jit.trace calls it, has the
# same gradients: without a kernel for autograd torch would go on without them.


def _differentiable(op: str, overload, operands: slice) -> Callable:
    def run(*args):
        tensors = [t for t in args[operands] if isinstance(t, Tensor)]
        wants_grad = _is_grad_enabled() and any(t.requires_grad for t in tensors)
        is_dual = forward_ad._current_level >= 0 and forward_ad._is_fwd_grad_enabled()
        if (wants_grad or is_dual) and in_functorch():
            raise NotImplementedError(
                f"{op}: torch.func takes no derivative of the op alone, as a graph of torch.export "
                "calls it: call torch.matmul, F.linear or the module"
            )
        if not wants_grad:
            with torch._C._AutoDispatchBelowAutograd():
                return overload(*args)
        bias = (None,) if op != "sddmm" and len(args) == 6 else ()  # its default
        return _FUNCTIONS[op][1 if is_dual else 0].apply(*args, *bias)

    return run


_library = torch.library.Library("sparsekern", "FRAGMENT")
for _op, _overload, _operands in (
    ("spmm", spmm_op, slice(2, 7)),
    ("spmm_t", spmm_t_op, slice(2, 7)),
    ("sddmm", sddmm_op, slice(4, 6)),
):
    _library.impl(_op, _differentiable(_op, _overload, _operands), "Autograd")
