"""Problem -> Kernel: the only place where a kernel is chosen.

The first row for the problem's op and device that does not refuse it runs; the `dense` rows at the
end refuse nothing. The choice is cached, so the environment is read when a problem is first met:
SPARSEKERN_KERNEL=name forces the rows of that name for the ops that have one, SPARSEKERN_DEBUG=1
prints each new problem with the kernel chosen and every refusal on standard error.
"""

import os
import sys
import warnings
from dataclasses import replace
from functools import lru_cache
from inspect import signature

from torch import Tensor

from ..indices import INDEX_LIMIT, VALUE_DTYPES
from . import core, reference
from .cpu import expand as expand_on_cpu
from .cpu import few_tokens, panel, split, widened
from .cuda import csr, expand, ordered, two_of_four
from .cuda import few_tokens as cuda_few_tokens
from .operands import native
from .problem import OLD_NAMES, Kernel, Problem
from .triton import rows as triton_rows


def _never(problem: Problem) -> None:
    return None


def _dense(op: str) -> Kernel:
    """The function of reference.py, which checks the indices."""
    product = getattr(reference, op)
    names = tuple(signature(product).parameters)

    def run(row_offsets, col_indices, *operands):
        for name, t in zip(names, (row_offsets, col_indices, *operands), strict=False):
            if isinstance(t, Tensor) and t.numel() > 0 and t.data_ptr() == 0:  # torch would read it
                raise ValueError(
                    f"{name}: expected {t.numel()} elements, but their memory was freed"
                )
        return product(row_offsets, col_indices, *operands)

    return Kernel("dense", op, None, _never, run)


def _first(problem: Problem) -> Kernel:
    return next(row for row in KERNELS if _refusal(row, problem) is None)


KERNELS: tuple[Kernel, ...] = (
    *core.kernels(_first),
    *few_tokens.KERNELS,
    *split.KERNELS,
    *panel.KERNELS,
    *expand_on_cpu.KERNELS,
    *widened.KERNELS,
    *cuda_few_tokens.KERNELS,
    *csr.KERNELS,
    *two_of_four.KERNELS,
    *ordered.KERNELS,
    *expand.KERNELS,
    *triton_rows.KERNELS,
    _dense("spmm"),
    _dense("spmm_t"),
    _dense("sddmm"),
)


@lru_cache(maxsize=4096)
def pick(problem: Problem) -> Kernel:
    """The kernel that runs `problem`, bound to it. ValueError if SPARSEKERN_KERNEL names one that
    cannot."""
    _check(problem)
    forced = os.environ.get("SPARSEKERN_KERNEL")
    kernel = _forced(problem, forced) if forced else None
    kernel = kernel or _first(problem)
    if os.environ.get("SPARSEKERN_DEBUG") == "1":
        print(f"sparsekern: {describe(problem, kernel)}", file=sys.stderr)
    return replace(kernel, run=kernel.bound(problem))


def forget_choices() -> None:
    """Choose anew, and read the environment anew, when a problem is met again."""
    pick.cache_clear()
    if native:
        native.forget_calls()


def _check(problem: Problem) -> None:
    """Sizes and a dtype that there can be; operands.py has seen that the tensors agree."""
    for name, size in (("n", problem.N), ("k", problem.K), ("nnz", problem.nnz)):
        if not 0 <= size < INDEX_LIMIT:
            raise ValueError(
                f"{problem.op}: {name}: expected 0 <= {name} < 2**31 (int32 indices), got {size}"
            )
    if problem.dtype not in VALUE_DTYPES:
        raise TypeError(
            f"{problem.op}: values, x, dy: expected float32, bfloat16, float16 or float64, "
            f"got {problem.dtype}"
        )


def refusals(problem: Problem) -> list[tuple[str, str]]:
    """(name, reason) of every row for this op and device that does not take `problem`, in table
    order."""
    rows = [row for row in KERNELS if row.op == problem.op and _is_for(problem.device, row)]
    reasons = [(row.name, _refusal(row, problem)) for row in rows]
    return [(name, reason) for name, reason in reasons if reason is not None]


def describe(problem: Problem, kernel: Kernel) -> str:
    """One line: the problem, its kernel and how it is set up, and the reason of each refusal."""
    reasons = "".join(f"; {name} refused: {reason}" for name, reason in refusals(problem))
    if not any(row.device == problem.device for row in KERNELS):
        reasons = f"; there are no kernels for {problem.device}"
    plan = f" ({kernel.plan(problem)})" if kernel.plan else ""
    return f"{problem} -> {kernel.name}{plan}{reasons}"


def _is_for(device: str, row: Kernel) -> bool:
    return row.device in (None, device)


def _refusal(row: Kernel, problem: Problem) -> str | None:
    if row.op != problem.op:
        return f"it computes {row.op}"
    if not _is_for(problem.device, row):
        return f"it runs on {row.device}"
    return row.refuse(problem)


def _forced(problem: Problem, name: str) -> Kernel | None:
    if name in OLD_NAMES:
        warnings.warn(
            f"SPARSEKERN_KERNEL: {name} is called {OLD_NAMES[name]} now; the next release knows "
            "that name alone",
            FutureWarning,
            stacklevel=1,  # this line: once in a process
        )
        name = OLD_NAMES[name]
    rows = [row for row in KERNELS if row.name == name]
    if not rows:
        known = ", ".join(sorted({row.name for row in KERNELS}))
        raise ValueError(f"SPARSEKERN_KERNEL: expected one of {known}, got {name}")
    # A name may have rows for each device, and not of the same ops.
    rows = [row for row in rows if _is_for(problem.device, row)] or rows
    row = next((row for row in rows if row.op == problem.op), None)
    reason = row and _refusal(row, problem)
    if reason:
        raise ValueError(f"SPARSEKERN_KERNEL: {name} refuses {problem}: {reason}")
    return row
