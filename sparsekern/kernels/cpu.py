"""CPU kernels in C++: the table rows that call `sparsekern._C`.

`panel` walks the non-zeros over feature-major panels of the tokens, packed inside the call
(csrc/cpu). `expand` writes W out and calls torch.mm, where W is too full for `panel` to win. Both
take float32 and bfloat16, sum in float32, and use as many threads as torch does.
"""

import weakref
from functools import lru_cache

import torch
from torch import Tensor

from .crossover import density_limit
from .dense import mm
from .plan import Machine, Plan, dense_wins_above, describe, machine_name, make_plan
from .problem import Kernel, Problem

try:
    from .. import _C
except ImportError:  # the rows stay in the table and say so
    _C = None


@lru_cache(maxsize=1)
def machine() -> Machine:
    """This machine, as its C++ library and torch see it."""
    has_tiles = torch.cpu._is_amx_tile_supported()
    return Machine(_C.isa(), _C.lanes(), _C.cache_bytes(1), _C.cache_bytes(2), has_tiles)


# By addresses and sizes of the index tensors. A C++ Pattern compares what it has derived with the
# indices (how thoroughly, csr.h says), so an entry can be out of date but not wrong. It goes
# when its col_indices tensor does.
_patterns: dict[tuple[int, int, int, int, int], tuple["_C.Pattern", weakref.ref]] = {}


def pattern_of(row_offsets: Tensor, col_indices: Tensor, n: int, k: int) -> "_C.Pattern":
    nnz = col_indices.shape[0]
    key = (row_offsets.data_ptr(), col_indices.data_ptr(), n, k, nnz)
    if key not in _patterns:
        forget = weakref.ref(col_indices, lambda _: _patterns.pop(key, None))
        _patterns[key] = (_C.Pattern(n, k, nnz), forget)
    return _patterns[key][0]


def version_of(row_offsets: Tensor, col_indices: Tensor) -> int:
    """Grows with every write to the indices that torch counts; -1 where it does not count."""
    try:
        return row_offsets._version + col_indices._version
    except RuntimeError:  # made in inference mode
        return -1


def type_of(x: Tensor) -> "_C.Type":
    return _C.Type.float32 if x.dtype == torch.float32 else _C.Type.bfloat16


def _plan(op: str, x: Tensor, n: int, k: int, nnz: int) -> Plan:
    problem = Problem(op, "cpu", x.dtype, x.shape[0], n, k, nnz)
    return make_plan(problem, machine(), torch.get_num_threads())


def _spmm(op, row_offsets, col_indices, values, n, k, x, bias):
    y = x.new_empty(x.shape[0], n if op == "spmm" else k)
    pattern_of(row_offsets, col_indices, n, k).spmm(
        row_offsets.data_ptr(),
        col_indices.data_ptr(),
        version_of(row_offsets, col_indices),
        type_of(x),
        values.data_ptr(),
        0 if bias is None else bias.data_ptr(),
        x.data_ptr(),
        y.data_ptr(),
        x.shape[0],
        op == "spmm_t",
        *_plan(op, x, n, k, values.shape[0]),
    )
    return y


def _spmm_panel(row_offsets, col_indices, values, n, k, x, bias=None):
    return _spmm("spmm", row_offsets, col_indices, values, n, k, x, bias)


def _spmm_t_panel(row_offsets, col_indices, values, n, k, dy, bias=None):
    return _spmm("spmm_t", row_offsets, col_indices, values, n, k, dy, bias)


def _sddmm_panel(row_offsets, col_indices, n, k, dy, x):
    nnz = col_indices.shape[0]
    dvalues = x.new_empty(nnz)
    pattern_of(row_offsets, col_indices, n, k).sddmm(
        row_offsets.data_ptr(),
        col_indices.data_ptr(),
        version_of(row_offsets, col_indices),
        type_of(x),
        dy.data_ptr(),
        x.data_ptr(),
        dvalues.data_ptr(),
        x.shape[0],
        *_plan("sddmm", x, n, k, nnz),
    )
    return dvalues


def _expand(row_offsets, col_indices, values, n, k):
    """W [N, K], dense."""
    w = values.new_empty(n, k)
    pattern_of(row_offsets, col_indices, n, k).to_dense(
        row_offsets.data_ptr(),
        col_indices.data_ptr(),
        values.element_size(),
        values.data_ptr(),
        w.data_ptr(),
        torch.get_num_threads(),
    )
    return w


def _spmm_expand(row_offsets, col_indices, values, n, k, x, bias=None):
    return mm(x, _expand(row_offsets, col_indices, values, n, k).t(), bias)


def _spmm_t_expand(row_offsets, col_indices, values, n, k, dy, bias=None):
    return mm(dy, _expand(row_offsets, col_indices, values, n, k), bias)


def _sddmm_expand(row_offsets, col_indices, n, k, dy, x):
    dw = mm(dy.t(), x)
    dvalues = x.new_empty(col_indices.shape[0])
    pattern_of(row_offsets, col_indices, n, k).from_dense(
        row_offsets.data_ptr(),
        col_indices.data_ptr(),
        dw.element_size(),
        dw.data_ptr(),
        dvalues.data_ptr(),
        torch.get_num_threads(),
    )
    return dvalues


def refuse_dtype(p: Problem) -> str | None:
    """What every row that calls `_C` refuses."""
    if _C is None:
        return "the C++ library is not built"
    if p.dtype not in (torch.float32, torch.bfloat16):
        return f"it takes float32 and bfloat16, not {str(p.dtype).removeprefix('torch.')}"
    return None


def _refuse_panel(p: Problem) -> str | None:
    if reason := refuse_dtype(p):
        return reason
    limit = density_limit(machine_name(machine()), p.dtype, p.M, f"panel {p.op}", "expand")
    if limit is None:
        limit = dense_wins_above(p, machine())
    if p.density > limit:
        return f"torch.mm is faster above density {limit:.2f} at {p.M} tokens"
    return None


def _describe_panel(p: Problem) -> str:
    return describe(make_plan(p, machine(), torch.get_num_threads()), machine())


KERNELS = (
    Kernel("panel", "spmm", "cpu", _refuse_panel, _spmm_panel, _describe_panel),
    Kernel("panel", "spmm_t", "cpu", _refuse_panel, _spmm_t_panel, _describe_panel),
    Kernel("panel", "sddmm", "cpu", _refuse_panel, _sddmm_panel, _describe_panel),
    Kernel("expand", "spmm", "cpu", refuse_dtype, _spmm_expand),
    Kernel("expand", "spmm_t", "cpu", refuse_dtype, _spmm_t_expand),
    Kernel("expand", "sddmm", "cpu", refuse_dtype, _sddmm_expand),
)
