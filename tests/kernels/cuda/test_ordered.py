"""Free patterns in an order of their columns: the order itself; on a GPU, the products."""

import pytest
import torch
from infinities import check_stored
from torch import nn

from sparsekern import SparseLinear, SparseTensor, explain, linear
from sparsekern.kernels.cuda import ordered
from sparsekern.kernels.table import pick
from sparsekern.testing import relative_error

on_gpu = pytest.mark.gpu
needs_gpu = pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU")
TOLERANCE = 2**-8  # one rounding of the result


@pytest.fixture(autouse=True)
def from_small_sizes_on(monkeypatch):
    """Smaller ones than where it pays."""
    monkeypatch.setattr(ordered, "_least_size", lambda m: 512 if m >= 1024 else None)
    ordered._refuse_size.cache_clear()
    pick.cache_clear()
    yield
    ordered._refuse_size.cache_clear()
    pick.cache_clear()


@on_gpu
@needs_gpu
@pytest.mark.parametrize("n, k, m", [(1024, 1024, 1024), (1040, 2064, 1032), (12288, 1088, 2048)])
def test_products(n, k, m):
    mask = torch.rand(n, k, device="cuda") < 0.1
    w = torch.randn(n, k, device="cuda").bfloat16() * mask
    w[tuple(mask.nonzero()[3].tolist())] = 0  # stored
    W = SparseTensor.from_dense(w, mask)
    W.values.requires_grad_()
    x = torch.randn(m, k, device="cuda").bfloat16().requires_grad_()
    bias = torch.randn(n, device="cuda").bfloat16().requires_grad_()
    assert explain(x, W).count("-> ordered") == 2
    y = linear(x, W, bias)
    dy = torch.randn_like(y)
    y.backward(dy)
    exact = x.double() @ w.double().T + bias.double()
    scale = x.double().abs() @ w.double().abs().T + bias.double().abs()
    assert relative_error(y, exact, scale) <= TOLERANCE
    exact, scale = dy.double() @ w.double(), dy.double().abs() @ w.double().abs()
    assert relative_error(x.grad, exact, scale) <= TOLERANCE
    assert torch.equal(linear(x, W, bias), y)
    with torch.no_grad():
        W.values.mul_(2)
        again = linear(x, W)
    exact, scale = 2 * x.double() @ w.double().T, 2 * x.double().abs() @ w.double().abs().T
    assert relative_error(again, exact, scale) <= TOLERANCE


@on_gpu
@needs_gpu
def test_infinities_reach_what_a_stored_value_connects():
    n, k, m = 1024, 1088, 1024
    mask = torch.rand(n, k) < 0.1
    mask[:, 7] = False
    w = torch.randn(n, k).bfloat16() * mask
    x = torch.randn(m, k).bfloat16()
    for token in range(0, m, 37):
        x[token, token % k] = (torch.inf, -torch.inf, torch.nan)[token % 3]
    x[5, 7] = torch.inf  # no row stores it
    bias = torch.randn(n).bfloat16()
    W = SparseTensor.from_dense(w, mask).cuda()
    assert explain(x.cuda(), W).count("-> ordered") == 2
    for b in (bias, None):
        y = linear(x.cuda(), W, None if b is None else b.cuda())
        check_stored(y, x, w, mask, b)
    dx = x[:, :n].contiguous().cuda() @ W
    check_stored(dx, x[:, :n], w.T.contiguous(), mask.T.contiguous())


@on_gpu
@needs_gpu
def test_a_captured_step_follows_values_tokens_and_bias():
    n, k, m = 1024, 2048, 1024
    dense = nn.Linear(k, n, device="cuda", dtype=torch.bfloat16)
    layer = SparseLinear.from_linear(dense, torch.rand(n, k, device="cuda") < 0.1)
    x = torch.randn(m, k, device="cuda", dtype=torch.bfloat16, requires_grad=True)
    dy = torch.randn(m, n, device="cuda", dtype=torch.bfloat16)
    stream = torch.cuda.Stream()
    with torch.cuda.stream(stream):
        layer(x).backward(dy)
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    x.grad = layer.values.grad = layer.bias.grad = None
    with torch.cuda.graph(graph):
        y = layer(x)
        y.backward(dy)
    captured = y, x.grad, layer.values.grad  # where a replay writes
    for _ in range(3):
        with torch.no_grad():
            x.normal_()
            layer.values.normal_()
            layer.bias.normal_()
        graph.replay()
        got = [t.clone() for t in captured]
        other = x.detach().clone().requires_grad_()
        layer.values.grad = None
        want = layer(other)
        want.backward(dy)
        # Another algorithm may be captured than runs outside.
        for a, b in zip(got, (want, other.grad, layer.values.grad), strict=True):
            scale = b.float().square().mean().sqrt().item()
            torch.testing.assert_close(a, b, rtol=2**-6, atol=2**-6 * scale)
