"""CPU kernels in C++: the table rows that call `sparsekern._C`.

`panel` walks the non-zeros over feature-major panels of the tokens, packed inside the call
(csrc/cpu). `expand` writes W out and calls torch.mm, where W is too full for `panel` to win. Both
take float32 and bfloat16, sum in float32, and use as many threads as torch does.
"""

import weakref

import torch
from torch import Tensor

from .problem import Kernel, Problem

try:
    from .. import _C
except ImportError:  # the rows stay in the table and say so
    _C = None

# panel beats expand up to the density share * (1 + tokens / M): `share` is the rate of panel over
# that of torch.mm for many tokens, `tokens` how many of them cost torch.mm as much as writing W
# out. Measured on AVX-512 with and without AMX, the matrix tiles that multiply bfloat16 at eight
# times the rate of float32; AVX2 lies within a tenth (docs/LOG.md).
_VECTORS = (0.55, 30)
_TILES = (0.06, 230)
_HAS_TILES = torch.cpu._is_amx_tile_supported()

# By addresses and sizes of the index tensors. A C++ Pattern compares what it has derived with the
# indices on every call, so an entry can be out of date but not wrong. It goes when its col_indices
# tensor does.
_patterns: dict[tuple[int, int, int, int, int], tuple["_C.Pattern", weakref.ref]] = {}


def _pattern(row_offsets: Tensor, col_indices: Tensor, n: int, k: int) -> "_C.Pattern":
    nnz = col_indices.shape[0]
    key = (row_offsets.data_ptr(), col_indices.data_ptr(), n, k, nnz)
    if key not in _patterns:
        forget = weakref.ref(col_indices, lambda _: _patterns.pop(key, None))
        _patterns[key] = (_C.Pattern(n, k, nnz), forget)
    return _patterns[key][0]


def _type(x: Tensor) -> "_C.Type":
    return _C.Type.float32 if x.dtype == torch.float32 else _C.Type.bfloat16


def _spmm_panel(row_offsets, col_indices, values, n, k, x, transposed=False):
    y = x.new_empty(x.shape[0], k if transposed else n)
    _pattern(row_offsets, col_indices, n, k).spmm(
        row_offsets.data_ptr(),
        col_indices.data_ptr(),
        _type(x),
        values.data_ptr(),
        x.data_ptr(),
        y.data_ptr(),
        x.shape[0],
        transposed,
        torch.get_num_threads(),
    )
    return y


def _spmm_t_panel(row_offsets, col_indices, values, n, k, dy):
    return _spmm_panel(row_offsets, col_indices, values, n, k, dy, transposed=True)


def _sddmm_panel(row_offsets, col_indices, n, k, dy, x):
    dvalues = x.new_empty(col_indices.shape[0])
    _pattern(row_offsets, col_indices, n, k).sddmm(
        row_offsets.data_ptr(),
        col_indices.data_ptr(),
        _type(x),
        dy.data_ptr(),
        x.data_ptr(),
        dvalues.data_ptr(),
        x.shape[0],
        torch.get_num_threads(),
    )
    return dvalues


def _expand(row_offsets, col_indices, values, n, k):
    """W [N, K], dense."""
    w = values.new_empty(n, k)
    _pattern(row_offsets, col_indices, n, k).to_dense(
        row_offsets.data_ptr(),
        col_indices.data_ptr(),
        values.element_size(),
        values.data_ptr(),
        w.data_ptr(),
        torch.get_num_threads(),
    )
    return w


def _spmm_expand(row_offsets, col_indices, values, n, k, x):
    return _mm(x, _expand(row_offsets, col_indices, values, n, k).t())


def _spmm_t_expand(row_offsets, col_indices, values, n, k, dy):
    return _mm(dy, _expand(row_offsets, col_indices, values, n, k))


def _sddmm_expand(row_offsets, col_indices, n, k, dy, x):
    dw = _mm(dy.t(), x)
    dvalues = x.new_empty(col_indices.shape[0])
    _pattern(row_offsets, col_indices, n, k).from_dense(
        row_offsets.data_ptr(),
        col_indices.data_ptr(),
        dw.element_size(),
        dw.data_ptr(),
        dvalues.data_ptr(),
        torch.get_num_threads(),
    )
    return dvalues


def _mm(a: Tensor, b: Tensor) -> Tensor:
    # An op's implementation runs under the caller's autocast, which would round these operands.
    with torch.autocast("cpu", enabled=False):
        return torch.mm(a, b)


def _refuse_expand(p: Problem) -> str | None:
    if _C is None:
        return "the C++ library is not built"
    if p.dtype not in (torch.float32, torch.bfloat16):
        return f"it takes float32 and bfloat16, not {str(p.dtype).removeprefix('torch.')}"
    return None


def _refuse_panel(p: Problem) -> str | None:
    share, tokens = _TILES if p.dtype == torch.bfloat16 and _HAS_TILES else _VECTORS
    limit = share * (1 + tokens / max(1, p.M))
    if p.density > limit:
        return f"torch.mm is faster above density {limit:.2f} at {p.M} tokens"
    return _refuse_expand(p)


KERNELS = (
    Kernel("panel", "spmm", "cpu", _refuse_panel, _spmm_panel),
    Kernel("panel", "spmm_t", "cpu", _refuse_panel, _spmm_t_panel),
    Kernel("panel", "sddmm", "cpu", _refuse_panel, _sddmm_panel),
    Kernel("expand", "spmm", "cpu", _refuse_expand, _spmm_expand),
    Kernel("expand", "spmm_t", "cpu", _refuse_expand, _spmm_t_expand),
    Kernel("expand", "sddmm", "cpu", _refuse_expand, _sddmm_expand),
)
