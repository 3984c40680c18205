"""W with far more rows or columns than values: the product of its core, the table row `core`.

The core is W without its empty rows and columns. The other rows take what their operands have
there, x [:, columns] and dy [:, rows], and the result is put in place; so nothing is packed for a
column that no value stands in, and memory is O(nnz + M (N + K)) whatever the dtype.
"""

from collections.abc import Callable
from typing import NamedTuple

from torch import Tensor

from .derived import derived
from .problem import Kernel, Problem

LARGE = 2**20  # rows or columns below which the other kernels' memory is small


class _Core(NamedTuple):
    row_offsets: Tensor  # int32 [len(rows) + 1]
    col_indices: Tensor  # int32 [nnz], into cols
    rows: Tensor  # of W that hold a value
    cols: Tensor


def _make(row_offsets: Tensor, col_indices: Tensor) -> _Core:
    counts = row_offsets.diff()
    rows = counts.nonzero().flatten()
    core_offsets = row_offsets.new_zeros(len(rows) + 1)
    core_offsets[1:] = counts[rows].cumsum(0)
    cols, places = col_indices.long().unique(return_inverse=True)
    return _Core(core_offsets, places.int(), rows, cols)


def _core(row_offsets: Tensor, col_indices: Tensor, n: int, k: int) -> _Core:
    return derived("core", row_offsets, col_indices, n, k, _make)


def _place(part: Tensor, places: Tensor, width: int, bias: Tensor | None) -> Tensor:
    """[M, width] with `part` at `places` and the bias, or 0, elsewhere."""
    m = part.shape[0]
    out = part.new_zeros(m, width) if bias is None else bias.expand(m, width).clone()
    return out.index_copy_(1, places, part)


def _refuse(p: Problem) -> str | None:
    most = max(p.N, p.K)
    if most < LARGE or p.nnz > most // 4:
        return f"W has not {LARGE} rows or columns with a value in at most a quarter of them"
    return None


def kernels(first: Callable[[Problem], Kernel]) -> tuple[Kernel, ...]:
    """The rows; first(problem) is the row that serves the core."""

    def serve(op: str, core: _Core, x: Tensor) -> tuple[Callable, tuple, tuple]:
        """The kernel of the core, its indices and its sizes."""
        n, k, nnz = len(core.rows), len(core.cols), len(core.col_indices)
        problem = Problem(op, "cpu", x.dtype, x.shape[0], n, k, nnz)
        return first(problem).bound(problem), (core.row_offsets, core.col_indices), (n, k)

    def spmm(row_offsets, col_indices, values, n, k, x, bias=None):
        core = _core(row_offsets, col_indices, n, k)
        product, indices, sizes = serve("spmm", core, x)
        core_bias = None if bias is None else bias[core.rows]
        y = product(*indices, values, *sizes, x.index_select(1, core.cols), core_bias)
        return _place(y, core.rows, n, bias)

    def spmm_t(row_offsets, col_indices, values, n, k, dy, bias=None):
        core = _core(row_offsets, col_indices, n, k)
        product, indices, sizes = serve("spmm_t", core, dy)
        core_bias = None if bias is None else bias[core.cols]
        dx = product(*indices, values, *sizes, dy.index_select(1, core.rows), core_bias)
        return _place(dx, core.cols, k, bias)

    def sddmm(row_offsets, col_indices, n, k, dy, x):
        core = _core(row_offsets, col_indices, n, k)
        product, indices, sizes = serve("sddmm", core, x)
        return product(
            *indices, *sizes, dy.index_select(1, core.rows), x.index_select(1, core.cols)
        )

    return tuple(Kernel("core", f.__name__, "cpu", _refuse, f) for f in (spmm, spmm_t, sddmm))
