"""The index tensors of a pattern: row_offsets int32 [N+1] and col_indices int32 [nnz], checked.

Nothing here is computed in 32 bits that may pass 2^31: a place, row * K + column, is int64.
"""

import operator
import warnings
from collections.abc import Iterable, Sequence, Set
from functools import cache

import torch
from torch import Tensor

VALUE_DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)
INDEX_DTYPES = (torch.int32, torch.int64)
INDEX_LIMIT = 2**31  # indices are int32


def expand_rows(row_offsets: Tensor, nnz: int) -> Tensor:
    """The row of each stored entry: int64 [nnz]. ValueError where the offsets are not right."""
    if row_offsets.is_cuda:  # there repeat_interleave believes offsets that lead out of its bounds
        return _search_rows(row_offsets, nnz)
    rows = torch.arange(row_offsets.shape[0] - 1, device=row_offsets.device)
    # It refuses a wrong sum, but a count below 0 only when it has written beyond its result.
    counts = row_offsets.diff().clamp(min=0)
    try:
        return rows.repeat_interleave(counts, output_size=nnz)
    except RuntimeError:
        _check_offsets(row_offsets, nnz)
        raise


def _search_rows(row_offsets: Tensor, nnz: int) -> Tensor:
    at = torch.arange(nnz, dtype=row_offsets.dtype, device=row_offsets.device)
    return torch.searchsorted(row_offsets, at, right=True) - 1


def count_rows(rows: Tensor, n: int) -> Tensor:
    """row_offsets int32 [N+1] of entries whose rows are given."""
    check_limit("nnz", rows.shape[0])
    row_offsets = torch.zeros(n + 1, dtype=torch.int32, device=rows.device)
    counts = rows.bincount(minlength=n)
    torch._check(counts.shape[0] == n)  # which torch.compile does not know
    row_offsets[1:] = counts.cumsum(0)
    return row_offsets


def places(row_offsets: Tensor, col_indices: Tensor, k: int) -> Tensor:
    """row * K + column of each stored entry: int64 [nnz]."""
    return expand_rows(row_offsets, col_indices.shape[0]) * k + col_indices


def counted(t: Tensor) -> Tensor:
    """t, or a copy of it if it was made in inference mode: torch counts no writes to such a tensor,
    so kernels would look at all of it on every call."""
    if torch.compiler.is_compiling() or not t.is_inference():
        return t
    with torch.inference_mode(False):
        return t.clone()


# Checks


def check_sizes(
    row_offsets: Tensor, col_indices: Tensor, values: Tensor, shape: Sequence[int]
) -> tuple[int, int]:
    """(N, K), after everything that can be checked without reading an index."""
    if isinstance(shape, str | Set) or not isinstance(shape, Iterable):
        raise TypeError(f"shape: expected (N, K), got {shape!r}")
    sizes = tuple(shape)
    if len(sizes) != 2:
        raise ValueError(f"shape: expected (N, K), got {sizes}")
    n, k = whole("N", sizes[0]), whole("K", sizes[1])
    for name, size in (("N", n), ("K", k)):
        check_limit(name, size)
    for name, t in (("row_offsets", row_offsets), ("col_indices", col_indices)):
        if not isinstance(t, Tensor) or t.layout != torch.strided or t.dtype not in INDEX_DTYPES:
            raise TypeError(f"{name}: expected an int32 or int64 tensor, got {kind(t)}")
        if t.ndim != 1:
            raise ValueError(f"{name}: expected a 1-D tensor, got shape {tuple(t.shape)}")
    check_values("values", values, ndim=1)
    nnz = col_indices.shape[0]
    check_limit("nnz", nnz)
    for name, t, size in (("row_offsets", row_offsets, n + 1), ("values", values, nnz)):
        if t.shape[0] != size:
            raise ValueError(f"{name}: expected {size} elements, got {t.shape[0]}")
        if t.device != col_indices.device:
            raise ValueError(f"{name}: expected device {col_indices.device}, got {t.device}")
    return n, k


def check_pattern(row_offsets: Tensor, col_indices: Tensor, n: int, k: int) -> None:
    """ValueError unless the offsets are right and the columns increase strictly in each row."""
    _check_bounds(row_offsets, col_indices, k)
    _check_steps(row_offsets, col_indices, _steps(row_offsets, col_indices))


def sorting_order(row_offsets: Tensor, col_indices: Tensor, n: int, k: int) -> Tensor | None:
    """The order int64 [nnz] that sorts the columns in each row; None if they are sorted.

    ValueError where no order makes a pattern of them. On the meta device there is nothing to see.
    """
    if col_indices.is_meta:
        return None
    _check_bounds(row_offsets, col_indices, k)
    order, steps = None, _steps(row_offsets, col_indices)
    if (steps < 0).any():
        order = places(row_offsets, col_indices, k).argsort()
        col_indices = col_indices[order]
        steps = _steps(row_offsets, col_indices)
    _check_steps(row_offsets, col_indices, steps)
    return order


def _check_offsets(row_offsets: Tensor, nnz: int) -> None:
    first, last = row_offsets[0].item(), row_offsets[-1].item()
    if (first, last) != (0, nnz):
        raise ValueError(
            f"row_offsets: expected to start at 0 and end at nnz = {nnz}, got {first} and {last}"
        )
    falls = row_offsets[1:] < row_offsets[:-1]
    if falls.any():
        row = falls.nonzero()[0].item()
        raise ValueError(
            f"row_offsets: expected not to decrease, got {row_offsets[row].item()} before "
            f"{row_offsets[row + 1].item()} at row {row}"
        )


def _check_bounds(row_offsets: Tensor, col_indices: Tensor, k: int) -> None:
    nnz = col_indices.shape[0]
    _check_offsets(row_offsets, nnz)
    if nnz == 0:
        return
    low, high = (bound.item() for bound in col_indices.aminmax())
    if low < 0 or high >= k:
        raise ValueError(f"col_indices: expected to lie in [0, {k}), got {low} to {high}")


def _steps(row_offsets: Tensor, col_indices: Tensor) -> Tensor:
    """From each column to the next [nnz - 1]; 1 from one row to the next, where any will do."""
    nnz = col_indices.shape[0]
    steps = col_indices[1:] - col_indices[:-1]  # diff() of no indices is these themselves
    starts = row_offsets[1:-1]
    steps[starts[(starts > 0) & (starts < nnz)].long() - 1] = 1
    return steps


def _check_steps(row_offsets: Tensor, col_indices: Tensor, steps: Tensor) -> None:
    for wrong, what in ((steps < 0, "not sorted"), (steps == 0, "a duplicate")):
        if wrong.any():
            at = wrong.nonzero()[0].item()
            row = torch.searchsorted(row_offsets, at, right=True).item() - 1
            raise ValueError(
                "col_indices: expected to increase strictly in each row, got "
                f"{col_indices[at].item()} before {col_indices[at + 1].item()} in row {row}: {what}"
            )


def check_values(name: str, values: Tensor, ndim: int) -> None:
    if not isinstance(values, Tensor) or values.layout != torch.strided:
        raise TypeError(f"{name}: expected a strided tensor, got {kind(values)}")
    if values.dtype not in VALUE_DTYPES:
        convert = "torch.sparse has complex ones" if values.is_complex() else "convert it first"
        raise TypeError(
            f"{name}: expected float32, bfloat16, float16 or float64, got {values.dtype}; {convert}"
        )
    if values.ndim != ndim:
        raise ValueError(f"{name}: expected a {ndim}-D tensor, got shape {tuple(values.shape)}")


@cache
def let_torch_warn() -> None:
    """torch says once in a process that CSR is in beta state: here, unheard."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        zero = torch.zeros(1, dtype=torch.int32, device="cpu")
        parts = zero, zero[:0], zero[:0], (0, 0)
        torch.sparse_csr_tensor(*parts, device="cpu", check_invariants=False)


def has_nan(t: Tensor) -> bool:
    """Whether any value is NaN. A sum shows it faster than a look at each, unless infinities cancel
    in it."""
    t = t.detach()
    return bool(t.sum().isnan()) and bool(t.isnan().any())


def whole(name: str, size: object) -> int:
    """A size as an int. TypeError for what is none."""
    if type(size) is int or isinstance(size, torch.SymInt):  # an index would fix it in a graph
        return size  # type: ignore[return-value]
    try:
        found = None if isinstance(size, bool) else operator.index(size)  # type: ignore[arg-type]
    except TypeError:
        found = None
    if found is None:
        raise TypeError(f"{name}: expected a whole number, got {size!r}")
    return found


def check_limit(name: str, size: int) -> None:
    if not 0 <= size < INDEX_LIMIT:
        raise ValueError(f"{name}: expected 0 <= {name} < 2**31 (int32 indices), got {size}")


def kind(value) -> str:
    if isinstance(value, Tensor):
        return f"a {value.layout} tensor of dtype {value.dtype}"
    return type(value).__name__


# Inside a graph of torch.compile nothing can be looked at: there the checks are a node of it.


def _run_checked_pattern(row_offsets, col_indices, n, k):
    order = sorting_order(row_offsets, col_indices, n, k)
    if order is None:
        order = torch.arange(col_indices.shape[0], device=col_indices.device)
    return row_offsets.to(torch.int32, copy=True), col_indices[order].int(), order


def _fake_checked_pattern(row_offsets, col_indices, n, k):
    nnz = col_indices.shape[0]
    return (
        row_offsets.new_empty(n + 1, dtype=torch.int32),
        col_indices.new_empty(nnz, dtype=torch.int32),
        col_indices.new_empty(nnz, dtype=torch.int64),
    )


_library = torch.library.Library("sparsekern", "FRAGMENT")
_library.define(
    "checked_pattern(Tensor row_offsets, Tensor col_indices, SymInt n, SymInt k) "
    "-> (Tensor, Tensor, Tensor)",
    tags=(torch.Tag.pt2_compliant_tag,),
)
for _key in ("CPU", "CUDA"):
    _library.impl("checked_pattern", _run_checked_pattern, _key)
torch.library.register_fake("sparsekern::checked_pattern", _fake_checked_pattern, lib=_library)
checked_pattern = torch.ops.sparsekern.checked_pattern.default
