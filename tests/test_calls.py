"""Prepared calls on a CPU, while somebody looks on, interrupts them or writes to what they give."""

import gc

import pytest
import torch
from torch.overrides import TorchFunctionMode

from sparsekern import SparseLinear, SparseTensor, ops
from sparsekern.kernels import prepared
from sparsekern.kernels.operands import native

N, K = 24, 40


@pytest.fixture
def layers():
    """One, and the nn.Linear of the same function."""
    linear = torch.nn.Linear(K, N)
    mask = torch.rand(N, K) < 0.3
    with torch.no_grad():
        linear.weight.mul_(mask)
    return SparseLinear.from_linear(linear, mask), linear


class Mode(TorchFunctionMode):
    """Calls `act` with the number of each function of torch."""

    def __init__(self, act):
        super().__init__()
        self.act, self.count = act, 0

    def __torch_function__(self, func, types, args=(), kwargs=None):
        self.count += 1
        self.act(self.count)
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("tokens", [(5,), (2, 5), (2, 1, 5)])
def test_results_are_written_to_in_place(layers, tokens):
    x = torch.randn(*tokens, K)
    made = []
    for layer in layers:
        a = x.clone().requires_grad_()
        y = layer(a).add_(1)
        torch.relu_(y).sum().backward()
        made.append((y.detach(), a.grad, layer.bias.grad.clone()))
        layer.bias.grad = None
    torch.testing.assert_close(*made)


def test_a_batch_of_gradients_of_more_dimensions(layers):
    x, h = torch.randn(2, 5, K, requires_grad=True), torch.randn(3, 2, 5, N)
    got, want = (
        torch.autograd.grad(layer(x), (x, layer.bias), h, is_grads_batched=True) for layer in layers
    )
    torch.testing.assert_close(got, want)


@pytest.mark.skipif(native is None, reason="the C++ library is not built")
def test_an_interrupt_while_a_call_is_prepared(layers, monkeypatch):
    sparse, dense = layers
    x = torch.randn(5, K)

    def interrupt(problem):
        raise KeyboardInterrupt

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(prepared, "pick", interrupt)
        sparse(x)
    torch.testing.assert_close(sparse(x), dense(x))


@pytest.mark.parametrize("error", [KeyboardInterrupt, RuntimeError])
@pytest.mark.parametrize("is_known", [False, True])
def test_a_mode_that_raises_at_any_place(layers, error, is_known):
    """An interrupt comes through; an error does, or the long way has the gradients."""
    sparse, dense = layers
    x = torch.randn(2, 5, K, requires_grad=True)
    want = dense(x)
    for at in range(1, 200):
        seen = []

        def act(count, at=at, seen=seen):
            if count == at:
                seen.append(count)
                raise error

        if not is_known and native:
            native.forget_calls()
        try:
            with Mode(act):
                y = sparse(x)
        except error:
            assert seen
        else:
            assert y.requires_grad and not (seen and error is KeyboardInterrupt)
            torch.testing.assert_close(y, want)
            if not seen:
                break
    assert not seen and at > 5


@pytest.mark.skipif(native is None, reason="the C++ library is not built")
def test_a_mode_that_forgets_all_calls(layers):
    sparse, dense = layers
    x = torch.randn(5, K)
    for _ in range(3):
        with Mode(lambda count: native.forget_calls()):
            torch.testing.assert_close(sparse(x), dense(x))
        sparse.col_indices.add_(0)  # a new version


def test_another_pattern_at_the_same_address():
    """Index tensors that die give their addresses to the next."""
    x, addresses = torch.randn(3, 16), set()
    for _ in range(200):
        w = torch.randn(8, 16) * (torch.rand(8, 1, 4, 4).argsort(3) < 2).view(8, 16)
        W = SparseTensor.from_dense(w)
        addresses.add((id(W.col_indices), W.col_indices.data_ptr()))
        torch.testing.assert_close(x @ W.T, x @ w.T)
    assert len(addresses) < 200


def test_patterns_of_which_only_autograd_holds_the_tensors(layers):
    sparse, dense = layers
    sparse.requires_grad_(False)
    x = torch.randn(5, K, requires_grad=True)
    y = ops.spmm(sparse.row_offsets, sparse.col_indices, sparse.values, N, K, x)
    del layers, sparse
    gc.collect()
    y.sum().backward()
    torch.testing.assert_close(x.grad, dense.weight.detach().sum(0).expand(5, K))


def test_checks_of_no_indices_write_nothing():
    """A write would make an error of the backward pass of whoever has saved them."""
    W = SparseTensor.from_dense(torch.zeros(N, K))
    version = W.col_indices._version
    SparseTensor(W.row_offsets, W.col_indices, W.values, W.shape)
    assert W.col_indices._version == version
