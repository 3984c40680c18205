"""float16 on a CPU: the table row `widened`, a product in float32 that is rounded once.

What is summed in float32 anyway is given to the float32 rows; widening costs a pass over the values
and the activations.
"""

import torch

from ..problem import Problem, bound_kernel
from . import expand, few_tokens, panel


def _inner(problem: Problem):
    wide = problem._replace(dtype=torch.float32)
    rows = (*few_tokens.KERNELS, *panel.KERNELS, *expand.KERNELS)
    return next(r for r in rows if r.op == problem.op and r.refuse(wide) is None), wide


def _bind(problem: Problem):
    row, wide = _inner(problem)
    product = row.bound(wide)

    def run(row_offsets, col_indices, *operands):
        widened = (t.float() if isinstance(t, torch.Tensor) else t for t in operands)
        return product(row_offsets, col_indices, *widened).half()

    return run


def _refuse(p: Problem) -> str | None:
    return panel.refuse_dtype(p, (torch.float16,))


def _describe(p: Problem) -> str:
    row, wide = _inner(p)
    plan = f", {row.plan(wide)}" if row.plan else ""
    return f"float32 {row.name}{plan}"


KERNELS = tuple(
    bound_kernel("widened", op, "cpu", _refuse, _bind, _describe)
    for op in ("spmm", "spmm_t", "sddmm")
)
