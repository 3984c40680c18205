"""Forward-mode autograd: tangents through all ops, rows and dtypes, against the dense twin."""

import pytest
import torch
from conftest import random_dense
from torch.autograd import forward_ad

import sparsekern
from sparsekern import SparseLinear, SparseTensor, ops
from sparsekern.kernels import table

N, K, M = 6, 9, 5
OPS = ("spmm", "spmm_t", "sddmm")
TOLERANCE = {torch.float64: 1e-12, torch.float32: 1e-5, torch.bfloat16: 0.05, torch.float16: 0.01}
ROWS = sorted({(row.name, row.op) for row in table.KERNELS if row.device in (None, "cpu")})


def calls(w: torch.Tensor):
    """op -> (ours, the dense twin, operands); both take values, x and bias, or dy and x."""
    W = SparseTensor.from_dense(w)
    ro, ci, places = W.row_offsets, W.col_indices, (w != 0).nonzero(as_tuple=True)
    x, dy = torch.randn(M, K, dtype=w.dtype), torch.randn(M, N, dtype=w.dtype)

    def dense(values):
        return torch.zeros(N, K, dtype=values.dtype).index_put(places, values)

    return {
        "spmm": (
            lambda v, x, b: ops.spmm(ro, ci, v, N, K, x, b),
            lambda v, x, b: x @ dense(v).T + b,
            (W.values, x, torch.randn(N, dtype=w.dtype)),
        ),
        "spmm_t": (
            lambda v, dy, b: ops.spmm_t(ro, ci, v, N, K, dy, b),
            lambda v, dy, b: dy @ dense(v) + b,
            (W.values, dy, torch.randn(K, dtype=w.dtype)),
        ),
        "sddmm": (
            lambda dy, x: ops.sddmm(ro, ci, N, K, dy, x),
            lambda dy, x: (dy.T @ x)[places],
            (dy, x),
        ),
    }


def tangent_of(function, primals, tangents):
    with forward_ad.dual_level():
        duals = [
            p if t is None else forward_ad.make_dual(p, t)
            for p, t in zip(primals, tangents, strict=True)
        ]
        return forward_ad.unpack_dual(function(*duals))


@pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
@pytest.mark.parametrize("row,op", ROWS)
def test_dual_tensors(row, op, dtype, fresh_table):
    """Each operand alone and all together, whether they require grad or not."""
    fresh_table.setenv("SPARSEKERN_KERNEL", row)
    ours, dense, primals = calls(random_dense(N, K, dtype=dtype))[op]
    try:
        ours(*primals)
    except ValueError as error:
        pytest.skip(str(error))
    all_tangents = [torch.randn_like(p) for p in primals]
    alone = [
        [t if i == j else None for j, t in enumerate(all_tangents)] for i in range(len(primals))
    ]
    for tangents in (all_tangents, *alone):
        for requires_grad in (False, True):
            operands = [p.detach().requires_grad_(requires_grad) for p in primals]
            got = tangent_of(ours, operands, tangents)
            want = tangent_of(
                dense,
                [p.double() for p in primals],
                [None if t is None else t.double() for t in tangents],
            )
            for a, b in zip(got, want, strict=True):
                torch.testing.assert_close(
                    a.double(), b, rtol=TOLERANCE[dtype], atol=TOLERANCE[dtype]
                )
            with torch.no_grad():
                assert torch.equal(tangent_of(ours, operands, tangents).tangent, got.tangent)


@pytest.mark.parametrize("op", OPS)
def test_gradcheck_in_forward_mode(op):
    ours, _, primals = calls(random_dense(N, K))[op]
    primals = [p.requires_grad_() for p in primals]
    assert torch.autograd.gradcheck(
        ours, primals, check_forward_ad=True, check_batched_forward_grad=True
    )
    assert torch.autograd.gradgradcheck(ours, primals, check_fwd_over_rev=True)


@pytest.mark.parametrize("op", OPS)
def test_gradcheck_in_float32(op):
    """The rows of float32 are others than those of float64."""
    ours, _, primals = calls(random_dense(N, K, dtype=torch.float32))[op]
    primals = [p.requires_grad_() for p in primals]
    assert torch.autograd.gradcheck(
        ours, primals, check_forward_ad=True, eps=1e-2, atol=2e-2, rtol=1e-2, nondet_tol=0
    )


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize("op", OPS)
def test_functions_of_torch_func(op, dtype):
    ours, dense, primals = calls(random_dense(N, K, dtype=dtype))[op]
    tangents = tuple(torch.randn_like(p) for p in primals)
    close = dict(rtol=TOLERANCE[dtype], atol=TOLERANCE[dtype])
    torch.testing.assert_close(
        torch.func.jvp(ours, primals, tangents), torch.func.jvp(dense, primals, tangents), **close
    )
    got, want = (torch.func.linearize(f, *primals)[1](*tangents) for f in (ours, dense))
    torch.testing.assert_close(got, want, **close)
    got, want = (torch.func.jacfwd(f, argnums=(0, 1))(*primals) for f in (ours, dense))
    torch.testing.assert_close(got, want, **close)

    def loss(f):
        return lambda *args: f(*args).sin().sum()

    got, want = (torch.func.hessian(loss(f), argnums=(0, 1))(*primals) for f in (ours, dense))
    torch.testing.assert_close(got, want, **close)


@pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
def test_frozen_module(dtype):
    linear = torch.nn.Linear(K, N, dtype=dtype)
    mask = torch.rand(N, K) < 0.5
    with torch.no_grad():
        linear.weight *= mask
    layer = SparseLinear.from_linear(linear, mask).requires_grad_(False)
    x, t = torch.randn(M, K, dtype=dtype), torch.randn(M, K, dtype=dtype)
    got, want = (tangent_of(f, [x], [t]).tangent for f in (layer, linear))
    torch.testing.assert_close(got, want, rtol=TOLERANCE[dtype], atol=TOLERANCE[dtype])


def test_matmul_in_all_forms():
    w = random_dense(N, K)
    W = SparseTensor.from_dense(w)
    x, dy = torch.randn(2, M, K, dtype=w.dtype), torch.randn(M, N, dtype=w.dtype)
    for ours, dense, operand in (
        (lambda x: torch.matmul(x, W.T), lambda x: x @ w.T, x),
        (lambda x: torch.matmul(x, W), lambda x: x @ w, dy),
        (lambda x: torch.matmul(W, x), lambda x: w @ x, x.mT.contiguous()),
        (lambda x: sparsekern.linear(x, W), lambda x: x @ w.T, x[0, 0]),
    ):
        tangent = torch.randn_like(operand)
        got, want = (tangent_of(f, [operand], [tangent]) for f in (ours, dense))
        torch.testing.assert_close(tuple(got), tuple(want))


def test_second_order_of_a_network():
    """The case of the finding: hessian is forward over reverse."""
    w = random_dense(N, K)
    W = SparseTensor.from_dense(w)
    x = torch.randn(K, dtype=w.dtype)
    got, want = (
        torch.func.hessian(lambda x, f=f: f(x).tanh().pow(2).sum())(x)
        for f in (lambda x: torch.matmul(W, x), lambda x: w @ x)
    )
    torch.testing.assert_close(got, want)


def test_a_tangent_that_an_op_would_lose_is_refused():
    """A graph that was compiled without one calls the op, past all that carries tangents on."""
    w = SparseTensor.from_dense(torch.eye(4))
    x, t = torch.randn(3, 4), torch.randn(3, 4)
    compiled = torch.compile(lambda x: x @ w.T, backend="aot_eager")
    assert torch.equal(compiled(x), x)
    parts = w.row_offsets, w.col_indices
    for call in (
        compiled,
        lambda x: torch.ops.sparsekern.spmm(*parts, w.values, 4, 4, x),
        lambda x: torch.ops.sparsekern.spmm_t(*parts, w.values, 4, 4, x),
        lambda x: torch.ops.sparsekern.sddmm(*parts, 4, 4, x, x),
    ):
        with forward_ad.dual_level():
            with pytest.raises(NotImplementedError, match="an operand has a tangent"):
                call(forward_ad.make_dual(x, t))
            call(x)
    with forward_ad.dual_level():
        y = torch.matmul(forward_ad.make_dual(x, t), w.T)
        assert torch.equal(forward_ad.unpack_dual(y).tangent, t)


@pytest.mark.parametrize("transposed", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
def test_forward_over_reverse_without_a_graph(dtype, transposed):
    """autograd.grad inside a dual level: all the gradients have tangents."""
    w, x, t = (torch.randn(5, 5, dtype=dtype) for _ in range(3))
    W = SparseTensor.from_dense(w).requires_grad_()

    def tangents(W, leaf):
        with forward_ad.dual_level():
            dual = forward_ad.make_dual(x.clone().requires_grad_(), t)
            y = torch.matmul(dual, W if transposed else W.T)
            gradients = torch.autograd.grad(y.pow(2).sum(), (dual, leaf))
            return [forward_ad.unpack_dual(g).tangent.flatten() for g in gradients]

    w.requires_grad_()
    torch.testing.assert_close(tangents(W, W.values), tangents(w, w))
