"""Prepared calls (steps.py) of whole products and of both gradients of one.

A call that is captured in a CUDA graph, on another GPU than the current one, or watched by a
tracer, a mode or a profiler goes the long way (ops.py). Where a row writes no steps down, as on a
CPU, there is one: its own function, which does the rest.
"""

import torch
from torch import Tensor

from .cuda.ordered import recognised
from .problem import Kernel, Problem
from .steps import COL_INDICES, ROW_OFFSETS, VALUES, A, Asked, B, Slot, Steps
from .table import pick

# As in csrc/calls.cpp.
OPS = SPMM, SPMM_T, SDDMM, SPMM_GRADIENTS, SPMM_T_GRADIENTS, SPMM_BIAS_GRADIENTS = range(6)


class NotNow(Exception):
    """A call that may be prepared another time."""


def prepare(op: int, row_offsets, col_indices, values, n: int, k: int, a, b) -> object:
    """The prepared call for operands that fit."""
    if _kind(a) == "cuda" and torch.cuda.is_current_stream_capturing():
        raise NotNow
    steps = Steps(a.device)
    name = ("spmm", "spmm_t", "sddmm", "spmm_t", "spmm", "spmm_t")[op]
    bias = b if op < SDDMM else None
    weight = row_offsets, col_indices, values
    first = _add(steps, _asked(name, *weight, n, k, a, bias), A, B)
    if op < SPMM_GRADIENTS:
        return steps.prepared(first)
    dy, x = (B, A) if op == SPMM_T_GRADIENTS else (A, B)
    asked = _asked("sddmm", *weight, n, k, a, None)
    if op != SPMM_BIAS_GRADIENTS:
        return steps.prepared(first, _add(steps, asked, dy, x))
    second = _add(steps, asked._replace(wants_sums=True), dy, x)
    sums = steps.sums
    if sums is None:
        sums = steps.call(torch.sum, steps.rows(dy, asked.tokens, n), 0)
    return steps.prepared(first, second, sums)


def _kind(a: Tensor) -> str:
    return a.device.type


def _asked(op: str, row_offsets, col_indices, values, n, k, a, bias) -> Asked:
    m, nnz = a.shape[:-1].numel(), col_indices.shape[0]
    problem = Problem(op, _kind(a), a.dtype, m, n, k, nnz)
    if problem.device == "cuda":
        problem = recognised(problem, row_offsets, col_indices)
    return Asked(problem, row_offsets, col_indices, values, a, bias)


def _add(steps: Steps, asked: Asked, a: Slot, b: Slot | None) -> Slot:
    p = asked.problem
    kernel, slot = pick(p), None
    if kernel.prepare and p.M and p.nnz:
        slot = kernel.prepare(steps, asked, a, b)
    return _run(steps, kernel, asked, a, b) if slot is None else slot


def _run(steps: Steps, kernel: Kernel, asked: Asked, a: Slot, b: Slot | None) -> Slot:
    """The kernel's own function as one step."""
    p = asked.problem
    indices = ROW_OFFSETS, COL_INDICES
    if p.op == "sddmm":
        assert b is not None
        dy, x = steps.rows(a, asked.tokens, p.N), steps.rows(b, asked.tokens, p.K)
        return steps.call(kernel.run, *indices, p.N, p.K, dy, x)
    inputs, outputs = (p.K, p.N) if p.op == "spmm" else (p.N, p.K)
    bias = b if asked.has_bias else None
    rows = steps.rows(a, asked.tokens, inputs)
    y = steps.call(kernel.run, *indices, VALUES, p.N, p.K, rows, bias)
    return steps.unfolded(y, asked.tokens, outputs)
