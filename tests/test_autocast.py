"""Autocast keeps the casts of parameters for a context: what it must see, and when they go."""

import subprocess
import sys
import threading
import weakref

import pytest
import torch
from torch import nn

from sparsekern import SparseLinear, casts
from sparsekern.testing import random_csr

BF16 = torch.bfloat16


@pytest.fixture
def layer():
    return SparseLinear(6, 5, *random_csr(5, 6, 0.5, torch.float32), torch.randn(5))


@pytest.fixture
def x():
    return torch.randn(3, 6)


def expected(layer, x, dtype=BF16):
    with torch.no_grad():
        w, b = layer.weight.to_dense().to(dtype), layer.bias.to(dtype)
        return nn.functional.linear(x.to(dtype), w, b)


def assert_right(layer, x, dtype=BF16):
    y = layer(x)
    assert y.dtype is dtype
    torch.testing.assert_close(y, expected(layer, x, dtype), atol=0.05, rtol=0.05)


def cast_of(t):
    return casts.autocast(None, t)[1]


@pytest.mark.parametrize("dtype", [BF16, torch.float16])
@pytest.mark.parametrize("mode", [torch.enable_grad, torch.no_grad, torch.inference_mode])
def test_one_cast_for_a_context(layer, x, dtype, mode):
    with torch.autocast("cpu", dtype):
        with mode():
            assert_right(layer, x, dtype)
            kept = cast_of(layer.values)
        assert cast_of(layer.values) is kept  # a graph even if first made without
        layer(x).sum().backward()
        assert layer.values.grad.dtype is layer.bias.grad.dtype is torch.float32
        dead = weakref.ref(kept)
        del kept
        with torch.autocast("cpu", enabled=False):
            assert layer(x).dtype is torch.float32
        with torch.autocast("cpu", dtype):
            pass
        assert cast_of(layer.values) is dead()
    assert dead() is None


@pytest.mark.parametrize("counted", [True, False])
def test_writes_between_contexts(layer, x, counted):
    for _ in range(3):
        with torch.autocast("cpu", BF16):
            y = layer(x)
            assert_right(layer, x)
        with torch.no_grad():
            (layer.values if counted else layer.values.data).add_(1)
    assert y.grad_fn is not None  # a graph of an earlier context keeps no cast in use


def test_counted_writes_in_a_context(layer, x):
    with torch.autocast("cpu", BF16):
        for _ in range(3):
            assert_right(layer, x)
            with torch.no_grad():
                layer.values.add_(1)
                layer.bias.mul_(2)
        layer.values.data = torch.randn_like(layer.values)
        assert_right(layer, x)


def test_frozen_in_a_context(layer, x):
    with torch.autocast("cpu", BF16):
        assert layer(x).requires_grad
        layer.requires_grad_(False)
        assert not layer(x).requires_grad


def test_another_dtype_in_a_context(layer, x):
    with torch.autocast("cpu", BF16):
        assert_right(layer, x)
        with torch.autocast("cpu", torch.float16):
            assert_right(layer, x, torch.float16)
        assert_right(layer, x)


def test_without_cache(layer, x):
    with torch.autocast("cpu", BF16, cache_enabled=False):
        assert_right(layer, x)
        assert cast_of(layer.values) is not cast_of(layer.values)


def test_saved_tensor_hooks_do_not_see_the_sentinel(layer, x):
    seen = []
    with torch.autograd.graph.saved_tensors_hooks(
        lambda t: seen.append(tuple(t.shape)) or t, lambda t: t
    ):
        for _ in range(2):
            with torch.autocast("cpu", BF16):
                assert_right(layer, x)
    assert (0, 0) not in seen and len(seen) % 2 == 0


@pytest.mark.parametrize("use_reentrant", [True, False])
def test_checkpoint(layer, x, use_reentrant):
    x.requires_grad_()
    with torch.autocast("cpu", BF16):
        layer(x).sum().backward()
        grad, layer.values.grad = layer.values.grad, None
        y = torch.utils.checkpoint.checkpoint(layer, x, use_reentrant=use_reentrant)
    y.sum().backward()
    torch.testing.assert_close(layer.values.grad, grad)


def test_double_backward(layer, x):
    dense, x = layer.to_linear(), x.requires_grad_()
    results = []
    for module, weight in ((layer, layer.values), (dense, dense.weight)):
        with torch.autocast("cpu", BF16):
            y = module(x) + module(2 * x)
        (dx,) = torch.autograd.grad(y.float().square().sum(), x, create_graph=True)
        (dw,) = torch.autograd.grad(dx.square().sum(), weight)
        assert dw.dtype is torch.float32
        results.append((dx.detach(), dw))
    (dx, dvalues), (dense_dx, dw) = results
    torch.testing.assert_close(dx, dense_dx, atol=0.1, rtol=0.1)
    at_pattern = dw[layer.weight.to_dense() != 0]
    torch.testing.assert_close(dvalues, at_pattern, atol=0.05 * dw.abs().max().item(), rtol=0.1)


def test_forward_mode_and_functorch(layer, x):
    def product(values):
        return torch.func.functional_call(layer, {"values": values}, (x,)).float().sum()

    with torch.autocast("cpu", BF16):
        assert_right(layer, x)
        grad = torch.func.grad(product)(layer.values.detach())
        _, tangent = torch.func.jvp(product, (layer.values.detach(),), (grad,))
        layer(x).float().sum().backward()
    torch.testing.assert_close(grad, layer.values.grad)
    torch.testing.assert_close(tangent, grad.square().sum(), atol=0.1, rtol=0.05)


def test_threads(layer, x):
    """Each has contexts of its own; torch's store, which ends with any of them, is one."""
    errors = []

    def run():
        try:
            for _ in range(100):
                with torch.autocast("cpu", BF16):
                    assert_right(layer, x)
                assert layer(x).dtype is torch.float32
        except BaseException as error:
            errors.append(error)

    threads = [threading.Thread(target=run) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not errors


def test_threads_with_and_without_a_context_do_not_wait_for_each_other():
    """A product holds Python's lock when it asks for the node that gathers a leaf's gradient; a
    cast of that leaf must not want the lock while it makes the node."""
    script = """
import sys, threading
import torch
from sparsekern import SparseLinear

def run():
    for _ in range(400):
        with torch.autocast("cpu", torch.bfloat16):
            layer(x)
        layer(x)

sys.setswitchinterval(1e-5)
layer, x = SparseLinear.from_linear(torch.nn.Linear(6, 5)), torch.randn(3, 6)
threads = [threading.Thread(target=run) for _ in range(4)]
for thread in threads:
    thread.start()
for thread in threads:
    thread.join()
"""
    subprocess.run([sys.executable, "-c", script], check=True, timeout=300)  # or for ever


def test_compiles_whole(layer, x):
    with torch.autocast("cpu", BF16):
        y = torch.compile(layer, backend="aot_eager", fullgraph=True)(x)
        torch.testing.assert_close(y, layer(x))


def test_more_dimensions(layer):
    x = torch.randn(2, 0, 3, 6), torch.randn(2, 4, 3, 6)
    with torch.autocast("cpu", BF16):
        for part in x:
            assert_right(layer, part)


def test_a_layer_from_inference_mode(x):
    """Its parameters want gradients, and count no writes."""
    with torch.inference_mode(), torch.autocast("cpu", BF16):
        layer = SparseLinear(6, 5, *random_csr(5, 6, 0.5, torch.float32), torch.randn(5))
        for _ in range(2):
            assert_right(layer, x)
            layer.values.add_(1)


def test_contexts_of_two_types_at_once(layer, x):
    """torch hands a cast that it keeps to a context of another type, too."""
    other = SparseLinear(6, 5, *random_csr(5, 6, 0.5, torch.float32), torch.randn(5))
    with torch.autocast("cpu", torch.float16):
        assert_right(layer, x, torch.float16)
        kept = cast_of(layer.values)
        casts._stores.clear()  # another thread may look before the first has put its own there
        with torch.autocast("cpu", BF16):
            assert_right(other, x)
            assert_right(layer, x)
        assert_right(layer, x, torch.float16)
        assert cast_of(layer.values).dtype is kept.dtype


def test_a_graph_that_is_exported_in_autocast_computes_as_there(layer, x):
    model = nn.Sequential(nn.Linear(6, 6), layer, nn.Linear(5, 4))
    with torch.autocast("cpu", BF16):
        program = torch.export.export(model, (x,)).module()
        assert torch.equal(program(x), model(x)) and program(x).dtype is BF16
