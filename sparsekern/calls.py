"""Calls in one step: what csrc/calls.cpp asks before it runs a prepared call (kernels/steps.py),
and the Functions of autograd that stand around one.

The short way of ops.py, for plain operands while nobody looks on; it takes a tenth of the time that
Python needs for the same.
"""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.autograd import Function, forward_ad, profiler

from .casts import is_any_autocast_enabled
from .kernels import observed
from .kernels.operands import native
from .kernels.prepared import prepare
from .kernels.steps import unfolded
from .ops import gradients, in_functorch, save_sddmm, sddmm_backward
from .registered import run_product, run_sddmm


def _prepared(op: str) -> Callable:
    """`apply` of the Function of a prepared product (kernels/steps.py), without a look for
    functorch, which whoever calls it has taken. Operands may have more than two dimensions."""

    def forward(ctx, call, row_offsets, col_indices, values, n, k, a, b):
        ctx.sizes = n, k
        needs = ctx.needs_input_grad
        ctx.save_for_backward(
            row_offsets, col_indices, values if needs[6] else None, a if needs[3] else None
        )
        y = native.run_prepared(call, values, a, b, row_offsets, col_indices)
        if y is not None:
            return y
        y = run_product(op, row_offsets, col_indices, values, n, k, a.flatten(0, -2), b)
        return unfolded(y, (*a.shape[:-1], y.shape[1]))  # it must not run now

    def backward(ctx, h):
        needs = ctx.needs_input_grad
        dvalues, da, db = gradients(op, ctx, h, (needs[3], needs[6], needs[7]))
        return None, None, None, dvalues, None, None, da, db

    methods = {"forward": staticmethod(forward), "backward": staticmethod(backward)}
    kind: Any = type(f"Prepared_{op}", (Function,), methods)
    return super(Function, kind).apply


class _PreparedSDDMM(Function):
    @staticmethod
    def forward(ctx, call, row_offsets, col_indices, values, n, k, dy, x):
        save_sddmm(ctx, row_offsets, col_indices, n, k, dy, x)
        made = native.run_prepared(call, None, dy, x, row_offsets, col_indices)
        return run_sddmm(row_offsets, col_indices, n, k, dy, x) if made is None else made

    @staticmethod
    def backward(ctx, h):
        return None, None, *sddmm_backward(ctx, h)


def _agrees(x: Tensor) -> bool:
    """Whether torch's autocast leaves products in the dtype of x alone."""
    device = x.device.type
    return not torch.is_autocast_enabled(device) or torch.get_autocast_dtype(device) is x.dtype


if native:
    native.set_up(
        (in_functorch, torch._C._len_torch_dispatch_stack, torch._C._get_tracing_state),
        is_any_autocast_enabled,
        _agrees,
        torch.is_grad_enabled,
        forward_ad,
        profiler,
        observed._observations,
        prepare,
        (
            _prepared("spmm"),
            _prepared("spmm_t"),
            _PreparedSDDMM.apply,
        ),
    )
