"""Single sparse matrices in files that others exchange: DLMC's .smtx and Matrix Market's .mtx."""

from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from ..extras import require
from ..files import as_path
from ..indices import INDEX_LIMIT, VALUE_DTYPES
from ..tensor import SparseTensor

__all__ = ["load_matrix"]

FEWEST_BYTES = 2  # of a number in text, with what parts it from the next one
MOST_ROWS = 2**24  # of a .mtx file of any size, or so many for a byte:
ROWS_OF_BYTE = 64


def load_matrix(path: str | Path, dtype: torch.dtype = torch.float32) -> SparseTensor:
    """A matrix from a .smtx file (Deep Learning Matrix Collection) or a .mtx file (Matrix Market,
    with SciPy), its values as `dtype`.

    .smtx holds a pattern without values: they are 1, and so they are for `pattern` in Matrix
    Market. Duplicates are summed in Matrix Market and refused in .smtx; zeros that the file stores
    stay, those of its dense `array` do not.

    FileNotFoundError, or a ValueError that names the file and what is wrong with it."""
    path = as_path("path", path)
    if path.suffix not in (".smtx", ".mtx"):
        raise ValueError(f"matrix: {path}: expected a file ending in .smtx or .mtx")
    if dtype not in VALUE_DTYPES:
        wanted = ", ".join(map(str, VALUE_DTYPES))
        raise ValueError(f"dtype: expected one of {wanted}, got {dtype!r}")
    if not path.is_file():
        raise FileNotFoundError(f"matrix: {path} does not exist")
    try:
        return _from_smtx(path, dtype) if path.suffix == ".smtx" else _from_mtx(path, dtype)
    except (OverflowError, TypeError, ValueError) as error:
        raise ValueError(f"matrix: {path}: {error}") from error


def _from_smtx(path: Path, dtype: torch.dtype) -> SparseTensor:
    """Three lines: `rows, columns, nnz`, the row offsets, the column indices."""
    with open(path, encoding="ascii") as file:
        lines = [line for line in file if line.strip()]
    if len(lines) not in (2, 3):  # two, where nothing is stored
        raise ValueError(
            "expected three lines, sizes, row offsets and column indices, "
            f"got {len(lines)} that are not empty"
        )
    n, k, nnz = _sizes(lines[0].replace(",", " ").split())
    offsets = _integers("row offsets", lines[1], n + 1)
    columns = _integers("column indices", lines[2] if len(lines) == 3 else "", nnz)
    return SparseTensor(offsets, columns, torch.ones(nnz, dtype=dtype, device="cpu"), (n, k))


def _integers(name: str, line: str, count: int) -> Tensor:
    words = line.split()
    if len(words) != count:
        raise ValueError(f"{name}: expected {count} by its first line, got {len(words)}")
    try:
        return torch.from_numpy(np.array(words, dtype=np.int64))
    except (OverflowError, ValueError) as error:
        raise ValueError(f"{name}: expected integers of 64 bits") from error


def _from_mtx(path: Path, dtype: torch.dtype) -> SparseTensor:
    _check_mtx(path)
    found = require("scipy.io", "bench").mmread(path)
    if found.dtype.kind == "c":
        raise ValueError("expected real or integer values, or a pattern, got complex ones")
    if isinstance(found, np.ndarray):
        return SparseTensor.from_dense(torch.from_numpy(found).to(dtype))
    return SparseTensor.from_scipy(found.astype(np.float64)).to(dtype)


def _check_mtx(path: Path) -> None:
    """What its head promises must be in the file: readers make room for it before they look."""
    with open(path, encoding="latin-1") as file:
        head = file.readline(200).split()
        if len(head) < 3 or head[0] != "%%MatrixMarket":
            raise ValueError("expected a first line that begins with %%MatrixMarket")
        is_dense = head[2].lower() == "array"
        line = next((x for x in file if x.strip() and not x.startswith("%")), "")
    sizes = _sizes(line.split()[: 2 if is_dense else 3], 2 if is_dense else 3)
    if head[4:] and head[4].lower() != "general" and sizes[0] != sizes[1]:
        raise ValueError(f"expected as many rows as columns, for it is {head[4]}, got {sizes[:2]}")
    entries = sizes[0] * sizes[1] if is_dense else sizes[2]
    numbers = entries // 2 if is_dense else 2 * entries  # half of a symmetric one may be left out
    size = path.stat().st_size
    if numbers * FEWEST_BYTES > size:
        raise ValueError(f"expected {entries} entries by its sizes, the file has only {size} bytes")
    if max(sizes[:2]) > max(MOST_ROWS, ROWS_OF_BYTE * size):
        raise ValueError(f"expected fewer rows and columns in {size} bytes, got {sizes[:2]}")


def _sizes(words: list[str], count: int = 3) -> list[int]:
    names = ("rows", "columns", "nnz")[:count]
    if len(words) != count or not all(w.isdecimal() and int(w) < INDEX_LIMIT for w in words):
        raise ValueError(
            f"expected {', '.join(names)}, each in [0, {INDEX_LIMIT}), got {' '.join(words)[:80]!r}"
        )
    return [int(word) for word in words]
