"""Small products leave the op out where nobody looks on, and only there."""

import subprocess
import sys

import pytest
import torch
from conftest import random_dense
from torch.profiler import ProfilerActivity, profile
from torch.utils._python_dispatch import TorchDispatchMode

from sparsekern import SparseTensor, ops

N, K, M = 6, 9, 5


@pytest.fixture
def W():
    return SparseTensor.from_dense(random_dense(N, K))


class Names(TorchDispatchMode):
    def __init__(self):
        super().__init__()
        self.seen = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.seen.append(str(func))
        return func(*args, **(kwargs or {}))


def test_a_mode_sees_the_ops(W):
    x = torch.randn(M, K, dtype=torch.float64, requires_grad=True)
    with Names() as names:
        y = torch.matmul(x, W.T)
        y.sum().backward()
    assert "sparsekern.spmm.default" in names.seen and "sparsekern.spmm_t.default" in names.seen


def test_a_profiler_sees_the_ops(W):
    with profile(activities=[ProfilerActivity.CPU]) as prof:
        torch.matmul(torch.randn(M, K, dtype=torch.float64), W.T)
    assert "sparsekern::spmm" in {event.key for event in prof.key_averages()}


def test_a_trace_holds_the_op(W):
    traced = torch.jit.trace(lambda x: torch.matmul(x, W.T), torch.randn(M, K, dtype=torch.float64))
    x = torch.randn(M, K, dtype=torch.float64)
    assert "sparsekern::spmm" in str(traced.graph)
    torch.testing.assert_close(traced(x), torch.matmul(x, W.T))


def negated(t):
    """The same numbers, with the minus still to be done."""
    lazy = torch.complex(torch.zeros_like(t), -t).conj().imag
    assert lazy.is_neg()
    return lazy


@pytest.mark.parametrize("make", [negated, lambda t: t.detach().clone()], ids=["neg", "plain"])
def test_lazy_negations(W, make):
    x, values = torch.randn(M, K, dtype=torch.float64), W.values
    bias = torch.randn(N, dtype=torch.float64)
    pattern = W.row_offsets, W.col_indices
    want = x @ W.to_dense().T + bias
    for args in ((make(values), x, bias), (values, make(x), bias), (values, x, make(bias))):
        got = ops.spmm(*pattern, args[0], N, K, *args[1:])
        torch.testing.assert_close(got, want)


def test_efficient_zeros(W):
    zero = torch._efficientzerotensor((M, K), dtype=torch.float64)
    assert not torch.matmul(zero, W.T).any()


def test_what_a_transform_has_left(W):
    """A tensor that escaped from torch.func is still wrapped."""
    left = []

    def keep(x):
        left.append(x)
        return x.sum()

    x = torch.randn(M, K, dtype=torch.float64)
    torch.func.grad(keep)(x)
    torch.testing.assert_close(torch.matmul(left[0], W.T), x @ W.to_dense().T)


@pytest.mark.parametrize("op", ["spmm", "spmm_t"])
def test_both_gradients_at_once_are_the_same(W, op):
    """The backward pass of a layer makes them together, except where a graph of it is wanted."""
    a = torch.randn(M, K if op == "spmm" else N, dtype=torch.float64)
    product = getattr(ops, op)
    operands = W.values.clone().requires_grad_(), a.requires_grad_()
    y = product(W.row_offsets, W.col_indices, operands[0], N, K, operands[1])
    h = torch.randn_like(y)
    want = torch.autograd.grad(y, operands, h, create_graph=True)
    got = torch.autograd.grad(y, operands, h)
    torch.testing.assert_close(got, want)


def test_the_import_brings_no_triton_and_flops_are_counted():
    """torch.utils.flop_counter brings triton, where that is installed."""
    code = """
import sys, torch
import sparsekern
assert not any(name in sys.modules for name in ("triton", "torch.utils.flop_counter"))
from torch.utils.flop_counter import FlopCounterMode
W = sparsekern.SparseTensor.from_dense(torch.eye(8))
with FlopCounterMode(display=False) as counter:
    torch.matmul(torch.randn(3, 8), W.T)
assert counter.get_total_flops() == 2 * 3 * 8, counter.get_total_flops()
"""
    subprocess.run([sys.executable, "-c", code], check=True)


@pytest.mark.parametrize("density", [0.3, 1.0])
@pytest.mark.parametrize("trained", ["x", "values", "both"])
def test_gradients_in_a_batch(trained, density):
    """is_grads_batched=True hands backward a tensor without memory of its own."""
    w = torch.where(torch.rand(6, 6) < density, torch.randn(6, 6), 0)
    W, w = SparseTensor.from_dense(w), w.requires_grad_(trained != "x")
    W.requires_grad_(trained != "x")
    x, h = torch.randn(4, 6, requires_grad=trained != "values"), torch.randn(3, 4, 6)
    for y, dense in ((x @ W.T, x @ w.T), (x @ W, x @ w)):
        leaves = [(a, b) for a, b in ((x, x), (W.values, w)) if a.requires_grad]
        got, want = (
            torch.autograd.grad(out, of, h, is_grads_batched=True, retain_graph=True)
            for out, of in zip((y, dense), zip(*leaves, strict=True), strict=True)
        )
        for a, b in zip(got, want, strict=True):
            torch.testing.assert_close(a, b if a.shape == b.shape else b[:, *W._coordinates()])
