"""Tokens that are cut into parts."""

import pytest
import torch

from sparsekern.kernels import table
from sparsekern.kernels.cpu import few_tokens, panel, split
from sparsekern.kernels.problem import Problem
from sparsekern.testing import Case, exact, relative_error

pytestmark = pytest.mark.skipif(panel._C is None, reason="the C++ library is not built")


@pytest.fixture
def on_avx512(monkeypatch, fresh_table):
    """The choices of a machine with 16 lanes and an L1 of 48 KiB, whatever runs here."""
    here = few_tokens.machine()._replace(lanes=16, l1_bytes=49152)
    monkeypatch.setattr(few_tokens, "machine", lambda: here)
    monkeypatch.setattr(split.panel._C, "lanes", lambda: 16)
    monkeypatch.setattr(panel, "_refuse_panel", lambda problem: None)


def test_parts():
    assert [split.parts(m) for m in (1, 16, 25, 32, 49, 64, 97, 128, 225, 256)] == [
        (m,) for m in (1, 16, 25, 32, 49, 64, 97, 128, 225, 256)
    ]
    assert split.parts(17) == (16, 1) and split.parts(48) == (32, 16)
    assert split.parts(20) == (16, 4) and split.parts(20, is_fed=True) == (20,)
    assert split.parts(147, is_fed=True) == (128, 19) and split.parts(50, is_fed=True) == (50,)
    assert split.parts(83) == (64, 16, 3) and split.parts(129) == (128, 1)
    assert split.parts(224) == (128, 64, 32) and split.parts(1 + 2**20) == (2**20, 1)
    for m in range(700):
        assert sum(split.parts(m)) == m and 0 not in split.parts(m)[1:]


@pytest.mark.parametrize("M", [17, 24, 41, 83, 129, 300])
def test_products(M, on_avx512, nan_memory):
    t = Case("split", M, 90, 150, sparsity=0.6).tensors()
    operands = t.row_offsets, t.col_indices, t.values, *t.mask.shape, t.x
    product, scale = exact(t)["spmm"]
    row = split.KERNELS[0]
    assert relative_error(row.run(*operands), product, scale) <= 2e-6
    bias = torch.randn(90)
    got = row.run(*operands, bias)
    assert relative_error(got, product + bias, scale + bias.abs()) <= 2e-6


def test_the_table_cuts_what_a_tile_leaves_over(on_avx512):
    problem = Problem("spmm", "cpu", torch.float32, 65, 768, 768, 768 * 768 // 4)
    row = table.pick(problem)
    assert row.name == "split"
    assert row.plan(problem) == "64 tokens by panel, 1 tokens by few_tokens"
    assert table.pick(problem._replace(M=64)).name == "panel"
    wide = problem._replace(K=2**17, M=70)
    assert row.plan(wide) == "64 tokens by panel, 6 tokens by panel"
    assert table.pick(problem._replace(M=few_tokens.MOST_TOKENS)).name == "few_tokens"
    assert "not float64" in dict(table.refusals(problem._replace(dtype=torch.float64)))["split"]
