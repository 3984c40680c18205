"""matmul and linear against torch's own on the dense twin: results, gradients and error texts."""

import re
import warnings

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from conftest import outcome, random_dense, sparse
from torch.func import grad, vmap
from torch.testing._internal.common_methods_invocations import op_db

import sparsekern
from sparsekern import SparseTensor

DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)


def agree(dense_call, sparse_call):
    """Both give the same result, or both raise the same error."""
    want, want_error = outcome(dense_call)
    got, got_error = outcome(sparse_call)
    assert got_error == want_error
    if want_error is None:
        torch.testing.assert_close(got, want)
        assert got.is_contiguous()


# PyTorch's own sample inputs


def holes(w):
    """w with some zeros in it."""
    return torch.where(torch.rand_like(w) < 0.6, w.detach(), 0).requires_grad_(w.requires_grad)


def samples(name):
    (op,) = [op for op in op_db if op.name == name and not op.variant_test_name]
    for dtype in (torch.float64, torch.float32):
        for i, sample in enumerate(op.sample_inputs("cpu", dtype, requires_grad=True)):
            yield pytest.param(op, sample, id=f"{name}-{dtype}-{i}".replace("torch.", ""))


def check_with_gradients(call, dense, position):
    """call(*dense) against the same with the tensor at `position` sparse."""
    dense = [t.detach().requires_grad_() for t in dense]
    dense[position] = holes(dense[position])
    mixed = [t.detach().requires_grad_() for t in dense]
    W = sparse(dense[position])
    mixed[position] = W
    want, got = call(*dense), call(*mixed)
    torch.testing.assert_close(got, want)
    assert got.shape == want.shape and got.is_contiguous()
    mixed[position] = W.values
    h = torch.randn_like(want)
    want_grads = list(torch.autograd.grad(want, dense, h))
    want_grads[position] = want_grads[position][dense[position] != 0]
    torch.testing.assert_close(list(torch.autograd.grad(got, mixed, h)), want_grads)


@pytest.mark.parametrize("op, sample", [*samples("matmul"), *samples("mm"), *samples("mv")])
def test_op_db_products(op, sample):
    a, b = sample.input, *sample.args
    for position, operand in enumerate((a, b)):
        if operand.ndim == 2:
            check_with_gradients(op.op, (a, b), position)
            check_with_gradients(sparsekern.matmul, (a, b), position)
    agree(lambda: op.op(a, b), lambda: sparsekern.matmul(a, b))


@pytest.mark.parametrize("op, sample", list(samples("nn.functional.linear")))
def test_op_db_linear(op, sample):
    arguments = [sample.input, *(t for t in sample.args if t is not None)]
    check_with_gradients(F.linear, arguments, 1)
    check_with_gradients(sparsekern.linear, arguments, 1)
    agree(lambda: F.linear(*arguments), lambda: sparsekern.linear(*arguments))


# Every way in


W = random_dense(4, 3)  # [N, K]
SHAPES = [(), (3,), (4,), (0, 3), (2, 3), (3, 4), (4, 3), (5, 2, 3), (5, 3, 4), (5, 4, 4)]
SHAPES += [(6, 1, 2, 3), (6, 1, 3, 2), (6, 0, 3), (2, 0), (0,), (1, 3), (7, 4, 1)]

WAYS = {
    "matmul(x, W)": lambda x, W: torch.matmul(x, W),
    "matmul(x, W.T)": lambda x, W: torch.matmul(x, W.T),
    "matmul(W, x)": lambda x, W: torch.matmul(W, x),
    "matmul(W.T, x)": lambda x, W: torch.matmul(W.T, x),
    "x @ W.T": lambda x, W: x @ W.T,
    "W @ x": lambda x, W: W @ x,
    "x.matmul(W)": lambda x, W: x.matmul(W),
    "x.matmul(other=W)": lambda x, W: x.matmul(other=W.T),
    "matmul(input=, other=)": lambda x, W: torch.matmul(input=x, other=W.T),
    "mm(x, W.T)": lambda x, W: torch.mm(x, W.T),
    "mm(W, mat2=x)": lambda x, W: torch.mm(W, mat2=x),
    "x.mm(W)": lambda x, W: x.mm(W),
    "mv(W, x)": lambda x, W: torch.mv(W, x),
    "mv(W.T, vec=x)": lambda x, W: torch.mv(W.T, vec=x),
    "x.mv(W)": lambda x, W: x.mv(W),
    "Tensor.__rmatmul__": lambda x, W: torch.Tensor.__rmatmul__(x, W),
    "linear(x, W)": lambda x, W: F.linear(x, W),
    "linear(x, W.T)": lambda x, W: F.linear(x, W.T),
    "linear(weight=W)": lambda x, W: F.linear(input=x, weight=W, bias=None),
}


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_shapes(way, shape):
    x = torch.randn(shape, dtype=W.dtype)
    agree(lambda: WAYS[way](x, W), lambda: WAYS[way](x, sparse(W)))


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("x_dtype", [*DTYPES, torch.int64, torch.bool, torch.complex64], ids=str)
@pytest.mark.parametrize("w_dtype", DTYPES, ids=str)
def test_dtype_errors(way, x_dtype, w_dtype):
    if x_dtype == w_dtype:
        return
    w = W.to(w_dtype)
    for shape in ((3,), (4,), (2, 3), (3, 4), (4, 3), (5, 2, 3), (5, 3, 4)):
        x = torch.ones(shape).to(x_dtype)
        want, want_error = outcome(lambda: WAYS[way](x, w))  # noqa: B023
        assert want_error is not None
        assert outcome(lambda: WAYS[way](x, sparse(w)))[1] == want_error  # noqa: B023


@pytest.mark.parametrize("w_shape", [(0, 3), (4, 0), (0, 0), (1, 1)], ids=str)
@pytest.mark.parametrize("way", WAYS)
def test_empty_weights(way, w_shape):
    w = torch.ones(w_shape, dtype=torch.float64)
    for shape in ((0,), (1,), (3,), (0, 0), (2, 0), (0, 3), (2, 3), (3, 4), (5, 2, 0), (0, 2, 3)):
        x = torch.ones(shape, dtype=torch.float64)
        agree(lambda: WAYS[way](x, w), lambda: WAYS[way](x, sparse(w)))  # noqa: B023


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_non_contiguous(dtype):
    w = random_dense(24, 32, dtype=dtype)
    for x in (
        torch.randn(32, 8, dtype=dtype).T,
        torch.randn(8, 64, dtype=dtype)[:, ::2],
        torch.randn(2, 32, 8, dtype=dtype).mT,
        torch.randn(8, 2, 32, dtype=dtype).transpose(0, 1),
        torch.randn(32, 1, dtype=dtype).squeeze().expand(3, 5, 32),
    ):
        got = sparsekern.matmul(x, sparse(w).T)
        torch.testing.assert_close(got, x @ w.T)
        assert got.is_contiguous()


def test_two_dense_arguments_go_to_torch():
    a, b = torch.randn(2, 3), torch.randn(3, 4)
    out = torch.empty(2, 4)
    assert torch.equal(sparsekern.matmul(a, b), a @ b)
    assert sparsekern.matmul(a, b, out=out) is out and torch.equal(out, a @ b)
    assert torch.equal(sparsekern.linear(a, b.T, b[0]), F.linear(a, b.T, b[0]))
    for call in (torch.matmul, sparsekern.matmul):
        with pytest.raises(RuntimeError, match=re.escape("(2x3 and 2x3)")):
            call(a, a)


# Errors


BIASES = {
    "none": None,
    "right": torch.ones(4, dtype=torch.float64),
    "short": torch.ones(3, dtype=torch.float64),
    "long": torch.ones(5, dtype=torch.float64),
    "float32": torch.ones(4),
    "int": torch.ones(4, dtype=torch.int32),
    "not a tensor": 1.0,
}


@pytest.mark.parametrize("shape", [(3,), (2, 3), (2, 4, 3), (0, 3)], ids=str)
@pytest.mark.parametrize("bias", BIASES.values(), ids=BIASES)
def test_bias(bias, shape):
    x = torch.randn(shape, dtype=torch.float64)
    if isinstance(bias, torch.Tensor) and bias.dtype != x.dtype:
        # torch broadcasts and promotes some of these; here they are refused.
        if outcome(lambda: F.linear(x, W, bias))[1] is None:
            with pytest.raises(NotImplementedError, match="linear: not supported with a Sparse"):
                F.linear(x, sparse(W), bias)
            return
    agree(lambda: F.linear(x, W, bias), lambda: F.linear(x, sparse(W), bias))


def test_bias_shapes_that_torch_broadcasts_are_refused():
    x = torch.randn(2, 3, dtype=torch.float64)
    for shape in ((), (1,), (2, 4)):
        with pytest.raises(NotImplementedError, match="linear: not supported with a Sparse"):
            F.linear(x, sparse(W), torch.ones(shape, dtype=torch.float64))


@pytest.mark.parametrize("wrong", [np.ones((2, 3)), 3.0, [[1.0]], None], ids=lambda v: type(v))
def test_not_a_tensor(wrong):
    for call in (
        lambda W: sparsekern.matmul(wrong, W.T),
        lambda W: sparsekern.matmul(W, wrong),
        lambda W: torch.mm(W, wrong),
        lambda W: torch.mv(W, wrong),
        lambda W: F.linear(wrong, W),
    ):
        want = outcome(lambda: call(W))[1]  # noqa: B023
        assert want is not None and outcome(lambda: call(sparse(W)))[1] == want  # noqa: B023


def test_numpy_operator():
    with pytest.raises(TypeError, match="must be Tensor, not numpy.ndarray"):
        np.ones((2, 3)) @ sparse(W).T
    with pytest.raises(TypeError, match="must be Tensor, not numpy.ndarray"):
        sparse(W) @ np.ones((3, 2))


def test_two_sparse_arguments():
    for call in (
        lambda: sparse(W) @ sparse(W).T,
        lambda: torch.matmul(sparse(W), sparse(W)),
        lambda: torch.mm(sparse(W), sparse(W)),
    ):
        with pytest.raises(NotImplementedError, match="expected a dense operand"):
            call()
    for call in (
        lambda: F.linear(sparse(W), W),
        lambda: F.linear(sparse(W), sparse(W)),
        lambda: F.linear(W, sparse(W), sparse(W)),
    ):
        with pytest.raises(NotImplementedError, match="linear: only the weight may be a Sparse"):
            call()


def test_what_torch_can_and_this_cannot():
    for x in (torch.ones(2, 3, dtype=torch.float64).to_sparse(), torch.ones(2, 3, device="meta")):
        with pytest.raises(NotImplementedError, match="matmul: not supported with a SparseTensor"):
            torch.matmul(x.double(), sparse(W).T)


def test_other_functions_raise_torchs_type_error():
    for call in (torch.add, torch.bmm, torch.Tensor.add):
        with pytest.raises(TypeError, match="Multiple dispatch failed|no implementation found"):
            call(W, sparse(W))


# out=


OUTS = {
    "right": lambda: torch.empty(2, 4, dtype=torch.float64),
    "strided": lambda: torch.empty(4, 2, dtype=torch.float64).T,
    "to be resized": lambda: torch.empty(0, dtype=torch.float64),
    "wrong shape": lambda: torch.empty(3, 3, dtype=torch.float64),
    "wrong dtype": lambda: torch.empty(2, 4),
    "other device": lambda: torch.empty(2, 4, dtype=torch.float64, device="meta"),
    "requires grad": lambda: torch.empty(2, 4, dtype=torch.float64, requires_grad=True),
    "not a tensor": lambda: 3,
}
OUT_WAYS = {
    "x @ W.T": (lambda out, W: torch.matmul(torch.ones(2, 3).double(), W.T, out=out)),
    "W @ x": (lambda out, W: torch.matmul(W.T, torch.ones(4, 4).double(), out=out)),
    "mm": (lambda out, W: torch.mm(torch.ones(2, 3).double(), W.T, out=out)),
    "mv": (lambda out, W: torch.mv(W, torch.ones(3).double(), out=out)),
    "v @ W": (lambda out, W: torch.matmul(torch.ones(4).double(), W, out=out)),
    "batch": (lambda out, W: torch.matmul(torch.ones(2, 1, 3).double(), W.T, out=out)),
    "W @ batch": (lambda out, W: torch.matmul(W, torch.ones(2, 3, 4).double(), out=out)),
}


@pytest.mark.parametrize("way", OUT_WAYS)
@pytest.mark.parametrize("kind", OUTS)
def test_out(kind, way):
    def call(W):
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            out = OUTS[kind]()
            result, error = outcome(lambda: OUT_WAYS[way](out, W))
        if error is None:
            assert result is out
        # An `out` that is not a tensor fails before W is asked: the text lists the given types.
        error = error and error.replace("SparseTensor", "Tensor")
        return result, error, [str(w.message) for w in caught]

    want, got = call(W), call(sparse(W))
    assert got[1:] == want[1:]
    if want[0] is not None and want[0].device.type == "cpu":
        torch.testing.assert_close(got[0], want[0])
        assert got[0].stride() == want[0].stride()


def test_out_with_gradients():
    x, out = torch.ones(2, 3, dtype=torch.float64), torch.empty(2, 4, dtype=torch.float64)
    text = re.escape("matmul(): functions with out=... arguments don't support automatic")
    for x_grad, w_grad in ((True, False), (False, True)):
        w = W.clone().requires_grad_(w_grad)
        with pytest.raises(RuntimeError, match=text):
            sparsekern.matmul(x.clone().requires_grad_(x_grad), sparse(w).T, out=out)
    with torch.no_grad():
        sparsekern.matmul(x.clone().requires_grad_(), sparse(W).T, out=out)
    torch.testing.assert_close(out, x @ W.T)


def test_out_may_be_the_operand():
    w = random_dense(3, 3)
    x = torch.randn(2, 3, dtype=torch.float64)
    want = x @ w
    sparsekern.matmul(x, sparse(w), out=x)
    torch.testing.assert_close(x, want)


# Autocast


@pytest.mark.parametrize("x_dtype", DTYPES, ids=str)
@pytest.mark.parametrize("w_dtype", DTYPES, ids=str)
@pytest.mark.parametrize("way", WAYS)
def test_autocast(way, w_dtype, x_dtype):
    w = W.to(w_dtype)
    for shape in ((3,), (4,), (2, 3), (3, 4), (5, 2, 3), (5, 3, 4)):
        x = torch.randn(shape, dtype=torch.float64).to(x_dtype)
        for dtype in (torch.bfloat16, torch.float16):
            with torch.autocast("cpu", dtype):
                agree(lambda: WAYS[way](x, w), lambda: WAYS[way](x, sparse(w)))  # noqa: B023


def test_autocast_gradients_and_bias():
    w = W.float().requires_grad_()
    Ws = sparse(w)
    x, bias = torch.randn(2, 3, requires_grad=True), torch.randn(4, requires_grad=True)
    with torch.autocast("cpu", torch.bfloat16):
        y = F.linear(x, Ws, bias)
    assert y.dtype == torch.bfloat16
    y.float().sum().backward()
    assert {t.grad.dtype for t in (x, bias, Ws.values)} == {torch.float32}
    with torch.autocast("cpu", torch.bfloat16):
        want = F.linear(x, w, bias)
    torch.testing.assert_close(y, want)
    torch.testing.assert_close(Ws.values.grad, torch.autograd.grad(want.sum(), w)[0][w != 0])


def test_autocast_out():
    x, out = torch.ones(2, 3), torch.empty(2, 4)
    with torch.autocast("cpu", torch.bfloat16):
        sparsekern.matmul(x, sparse(W.float()).T, out=out)
    torch.testing.assert_close(out, x @ W.float().T)


# Numbers


def test_nan_and_inf_in_values_reach_the_result():
    w = torch.tensor([[0.0, torch.nan, 1.0], [torch.inf, 0.0, 2.0]])
    y = sparsekern.matmul(torch.ones(1, 3), sparse(w).T)
    assert y[0, 0].isnan() and y[0, 1].isinf()


def test_explicit_zeros_have_gradients():
    W = SparseTensor.from_dense(torch.zeros(4, 3), torch.ones(4, 3, dtype=torch.bool))
    W.values.requires_grad_()
    sparsekern.matmul(torch.ones(2, 3), W.T).sum().backward()
    assert torch.equal(W.values.grad, torch.full((12,), 2.0))


# torch.compile, torch.export, functorch


def everything(x, W, bias):
    """All the ways at once, through captured or given W."""
    y = torch.matmul(x, W.T) + x @ W.T + F.linear(x, W, bias) + sparsekern.linear(x, W, bias)
    return y.sin().sum() + torch.matmul(W, x.mT).cos().sum() + (y @ W).sum()


@pytest.mark.parametrize("backend", ["aot_eager", "inductor"])
def test_compile(backend):
    torch._dynamo.reset()
    w = W.clone().requires_grad_()
    Ws = sparse(w)
    x, bias = (torch.randn(s, dtype=w.dtype, requires_grad=True) for s in ((2, 5, 3), (4,)))
    got = torch.compile(everything, fullgraph=True, backend=backend)(x, Ws, bias)
    want = everything(x, w, bias)
    torch.testing.assert_close(got, want)
    grads = torch.autograd.grad(got, (x, bias, Ws.values))
    x_grad, bias_grad, w_grad = torch.autograd.grad(want, (x, bias, w))
    torch.testing.assert_close(grads, (x_grad, bias_grad, w_grad[w != 0]))


def test_compile_keeps_the_order_of_the_operator():
    """Dynamo hands W @ x over as x @ W, which fits too where the shapes are square."""
    w = random_dense(3, 3)
    Ws, x = sparse(w), torch.randn(3, 3, dtype=w.dtype)

    def compiled(f, **kwargs):
        torch._dynamo.reset()
        return torch.compile(f, backend="aot_eager", **kwargs)(x, Ws)

    torch.testing.assert_close(compiled(lambda x, W: W @ x), w @ x)
    torch.testing.assert_close(compiled(lambda x, W: x @ W), x @ w)
    for f, want in ((lambda x, W: torch.matmul(W, x), w @ x), (torch.matmul, x @ w)):
        torch.testing.assert_close(compiled(f, fullgraph=True), want)
    for f in (lambda x, W: W @ x, lambda x, W: x @ W):
        with pytest.raises(Exception, match="write torch.matmul|NotImplementedError"):
            compiled(f, fullgraph=True)


def test_compile_does_not_recompile_for_new_values():
    torch._dynamo.reset()
    counter = torch._dynamo.testing.CompileCounter()
    f = torch.compile(lambda x, W: x @ W.T, fullgraph=True, backend=counter)
    x = torch.randn(2, 3, dtype=torch.float64)
    for _ in range(3):
        w = torch.where(W != 0, torch.randn_like(W), 0)
        torch.testing.assert_close(f(x, sparse(w)), x @ w.T)
    assert counter.frame_count == 1


def test_compile_under_autocast():
    torch._dynamo.reset()
    x, w = torch.randn(2, 3), W.float()
    f = torch.compile(lambda x, W: x @ W.T, fullgraph=True, backend="aot_eager")
    with torch.autocast("cpu", torch.bfloat16):
        torch.testing.assert_close(f(x, sparse(w)), x @ w.T)


@pytest.mark.parametrize("strict", [False, True])
def test_export(strict):
    class Both(torch.nn.Module):
        def forward(self, x):
            return x @ Ws.T @ Ws + (Ws.T @ (Ws @ x.mT)).mT

    w = random_dense(3, 3)
    Ws = sparse(w)
    batch = torch.export.Dim("batch", min=1, max=64)
    x = torch.randn(4, 2, 3, dtype=w.dtype)
    program = torch.export.export(Both(), (x,), dynamic_shapes=({0: batch},), strict=strict)
    for size in (1, 6):
        x = torch.randn(size, 2, 3, dtype=w.dtype)
        torch.testing.assert_close(program.module()(x), 2 * x @ w.T @ w)


def test_vmap_and_func_grad():
    Ws = sparse(W)
    x, bias = torch.randn(5, 2, 3, dtype=W.dtype), torch.randn(5, 4, dtype=W.dtype)
    torch.testing.assert_close(vmap(lambda x: x @ Ws.T)(x), x @ W.T)
    torch.testing.assert_close(vmap(lambda x: Ws @ x)(x.mT), W @ x.mT)
    want = F.linear(x, W) + bias[:, None]
    torch.testing.assert_close(vmap(lambda x, b: F.linear(x, Ws, b))(x, bias), want)
    want = F.linear(x[0], W) + bias[:, None]
    torch.testing.assert_close(vmap(lambda b: F.linear(x[0], Ws, b))(bias), want)
    got = grad(lambda x: (x @ Ws.T).sin().sum())(x)
    torch.testing.assert_close(got, grad(lambda x: (x @ W.T).sin().sum())(x))


def test_double_backward():
    x = torch.randn(2, 5, 3, dtype=torch.float64, requires_grad=True)
    pattern = sparse(W)
    values = pattern.values.clone().requires_grad_()
    bias = torch.randn(4, dtype=torch.float64, requires_grad=True)

    def f(x, values, bias):
        Ws = SparseTensor(pattern.row_offsets, pattern.col_indices, values, W.shape)
        return F.linear(x, Ws, bias) @ Ws

    assert torch.autograd.gradcheck(f, (x, values, bias))
    assert torch.autograd.gradgradcheck(f, (x, values, bias))


def test_inference_mode():
    with torch.inference_mode():
        y = F.linear(torch.ones(2, 3, dtype=W.dtype), sparse(W), torch.ones(4, dtype=W.dtype))
    assert y.is_inference()
