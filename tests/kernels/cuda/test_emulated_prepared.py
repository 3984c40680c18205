"""Prepared calls of the rows for GPUs on a CPU: the emulator's kernels, the stand-in for
cuSPARSELt, torch's own autograd."""

import gc
import weakref

import pytest
import torch
from emulated_cublaslt import cublaslt_library, dense  # noqa: F401
from emulated_cusparselt import (  # noqa: F401
    TOLERANCE,
    check,
    cusparselt_library,
    emulated_cuda,
    emulator,
    stand_in,
)
from infinities import check_stored, tokens_with_infinities, weight_with_infinities
from test_two_of_four import two_way
from torch.autograd import forward_ad

from sparsekern import SparseLinear, SparseTensor, ops
from sparsekern.kernels import prepared
from sparsekern.kernels.operands import native
from sparsekern.kernels.steps import A, Steps
from sparsekern.testing import relative_error

pytestmark = [
    pytest.mark.usefixtures("stand_in", "dense", "fresh_table"),
    pytest.mark.skipif(native is None, reason="the C++ library is not built"),
]
N, K = 48, 80


@pytest.fixture(autouse=True)
def as_on_a_gpu(monkeypatch):
    monkeypatch.setattr(prepared, "_kind", lambda a: "cuda")


@pytest.fixture
def ran(monkeypatch):
    """Names of the rows that were prepared."""
    names = []
    pick = prepared.pick

    def noted(problem):
        kernel = pick(problem)
        names.append(kernel.name)
        return kernel

    monkeypatch.setattr(prepared, "pick", noted)
    return names


def layer(mask, dtype=torch.bfloat16, bias=True):
    linear = torch.nn.Linear(mask.shape[1], mask.shape[0], bias, dtype=dtype)
    sparse = SparseLinear.from_linear(linear, mask)
    return sparse, sparse.weight.detach().to_dense()


def call(layer, x):
    """What the layer does where its call is prepared; None where it goes the long way."""
    operands = layer.row_offsets, layer.col_indices, layer.values
    return native.call(ops.SPMM, *operands, *layer.weight.shape, x, layer.bias)


def masks():
    free, few = torch.rand(N, K) < 0.5, torch.rand(N, K) < 0.05
    free[0, :3] = few[0, :3] = True  # not two-way
    return {"free": free, "few": few, "two-way": two_way(N, K)}


CASES = [
    ("few_tokens", "free", (2,), torch.bfloat16),
    ("few_tokens", "free", (1, 3), torch.float16),
    ("expand", "free", (80,), torch.bfloat16),
    ("expand", "free", (4, 20), torch.float32),
    ("two_of_four", "two-way", (80,), torch.bfloat16),
    ("two_of_four", "two-way", (80,), torch.float16),
    ("ordered", "few", (4, 20), torch.bfloat16),
    ("two_of_four", "two-way", (4, 20), torch.bfloat16),
]


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("row, family, tokens, dtype", CASES)
def test_forward_and_gradients(row, family, tokens, dtype, bias, ran):
    mask = masks()[family]
    sparse, w = layer(mask, dtype, bias)
    x = torch.randn(*tokens, K).to(dtype).requires_grad_()
    h = torch.randn(*tokens, N).to(dtype)
    flat, dy = x.detach().flatten(0, -2), h.flatten(0, -2)
    for _ in range(2):
        x.grad = None
        sparse.zero_grad()
        y = sparse(x)
        assert "Prepared" in str(y.grad_fn)
        y.backward(h)
        check(y.detach().flatten(0, -2), flat, w, sparse.bias.detach() if bias else None)
        check(x.grad.flatten(0, -2), dy, w.T)
        exact, scale = dy.double().T @ flat.double(), dy.double().abs().T @ flat.double().abs()
        assert relative_error(sparse.values.grad, exact[mask], scale[mask]) <= TOLERANCE
        with torch.no_grad():
            assert torch.equal(sparse(x), y) and torch.equal(call(sparse, x), y)
            sparse.values.mul_(2)
            w = 2 * w
    assert ran[0] == row
    with torch.inference_mode():
        check(sparse(x).flatten(0, -2), flat, w, sparse.bias if bias else None)


@pytest.mark.parametrize("tokens", [2, 80])
def test_infinities(tokens, ran):
    w, mask, bias = weight_with_infinities(N, K, torch.bfloat16)
    W, x = SparseTensor.from_dense(w, mask), tokens_with_infinities(tokens, K, torch.bfloat16)
    sparse = SparseLinear(K, N, W.row_offsets, W.col_indices, W.values, bias)
    with torch.no_grad():
        check_stored(call(sparse, x), x, w, mask, bias)
    assert ran == ["few_tokens" if tokens == 2 else "expand"]


def with_values(layer, values):
    layer.values.data = values


def other_columns(layer):
    """Another valid pattern in the same memory."""
    layer.col_indices.copy_(K - 1 - layer.col_indices.view(N, -1).flip(1).flatten())


def regular(dtype=torch.bfloat16):
    """The same number of places in each row."""
    return layer(torch.rand(N, K).argsort(1) < 40, dtype)[0]


CHANGES = {
    "values in place": lambda s: s.values.data.mul_(2),
    "values moved": lambda s: with_values(s, s.values.data * 2),
    "optimizer": lambda s: torch._foreach_mul_([s.values], 3.0),
    "bias moved": lambda s: setattr(s.bias, "data", s.bias.data + 1),
    "columns in place": other_columns,
    "columns moved": lambda s: (
        setattr(s.col_indices, "data", s.col_indices.clone()),
        other_columns(s),
    ),
    "float32": lambda s: s.float(),
    "float16": lambda s: s.half(),
    "loaded": lambda s: s.load_state_dict(regular().state_dict()),
    "another pattern": lambda s: s.load_state_dict(layer(masks()["free"])[0].state_dict()),
    "frozen": lambda s: s.requires_grad_(False),
}


@pytest.mark.parametrize("tokens", [2, 80])
@pytest.mark.parametrize("change", CHANGES)
def test_nothing_stale(change, tokens):
    sparse, x = regular(), torch.randn(tokens, K)
    for again in range(3):
        for _ in range(2):
            t = x.to(sparse.values.dtype, copy=True).requires_grad_()
            y = sparse(t)
            y.sum().backward()  # whose gradient is expanded
            w = sparse.weight.detach().to_dense()
            check(y.detach(), t.detach(), w, sparse.bias.detach())
            check(t.grad, torch.ones_like(y), w.T)
            with torch.no_grad():
                check(sparse(t), t, w, sparse.bias)
        with torch.no_grad():
            CHANGES[change](sparse)
        if change == "frozen" and again == 0:
            with torch.no_grad():
                check(sparse(t), t, w, sparse.bias)
            sparse.values.data.mul_(2), sparse.requires_grad_(True)


def test_values_that_torch_counts_are_not_mixed_up_with_those_in_training():
    """Both share one pack: what is brought in for one must not be taken for the other."""
    sparse, x = regular(), torch.randn(2, K).bfloat16()
    weight = sparse.weight
    fixed = weight.detach()
    fixed = SparseTensor(fixed.row_offsets, fixed.col_indices, fixed.values.clone(), fixed.shape)
    fixed.values.mul_(-1)
    pattern = weight.row_offsets, weight.col_indices
    with torch.no_grad():
        for _ in range(3):
            minus = ops.spmm(*pattern, fixed.values, N, K, x)
            plus = ops.spmm(*pattern, sparse.values, N, K, x)
            assert torch.equal(minus, -plus)


def test_a_changed_pattern_under_a_graph_is_an_error():
    sparse, x = regular(), torch.randn(80, K).bfloat16()
    y = sparse(x)
    other_columns(sparse)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        y.sum().backward()


def test_what_is_left_to_the_long_way(stand_in, monkeypatch):  # noqa: F811
    sparse = regular()
    x = torch.randn(80, K).bfloat16()
    with torch.no_grad():
        assert call(sparse, x) is not None
        assert call(sparse, x.t().contiguous().t()) is None
        assert call(sparse, x.float()) is None and call(sparse, x[0]) is None
        assert call(sparse, x.as_subclass(torch.nn.Buffer)) is None
        stand_in.is_capturing = True
        assert call(sparse, x) is None
        stand_in.is_capturing = False
        with torch.autocast("cpu", torch.float16):
            assert call(sparse, x) is None
        with torch.autocast("cpu", torch.bfloat16):
            assert call(sparse, x) is not None
        with forward_ad.dual_level():
            assert call(sparse, x) is None
    torch.func.vmap(lambda t: (call(sparse, t), t)[1])(x[None])
    y = sparse(x.requires_grad_())
    (dx,) = torch.autograd.grad(y.square().sum(), x, create_graph=True)
    assert dx.requires_grad


def test_captured_between_forward_and_backward(stand_in):  # noqa: F811
    sparse, x = regular(), torch.randn(4, 20, K).bfloat16().requires_grad_()
    want = torch.autograd.grad(sparse(x).square().sum(), x)[0]
    y = sparse(x)
    stand_in.is_capturing = True
    (got,) = torch.autograd.grad(y.square().sum(), x)
    stand_in.is_capturing = False
    torch.testing.assert_close(got, want)


@pytest.mark.parametrize("is_capturing", [False, True])
def test_results_are_written_to_in_place(is_capturing, stand_in):  # noqa: F811
    """As those of nn.Linear, whichever way they came: no view is what a Function returns."""
    for tokens in (2, 80):
        sparse, x = regular(), torch.randn(1, tokens, K).bfloat16().requires_grad_()
        want = sparse(x).detach() + 1
        stand_in.is_capturing = is_capturing
        y = sparse(x)
        torch.testing.assert_close(y.add_(1), want)
        y.sum().backward()
        stand_in.is_capturing = False


def test_another_current_device(monkeypatch):
    sparse, x = regular().requires_grad_(False), torch.randn(80, K).bfloat16()
    want = sparse(x)
    assert call(sparse, x) is not None
    native.forget_calls()
    here = lambda: 1, lambda device: 7, lambda: False  # noqa: E731
    monkeypatch.setattr("sparsekern.kernels.cuda.library.surroundings", lambda: here)
    assert call(sparse, x) is None
    torch.testing.assert_close(sparse(x), want)


def test_a_pattern_that_is_gone_keeps_nothing():
    sparse, x = regular(), torch.randn(80, K).bfloat16()
    sparse(x).sum().backward()
    gone = [weakref.ref(t) for t in (sparse.row_offsets, sparse.col_indices, sparse.values)]
    del sparse
    gc.collect()
    assert [ref() for ref in gone] == [None] * 3


def test_what_is_written_out_is_gone_when_the_next_comes():
    """W, before the dense gradient of W is there: a layer's backward pass holds one of them."""
    seen = []
    device = torch.device("cpu")

    def made(t, *others):
        seen.append((weakref.ref(t), [ref() is not None for ref, _ in seen]))
        return t

    steps = Steps(device)
    first = steps.call(lambda t: made(t.clone()), A)
    second = steps.call(lambda t: made(t * 2), first)
    third = steps.call(lambda t, u: made(t + u), second, second)
    unused = steps.call(lambda: made(torch.ones(1)))
    fourth = steps.call(lambda t: made(t + 1), third)
    call = steps.prepared(third, fourth)
    x = torch.ones(2)
    got = native.run_prepared(call, None, x, None, None, None)
    assert [t.tolist() for t in got] == [[4, 4], [5, 5]]
    assert [alive for _, alive in seen] == [[], [True], [False, True], [False, False, True]] + [
        [False, False, True, False]
    ]
    assert unused.place == 8
