"""Small products leave the op out where nobody looks on, and only there."""

import random
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from conftest import random_dense
from torch.profiler import ProfilerActivity, profile
from torch.utils._python_dispatch import TorchDispatchMode

from sparsekern import SparseLinear, SparseTensor, ops
from sparsekern.kernels import operands

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


needs_table = pytest.mark.skipif(
    not hasattr(operands, "_C") or not hasattr(torch.Tensor, "__dlpack_c_exchange_api__"),
    reason="the C++ library is not built, or torch lacks the table that it reads",
)


def freed(t):
    t = torch.cat([t.flatten(), t.flatten()])[: t.numel()].view(t.shape)
    t.untyped_storage().resize_(0)
    return t


def freed_view(t):
    t = torch.cat([t.flatten(), t.flatten()])[t.numel() :].view(t.shape)
    t.untyped_storage().resize_(0)
    return t


ALTERED = {
    "view": lambda t: torch.cat([t, t])[len(t) :],
    "strided": lambda t: t.repeat_interleave(2, dim=-1)[..., ::2],
    "transposed": lambda t: t.t().contiguous().t() if t.ndim == 2 else t[None],
    "expanded": lambda t: t[:1].expand(t.shape),
    "one less": lambda t: t[..., :-1].contiguous(),
    "one more": lambda t: torch.cat([t, t], -1)[..., : t.shape[-1] + 1].contiguous(),
    "another M": lambda t: torch.cat([t, t]),
    "more dimensions": lambda t: t[None],
    "fewer": lambda t: t[0],
    "wider": lambda t: t.long() if t.dtype is torch.int32 else t.double(),
    "same bits": lambda t: t.view(torch.float32 if t.dtype is torch.int32 else torch.int32),
    "half": lambda t: t.half(),
    "bfloat16": lambda t: t.bfloat16(),
    "meta": lambda t: t.to("meta"),
    "sparse": lambda t: t.to_sparse(),
    "freed": freed,
    "freed view": freed_view,
    "efficient zeros": lambda t: torch._efficientzerotensor(t.shape, dtype=t.dtype),
    "list": lambda t: t.tolist(),
    "array": lambda t: t.numpy(),
    "None": lambda t: None,
}
NAMES = ("row_offsets", "col_indices", "values", "bias", "x", "dy")


def fitting(row_offsets, col_indices, values, bias, x, dy, n=N):
    pattern = n, row_offsets, col_indices
    return operands.fitting_tokens(*pattern, values, bias, N, x, K, dy, N)


@pytest.fixture
def fits(W):
    W = W.float()
    tensors = W.row_offsets, W.col_indices, W.values, torch.randn(N), torch.randn(M, K)
    return dict(zip(NAMES, (*tensors, torch.randn(M, N)), strict=True))


@needs_table
@pytest.mark.parametrize("how", ALTERED)
@pytest.mark.parametrize("name", NAMES)
def test_one_step_refuses_what_does_not_fit(fits, name, how):
    assert fitting(**fits) == M
    if how == "None" and name in ("values", "bias"):
        return  # may be left out
    altered = ALTERED[how](fits[name])
    assert fitting(**{**fits, name: altered}) is None
    assert fitting(**fits) == M


@needs_table
def test_one_step_takes_what_fits(fits):
    assert fitting(**{**fits, "values": None, "bias": None}) == M
    assert fitting(**{**fits, "values": torch.nn.Parameter(fits["values"])}) == M
    none = {**fits, "x": torch.empty(0, K), "dy": torch.empty(0, N)}
    assert fitting(**none) == 0
    for n in (N + 1, -1, None, "3", 2**70, float(N)):
        assert fitting(**fits, n=n) is None
    assert operands.fitting_tokens() is None and operands.fitting_tokens(*range(8)) is None


@needs_table
def test_one_step_takes_no_more_than_the_checks(fits):
    """At random: whatever it takes passes them and lies where a kernel reads it."""
    rng, taken = random.Random(0), 0
    for _ in range(2000):
        t = dict(fits)
        for name in rng.sample(NAMES, rng.randrange(3)):
            try:
                t[name] = ALTERED[rng.choice(list(ALTERED))](t[name])
            except (AttributeError, RuntimeError, TypeError):  # altered twice
                continue
        m = fitting(**t)
        if m is None:
            continue
        taken += 1
        pattern, values = (t["row_offsets"], t["col_indices"]), t["values"]
        if values is None:
            values = torch.zeros(len(pattern[1]))
        checked = operands.check_product("spmm", *pattern, values, N, K, t["x"], None)
        assert checked == operands.check_sddmm(*pattern, N, K, t["dy"], t["x"])
        assert checked == (m, len(pattern[1]))
        for a in t.values():
            assert a is None or (a.is_contiguous() and a.data_ptr() and not a.storage_offset())
    assert taken > 100


@pytest.mark.parametrize("op", ["spmm", "spmm_t"])
def test_the_gradient_sees_a_negation_that_is_still_to_be_done(op):
    W = SparseTensor.from_dense(torch.randn(8, 8))
    values = W.values._neg_view().requires_grad_()
    x = torch.randn(4, 8, requires_grad=True)
    product = getattr(ops, op)
    product(W.row_offsets, W.col_indices, values, 8, 8, x).sum().backward()
    dense = -W.to_dense() if op == "spmm" else -W.to_dense().T
    torch.testing.assert_close(x.grad, torch.ones(4, 8) @ dense)


def test_a_subclass_cannot_change_an_operand_that_was_checked():
    weight, x = (torch.randint(-4, 5, shape).float() for shape in ((64, 512), (4, 512)))
    W = SparseTensor.from_dense(weight)

    class Hostile(torch.Tensor):
        def storage_offset(self):
            x.set_(torch.zeros(1, 1))
            return 0

    bias = torch.zeros(64).as_subclass(Hostile)
    y = torch.ops.sparsekern.spmm(W.row_offsets, W.col_indices, W.values, 64, 512, x, bias)
    assert x.shape == (4, 512)
    torch.testing.assert_close(y, x @ weight.T, rtol=0, atol=0)


needs_calls = pytest.mark.skipif(operands.native is None, reason="nothing is prepared here")


@needs_calls
def test_calls_of_several_threads():
    layer = SparseLinear.from_linear(torch.nn.Linear(64, 48), torch.rand(48, 64) < 0.4)
    x = torch.randn(6, 1, 3, 64)

    def gradients(t):
        t = t.clone().requires_grad_()
        y = layer(t)
        return y.detach(), *torch.autograd.grad(y.square().sum(), (t, layer.values))

    want = [gradients(t) for t in x]
    with ThreadPoolExecutor(len(x)) as pool:
        for _ in range(20):
            for got, same in zip(pool.map(gradients, x), want, strict=True):
                assert all(map(torch.equal, got, same))


@needs_calls
def test_a_pattern_has_its_own_calls_and_takes_them_along(monkeypatch):
    """Many shapes, patterns that die, and those that come to lie where others were."""
    for i in range(300):
        n, k = 3 + i % 5, 4 + i % 7
        W = SparseTensor.from_dense(torch.randn(n, k) * (torch.rand(n, k) < 0.5))
        x = torch.randn(1 + i % 3, k)
        for _ in range(2):
            torch.testing.assert_close(x @ W.T, x @ W.to_dense().T)
    layer = SparseLinear.from_linear(torch.nn.Linear(8, 8), torch.rand(8, 8) < 0.5)
    for m in range(1, 300):  # more than are kept
        x = torch.randn(m, 8)
        torch.testing.assert_close(layer(x), x @ layer.weight.to_dense().T + layer.bias)


@needs_calls
@pytest.mark.parametrize("wrong", [(), (1,), tuple(range(8)), (9, *[None] * 7), ("a", *[0] * 7)])
def test_a_call_of_anything_else_is_left_alone(wrong):
    assert operands.native.call(*wrong) is None and operands.native.call_op(*wrong) is None


@needs_calls
@pytest.mark.parametrize("name", NAMES[2:5])
def test_a_call_takes_parts_of_tensors_that_are_there(fits, name):
    def call(**t):
        operands_ = t["row_offsets"], t["col_indices"], t["values"], N, K, t["x"], t["bias"]
        return operands.native.call(ops.SPMM, *operands_)

    want = call(**fits)
    assert want is not None
    for how in ("view", "freed view", "freed", "strided"):
        part = ALTERED[how](fits[name])
        if how == "view":
            assert torch.equal(call(**{**fits, name: part.copy_(fits[name])}), want)
        else:
            assert call(**{**fits, name: part}) is None
