"""The C++ kernels: every row of the table on every awkward problem, and what they promise beside
the numbers: the same bits whatever the threads, no stale pattern, memory that goes away."""

import gc
import os
import subprocess
import sys

import pytest
import torch
from conftest import products, written_out

import sparsekern
from sparsekern.kernels import derived, table
from sparsekern.kernels.cpu import dense_product
from sparsekern.kernels.cpu import panel as cpu
from sparsekern.kernels.cpu.machine import machine, rates, rates_in_words
from sparsekern.kernels.cpu.plan import dense_wins_above
from sparsekern.kernels.problem import problem_of
from sparsekern.testing import PROBLEMS, Case, exact, random_csr, relative_error

pytestmark = pytest.mark.skipif(cpu._C is None, reason="the C++ library is not built")

panel = cpu.KERNELS[0].run
TYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float64": torch.float64}
# The unit roundoff, times what a sum of a few hundred terms adds for float32. A bfloat16 result is
# rounded once, from a float32 sum.
TOLERANCE = {torch.float32: 2e-6, torch.bfloat16: 2**-8, torch.float64: 1e-14}
MANY_BLOCKS = Case("many-blocks", 300, 1500, 1300, sparsity=0.6)


@pytest.fixture(params=[1, 2], ids=["1-thread", "2-threads"])
def threads(request):
    torch.set_num_threads(request.param)


@pytest.mark.parametrize("dtype", TYPES)
@pytest.mark.parametrize("case", (*PROBLEMS, MANY_BLOCKS), ids=lambda case: case.name)
def test_products(case, dtype, threads, nan_memory):
    t = case.tensors(TYPES[dtype])
    want = exact(t)
    for kernel in cpu.KERNELS:
        got = kernel.run(*products(t)[kernel.op])
        assert got.dtype == TYPES[dtype] and got.is_contiguous()
        error = relative_error(got, *want[kernel.op])
        assert error <= TOLERANCE[TYPES[dtype]], (kernel.op, kernel.name, error)


@pytest.mark.parametrize("dtype", TYPES)
@pytest.mark.parametrize("M", [1, 20, 300])
def test_bias(M, dtype, nan_memory):
    t = Case("bias", M, 700, 300, sparsity=0.6).tensors(TYPES[dtype])
    want = exact(t)
    for kernel in cpu.KERNELS:
        if kernel.op == "sddmm":
            continue
        product, scale = want[kernel.op]
        bias = torch.randn(product.shape[1]).to(TYPES[dtype])
        got = kernel.run(*products(t)[kernel.op], bias)
        error = relative_error(got, product + bias.double(), scale + bias.double().abs())
        assert error <= TOLERANCE[TYPES[dtype]], (kernel.op, kernel.name)


@pytest.mark.parametrize("M", [2, 15, 16, 17, 31, 33, 63, 65, 95, 97, 127, 129, 200, 257])
def test_every_number_of_tokens(M, nan_memory):
    t = Case("tokens", M, 70, 50).tensors()
    want = exact(t)
    for kernel in cpu.KERNELS:
        got = kernel.run(*products(t)[kernel.op])
        assert relative_error(got, *want[kernel.op]) <= 2e-6, (kernel.op, kernel.name)


def test_unknown_instruction_set():
    env = {**os.environ, "SPARSEKERN_ISA": "sse9"}
    probe = "from sparsekern import _C; _C.isa()"
    run = subprocess.run([sys.executable, "-c", probe], env=env, capture_output=True, text=True)
    assert "ValueError: SPARSEKERN_ISA: expected one of portable" in run.stderr
    assert "got 'sse9'" in run.stderr


@pytest.mark.parametrize("M", [5, 300])
def test_same_bits_whatever_the_threads(M):
    t = Case("bits", M, 700, 600).tensors()
    results = []
    for threads in (1, 2, 3, 2, 1):
        torch.set_num_threads(threads)
        results.append([kernel.run(*products(t)[kernel.op]) for kernel in cpu.KERNELS[:3]])
    for result in results[1:]:
        assert all(map(torch.equal, result, results[0]))


@pytest.mark.parametrize("M", [16, 300])
def test_not_a_number_stays_where_it_belongs(M):
    """A NaN or infinity in x reaches only the rows of W that have its column."""
    t = Case("nan", M, 90, 70).tensors()
    t.x[:, 3] = torch.nan
    t.x[:, 4] = torch.inf
    y = panel(*products(t)["spmm"])
    touched = t.mask[:, 3] | t.mask[:, 4]
    assert not y[:, touched].isfinite().any()
    assert y[:, ~touched].isfinite().all()


def test_bfloat16_rounds_to_nearest_even_and_keeps_nan():
    x = torch.tensor([1.0, 1 + 2**-8, 1 + 3 * 2**-8, 3.4e38, float("nan"), -0.0, 1e-40])
    w = torch.eye(1, dtype=torch.bfloat16).expand(40, 1).contiguous()
    ones = sparsekern.SparseTensor.from_dense(w)
    y = sparsekern.linear(x[:, None].bfloat16(), ones)
    assert torch.equal(y.nan_to_num(7), x[:, None].bfloat16().expand(7, 40).nan_to_num(7))
    # A sum that ends between two bfloat16: 1 + 2^-8 goes to the even neighbour, 1.
    pair = sparsekern.SparseTensor.from_dense(torch.ones(9, 2, dtype=torch.bfloat16))
    y = sparsekern.linear(torch.tensor([[1.0, 2**-8]] * 40).bfloat16(), pair)
    assert torch.equal(y, torch.ones(40, 9).bfloat16())


def test_changed_values_are_seen_however_they_changed():
    row_offsets, col_indices, values = random_csr(60, 80, 0.5)
    x = torch.randn(100, 80)
    arguments = (row_offsets, col_indices, values, 60, 80, x)
    before = panel(*arguments)
    values.data.mul_(2)  # in a way that autograd's version counter does not notice
    assert torch.allclose(panel(*arguments), 2 * before)


def test_changed_pattern_is_seen_however_it_changed():
    """Collectives write into index buffers without touching their version counter."""
    row_offsets, col_indices, values = random_csr(60, 80, 0.5)
    x, dy = torch.randn(100, 80), torch.randn(100, 60)
    other_rows, other_cols, _ = random_csr(60, 80, 0.5, seed=1)
    for _ in range(2):
        for op, arguments in {
            "spmm": (row_offsets, col_indices, values, 60, 80, x),
            "spmm_t": (row_offsets, col_indices, values, 60, 80, dy),
            "sddmm": (row_offsets, col_indices, 60, 80, dy, x),
        }.items():
            panel = next(row.run for row in cpu.KERNELS if (row.op, row.name) == (op, "panel"))
            w = written_out(row_offsets, col_indices, values, 60, 80)
            want = {"spmm": x @ w.T, "spmm_t": dy @ w, "sddmm": (dy.T @ x)[w != 0]}[op]
            torch.testing.assert_close(panel(*arguments), want, rtol=1e-4, atol=1e-4)
        row_offsets.data.copy_(other_rows)
        col_indices.data.copy_(other_cols)


def test_pattern_made_invalid_is_refused():
    row_offsets, col_indices, values = random_csr(60, 80, 0.5)
    x = torch.randn(100, 80)
    panel(row_offsets, col_indices, values, 60, 80, x)
    col_indices[7] = 80
    with pytest.raises(ValueError, match="col_indices: expected"):
        panel(row_offsets, col_indices, values, 60, 80, x)


def test_one_changed_column_changes_the_fingerprint():
    """Every single place of the indices counts."""
    row_offsets = torch.arange(0, 501, 10, dtype=torch.int32)
    col_indices = (torch.arange(500, dtype=torch.int32) % 10) * 2
    values, x = torch.ones(500), torch.randn(100, 20)
    for place in range(0, 500, 7):
        before = panel(row_offsets, col_indices, values, 50, 20, x)
        col_indices[place] += 1
        after = panel(row_offsets, col_indices, values, 50, 20, x)
        changed = (before != after).any(dim=0).nonzero().flatten().tolist()
        assert changed == [place // 10]


def test_patterns_go_with_their_tensors():
    gc.collect()
    kept = len(derived._store)
    w = sparsekern.SparseTensor.from_dense(torch.randn(50, 60))
    sparsekern.linear(torch.randn(100, 60), w)
    assert len(derived._store) == kept + 1
    del w
    gc.collect()
    assert len(derived._store) == kept


def test_two_threads_of_the_caller_at_once():
    """The GIL is released, and two calls on one pattern do not disturb each other."""
    from concurrent.futures import ThreadPoolExecutor

    t = Case("shared", 200, 300, 400).tensors()
    want = panel(*products(t)["spmm"])
    fresh = t._replace(col_indices=t.col_indices.clone())
    with ThreadPoolExecutor(4) as pool:
        runs = pool.map(lambda _: panel(*products(fresh)["spmm"]), range(32))
        assert all(torch.equal(got, want) for got in runs)


def test_the_table_leaves_to_torch_what_torch_does_faster(fresh_table):
    problem = table.Problem("spmm", "cpu", torch.float32, 1024, 768, 768, 768 * 768 // 4)
    assert table.pick(problem).name == "panel"
    nearly_full = problem._replace(nnz=768 * 768 * 9 // 10)
    assert table.pick(nearly_full).name == "expand"
    limit = f"a dense product is faster above density {dense_wins_above(problem, machine()):.2f}"
    assert limit in dict(table.refusals(nearly_full))["panel"]
    in_bf16 = nearly_full._replace(dtype=torch.bfloat16)
    assert "torch.mm; a dense layer is faster" in table.describe(in_bf16, table.pick(in_bf16))
    assert table.pick(nearly_full._replace(M=28)).name == "panel"
    assert table.pick(problem._replace(dtype=torch.float64)).name == "panel"
    assert table.pick(problem._replace(dtype=torch.float16)).name == "widened"


@pytest.mark.parametrize("operands", ["plain", "transposed"])
@pytest.mark.parametrize("K", [1, 192, 193, 700])
def test_both_dense_products_of_expand(K, operands, monkeypatch):
    """torch.mm and oneDNN, whichever is the faster one here, with and without a bias, and in
    float32 whatever autocast says."""
    generator = torch.Generator().manual_seed(0)
    a, b = (torch.randn(s, generator=generator) for s in ((20, K), (K, 30)))
    if operands == "transposed":
        a, b = a.t().contiguous().t(), b.t().contiguous().t()
    bias = torch.randn(30, generator=generator)
    for name in ("torch.mm", "oneDNN"):
        monkeypatch.setattr(dense_product, "library", lambda dtype, name=name: name)
        for each in (None, bias):
            with torch.autocast("cpu", torch.bfloat16):
                got = dense_product.product(a, b, each)
            want = a.double() @ b.double() + (0 if each is None else each.double())
            scale = a.abs().double() @ b.abs().double() + bias.abs().double()
            assert got.dtype == torch.float32
            assert relative_error(got, want, scale) < TOLERANCE[torch.float32]


def test_expand_takes_onednn_where_it_is_clearly_faster(monkeypatch):
    for onednn, name in ((None, "torch.mm"), (1.1e11, "torch.mm"), (2e11, "oneDNN")):
        monkeypatch.setattr(dense_product, "rates", lambda r=onednn: dense_product.Rates(1e11, r))
        assert dense_product.library(torch.float32) == name
        assert dense_product.library(torch.bfloat16) == "torch.mm"


def test_dense_products_are_measured_on_one_thread(monkeypatch):
    """Two that wait for each other beside other work would make equal processes differ."""
    seen = set()

    def multiply(a, b, bias=None):
        assert a.is_cpu and b.is_cpu
        seen.add(torch.get_num_threads())

    monkeypatch.setattr(dense_product, "mm", multiply)
    monkeypatch.setattr(dense_product, "_onednn", multiply)
    torch.set_num_threads(2)
    with torch.device("meta"):
        found = dense_product.rates.__wrapped__()
        assert rates.__wrapped__().l1 > 0
    assert seen == {1} and torch.get_num_threads() == 2
    assert "a core" in dense_product.rates_in_words(found)


def test_subnormal_numbers_count_as_zeros_in_dot_products_alone():
    t = Case("subnormal", 64, 40, 50).tensors(torch.bfloat16)
    dy, x = torch.full_like(t.dy, 1e-39), torch.full_like(t.x, 1)
    w = t.row_offsets, t.col_indices
    dvalues = cpu._bind_sddmm(problem_of("sddmm", *w, 40, 50, dy, x))(*w, 40, 50, dy, x)
    assert bool((dvalues == 0).all()) == machine().has_dots
    dx = cpu.bind_spmm(problem_of("spmm_t", *w, t.values, 40, 50, dy))(*w, t.values, 40, 50, dy)
    assert bool((dx == 0).all()) == (machine().has_pairs and cpu._C.has_bf16_dots())
    wide = t.values.float(), 40, 50, dy.float()
    dx = cpu.bind_spmm(problem_of("spmm_t", *w, *wide))(*w, *wide)
    assert (dx != 0).any()


def test_results_of_huge_pages(nan_memory):
    """The system is asked for them where a result has room for one of 2 MiB."""
    t = Case("large", 1100, 1000, 1000, sparsity=0.99).tensors()
    want = exact(t)
    for kernel in cpu.KERNELS[:2]:
        got = kernel.run(*products(t)[kernel.op])
        assert relative_error(got, *want[kernel.op]) <= 2e-6, kernel.op


def test_rates_of_this_machine():
    found = rates()
    assert found.registers > 0 and found.l1 > 0 and found.l2 > 0 and found.pairs > 0
    assert (found.dots is not None) == cpu._C.has_bf16_dots()
    assert "GFLOP/s a core" in rates_in_words(found)
