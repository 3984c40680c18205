"""Single matrices of others: .smtx and .mtx."""

import pytest
import torch

from sparsekern import SparseTensor, weights


def test_smtx(tmp_path):
    """As the Deep Learning Matrix Collection has them; columns may come in any order."""
    path = tmp_path / "m.smtx"
    path.write_text("3, 5, 4\n0 2 2 4\n4 1 0 3\n")
    w = weights.load_matrix(path, torch.bfloat16)
    assert w.dtype == torch.bfloat16 and w.shape == (3, 5)
    assert w.to_dense().tolist() == [[0, 1, 0, 0, 1], [0] * 5, [1, 0, 0, 1, 0]]
    path.write_text("2, 3, 0\n0 0 0\n\n")
    assert weights.load_matrix(str(path)).nnz == 0


@pytest.mark.parametrize(
    "text, message",
    [
        ("", "expected three lines, sizes, row offsets and column indices, got 0"),
        ("3, 5, 4\n0 2 2 4\n4 1 0 3\n1 2\n", "expected three lines.*got 4"),
        ("3, 5\n0 2 2 4\n4 1 0 3\n", "expected rows, columns, nnz, each in .* got '3 5'"),
        ("3, -5, 4\n0 2 2 4\n4 1 0 3\n", "expected rows, columns, nnz, each in"),
        ("2147483648, 5, 4\n0 2 2 4\n4 1 0 3\n", "expected rows, columns, nnz, each in"),
        ("2147483647, 5, 4\n0 2 2 4\n4 1 0 3\n", "row offsets: expected 2147483648 .* got 4"),
        ("3, 5, 2147483647\n0 2 2 4\n4 1 0 3\n", "column indices: expected 2147483647 .* got 4"),
        ("3, 5, 4\n0 2 2 4\n4 1 0 x\n", "column indices: expected integers"),
        ("3, 5, 4\n0 2 2 4\n4 1 0 99999999999999999999\n", "column indices"),
        ("3, 5, 4\n0 2 2 4\n4 1 0 7\n", r"col_indices: expected to lie in \[0, 5\)"),
        ("3, 5, 4\n0 2 2 4\n1 1 0 3\n", "col_indices: .* a duplicate"),
        ("3, 5, 4\n0 3 2 4\n4 1 0 3\n", "row_offsets: expected not to decrease"),
        ("3, 5, 4\n0 2 2 4\n4 1 0 é\n", "ascii"),
    ],
)
def test_smtx_that_is_none(tmp_path, text, message):
    path = tmp_path / "m.smtx"
    path.write_text(text, encoding="utf-8")
    with pytest.raises(ValueError, match=message) as caught:
        weights.load_matrix(path)
    assert str(caught.value).startswith(f"matrix: {path}: ")


HEAD = "%%MatrixMarket matrix coordinate"


@pytest.mark.parametrize(
    "text, want",
    [
        (
            f"{HEAD} real general\n% a comment\n2 3 3\n1 1 1.5\n1 3 0\n2 2 2.5\n",
            [[1.5, 0, 0], [0, 2.5, 0]],
        ),
        (f"{HEAD} integer general\n2 2 2\n1 1 3\n1 1 4\n", [[7, 0], [0, 0]]),
        (f"{HEAD} pattern general\n2 2 1\n2 1\n", [[0, 0], [1, 0]]),
        (f"{HEAD} real symmetric\n2 2 2\n1 1 1\n2 1 5\n", [[1, 5], [5, 0]]),
        ("%%MatrixMarket matrix array real general\n2 2\n1\n2\n0\n4\n", [[1, 0], [2, 4]]),
    ],
)
def test_matrix_market(tmp_path, text, want):
    pytest.importorskip("scipy")
    path = tmp_path / "m.mtx"
    path.write_text(text)
    w = weights.load_matrix(path)
    assert (
        isinstance(w, SparseTensor) and w.dtype == torch.float32 and w.to_dense().tolist() == want
    )
    if "comment" in text:
        assert w.nnz == 3  # the zero is stored


@pytest.mark.parametrize(
    "text, message",
    [
        ("1 2 3\n", "expected a first line that begins with %%MatrixMarket"),
        (f"{HEAD} real general\n", "expected rows, columns, nnz, each in"),
        (
            f"{HEAD} real general\n2 2 2147483647\n1 1 1\n",
            "expected 2147483647 entries by its sizes",
        ),
        (
            f"{HEAD} real general\n2147483647 2147483647 1\n1 1 1\n",
            "expected fewer rows and columns",
        ),
        (
            "%%MatrixMarket matrix array real general\n99999 99999\n1\n",
            "expected 9999800001 entries",
        ),
        (f"{HEAD} complex general\n1 1 1\n1 1 1 2\n", "expected real or integer values"),
        (f"{HEAD} real general\n2 2 1\n3 1 1\n", "Row index out of bounds"),
        (f"{HEAD} real general\n2 2 2\n1 1 1\n", "Truncated file"),
        (f"{HEAD} integer general\n1 1 1\n1 1 {10**20}\n", "Integer out of range"),
        (f"{HEAD} real Symmetric\n2 3 1\n2 1 1\n", "as many rows as columns, .* is Symmetric"),
    ],
)
def test_matrix_market_that_is_none(tmp_path, text, message):
    pytest.importorskip("scipy")
    path = tmp_path / "m.mtx"
    path.write_text(text)
    with pytest.raises(ValueError, match=message) as caught:
        weights.load_matrix(path)
    assert str(caught.value).startswith(f"matrix: {path}: ")


def test_other_files(tmp_path):
    with pytest.raises(ValueError, match=r"m.npz: expected a file ending in .smtx or .mtx"):
        weights.load_matrix(tmp_path / "m.npz")
    with pytest.raises(FileNotFoundError, match="m.smtx does not exist"):
        weights.load_matrix(tmp_path / "m.smtx")
    for dtype in (torch.int32, "float"):
        with pytest.raises(ValueError, match=f"dtype: expected one of .*, got {dtype!r}"):
            weights.load_matrix(tmp_path / "m.smtx", dtype=dtype)
