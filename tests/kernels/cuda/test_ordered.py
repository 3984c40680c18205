"""Free patterns in an order of their columns: the order itself; on a GPU, the products."""

import pytest
import torch
from captured_layer import check_captured_step
from emulated_cuda import emulated_cuda, emulator  # noqa: F401
from infinities import check_stored

from sparsekern import SparseTensor, explain, linear
from sparsekern.kernels.cuda import ordered
from sparsekern.kernels.table import forget_choices
from sparsekern.testing import relative_error

_C = pytest.importorskip("sparsekern._C", exc_type=ImportError)  # the packer is its own
TOLERANCE = {torch.bfloat16: 2**-8, torch.float16: 2**-11}  # one rounding of the result


@pytest.fixture(autouse=True)
def from_small_sizes_on(monkeypatch):
    """Smaller ones than where it pays."""
    monkeypatch.setattr(ordered, "_least_size", lambda m, dtype: 512 if m >= 1024 else None)
    ordered.refuse_size.cache_clear()
    forget_choices()
    yield
    ordered.refuse_size.cache_clear()
    forget_choices()


def order_of(mask, most_slots):
    """(columns [slots], places [nnz]), or None."""
    W = SparseTensor.from_dense(mask.float(), mask)
    arrays = W.row_offsets.data_ptr(), W.col_indices.data_ptr()
    order = _C.Order(*arrays, *W.shape, W.nnz, most_slots)
    if not order.slots:
        return None
    columns, places = (torch.full((size,), -7, dtype=torch.int32) for size in (order.slots, W.nnz))
    order.write(columns.data_ptr(), places.data_ptr())
    return columns, places


def masks():
    """Masks [N, K] and a bound on the slots that they take."""
    yield torch.zeros(5, 9, dtype=torch.bool), 12
    yield torch.ones(70, 10, dtype=torch.bool), 20
    yield torch.eye(130, dtype=torch.bool), 132
    for n, k, density in (
        (1, 1, 0.5),
        (63, 64, 0.3),
        (64, 96, 0.15),
        (65, 97, 0.5),
        (200, 33, 0.8),
    ):
        yield torch.rand(n, k) < density, 2 * k + 4
    yield torch.rand(256, 256) < 0.1, 256
    yield torch.rand(512, 260) < 0.1, 264
    rows = torch.rand(300, 1) ** 3  # some rows are full, many are empty
    yield torch.rand(300, 120) < rows, 240
    columns = torch.rand(1, 300) ** 6
    yield torch.rand(100, 300) < columns, 450


@pytest.mark.parametrize("mask, most", [*masks()])
def test_an_order_holds_every_entry_once(mask, most):
    """And at most two of four in any row."""
    (n, k), (rows, wanted) = mask.shape, mask.nonzero().T
    columns, places = order_of(mask, 2**30)
    assert len(columns) % 4 == 0 and k <= len(columns) <= most
    assert torch.equal(columns[places.long()].long(), wanted)
    held = torch.zeros(n * len(columns), dtype=torch.bool)
    at = rows * len(columns) + places
    held[at] = True
    assert held.sum() == len(at)  # each in a place of its own
    assert (held.view(-1, 4).sum(1) <= 2).all()
    used = columns[columns >= 0]
    assert torch.equal(used.unique().long(), torch.arange(k))
    for four in columns.view(-1, 4).tolist():
        of_columns = [c for c in four if c >= 0]
        assert len(of_columns) == len(set(of_columns))
    # The same again, where it may take just as much; nothing where it may not.
    again = order_of(mask, len(columns))
    assert torch.equal(again[0], columns) and torch.equal(again[1], places)
    assert order_of(mask, k - 1) is None


def check_what_is_read_beside_the_library(device, monkeypatch):
    """x in order, and the operands: each row has its values, and zeros."""
    monkeypatch.setattr(ordered, "TILE_SLOTS", 512)
    tail = torch.arange(48, dtype=torch.uint8, device=device)

    def compress(two):  # what the library makes of it
        return torch.cat((two.new_zeros(two.numel() // 2).view(torch.uint8), tail))

    monkeypatch.setattr(ordered.cusparselt, "compress", compress)
    for n, k in ((16, 16), (48, 272), (272, 80), (528, 400)):
        columns = torch.randint(k, (208,), device=device)
        x = torch.randn(6, k, device=device).bfloat16()
        assert torch.equal(ordered.permute(x, columns.to(torch.int16)), x[:, columns])
        mask = torch.rand(n, k, device=device) < 0.06
        w = (torch.arange(n * k, device=device).view(n, k) % 251 + 1).bfloat16() * mask
        W = SparseTensor.from_dense(w, mask)
        for op, dense in (("spmm", w), ("spmm_t", w.t())):
            side = ordered._side_of(op, W.row_offsets, W.col_indices, n, k)
            row = 0
            for panel in side.panels:
                operand = ordered.fill(side, panel, W.values)
                slots = operand[: panel.rows * panel.width // 2].view(panel.rows, -1)
                values = dense[row : row + panel.rows].sort(1, descending=True).values
                got, most = slots.sort(1, descending=True).values, min(k, n, slots.shape[1])
                assert torch.equal(got[:, :most], values[:, :most]) and not got[:, most:].any()
                assert torch.equal(operand[slots.numel() :].view(torch.uint8), tail)
                row += panel.rows
            assert row == len(dense)


@pytest.mark.parametrize("backward", [False, True])
def test_what_is_read_beside_the_library(backward, emulated_cuda, monkeypatch, nan_memory):  # noqa: F811
    emulated_cuda.backward(backward)
    check_what_is_read_beside_the_library("cpu", monkeypatch)


@pytest.mark.gpu
@pytest.mark.sanitize
def test_what_is_read_beside_the_library_on_a_gpu(monkeypatch, nan_memory):
    check_what_is_read_beside_the_library("cuda", monkeypatch)


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("n, k, m", [(1024, 1024, 1024), (1040, 2064, 1032), (12288, 1088, 2048)])
def test_products(n, k, m, dtype):
    mask = torch.rand(n, k, device="cuda") < 0.1
    w = torch.randn(n, k, device="cuda").to(dtype) * mask
    w[tuple(mask.nonzero()[3].tolist())] = 0  # stored
    W = SparseTensor.from_dense(w, mask)
    W.values.requires_grad_()
    x = torch.randn(m, k, device="cuda").to(dtype).requires_grad_()
    bias = torch.randn(n, device="cuda").to(dtype).requires_grad_()
    assert explain(x, W).count("-> ordered") == 2
    y = linear(x, W, bias)
    dy = torch.randn_like(y)
    y.backward(dy)
    exact = x.double() @ w.double().T + bias.double()
    scale = x.double().abs() @ w.double().abs().T + bias.double().abs()
    assert relative_error(y, exact, scale) <= TOLERANCE[dtype]
    exact, scale = dy.double() @ w.double(), dy.double().abs() @ w.double().abs()
    assert relative_error(x.grad, exact, scale) <= TOLERANCE[dtype]
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
    mask = torch.rand(n, k) < 0.1
    mask[:, 7] = False
    w = torch.randn(n, k).to(dtype) * mask
    x = torch.randn(m, k).to(dtype)
    for token in range(0, m, 37):
        x[token, token % k] = (torch.inf, -torch.inf, torch.nan)[token % 3]
    x[5, 7] = torch.inf  # no row stores it
    bias = torch.randn(n).to(dtype)
    W = SparseTensor.from_dense(w, mask).cuda()
    assert explain(x.cuda(), W).count("-> ordered") == 2
    for b in (bias, None):
        y = linear(x.cuda(), W, None if b is None else b.cuda())
        check_stored(y, x, w, mask, b)
    dx = x[:, :n].contiguous().cuda() @ W
    check_stored(dx, x[:, :n], w.T.contiguous(), mask.T.contiguous())


@pytest.mark.gpu
def test_a_captured_step_follows_values_tokens_and_bias():
    check_captured_step(torch.rand(1024, 2048, device="cuda") < 0.1)
