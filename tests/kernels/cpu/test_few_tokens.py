"""SpMM for few tokens: every compressed format on awkward problems and every instruction set, and
what they promise beside the numbers: no stale pattern, no NaN out of nowhere, the same bits
whatever the threads."""

from contextlib import nullcontext

import pytest
import torch
from conftest import written_out

from sparsekern.kernels import table
from sparsekern.kernels.cpu import few_tokens as rows
from sparsekern.kernels.problem import Problem
from sparsekern.testing import Case, exact, random_csr, relative_error

pytestmark = pytest.mark.skipif(rows._C is None, reason="the C++ library is not built")

few_tokens, few_tokens_t = (row.run for row in rows.KERNELS)
TYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}
# As in test_cpu_kernels.py.
TOLERANCE = {torch.float32: 2e-6, torch.bfloat16: 2**-8}
MOST_TOKENS = {"bitmap": 8, "columns": 16, "window64": 1, "window128": 1, "columns32": 4}

# Rows off the groups of 2, 4, 8 and 16 that share a loop; columns off words and vectors.
SHAPES = [
    Case("odd", 0, 37, 101),
    Case("odd-dense", 0, 37, 101, sparsity=0.2),
    Case("odd-rare", 0, 37, 101, sparsity=0.97),
    Case("empty-row", 0, 37, 101, "empty_row"),
    Case("full-row", 0, 37, 101, "full_row", 0.9),
    Case("full", 0, 37, 101, "full"),
    Case("empty", 0, 37, 101, "empty"),
    Case("one-by-one", 0, 1, 1, "full"),
    Case("one-row", 0, 1, 300),
    Case("one-column", 0, 300, 1),
    Case("word", 0, 16, 64, sparsity=0.5),
    Case("word-and-one", 0, 17, 65, "full"),
    Case("long-rows", 0, 20, 3001, sparsity=0.5),
    Case("many-rows", 0, 1001, 70, sparsity=0.5),
]


@pytest.fixture(params=list(MOST_TOKENS))
def format(request, monkeypatch):
    """Every problem in this format, whatever index_format() would choose."""
    monkeypatch.setattr(rows, "index_format", lambda problem, lanes: request.param)
    yield request.param


def operands(t):
    return t.row_offsets, t.col_indices, t.values, *t.mask.shape, t.x


def with_tokens(case, M):
    return Case(case.name, M, case.N, case.K, case.mask_kind, case.sparsity)


@pytest.mark.parametrize("dtype", TYPES)
@pytest.mark.parametrize("case", SHAPES, ids=lambda case: case.name)
def test_products(case, dtype, format, nan_memory):
    for M in range(MOST_TOKENS[format] + 1):
        t = with_tokens(case, M).tensors(TYPES[dtype])
        got = few_tokens(*operands(t))
        assert got.dtype == TYPES[dtype] and got.shape == (M, case.N) and got.is_contiguous()
        error = relative_error(got, *exact(t)["spmm"])
        assert error <= TOLERANCE[TYPES[dtype]], (M, error)


@pytest.mark.parametrize("dtype", TYPES)
@pytest.mark.parametrize("bad", [torch.nan, torch.inf, -torch.inf])
def test_not_a_number_stays_where_it_belongs(dtype, bad, format):
    """In x it reaches the rows of W that have its column; in W its own row and no other."""
    for M in {min(m, MOST_TOKENS[format]) for m in (1, 2, 4, 8, 16)}:
        t = Case("nan", M, 90, 150).tensors(TYPES[dtype])
        t.x[:, [3, 70, 149]] = bad
        touched = t.mask[:, [3, 70, 149]].any(dim=1)
        y = few_tokens(*operands(t))
        assert not y[:, touched].isfinite().any()
        assert y[:, ~touched].isfinite().all()
        t = Case("nan", M, 90, 150).tensors(TYPES[dtype])
        t.values[::97] = bad
        rows = torch.repeat_interleave(torch.arange(90), t.row_offsets.diff())[::97]
        finite = few_tokens(*operands(t)).isfinite()
        assert not finite[:, rows].any()
        finite[:, rows] = True
        assert finite.all()


def test_explicit_zeros_meet_x(format):
    """A stored zero is a product like any other: 0 * inf is NaN."""
    M = min(2, MOST_TOKENS[format])
    t = Case("zeros", M, 40, 50).tensors()
    t.values.zero_()
    t.x[:, 7] = torch.inf
    y = few_tokens(*operands(t))
    assert y[:, t.mask[:, 7]].isnan().all()
    assert torch.equal(y[:, ~t.mask[:, 7]], torch.zeros(M, int((~t.mask[:, 7]).sum())))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64], ids=str)
@pytest.mark.parametrize("case", SHAPES, ids=lambda case: case.name)
def test_transposed_products(case, dtype, nan_memory):
    tolerance = TOLERANCE.get(dtype, 1e-14)
    for M in (0, 1, 2, 3, rows.MOST_TOKENS_T):
        t = with_tokens(case, M).tensors(dtype)
        arguments = (*operands(t)[:-1], t.dy)
        product, scale = exact(t)["spmm_t"]
        got = few_tokens_t(*arguments)
        assert got.dtype == dtype and got.shape == (M, case.K) and got.is_contiguous()
        assert relative_error(got, product, scale) <= tolerance
        bias = torch.randn(case.K).to(dtype)
        got = few_tokens_t(*arguments, bias)
        assert relative_error(got, product + bias, scale + bias.abs()) <= tolerance


def test_transposed_products_have_the_same_bits_whatever_the_threads():
    t = Case("bits", 3, 1500, 600, sparsity=0.3).tensors()  # in several parts
    results = []
    for threads in (1, 2, 3):
        torch.set_num_threads(threads)
        results.append(few_tokens_t(*operands(t)[:-1], t.dy))
    assert all(torch.equal(result, results[0]) for result in results[1:])


def test_an_infinity_in_dy_reaches_the_columns_of_its_row():
    t = Case("inf", 2, 40, 50).tensors()
    t.dy[:, 7] = torch.inf
    t.values[t.row_offsets[7]] = 0
    finite = few_tokens_t(*operands(t)[:-1], t.dy).isfinite()
    assert torch.equal(finite, ~t.mask[7].expand(2, -1))


def test_more_columns_than_16_bits_have_numbers():
    row_offsets, col_indices, values = random_csr(5, 70000, 0.99)
    for M in range(1, rows.MOST_TOKENS_WIDE + 1):
        x, dy = torch.randn(M, 70000), torch.randn(M, 5)
        w = written_out(row_offsets, col_indices, values, 5, 70000).double()
        y = few_tokens(row_offsets, col_indices, values, 5, 70000, x)
        torch.testing.assert_close(y, (x.double() @ w.T).float(), rtol=1e-5, atol=1e-4)
        dx = few_tokens_t(row_offsets, col_indices, values, 5, 70000, dy)
        torch.testing.assert_close(dx, (dy.double() @ w).float(), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("M", [1, 5])
def test_same_bits_whatever_the_threads(M, format):
    t = Case(
        "bits", min(M, MOST_TOKENS[format]), 1500, 600, sparsity=0.5
    ).tensors()  # enough non-zeros for all threads
    results = []
    for threads in (1, 2, 3, 2, 1):
        torch.set_num_threads(threads)
        results.append(few_tokens(*operands(t)))
    assert all(torch.equal(result, results[0]) for result in results[1:])


def test_changed_values_are_seen_however_they_changed(format):
    t = Case("values", min(3, MOST_TOKENS[format]), 60, 80).tensors()
    before = few_tokens(*operands(t))
    t.values.data.mul_(2)
    assert torch.equal(few_tokens(*operands(t)), 2 * before)


def expect_right(arguments):
    *w, x = arguments
    want = x @ written_out(*w).T
    torch.testing.assert_close(few_tokens(*arguments), want, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("mode", [nullcontext, torch.inference_mode])
def test_one_changed_column_is_seen(format, mode):
    """By its version; tensors of inference mode have none: each call reads all indices."""
    with mode():
        row_offsets = torch.arange(0, 5001, 10, dtype=torch.int32)
        col_indices = (torch.arange(5000, dtype=torch.int32) % 10) * 2
        arguments = (row_offsets, col_indices, torch.ones(5000), 500, 20, torch.randn(1, 20))
        for place in range(0, 5000, 333):
            expect_right(arguments)
            col_indices[place] += 1
        expect_right(arguments)


def test_pattern_replaced_behind_the_versions_is_seen(format):
    """Collectives and .data write into index buffers without touching their version counter."""
    row_offsets, col_indices, values = random_csr(60, 80, 0.5)
    other_rows, other_cols, _ = random_csr(60, 80, 0.5, seed=1)
    arguments = (row_offsets, col_indices, values, 60, 80, torch.randn(1, 80))
    expect_right(arguments)
    col_indices.data[: row_offsets[1]] = torch.arange(int(row_offsets[1]), dtype=torch.int32)
    expect_right(arguments)
    row_offsets.data.copy_(other_rows)
    col_indices.data.copy_(other_cols)
    expect_right(arguments)


def test_pattern_made_invalid_is_refused(format):
    row_offsets, col_indices, values = random_csr(60, 80, 0.5)
    arguments = (row_offsets, col_indices, values, 60, 80, torch.randn(1, 80))
    few_tokens(*arguments)
    good = int(col_indices[7])
    for bad in (80, -1, 2**31 - 1):
        col_indices[7] = bad
        with pytest.raises(ValueError, match="col_indices: expected"):
            few_tokens(*arguments)
    col_indices[7] = good
    expect_right(arguments)
    row_offsets.data[3] = 10**9
    with pytest.raises(ValueError, match="row_offsets: expected"):
        few_tokens(*arguments)


def test_bias(format):
    t = with_tokens(SHAPES[0], min(3, MOST_TOKENS[format])).tensors()
    bias = torch.randn(t.mask.shape[0])
    got = few_tokens(*operands(t), bias)
    assert torch.equal(got, few_tokens(*operands(t)) + bias)


def test_threads_of_the_caller_at_once(format):
    from concurrent.futures import ThreadPoolExecutor

    t = Case("shared", min(3, MOST_TOKENS[format]), 1000, 700).tensors()
    want = few_tokens(*operands(t))
    fresh = t._replace(col_indices=t.col_indices.clone())
    with ThreadPoolExecutor(4) as pool:
        runs = pool.map(lambda _: few_tokens(*operands(fresh)), range(32))
        assert all(torch.equal(got, want) for got in runs)


def test_the_table_takes_few_tokens(fresh_table):
    problem = Problem("spmm", "cpu", torch.float32, 1, 768, 768, 768 * 768 // 10)
    assert table.pick(problem).name == "few_tokens"
    many = dict(table.refusals(problem._replace(M=17)))
    assert many["few_tokens"] == "it serves up to 16 tokens, not 17"
    wide = problem._replace(K=65537, M=4)
    assert table.pick(wide).name == "few_tokens"
    many = dict(table.refusals(wide._replace(M=5)))
    assert many["few_tokens"] == "with K = 65537 it serves up to 4 tokens, not 5"
    assert (
        "not float64" in dict(table.refusals(problem._replace(dtype=torch.float64)))["few_tokens"]
    )


@pytest.mark.parametrize("lanes", [4, 8, 16])
@pytest.mark.parametrize("density", [0, 0.01, 0.2, 0.5, 1])
def test_formats_serve_what_they_are_chosen_for(lanes, density):
    for M in range(17):
        problem = Problem("spmm", "cpu", torch.float32, M, 100, 100, int(1e4 * density))
        assert M <= MOST_TOKENS[rows.index_format(problem, lanes)]


def test_x_that_does_not_fit_l1_goes_to_panel(monkeypatch, fresh_table):
    """On a machine that reads L2 slower than it multiplies, where rows are long enough."""
    problem = Problem("spmm", "cpu", torch.float32, 16, 2048, 2048, 2048 * 2048 // 2)
    here = rows.machine()._replace(lanes=16, l1_bytes=49152, l1_feeds=True)
    monkeypatch.setattr(rows, "machine", lambda: here)
    assert "does not fit L1" in rows._refuse(problem)
    assert table.pick(problem).name == "panel"
    for fits in ({"M": 8}, {"K": 768, "nnz": 2048 * 384}, {"nnz": 2048 * 100}):
        assert rows._refuse(problem._replace(**fits)) is None
    monkeypatch.setattr(rows, "machine", lambda: here._replace(l1_feeds=False))
    assert rows._refuse(problem) is None
