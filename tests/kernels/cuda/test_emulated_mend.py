"""The kernels of mend.cu without a GPU: infinities, wild indices, places beyond 2^31."""

import pytest
import torch
from emulated_cuda import emulated_cuda, emulator  # noqa: F401
from test_emulated_cuda import random_weight

from sparsekern import SparseTensor
from sparsekern.kernels.cuda import expand, few_tokens
from sparsekern.kernels.cuda.layout import Gpu

pytestmark = pytest.mark.usefixtures("emulated_cuda", "with_library")
FLOATS = pytest.mark.parametrize(
    "dtype", [torch.bfloat16, torch.float16, torch.float32, torch.float64], ids=str
)


@pytest.fixture
def with_library(monkeypatch):
    monkeypatch.setattr(expand.cuda_library, "refusal", lambda: None)
    monkeypatch.setattr(few_tokens, "gpu_of", lambda device: Gpu(3, 227 * 1024))


def by_stored_values(w, mask, x, bias):
    """x W^T + bias where a place that is not stored takes no part, in float64."""
    rows = [x.double()[:, m] @ v[m] for v, m in zip(w.double(), mask, strict=True)]
    return torch.stack(rows, 1) + bias.double()


@FLOATS
@pytest.mark.parametrize("n, k", [(37, 101), (5, 4500), (300, 9)])
@pytest.mark.parametrize("way", ["spmm", "spmm_t"])
def test_infinities_reach_what_a_stored_value_connects(way, n, k, dtype, nan_memory):
    mask = torch.rand(n, k) < 0.3
    mask[:, 1] = mask[2] = False
    w = torch.randn(n, k).to(dtype) * mask
    W = SparseTensor.from_dense(w, mask)
    x = torch.randn(21, k if way == "spmm" else n).to(dtype)
    x[3, 4], x[8, 0], x[8, 2] = torch.inf, -torch.inf, torch.nan
    x[9, 1 if way == "spmm" else 2] = torch.inf  # nothing is stored there
    x[20] = torch.nan
    bias = torch.randn(n if way == "spmm" else k).to(dtype)
    run = {"spmm": expand.spmm, "spmm_t": expand.spmm_t}[way]
    for b in (bias, None):
        y = run(W.row_offsets, W.col_indices, W.values, n, k, x, b)
        w_, mask_ = (w, mask) if way == "spmm" else (w.t(), mask.t())
        want = by_stored_values(w_, mask_, x, bias if b is not None else 0 * bias)
        assert torch.equal(y.isnan(), want.isnan()) and torch.equal(y.isinf(), want.isinf())
        finite = want.isfinite()
        assert finite[9].all() and not finite[20, mask_.any(1)].any()
        tolerance = {torch.bfloat16: 3e-2, torch.float16: 4e-3}.get(dtype, 1e-4)
        torch.testing.assert_close(y.double()[finite], want[finite], rtol=tolerance, atol=tolerance)
        assert torch.equal(y[want.isinf()].double(), want[want.isinf()])


@pytest.mark.parametrize("op", ["spmm", "spmm_t"])
@pytest.mark.parametrize("m, checked", [(2100, 1), (2100, 7), (2100, 41), (70000, 1)])
def test_blocks_of_many_tokens(op, m, checked):
    """Those alone are mended that have an infinity or NaN among their first results."""
    n = k = 41
    W = SparseTensor.from_dense(random_weight(n, k, 0.3, torch.float32))
    x, y = torch.randn(m, k), torch.full((m, n), 5.0)
    spoilt = torch.tensor([0, 8, 9, 255, m // 2, m - 1])
    y[spoilt, checked - 1] = torch.tensor([torch.nan, torch.inf] * 3)
    if checked < n:
        y[3, checked] = torch.nan
    others = torch.ones(m, dtype=torch.bool)
    others[spoilt] = False
    before = y[others].clone()
    expand.mend(op, W.row_offsets, W.col_indices, W.values, n, k, x, None, y, checked)
    w = W.to_dense() if op == "spmm" else W.to_dense().t()
    torch.testing.assert_close(y[spoilt], x[spoilt] @ w.t())
    torch.testing.assert_close(y[others], before, rtol=0, atol=0, equal_nan=True)


@pytest.mark.parametrize("damage", ["columns", "offsets", "both"])
@pytest.mark.parametrize("seed", range(4))
def test_no_index_leads_out_of_bounds(damage, seed):
    """Indices that are anything, as a write that torch does not count may leave them."""
    n, k, m, edge = 40, 130, 9, 4096
    W = SparseTensor.from_dense(random_weight(n, k, 0.3, torch.float32))
    row_offsets, col_indices = W.row_offsets.clone(), W.col_indices.clone()
    generator = torch.Generator().manual_seed(seed)
    for t, name in ((col_indices, "columns"), (row_offsets, "offsets")):
        if damage in (name, "both"):
            at = torch.randperm(len(t), generator=generator)[:20]
            wild = torch.randint(-(2**31), 2**31 - 1, (20,), generator=generator)
            t[at] = torch.where(at % 2 == 0, wild, wild % 300 - 100).int()
    # The memory around what is written and read: NaN to read, and unchanged afterwards.
    memory = torch.full((4 * edge,), torch.nan)

    def inside(shape):
        memory.fill_(torch.nan)
        return memory[edge : edge + shape[0] * shape[1]].view(shape)

    def check(op, x, y, checked):
        expand.mend(op, row_offsets, col_indices, W.values, n, k, x, None, y, checked)
        assert memory[:edge].isnan().all() and memory[edge + y.numel() :].isnan().all()

    for checked in (1, 7):
        check("spmm", torch.full((m, k), torch.inf), inside((m, n)).fill_(torch.nan), checked)
        dx = inside((m, k)).fill_(torch.nan)
        check("spmm_t", torch.ones(m, n), dx, checked)
        assert dx.isfinite().all()


@pytest.mark.parametrize("row", ["expand", "few_tokens"])
def test_a_pattern_made_invalid_is_refused(row):
    W = SparseTensor.from_dense(random_weight(40, 130, 0.3))
    x, dy, args = torch.randn(5, 130).bfloat16(), torch.randn(5, 40).bfloat16(), (40, 130)
    pattern = W.row_offsets, W.col_indices

    def products():
        if row == "few_tokens":
            return [few_tokens.KERNELS[0].run(*pattern, W.values, *args, x)]
        return [
            expand.spmm(*pattern, W.values, *args, x),
            expand.spmm_t(*pattern, W.values, *args, dy),
            expand.sddmm(*pattern, *args, dy, x),
        ]

    products()
    for t, at, value in ((W.col_indices, 5, 10**9), (W.row_offsets, 3, 2**31 - 1)):
        before = t.clone()
        t[at] = value  # counted
        with pytest.raises(ValueError, match="col_indices|row_offsets"):
            products()
        t.copy_(before)
        products()
    W.col_indices.data[5] = 10**9  # not counted: stale, or without the column
    assert all(y.shape[0] for y in products())


def test_places_of_x_beyond_two_to_the_31():
    """Of a token whose row of x begins there; pages that nobody writes take no memory."""
    n, k, m = 2, 2**30, 3
    W = SparseTensor(*map(torch.tensor, ([0, 2, 3], [5, k - 1, 7], [2.0, 3.0, 4.0])), (n, k))
    W = W.to(torch.bfloat16)
    x = torch.empty(m, k, dtype=torch.bfloat16)
    x[2, 5], x[2, k - 1], x[2, 7] = 1, 10, 100
    y = torch.zeros(m, n, dtype=torch.bfloat16)
    y[2] = torch.nan
    expand.mend("spmm", W.row_offsets, W.col_indices, W.values, n, k, x, None, y)
    assert y.tolist() == [[0, 0], [0, 0], [32, 400]]
