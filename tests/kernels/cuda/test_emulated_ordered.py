"""Free patterns in an order of their columns, without a GPU: the emulator's kernels around the
stand-in of tests/cuda/cusparselt.cpp."""

import threading
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from emulated_cusparselt import (  # noqa: F401
    REFUSED,
    WRONG,
    check,
    cusparselt_library,
    emulated_cuda,
    emulator,
    stand_in,
)
from infinities import check_stored

from sparsekern import SparseTensor
from sparsekern.kernels import derived
from sparsekern.kernels.cuda import algorithms, ordered
from sparsekern.kernels.problem import Problem
from sparsekern.kernels.table import pick, refusals

pytestmark = pytest.mark.usefixtures("stand_in", "fresh_table")
N, K, M = 96, 128, 96


def layer(n=N, k=K, density=0.08):
    """(W, w, mask); a stored value is 0."""
    mask = torch.rand(n, k) < density
    mask[0, :3] = mask[:3, 0] = True  # not two-way
    return of_mask(mask)


def of_mask(mask):
    w = torch.randn(mask.shape).bfloat16() * mask
    w[tuple(mask.nonzero()[3])] = 0
    return SparseTensor.from_dense(w, mask), w, mask


def problem(W, op="spmm", m=M, dtype=None):
    asked = Problem(op, "cuda", dtype or W.values.dtype, m, *W.shape, W.nnz)
    return ordered.recognised(asked, W.row_offsets, W.col_indices)


def product(W, x, bias=None, op="spmm"):
    row = pick(problem(W, op, x.shape[0]))
    assert row.name == "ordered"
    return row.run(W.row_offsets, W.col_indices, W.values, *W.shape, x, bias)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("n, k, m", [(16, 48, 72), (N, K, M), (1040, 64, 72)])
def test_forward_and_input_gradient_follow_values_and_bias(n, k, m, dtype, nan_memory):
    W, w, _ = layer(n, k, 0.02 if n > 1000 else 0.08)
    x, dy = torch.randn(m, k).to(dtype), torch.randn(m, n).to(dtype)
    bias, bias_t = torch.randn(n).to(dtype), torch.randn(k).to(dtype)
    W, w = W.to(dtype), w.to(dtype)
    for scale in (1, 2):
        W.values.mul_(scale), bias.mul_(scale)
        w = w * scale
        check(product(W, x, bias), x, w, bias)
        check(product(W, x), x, w)
        check(product(W, dy, op="spmm_t"), dy, w.T)
        check(product(W, dy, bias_t, op="spmm_t"), dy, w.T, bias_t)
    shifted = torch.randn(m * k + 1).to(dtype)[1:].view(m, k)  # not on a multiple of 16 bytes
    check(product(W, shifted), shifted, w)


def test_a_tall_matrix_is_cut_into_panels(nan_memory, monkeypatch):
    monkeypatch.setattr(ordered, "MOST_WIDTH", 1.5)
    W, w, mask = layer(400, 64, 0.2)
    side = ordered._side_of("spmm", W.row_offsets, W.col_indices, *W.shape)
    assert len(side.panels) > 1 and sum(panel.rows for panel in side.panels) == 400
    x, bias = torch.randn(M, 64).bfloat16(), torch.randn(400).bfloat16()
    x[5, 3] = torch.inf
    check_stored(product(W, x, bias), x, w, mask, bias)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_infinities_reach_what_a_stored_value_connects(dtype, nan_memory):
    mask = torch.rand(N, K) < 0.08
    mask[0, :3] = mask[:3, 0] = True
    mask[:, 7] = mask[5] = False
    W, w, mask = of_mask(mask)
    W, w = W.to(dtype), w.to(dtype)
    x, dy = torch.randn(M, K).to(dtype), torch.randn(M, N).to(dtype)
    for token in range(0, M, 3):
        bad = (torch.inf, -torch.inf, torch.nan)[token % 9 // 3]
        x[token, (5 * token) % K] = dy[token, (5 * token) % N] = bad
    x[1, 7] = dy[1, 5] = torch.inf  # nothing is stored there
    bias = torch.randn(N).to(dtype)
    check_stored(product(W, x, bias), x, w, mask, bias)
    check_stored(product(W, x), x, w, mask)
    check_stored(product(W, dy, op="spmm_t"), dy, w.T.contiguous(), mask.T.contiguous())


def test_a_pattern_that_changes_has_another_order():
    W, w, mask = layer()
    x = torch.randn(M, K).bfloat16()
    check(product(W, x), x, w)
    moved = mask.roll(1, 1)  # as many in each row
    moved_w = torch.randn(N, K).bfloat16() * moved
    V = SparseTensor.from_dense(moved_w, moved)
    W.col_indices.copy_(V.col_indices)
    W.values.copy_(V.values)
    check(product(W, x), x, moved_w)


def test_threads_may_meet_a_pattern_at_once():
    """Each may seek the order, and multiplies by a handle of its own; so after a change."""
    W, w, mask = layer()
    moved = mask.roll(1, 1)
    moved_w = torch.randn(N, K).bfloat16() * moved
    together = threading.Barrier(4)

    def multiply(i, w):
        x, dy = torch.randn(M + 8 * i, K).bfloat16(), torch.randn(M, N).bfloat16()
        together.wait()
        for op, operand, dense in (("spmm", x, w), ("spmm_t", dy, w.T))[:: 1 - 2 * (i % 2)]:
            check(product(W, operand, op=op), operand, dense)

    with ThreadPoolExecutor(4) as pool:
        list(pool.map(multiply, range(4), [w] * 4))
        V = SparseTensor.from_dense(moved_w, moved)
        W.col_indices.copy_(V.col_indices)
        W.values.copy_(V.values)
        list(pool.map(multiply, range(4), [moved_w] * 4))


def test_no_order_is_sought_of_a_pattern_that_will_change_soon():
    W, *_ = layer()
    derived.note_passing(W.row_offsets, True)
    assert not problem(W).is_ordered and "will change the pattern soon" in reason(W)
    derived.note_passing(W.row_offsets, False)
    assert problem(W).is_ordered


def test_no_order_is_sought_where_another_row_is_forced(monkeypatch):
    W, *_ = layer()
    with monkeypatch.context() as without:
        without.setattr(ordered, "_order", None)
        without.setenv("SPARSEKERN_KERNEL", "expand")
        asked = problem(W)
        assert not asked.is_ordered and pick(asked).name == "expand"
    monkeypatch.setenv("SPARSEKERN_KERNEL", "ordered")
    assert problem(W).is_ordered


@pytest.mark.parametrize("op", ["spmm", "spmm_t"])
def test_without_a_right_algorithm_w_is_written_out(op, stand_in):  # noqa: F811
    for number in algorithms.CANDIDATES[torch.bfloat16]:
        stand_in.algorithm(number, (REFUSED, WRONG)[number % 2])
    W, w, _ = layer()
    x = torch.randn(M, K if op == "spmm" else N).bfloat16()
    with pytest.warns(UserWarning, match="no algorithm multiplies .* right"):
        check(product(W, x, op=op), x, w if op == "spmm" else w.T)


def test_a_capture_wants_the_order_to_be_there(stand_in):  # noqa: F811
    W, w, _ = layer()
    x, bias = torch.randn(M, K).bfloat16(), torch.randn(N).bfloat16()
    product(W, x, bias)  # the warm-up
    stand_in.is_capturing = True
    check(product(W, x, bias), x, w, bias)


def reason(W, **asked):
    return dict(refusals(problem(W, **asked)))["ordered"]


def test_refusals_say_why(monkeypatch):
    W, *_ = layer()
    assert "it takes bfloat16 and float16" in reason(W, dtype=torch.float32)
    assert "as fast at 64 tokens" in reason(W, m=64) and "multiples" in reason(W, m=76)
    with monkeypatch.context() as larger:
        larger.setattr(ordered, "_least_size", lambda m, dtype: 48)
        ordered.refuse_size.cache_clear()
        dense, *_ = layer(density=0.4)
        assert "an order of so many values serves 32 rows, and pays from 48 on" in reason(dense)
    ordered.refuse_size.cache_clear()
    full = torch.zeros(N, K, dtype=torch.bool)
    full[:, : K // 2 + 16] = True  # a group holds two of them
    assert "no order of the columns was found" in reason(of_mask(full)[0])
    monkeypatch.setattr(ordered, "_C", None)
    assert "the C++ library, which finds the order, is not built" in reason(W)


def test_a_matrix_without_values(nan_memory):
    """It is two-way, but not for these rows."""
    mask = torch.zeros(N, K, dtype=torch.bool)
    W = SparseTensor.from_dense(mask.bfloat16(), mask)
    bias = torch.randn(N).bfloat16()
    y = ordered.spmm(
        W.row_offsets, W.col_indices, W.values, N, K, torch.ones(M, K).bfloat16(), bias
    )
    assert torch.equal(y, bias.expand(M, N))
    y = ordered.spmm_t(W.row_offsets, W.col_indices, W.values, N, K, torch.ones(M, N).bfloat16())
    assert torch.equal(y, torch.zeros(M, K).bfloat16())
