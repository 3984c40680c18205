"""Products of many tokens on a CPU: the table rows `panel`, which call `sparsekern._C`.

They walk the non-zeros over feature-major panels of the tokens, packed inside the call (csrc/cpu),
in float32, bfloat16, summed in float32, and float64, on as many threads as torch uses.
"""

from functools import partial

import torch
from torch import Tensor

from ..crossover import density_limit
from ..derived import _store, kept, versions
from ..problem import Problem, bound_kernel
from .dense_product import library
from .machine import _C, NO_LIBRARY, Machine, machine, machine_name
from .plan import Plan, dense_wins_above, density_of_dense_rate, describe, make_plan

SLOWER = "; a dense layer is faster"


def _machine_for(dtype: torch.dtype) -> Machine:
    """The machine with as many lanes as a vector has of what `dtype` is computed in."""
    here = machine()
    return here._replace(lanes=here.lanes // 2) if dtype == torch.float64 else here


def pattern_of(row_offsets: Tensor, col_indices: Tensor, n: int, k: int) -> "_C.Pattern":
    """The C++ store of what this pattern's kernels derive; it notices itself when that is stale,
    as csrc/pattern/csr.h says."""
    key = "cpu", row_offsets.data_ptr(), col_indices.data_ptr(), n, k, col_indices.numel()
    try:  # what kept() does first, for the calls that cost as little as it
        return _store[key][0]
    except KeyError:
        make = partial(_C.Pattern, n, k, col_indices.numel())
        return kept("cpu", row_offsets, col_indices, n, k, make)


def type_of(dtype: torch.dtype) -> "_C.Type":
    return getattr(_C.Type, str(dtype).removeprefix("torch."))


def _plan(problem: Problem, threads: int) -> Plan:
    return make_plan(problem, _machine_for(problem.dtype), threads)


class _Plans(dict):
    """The plan of a problem by the number of threads, for C++; made when first asked for."""

    def __init__(self, problem: Problem):
        self._problem = problem

    def __missing__(self, threads: int) -> "_C.Plan":
        plan = self[threads] = _C.Plan(**_plan(self._problem, threads)._asdict())
        return plan


def bind_spmm(problem: Problem):
    """Bind `panel` to a problem of spmm or spmm_t."""
    type_, is_transposed = type_of(problem.dtype), problem.op == "spmm_t"
    m, width = problem.M, problem.K if is_transposed else problem.N
    inputs = problem.N if is_transposed else problem.K
    x_bytes, y_bytes = (size * problem.dtype.itemsize for size in (inputs, width))  # of a token
    plans = _Plans(problem)

    def run(row_offsets, col_indices, values, n, k, x, bias=None, y=None, first=0):
        """With y, of M tokens of x and y from `first` on."""
        y = x.new_empty(m, width) if y is None else y
        pattern_of(row_offsets, col_indices, n, k).spmm(
            row_offsets.data_ptr(),
            col_indices.data_ptr(),
            *versions(row_offsets, col_indices),
            type_,
            values.data_ptr(),
            0 if bias is None else bias.data_ptr(),
            x.data_ptr() + first * x_bytes,
            y.data_ptr() + first * y_bytes,
            m,
            is_transposed,
            plans[torch.get_num_threads()],
        )
        return y

    return run


def _bind_sddmm(problem: Problem):
    type_, plans = type_of(problem.dtype), _Plans(problem)

    def run(row_offsets, col_indices, n, k, dy, x):
        dvalues = x.new_empty(problem.nnz)
        pattern_of(row_offsets, col_indices, n, k).sddmm(
            row_offsets.data_ptr(),
            col_indices.data_ptr(),
            *versions(row_offsets, col_indices),
            type_,
            dy.data_ptr(),
            x.data_ptr(),
            dvalues.data_ptr(),
            problem.M,
            plans[torch.get_num_threads()],
        )
        return dvalues

    return run


def refuse_dtype(
    p: Problem, dtypes: tuple[torch.dtype, ...] = (torch.float32, torch.bfloat16, torch.float64)
) -> str | None:
    """Reason why no row that calls `_C` runs it: not built, or the dtype. None where one may."""
    if _C is None:
        return NO_LIBRARY
    if p.dtype not in dtypes:
        *taken, got = (str(dtype).removeprefix("torch.") for dtype in (*dtypes, p.dtype))
        return f"it takes {', '.join(taken)}, not {got}"
    return None


def _refuse_panel(p: Problem) -> str | None:
    if reason := refuse_dtype(p):
        return reason
    limit = density_limit(machine_name(machine()), p.dtype, p.M, f"panel {p.op}", "expand")
    if limit is None:
        limit = dense_wins_above(p, machine())
    if p.density > limit:
        return f"a dense product is faster above density {limit:.2f} at {p.M} tokens"
    return None


def _describe_panel(p: Problem) -> str:
    here = _machine_for(p.dtype)
    text = describe(_plan(p, torch.get_num_threads()), here)
    # Where nn.Linear's own library is not the fastest, a dense layer is slower than `expand`.
    is_slower = p.density > density_of_dense_rate(p, here) and library(p.dtype) == "torch.mm"
    return text + SLOWER * is_slower


KERNELS = (
    bound_kernel("panel", "spmm", "cpu", _refuse_panel, bind_spmm, _describe_panel),
    bound_kernel("panel", "spmm_t", "cpu", _refuse_panel, bind_spmm, _describe_panel),
    bound_kernel("panel", "sddmm", "cpu", _refuse_panel, _bind_sddmm, _describe_panel),
)
