"""The three products of a training step in the GPU's benchmark, without a GPU."""

from contextlib import nullcontext
from dataclasses import replace
from functools import partial

import pytest
import torch
from test_bench_gpu import CallingClock

from sparsekern import SparseTensor
from sparsekern.bench import measure_gpu
from sparsekern.bench import train_products_gpu as products
from sparsekern.bench.rates import case_name, derive
from sparsekern.kernels.cuda import two_of_four
from sparsekern.testing import frobenius_error

SIZES = products.Sizes(((32, 16), (16, 32)), 8, ())
TWO_WAY = f"{products.NAME} 75% two-way"


@pytest.fixture(autouse=True)
def one_blas(monkeypatch):
    monkeypatch.setattr(measure_gpu, "blas", lambda library: nullcontext())


def made(clock=None, sizes=SIZES) -> list[dict]:
    generator = torch.Generator().manual_seed(0)
    return [derive(case) for case in products.cases(sizes, clock or CallingClock(), generator)]


def test_every_product_of_all_masks_is_raced():
    clock = CallingClock(**{"F.linear cublaslt": 0.8, TWO_WAY: 0.5})
    cases = made(clock)
    assert [case_name(case) for case in cases[:3]] == [
        "spmm 32x16-M8-75%-GPU-bfloat16-cold",
        "spmm 32x16-M8-75%-GPU-bfloat16-two-way-cold",
        "spmm 32x16-M8-90%-GPU-bfloat16-cold",
    ]
    assert [c["op"] for c in cases] == [op for _ in range(2) for op in products.OPS for _ in "123"]
    assert len(cases) == SIZES.count
    for case in cases:
        ways = case["ways"]
        assert {way["kind"] for way in ways.values()} == {"dense", "other", "ours"}
        assert ways["sparsekern"]["is_right"] and case["nnz"] < 0.5 * 32 * 16
        assert all(way["is_right"] for way in ways.values() if way["kind"] == "dense")
        assert ways["sparsekern"]["median_s"] == (0.5 if case["mask"] == "two-way" else 1.0)
    assert cases[0]["speedup"] == 0.8 and cases[1]["speedup"] == 1.6
    assert cases[0]["kernel"] == "expand"
    eight = cases[0]["ways"][products.FP8]
    assert eight["kind"] == "other" and (eight.get("failed") or 0.01 < eight["error"] < 0.1)


def test_a_product_that_is_wrong_is_marked(monkeypatch):
    right = products.ops.sddmm
    monkeypatch.setattr(products.ops, "sddmm", lambda *operands: 1.01 * right(*operands))
    for case in made():
        assert case["ways"]["sparsekern"]["is_right"] == (case["op"] != "sddmm")


def test_fp8_is_the_product_in_few_bits():
    t = torch.randn(5, 7, dtype=torch.bfloat16)
    eight, scale = products.in_fp8(t.t())
    assert eight.shape == (7, 5) and eight.is_contiguous() and eight.itemsize == 1
    assert frobenius_error(eight.float() * scale, t.t().double()) < 0.04


def test_what_is_written_out_is_right_and_its_bytes_are_counted(monkeypatch):
    n, k = 16, 32
    made_of: list[SparseTensor] = []

    def fill(bitmap, values, tail, operand, n, k, transposed=False):
        w = made_of[0].to_dense().t() if transposed else made_of[0].to_dense()
        operand[: n * k // 2] = w[two_of_four.with_free_places(w.bool())]

    monkeypatch.setattr(products.cuda_library, "refusal", lambda: None)
    for name, function in (
        ("write_out", lambda *_: made_of[0].to_dense()),
        ("collect", lambda bitmap, w, nnz: w[w != 0]),
        ("fill", fill),
        ("fill_transposed", partial(fill, transposed=True)),
    ):
        monkeypatch.setattr(products.bitmaps, name, function)
    make = products.SparseTensor.from_dense
    monkeypatch.setattr(
        products.SparseTensor, "from_dense", lambda *a: made_of.append(make(*a)) or made_of[-1]
    )
    cases = made(sizes=replace(SIZES, shapes=(), write_outs=((n, k),)))
    assert [case["op"] for case in cases] == ["write_out", "collect", "fill", "fill_transposed"]
    for case in cases:
        (way,) = case["ways"].values()
        assert way["is_right"] and way["error"] == 0
        values, dense, tail = 2 * case["nnz"], 2 * n * k, n * k // 8
        other = dense if case["op"] in ("write_out", "collect") else dense // 2 + 2 * tail
        assert way["bytes"] == 12 * n + values + other
