"""W written out in parts by its bitmap: every part of it, and the products out of such parts."""

import pytest
import torch
from conftest import products, written_out

from sparsekern.kernels.cpu import dense_product, expand, panel
from sparsekern.testing import Case, exact, relative_error

pytestmark = pytest.mark.skipif(panel._C is None, reason="the C++ library is not built")

TOLERANCE = {torch.float32: 2e-6, torch.bfloat16: 2**-8, torch.float64: 1e-15}
CASES = [
    Case("odd", 9, 37, 101),
    Case("words", 9, 64, 192, sparsity=0.5),
    Case("word-and-one", 9, 70, 129, "full"),
    Case("empty", 9, 37, 101, "empty"),
    Case("one-by-one", 1, 1, 1, "full"),
    Case("many-rows", 3, 300, 65, sparsity=0.3),
    Case("no-columns", 9, 37, 0),
    Case("no-rows", 9, 0, 101),
]


def parts_of(n, k):
    """(row, rows, col, cols): all, and some that begin and end anywhere they may."""
    yield 0, n, 0, k
    yield n // 2, n - n // 2, 0, k
    yield n // 3, n // 3, k // 128 * 64, k - k // 128 * 64
    yield 0, n, k // 64 * 64, min(k - k // 64 * 64, 3)


@pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_parts(case, dtype):
    t = case.tensors(dtype)
    n, k = t.mask.shape
    pattern = panel.pattern_of(t.row_offsets, t.col_indices, n, k)
    indices = t.row_offsets.data_ptr(), t.col_indices.data_ptr(), 0, 0, dtype.itemsize
    w = written_out(t.row_offsets, t.col_indices, t.values, n, k)
    for row, rows, col, cols in parts_of(n, k):
        part = torch.full((rows, cols), torch.nan, dtype=dtype)
        pattern.to_dense(*indices, t.values.data_ptr(), row, rows, col, cols, part.data_ptr(), 2)
        assert torch.equal(part, w[row : row + rows, col : col + cols])
    back = torch.full_like(t.values, torch.nan)
    for row, rows in ((0, n // 3), (n // 3, n - n // 3)):
        some = w[row : row + rows].contiguous()
        pattern.from_dense(*indices, some.data_ptr(), row, rows, back.data_ptr(), 2)
    assert torch.equal(back, t.values)


@pytest.mark.parametrize("library", ["torch.mm", "oneDNN"])
@pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_products_of_parts(case, dtype, library, monkeypatch, nan_memory):
    """Several parts of a product, where one would do."""
    if library == "oneDNN" and dtype != torch.float32:
        pytest.skip("torch.mm multiplies it")
    for module in (dense_product, expand):
        monkeypatch.setattr(module, "library", lambda dtype: library)
        monkeypatch.setattr(module, "LONGEST_SUM", 64)
    monkeypatch.setattr(expand, "_width", lambda *sizes: 64)
    t = case.tensors(dtype)
    n, k = t.mask.shape
    rows = {row.op: row for row in expand.KERNELS}
    for op, operands in products(t).items():
        product, scale = exact(t)[op]
        with torch.autocast("cpu", torch.bfloat16):
            got = rows[op].run(*operands)
        assert got.dtype == dtype
        assert relative_error(got, product, scale) <= TOLERANCE[dtype]
        if op == "sddmm":
            continue
        bias = torch.randn(n if op == "spmm" else k, dtype=torch.float64).to(dtype)
        with_bias = rows[op].run(*operands, bias)
        error = relative_error(with_bias, product + bias.double(), scale + bias.double().abs())
        assert error <= TOLERANCE[dtype]


def test_a_missing_place_takes_no_part(monkeypatch):
    monkeypatch.setattr(expand, "_width", lambda *sizes: 64)
    t = Case("missing", 9, 130, 101, sparsity=0.5).tensors()
    operands = list(products(t)["spmm"])
    operands[5] = operands[5].clone()
    operands[5][3, 7] = torch.inf
    finite = expand.KERNELS[0].run(*operands).isfinite()
    assert torch.equal(finite[3], ~t.mask[:, 7]) and finite[[0, 1, 2, 4, 5, 6, 7, 8]].all()


def test_a_changed_pattern_is_seen():
    t = Case("changed", 9, 40, 101, sparsity=0.5).tensors()
    operands = products(t)["spmm"]
    before = expand.KERNELS[0].run(*operands)
    last = t.row_offsets[1:] - 1  # the last column of each row moves to the end, if it is free
    t.col_indices[last[last >= 0].long()] = 100
    want = t.x @ written_out(t.row_offsets, t.col_indices, t.values, 40, 101).t()
    got = expand.KERNELS[0].run(*operands)
    torch.testing.assert_close(got, want, rtol=1e-4, atol=1e-4)
    assert not torch.equal(before, got)


def test_widths():
    assert expand._width(0, 100, 4) == 64 and expand._width(100, 0, 4) == 128
    wide = expand._width(8192, 2**20, 4)
    assert wide % 64 == 0 and wide >= expand.LEAST_WIDTH
    assert expand._width(768, 64, 2) == 768
