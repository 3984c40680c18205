"""Prepared calls on a GPU: nothing stale, captures, streams, threads, another GPU."""

import math
import threading

import pytest
import torch
from test_emulated_prepared import CHANGES, K, N, layer, regular
from test_emulated_prepared import call as call_of
from test_two_of_four import two_way

from sparsekern import SparseTensor, explain, ops
from sparsekern import linear as linear_of
from sparsekern.indices import expand_rows
from sparsekern.kernels.cuda import cublaslt
from sparsekern.kernels.cuda.choose import pack
from sparsekern.kernels.cuda.compressed import pack_two_of_four
from sparsekern.kernels.operands import native
from sparsekern.kernels.problem import Problem
from sparsekern.nn import PackedLinear, linear
from sparsekern.testing import relative_error

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(native is None, reason="the C++ library is not built"),
]
TOKENS = pytest.mark.parametrize("tokens", [1, 16, 96])  # few_tokens twice, expand


def check(y, x, w, bias=None):
    exact, scale = x.double() @ w.double().T, x.double().abs() @ w.double().abs().T
    if bias is not None:
        exact, scale = exact + bias.double(), scale + bias.double().abs()
    assert relative_error(y, exact, scale) <= 2**-7  # cuBLAS may add parts in 16 bits


@TOKENS
@pytest.mark.parametrize("change", [*CHANGES, "there and back"])
def test_nothing_stale(change, tokens):
    sparse, x = regular().cuda(), torch.randn(tokens, K, device="cuda")
    for _ in range(3):
        for _ in range(2):
            t = x.to(sparse.values.dtype, copy=True).requires_grad_()
            y = sparse(t)
            y.backward(torch.ones_like(y))
            w = sparse.weight.detach().to_dense()
            check(y.detach(), t.detach(), w, sparse.bias.detach())
            check(t.grad, torch.ones_like(y), w.T)
            with torch.no_grad():
                assert call_of(sparse, t) is not None
                check(sparse(t), t, w, sparse.bias)
        with torch.no_grad():
            if change == "there and back":
                sparse.cpu()(x.to("cpu", sparse.values.dtype))
                sparse.cuda()
            else:
                CHANGES[change](sparse)


@TOKENS
def test_a_capture_between_calls(tokens):
    sparse, x = regular().cuda(), torch.randn(tokens, K, device="cuda").bfloat16()
    with torch.no_grad():
        want = sparse(x)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            assert call_of(sparse, x) is None
            y = sparse(x)
        assert torch.equal(sparse(x), want)
        sparse.values.mul_(2)
        graph.replay()
        for result in (y, sparse(x)):  # cuBLAS in the graph, cuBLASLt here
            check(result, x, sparse.weight.to_dense(), sparse.bias)


@TOKENS
def test_parts_of_other_tensors(tokens):
    sparse, x = regular().cuda(), torch.randn(3 * tokens * K, device="cuda").bfloat16()
    with torch.no_grad():
        for first, is_taken in ((0, True), (K * tokens, True), (1, False)):
            part = x[first:][: tokens * K].view(tokens, K)
            assert (call_of(sparse, part) is not None) == is_taken
            check(sparse(part), part, sparse.weight.to_dense(), sparse.bias)


@TOKENS
def test_a_packed_layer_reads_a_bias_with_gaps_in_each_call(tokens):
    w, x = regular().cuda().weight.detach(), torch.randn(tokens, K, device="cuda").bfloat16()
    layer = PackedLinear(pack(w, tokens), torch.zeros(2 * N, device="cuda").bfloat16()[::2])
    with torch.no_grad():
        for _ in range(3):
            layer.bias.normal_()
            check(layer(x), x, w.to_dense(), layer.bias)


def test_streams():
    sparse, x = regular().cuda(), torch.randn(4, 96, K, device="cuda").bfloat16()
    with torch.no_grad():
        want = [sparse(t) for t in x]
        torch.cuda.synchronize()
        streams, got = [torch.cuda.Stream() for _ in x], []
        for _ in range(20):
            for t, stream in zip(x, streams, strict=True):
                with torch.cuda.stream(stream):
                    got.append(sparse(t))
        torch.cuda.synchronize()
    for i, y in enumerate(got):
        assert torch.equal(y, want[i % 4])


def test_threads():
    sparse, x = regular().cuda(), torch.randn(4, 96, K, device="cuda").bfloat16()
    wrong = []

    def gradients(t):
        t = t.clone().requires_grad_()
        y = sparse(t)
        return y.detach(), *torch.autograd.grad(y, (t, sparse.values), torch.ones_like(y))

    want = [gradients(t) for t in x]

    def run(i):
        with torch.cuda.stream(torch.cuda.Stream()):
            for _ in range(20):
                if not all(map(torch.equal, gradients(x[i]), want[i])):
                    wrong.append(i)

    torch.cuda.synchronize()
    threads = [threading.Thread(target=run, args=(i,)) for i in range(len(x))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not wrong


def test_a_thread_that_was_warmed_up_captures():
    """Its first product by torch, which the long way is, would make a handle in the capture."""
    sparse, x = regular().cuda().requires_grad_(False), torch.randn(96, K, device="cuda").bfloat16()
    want, got = sparse(x), []

    def run():
        stream, graph = torch.cuda.Stream(), torch.cuda.CUDAGraph()
        with torch.cuda.stream(stream):
            sparse(x)
            with torch.cuda.graph(graph, stream=stream):
                y = sparse(x)
            graph.replay()
        stream.synchronize()
        got.append(y)

    torch.cuda.synchronize()
    thread = threading.Thread(target=run)
    thread.start()
    thread.join()
    torch.testing.assert_close(got[0], want)


@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="one GPU")
@TOKENS
def test_another_gpu(tokens):
    sparse, x = regular(), torch.randn(tokens, K).bfloat16()
    want = sparse.cuda(0)(x.cuda(0)).cpu()
    other = sparse.cuda(1)(x.cuda(1).requires_grad_())
    other.sum().backward()
    assert other.device.index == 1 and torch.equal(other.cpu(), want)


@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="one GPU")
def test_two_way_products_on_another_gpu_than_the_current_one():
    mask = two_way(2048, 2048)
    w, x = torch.randn(2048, 2048).bfloat16() * mask, torch.randn(2048, 2048).bfloat16()
    W = SparseTensor.from_dense(w, mask)
    for device in ("cuda:1", "cuda:0"):
        there, t = W.to(device), x.to(device)
        assert "-> two_of_four" in explain(t, there)
        for y in (linear_of(t, there), pack_two_of_four(there, torch.bfloat16).multiply(t, None)):
            assert y.device == t.device
            check(y, t, w.to(device))
        check(t @ there, t, w.T.to(device))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32], ids=str)
@TOKENS
def test_the_long_way_gives_the_same(tokens, dtype, monkeypatch):
    sparse, _ = layer(torch.rand(N, K) < 0.5, dtype)
    sparse = sparse.cuda()
    x = torch.randn(tokens, K, device="cuda", dtype=dtype)
    h = torch.randn(tokens, N, device="cuda", dtype=dtype)
    results = []
    no_call = lambda *_: None  # noqa: E731
    for way in (native.call, no_call):
        for module in (ops, linear):
            monkeypatch.setattr(module, "call", way)
        if way is no_call:
            monkeypatch.setattr(native, "call_op", way)
        t = x.clone().requires_grad_()
        y = sparse(t)
        results.append((y, *torch.autograd.grad(y, (t, sparse.values, sparse.bias), h)))
    y, dx, dvalues, _ = results[0]
    w = sparse.weight.detach().to_dense()
    check(y.detach(), x, w, sparse.bias.detach())
    check(dx, h, w.T)
    for i, (a, b) in enumerate(zip(*results, strict=True)):
        if dtype is torch.float32 or (i == 0 and tokens < 65):  # not by cuBLASLt in one of them
            assert torch.equal(a, b)
        else:
            assert relative_error(a, b.double(), b.double().abs().max()) <= 2**-7


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("n, k, tokens", [(64, 64, 128), (37, 51, 65), (768, 3072, 200)])
def test_products_of_fixed_algorithms(n, k, tokens, dtype):
    """Those of cuBLASLt, with sums of dY beside dW, at other addresses in each call."""
    sparse, w = layer(torch.rand(n, k) < 0.5, dtype)
    sparse, w = sparse.cuda(), w.cuda()
    at = expand_rows(sparse.row_offsets, sparse.values.numel()), sparse.col_indices
    for op, has_bias in (("spmm", True), ("spmm_t", False), ("sddmm", True), ("sddmm", False)):
        problem = Problem(op, "cuda", dtype, tokens, n, k, sparse.values.numel())
        is_there = cublaslt.product_of(problem, 0, has_bias) is not None
        assert is_there or n % 8, (op, has_bias)  # or torch multiplies, and sums
    for shape in ((tokens,), (5, tokens)):
        for first in (0, 8):  # of 16 bytes
            x, h = (
                torch.randn(first + math.prod(shape) * width, device="cuda").to(dtype)[first:]
                for width in (k, n)
            )
            x, h = x.view(*shape, k).requires_grad_(), h.view(*shape, n)
            y = sparse(x)
            dx, dvalues, dbias = torch.autograd.grad(y, (x, sparse.values, sparse.bias), h)
            flat, dy = x.detach().flatten(0, -2), h.flatten(0, -2)
            check(y.detach().flatten(0, -2), flat, w, sparse.bias.detach())
            check(dx.flatten(0, -2), dy, w.T)
            size = dy.double().abs().T @ flat.double().abs()
            exact = dy.double().T @ flat.double()
            assert relative_error(dvalues, exact[at], size[at]) <= 2**-8
            exact, size = dy.double().sum(0), dy.double().abs().sum(0)
            assert relative_error(dbias, exact, size) <= 2**-8
