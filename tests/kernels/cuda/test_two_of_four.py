"""Two-way patterns on sparse tensor cores: what is known of a pattern; on a GPU, the products."""

import pytest
import torch
from captured_layer import check_captured_step
from emulated_cuda import emulated_cuda, emulator  # noqa: F401
from infinities import check_stored

from sparsekern import SparseTensor, explain, linear
from sparsekern.kernels import crossover
from sparsekern.kernels.crossover import least_size
from sparsekern.kernels.cuda import algorithms, cusparselt, two_of_four
from sparsekern.kernels.cuda import bitmap as bitmaps
from sparsekern.kernels.table import forget_choices
from sparsekern.testing import relative_error

TOLERANCE = {torch.bfloat16: 2**-8, torch.float16: 2**-11}  # one rounding of the result


@pytest.fixture(autouse=True)
def from_small_sizes_on(monkeypatch):
    """Smaller ones than where it pays."""
    monkeypatch.setattr(two_of_four, "_least_size", lambda m, dtype: 1024 if m >= 1024 else None)
    forget_choices()
    yield
    forget_choices()


def two_way(n: int, k: int, share: float = 0.3324) -> torch.Tensor:
    """A mask that is drawn block by block until it is legal: at most two of four both ways."""
    blocks = torch.zeros(n // 4 * k // 4, 4, 4, dtype=torch.bool)
    todo = torch.arange(len(blocks))
    while len(todo):
        drawn = torch.rand(len(todo), 4, 4) < share
        is_legal = (drawn.sum(1) <= 2).all(1) & (drawn.sum(2) <= 2).all(1)
        blocks[todo[is_legal]] = drawn[is_legal]
        todo = todo[~is_legal]
    return blocks.view(n // 4, k // 4, 4, 4).permute(0, 2, 1, 3).reshape(n, k)


def bitmap_of(mask):
    W = SparseTensor.from_dense(mask.float(), mask)
    return bitmaps.make_bitmap(W.row_offsets, W.col_indices, *mask.shape)


@pytest.mark.parametrize("n, k", [(4, 4), (8, 64), (12, 68), (7, 130), (64, 256)])
def test_two_way_is_at_most_two_of_four_in_rows_and_columns(n, k):
    mask = two_way(-(-n // 4) * 4, -(-k // 4) * 4)[:n, :k]
    assert bitmaps.is_two_way(bitmap_of(mask))
    for _ in range(20):
        row, col = int(torch.randint(n, ())), int(torch.randint(k, ()))
        other = mask.clone()
        other[row, col] = True
        is_legal = other[row, col // 4 * 4 : col // 4 * 4 + 4].sum() <= 2
        is_legal &= other[row // 4 * 4 : row // 4 * 4 + 4, col].sum() <= 2
        assert bitmaps.is_two_way(bitmap_of(other)) == bool(is_legal)
    assert bitmaps.is_two_way(bitmap_of(torch.zeros(n, k, dtype=torch.bool)))


def test_free_places_and_the_rows_that_hold_all_columns():
    stored = two_way(64, 128)
    two = two_of_four.with_free_places(stored)
    assert (two.view(64, 32, 4).sum(-1) == 2).all() and (two | ~stored).all()
    empty = ~stored.view(64, 32, 4).any(-1)
    assert two.view(64, 32, 4)[empty].tolist() == [[True, True, False, False]] * int(empty.sum())
    checked = two_of_four.rows_of_all_columns(two)
    assert torch.equal(two[:checked].any(0), two.any(0))
    assert not torch.equal(two[: checked - 1].any(0), two.any(0))
    assert two_of_four.rows_of_all_columns(torch.zeros(3, 8, dtype=torch.bool)) == 0


def test_on_a_cpu_nothing_is_said_of_sparse_tensor_cores():
    mask = two_way(1024, 1024)
    x, W = torch.randn(8, 1024), SparseTensor.from_dense(mask.float(), mask)
    assert "two_of_four" not in explain(x, W)


@pytest.mark.usefixtures("emulated_cuda")
def test_a_pattern_has_one_bitmap(monkeypatch):
    mask = two_way(64, 128)
    W = SparseTensor.from_dense(torch.randn(64, 128).bfloat16() * mask, mask)
    made = []

    def compress(two):
        made.append(two)
        return two.new_zeros(two.numel() * 9 // 8, dtype=torch.uint8)

    monkeypatch.setattr(two_of_four.cusparselt, "compress", compress)
    indices = W.row_offsets, W.col_indices, 64, 128
    pattern = two_of_four._pattern(*indices)
    assert pattern.bitmap is bitmaps.bitmap_of(*indices)
    assert torch.equal(made[0].bool(), two_of_four.with_free_places(mask))
    assert torch.equal(made[1].bool(), two_of_four.with_free_places(mask.T))
    W.col_indices.copy_(W.col_indices.clone())  # counted: all of it is made anew
    assert two_of_four._pattern(*indices).bitmap is bitmaps.bitmap_of(*indices)
    free = SparseTensor.from_dense(torch.ones(64, 128).bfloat16())
    assert two_of_four._pattern(free.row_offsets, free.col_indices, 64, 128) is None


ROWS = "two_of_four", "two_of_four packed", "ordered"


@pytest.mark.parametrize("row", ROWS)
def test_a_size_of_bfloat16_says_nothing_of_float16(row, monkeypatch):
    data = {"bfloat16": [[8, 64], [16, 32]], "float16": [[8, None], [64, 128]]}
    monkeypatch.setattr(crossover, "_least_sizes", lambda: {row: {"sm_90": data}})

    def found(dtype):
        return [least_size("sm_90", dtype, m, row) for m in (7, 8, 16, 64, 8192)]

    assert found(torch.bfloat16) == [None, 64, 32, 32, 32]
    assert found(torch.float16) == [None, None, None, 128, 128]
    del data["float16"]
    assert found(torch.float16) == 5 * [None]


def test_the_shipped_least_sizes_are_sound():
    data = crossover._least_sizes()
    assert {*data} == {*ROWS}
    for entry in (entry for machines in data.values() for entry in machines.values()):
        assert entry["measured"].keys() == entry.keys() - {"measured"}
        for dtype in entry["measured"]:
            assert getattr(torch, dtype) in TOLERANCE
            tokens, sizes = zip(*entry[dtype], strict=True)
            assert [*tokens] == sorted({*tokens}) and all(s is None or s > 0 for s in sizes)


def test_no_algorithm_is_tried_that_may_end_the_process():
    """In float16 5 was the last that was begun before one did."""
    assert not {5} & {*algorithms.CANDIDATES[torch.float16]}
    for found in algorithms.CANDIDATES.values():
        assert [*found] == sorted({*found}) and {*found} <= {*range(26)}


@pytest.mark.parametrize("op", ["spmm", "spmm_t"])
def test_without_a_right_algorithm_w_is_written_out(op, monkeypatch):
    monkeypatch.setattr(two_of_four, "_pattern", lambda *_: two_of_four)
    monkeypatch.setattr(two_of_four, "algorithm_of", lambda *_: algorithms.NONE_RIGHT)
    monkeypatch.setattr(two_of_four.expand, op, lambda *operands: operands)
    operands = [torch.zeros(1)] * 3 + [1024, 2048, torch.zeros(1, 1), None]
    assert getattr(two_of_four, op)(*operands) == tuple(operands)


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("n, k, m", [(1024, 1024, 1024), (1040, 2064, 1032), (3072, 1088, 2048)])
def test_products(n, k, m, dtype):
    mask = two_way(n, k).cuda()
    w = torch.randn(n, k, device="cuda").to(dtype) * mask
    w[mask.nonzero().T.tolist()[0][0], mask.nonzero().T.tolist()[1][0]] = 0  # stored
    W = SparseTensor.from_dense(w, mask)
    W.values.requires_grad_()
    x = torch.randn(m, k, device="cuda").to(dtype).requires_grad_()
    bias = torch.randn(n, device="cuda").to(dtype).requires_grad_()
    assert explain(x, W).count("-> two_of_four") == 2
    y = linear(x, W, bias)
    dy = torch.randn_like(y)
    y.backward(dy)
    exact = x.double() @ w.double().T + bias.double()
    scale = x.double().abs() @ w.double().abs().T + bias.double().abs()
    assert relative_error(y, exact, scale) <= TOLERANCE[dtype]
    exact, scale = dy.double() @ w.double(), dy.double().abs() @ w.double().abs()
    assert relative_error(x.grad, exact, scale) <= TOLERANCE[dtype]
    exact = (dy.double().T @ x.double())[mask]
    scale = (dy.double().abs().T @ x.double().abs())[mask]
    assert relative_error(W.values.grad, exact, scale) <= TOLERANCE[dtype]
    assert torch.equal(linear(x, W, bias), y)
    with torch.no_grad():
        W.values.mul_(2)
        again = linear(x, W)
    exact, scale = 2 * x.double() @ w.double().T, 2 * x.double().abs() @ w.double().abs().T
    assert relative_error(again, exact, scale) <= TOLERANCE[dtype]


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_infinities_reach_what_a_stored_value_connects(dtype):
    n, k, m = 1024, 1088, 1024
    mask = two_way(n, k)
    mask[:, 7] = False
    w = torch.randn(n, k).to(dtype) * mask
    x = torch.randn(m, k).to(dtype)
    for token in range(0, m, 37):
        x[token, token % k] = (torch.inf, -torch.inf, torch.nan)[token % 3]
    x[5, 7] = torch.inf  # no row stores it
    bias = torch.randn(n).to(dtype)
    W = SparseTensor.from_dense(w, mask).cuda()
    for b in (bias, None):
        y = linear(x.cuda(), W, None if b is None else b.cuda())
        check_stored(y, x, w, mask, b)
    dx = x[:, :n].contiguous().cuda() @ W
    check_stored(dx, x[:, :n], w.T.contiguous(), mask.T.contiguous())


@pytest.mark.gpu
def test_a_captured_step_follows_values_tokens_and_bias():
    check_captured_step(two_way(1024, 2048).cuda())


@pytest.mark.gpu
def test_what_it_does_not_take_runs_elsewhere():
    mask = two_way(1024, 1024).cuda()
    w = torch.randn(1024, 1024, device="cuda").bfloat16() * mask
    W = SparseTensor.from_dense(w, mask)
    for m, dtype in ((1025, torch.bfloat16), (512, torch.bfloat16), (1024, torch.float32)):
        text = explain(torch.randn(m, 1024, device="cuda").to(dtype), W.to(dtype))
        assert "-> expand" in text and "two_of_four refused: " in text
    free = torch.rand(1024, 1024, device="cuda") < 0.3
    x = torch.randn(1024, 1024, device="cuda").bfloat16()
    text = explain(x, SparseTensor.from_dense(free.bfloat16(), free))
    assert "two_of_four refused: the pattern is not two-way" in text


@pytest.mark.gpu
def test_no_call_leaks():
    """Plans and selections are destroyed: memory of the process settles."""
    import resource

    mask = two_way(1024, 1024).cuda()
    W = SparseTensor.from_dense(torch.randn(1024, 1024, device="cuda").bfloat16() * mask, mask)
    x = torch.randn(1024, 1024, device="cuda").bfloat16()
    linear(x, W)
    operand = two_of_four._operand(
        "spmm", two_of_four._pattern(W.row_offsets, W.col_indices, 1024, 1024), W.values, 1024, 1024
    )
    peaks = []
    for _ in range(4):
        for _ in range(300):
            cusparselt.Plan(1024, 1024, 1024, 0).multiply(operand, x)
        torch.cuda.synchronize()
        peaks.append(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss)
    assert peaks[-1] - peaks[1] < 8 * 1024  # KiB
