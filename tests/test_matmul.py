"""matmul and linear against torch's own on the dense twin: results, gradients and error texts."""

import operator
import re
import warnings

import numpy as np
import pytest
import torch
import torch._dynamo.testing  # not brought by torch._dynamo
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

FAMILY = (
    *("matmul", "__rmatmul__", "mm", "mv", "addmm", "addmv", "nn.functional.linear", "einsum"),
    *("inner", "tensordot", "linalg.multi_dot", "chain_matmul"),
)


def samples():
    """Each sample of the family with a 2-D operand, once for each such operand. By the function
    below `sample_inputs`, which would search the stack for a test a hundred times."""
    torch.manual_seed(0)
    for op in op_db:
        if op.name not in FAMILY or op.variant_test_name:
            continue
        for dtype in DTYPES:
            for i, sample in enumerate(op.sample_inputs_func(op, "cpu", dtype, False)):
                arguments = [sample.input, *sample.args]
                for position, t in enumerate(flatten(arguments)):
                    # The summand of addmm is no factor.
                    if t.ndim == 2 and not (op.name == "addmm" and position == 0):
                        name = f"{op.name}-{str(dtype)[6:]}-{i}-{position}"
                        yield pytest.param(op, arguments, sample.kwargs, position, id=name)


def flatten(a) -> list:
    if isinstance(a, (list, tuple)):
        return [t for part in a for t in flatten(part)]
    return [a] if isinstance(a, torch.Tensor) else []


def replaced(a, tensors):
    """`a` with its tensors replaced, in order, by those of an iterator."""
    if isinstance(a, (list, tuple)):
        return type(a)(replaced(part, tensors) for part in a)
    return next(tensors) if isinstance(a, torch.Tensor) else a


def holes(w):
    """w with some zeros in it."""
    return torch.where(torch.rand(w.shape) < 0.6, w, 0)


def assert_as_good(got, want, truth, scale):
    """At most twice the error of torch's own, and a few roundings of the sum of absolute values."""
    assert got.shape == want.shape and got.dtype == want.dtype
    if got.numel():
        ours, torchs = ((t.double() - truth).abs() for t in (got, want))
        limit = 2 * torchs.max() + 4 * torch.finfo(got.dtype).eps * scale.max()
        assert ours.max() <= limit


@pytest.mark.parametrize("op, arguments, kwargs, position", samples())
def test_op_db(op, arguments, kwargs, position):
    """Results, gradients and out= of one sparse operand, against the dense twin and float64."""
    tensors = flatten(arguments)
    tensors[position] = holes(tensors[position])

    def run(tensors, h=None):
        tensors = [t.detach().requires_grad_() for t in tensors]
        leaves = list(tensors)
        if h is None:  # ours
            tensors[position] = sparse(tensors[position])
            leaves[position] = tensors[position].values
        y = op.op(*replaced(arguments, iter(tensors)), **kwargs)
        grads = torch.autograd.grad(y, leaves, upstream if h is None else h)
        grads = list(grads)
        if h is not None:
            grads[position] = grads[position][at]
        return y, *grads

    at = tensors[position] != 0
    shape = op.op(*replaced(arguments, iter(tensors)), **kwargs)
    upstream = torch.randn_like(shape)
    got, want = run(tensors), run(tensors, upstream)
    truth = run([t.double() for t in tensors], upstream.double())
    scale = run([t.double().abs() for t in tensors], upstream.double().abs())
    for quadruple in zip(got, want, truth, scale, strict=True):
        assert_as_good(*quadruple)
    if op.supports_out:
        with torch.no_grad():
            out = torch.empty_like(shape)
            tensors[position] = sparse(tensors[position])
            assert op.op(*replaced(arguments, iter(tensors)), **kwargs, out=out) is out
            torch.testing.assert_close(out, got[0])


def test_the_family_is_in_the_op_db():
    assert {op.name for op in op_db} >= set(FAMILY) - {"chain_matmul"}


def test_chain_matmul():
    a, b, c = (random_dense(4, 4) for _ in range(3))
    for mixed in (
        (a, sparse(b), c),
        (sparse(a), b, c),
        (a, b, sparse(c)),
        (sparse(a), sparse(b), c),
    ):
        torch.testing.assert_close(torch.chain_matmul(*mixed), a @ b @ c)
        torch.testing.assert_close(torch.linalg.multi_dot([*mixed, a[0]]), a @ b @ c @ a[0])
        torch.testing.assert_close(torch.linalg.multi_dot([a[0], *mixed]), a[0] @ a @ b @ c)
    with pytest.raises(RuntimeError, match="multi_dot"):
        torch.linalg.multi_dot([a[:, :3], sparse(b)])


# Sums over indices


EQUATIONS = """ij,bj->bi ij,bj bij,jk->bik bij,kj->bki ij,j->i ij,i ij,ij-> ij,ij->i ij,ij->j
ij,ij->ij ij,jb->ijb ij,b->ijb ij,b->b ij,b->ib bi,ij->jb bij,ij->b bij,ij->bj bij,ij->bi ij->
ij->j ij->i ij->ij ij->ji ij,bb->i ij,jj->i ij,bjj->bi ...j,ij->...i ...ij,jk->...ik
i...,ij->...j ij,->ij ij,ba->abij""".split()
SIZES = {"wide": (4, 5, 3, 2, 6), "square": (3, 3, 3, 3, 3), "empty": (4, 0, 2, 3, 1)}


@pytest.mark.parametrize("equation", EQUATIONS)
@pytest.mark.parametrize("sizes", SIZES)
def test_einsum(equation, sizes):
    size = dict(zip("ijkab", SIZES[sizes], strict=True))
    terms = equation.split("->")[0].split(",")
    at = next(i for i, term in enumerate(terms) if term in ("ij", "jk", "kj"))
    shapes = [[size[c] for c in term.replace("...", "ab")] for term in terms]
    dense = [torch.randn(s, dtype=torch.float64) for s in shapes]
    dense[at] = holes(dense[at])
    for transposed in (False, True):
        twins = [t.clone().requires_grad_() for t in dense]
        W = sparse(twins[at].T if transposed else twins[at])
        W.values.requires_grad_()
        mixed = list(twins)
        mixed[at] = W.T if transposed else W
        got, want = torch.einsum(equation, *mixed), torch.einsum(equation, *twins)
        torch.testing.assert_close(got, want)
        h = torch.randn_like(want)
        (want_grad,) = torch.autograd.grad(want, twins[at], h, retain_graph=True)
        (got_grad,) = torch.autograd.grad(got, W.values, h)
        pattern = mixed[at]._coordinates()
        torch.testing.assert_close(got_grad, want_grad[pattern])


def test_einsum_errors_are_torchs():
    W, x = random_dense(4, 5), torch.randn(5, 3, dtype=torch.float64)
    for equation, other in (
        ("ij,jk->iz", x),
        ("ij,jk->ikk", x),
        ("ij,ik->jk", x),
        ("ijk,jk->i", x),
        ("ij", x),
        ("ij,jk->ik", x.float()),
        ("i j, jk -> ik", x.T),
    ):
        agree(
            lambda: torch.einsum(equation, W, other),  # noqa: B023
            lambda: torch.einsum(equation, sparse(W), other),  # noqa: B023
        )
    with pytest.raises(NotImplementedError, match="the diagonal of a SparseTensor"):
        torch.einsum("ii->", sparse(random_dense(3, 3)))


@pytest.mark.parametrize(
    "dims", [0, 1, 2, ([1], [0]), ([0], [1]), ([-1, 0], [0, 1]), ([0], [0])], ids=str
)
def test_tensordot(dims):
    w = random_dense(4, 4)
    for x in (torch.randn(4, 4, dtype=w.dtype), torch.randn(4, 4, 4, dtype=w.dtype)):
        for a, b in ((w, x), (x, w)):
            ours = [sparse(t) if t is w else t for t in (a, b)]
            want = torch.tensordot(a, b, dims)
            torch.testing.assert_close(torch.tensordot(*ours, dims), want, check_stride=True)
            out = torch.empty_like(want)
            assert torch.tensordot(*ours, dims, out=out) is out
            torch.testing.assert_close(out, want)
    with pytest.raises(RuntimeError):
        torch.tensordot(sparse(w), x, 3)


# Products with a summand


ADDED = {
    "addmm(x, W)": lambda i, x, W, **kw: torch.addmm(i, x, W, **kw),
    "addmm(W, x)": lambda i, x, W, **kw: torch.addmm(i, W.T, x.T, **kw),
    "Tensor.addmm": lambda i, x, W, **kw: i.addmm(x, W, **kw),
    "sparse.addmm": lambda i, x, W, **kw: (
        torch.sparse.addmm if isinstance(W, SparseTensor) else torch.addmm
    )(i, W.T, x.T, **kw),
    "addmv": lambda i, x, W, **kw: torch.addmv(i, W, x[0], **kw),
    "Tensor.addmv": lambda i, x, W, **kw: i.addmv(W, x[0], **kw),
}
SUMMANDS = [(), (1,), (4,), (1, 1), (4, 4), (1, 4), (4, 1), (3,), (2, 4, 4)]


@pytest.mark.parametrize(
    "scales", [{}, {"beta": 0.5, "alpha": 2}, {"beta": 0}, {"alpha": 0}], ids=str
)
@pytest.mark.parametrize("way", ADDED)
@pytest.mark.parametrize("shape", SUMMANDS, ids=str)
def test_summands(way, shape, scales):
    w = random_dense(4, 4)
    x, summand = torch.randn(4, 4, dtype=w.dtype), torch.randn(shape, dtype=w.dtype)
    if scales.get("beta") == 0 and shape:
        summand = summand * torch.nan  # does not count
    agree(
        lambda: ADDED[way](summand, x, w, **scales),
        lambda: ADDED[way](summand, x, sparse(w), **scales),
    )


@pytest.mark.parametrize("way", ["addmm(x, W)", "addmv", "addmm(W, x)"])
def test_summands_of_other_dtypes_and_autocast(way):
    call = ADDED[way]
    for w_dtype in DTYPES:
        for dtype in DTYPES:
            w, x = random_dense(4, 4).to(w_dtype), torch.randn(4, 4).to(w_dtype)
            summand = torch.randn(4).to(dtype)
            if dtype != w_dtype:
                agree(lambda: call(summand, x, w), lambda: call(summand, x, sparse(w)))  # noqa: B023
            with torch.autocast("cpu", torch.bfloat16):
                want, want_error = outcome(lambda: call(summand, x, w))  # noqa: B023
                got, error = outcome(lambda: call(summand, x, sparse(w)))  # noqa: B023
            assert error == want_error
            if want is not None:
                torch.testing.assert_close(got, want, rtol=2e-2, atol=2e-2)


def test_summands_in_place():
    w, x = random_dense(4, 4), torch.randn(4, 4, dtype=torch.float64)
    y, z = x.clone(), x[0].clone()
    assert y.addmm_(x, sparse(w), beta=2) is y and z.addmv_(sparse(w), x[1]) is z
    torch.testing.assert_close(y, 2 * x + x @ w)
    torch.testing.assert_close(z, x[0] + w @ x[1])
    agree(lambda: x[0].clone().addmm_(x, w), lambda: x[0].clone().addmm_(x, sparse(w)))


def test_linear_of_a_sparse_input():
    x, w, b = random_dense(4, 5), torch.randn(3, 5, dtype=torch.float64), torch.randn(3).double()
    for bias in (None, b):
        agree(lambda: F.linear(x, w, bias), lambda: F.linear(sparse(x), w, bias))  # noqa: B023
        agree(lambda: F.linear(x, w[0]), lambda: F.linear(sparse(x), w[0]))
        agree(lambda: F.linear(x, w.T, bias), lambda: F.linear(sparse(x), w.T, bias))  # noqa: B023


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
        w = w.detach().requires_grad_(len(shape) == 3)  # torch has other words there
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


@pytest.mark.parametrize("shape", [(0, 3), (2, 0, 3), (0, 2, 3), (1, 0, 2, 3)], ids=str)
def test_gradients_of_no_tokens(shape):
    """Of any of the operands, of the others when these are frozen too."""
    for needs in range(1, 8):
        values, x, bias = sparse(W).values, torch.randn(shape).double(), torch.randn(4).double()
        leaves = [t for i, t in enumerate((values, x, bias)) if needs >> i & 1]
        w = sparse(W)._with_values(values, False)
        for t in leaves:
            t.requires_grad_()
        y = F.linear(x, w, bias)
        for leaf, gradient in zip(leaves, torch.autograd.grad(y.sum(), leaves), strict=True):
            assert torch.equal(gradient, torch.zeros_like(leaf))


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
        lambda w: w @ w.T,
        lambda w: torch.matmul(w.T, w),
        lambda w: torch.mm(w, w.T),
        lambda w: w.matmul(w.T),
    ):
        got = call(sparse(W))
        assert isinstance(got, SparseTensor)
        torch.testing.assert_close(got.to_dense(), call(W))
    for call in (lambda: F.linear(sparse(W), sparse(W)), lambda: F.linear(W, sparse(W), sparse(W))):
        with pytest.raises(NotImplementedError, match="linear: only one of input and weight may"):
            call()
    with pytest.raises(NotImplementedError, match="matmul: out= takes no product of two Sparse"):
        torch.matmul(sparse(W), sparse(W).T, out=torch.empty(0, dtype=W.dtype))


def test_what_torch_can_and_this_cannot():
    for x in (torch.ones(2, 3, dtype=torch.float64).to_sparse(), torch.ones(2, 3, device="meta")):
        with pytest.raises(NotImplementedError, match="matmul: not supported with a SparseTensor"):
            torch.matmul(x.double(), sparse(W).T)


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
    y = sparsekern.matmul(torch.ones(1, 3), SparseTensor.from_dense(w, w != 0).T)
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


@pytest.mark.parametrize("fullgraph", [True, False])
@pytest.mark.parametrize("shape", [(3, 3), (2, 3)], ids=str)
def test_compile_keeps_the_order_of_the_operator(shape, fullgraph):
    """Dynamo hands W @ x over as x @ W, which fits too where the shapes are square."""
    w = random_dense(3, 3)
    Ws, x = sparse(w), torch.randn(shape, dtype=w.dtype)
    reflected = torch._dynamo.variables.builtin.BUILTIN_TO_TENSOR_RFN_MAP
    for f in (
        lambda x, W: x @ W,
        lambda x, W: W @ x.mT,
        lambda x, W: (W @ (x @ W.T).mT).mT @ W,
        lambda x, W: W.T @ x[0],
        lambda x, W: x[0] @ W.T,
        lambda x, W: W @ x.mT[None],
        lambda x, W: torch.matmul(W, x.mT),
        lambda x, W: W.mm(x.mT) + W.matmul(x.mT) + x.matmul(W).mT,
    ):
        reflected.pop(operator.matmul, None)  # as before the first compilation
        torch._dynamo.reset()
        compiled = torch.compile(f, backend="eager", fullgraph=fullgraph)
        torch.testing.assert_close(compiled(x, Ws), f(x, w))
        torch.testing.assert_close(compiled(x[:1], Ws), f(x[:1], w))


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
