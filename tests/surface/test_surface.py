"""What torch offers on a sparse matrix, on a SparseTensor: the dense twin's value, or words."""

import copy
import io
import math
import operator
import pickle
import re
import weakref

import numpy as np
import pytest
import torch
from conftest import random_dense, sparse
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

import sparsekern
from sparsekern import SparseTensor
from sparsekern.tensor import TORCH_FUNCTIONS

DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)
W = random_dense(4, 5)
V = random_dense(4, 5)
X = torch.randn(4, 5, dtype=torch.float64)


def dense(t):
    return t.to_dense() if isinstance(t, SparseTensor) else t


def check(call, *weights, is_sparse=None):
    """call(*weights) on dense twins and on SparseTensors, as they are and as transposes: the same
    values and the same gradients at the stored places."""
    for transposed in (False, True):
        twins = [w.detach().requires_grad_() for w in weights]
        ours = [sparse(w.detach().T if transposed else w.detach()) for w in twins]
        for s in ours:
            s.requires_grad_()
        got = call(*(s.T if transposed else s for s in ours))
        want = call(*twins)
        assert is_sparse is None or isinstance(got, SparseTensor) == is_sparse
        torch.testing.assert_close(dense(got), want)
        if want.requires_grad and want.dtype == torch.float64:
            h = torch.randn_like(want)
            want_grads = torch.autograd.grad(want, twins, h, materialize_grads=True)
            values = [s.values for s in ours]
            got_grads = torch.autograd.grad(dense(got), values, h, materialize_grads=True)
            for w, ds, s in zip(want_grads, got_grads, ours, strict=True):
                at = (w.T if transposed else w)[s._coordinates()]
                torch.testing.assert_close(ds, at)


# Element by element


SPARSE_RESULTS = {
    "W + V": lambda a, b: a + b,
    "W - V": lambda a, b: a - b,
    "W * V": lambda a, b: a * b,
    "add alpha": lambda a, b: torch.add(a, b, alpha=2.5),
    "sub alpha": lambda a, b: a.sub(b, alpha=-0.5),
    "W * mask": lambda a, b: a * (X > 0),
    "mask * W": lambda a, b: (X > 0) * a,
    "W * row": lambda a, b: a * X[0],
    "W * column": lambda a, b: X[:, :1] * a,
    "W * 2": lambda a, b: a * 2,
    "2 * W": lambda a, b: 2 * a,
    "W * 0-dim": lambda a, b: a * torch.tensor(3.0),
    "W / 2": lambda a, b: a / 2,
    "div floor": lambda a, b: torch.div(a, 0.3, rounding_mode="floor").detach(),
    "W ** 2": lambda a, b: a**2,
    "pow": lambda a, b: torch.pow(a, 3),
    "-W": lambda a, b: -a,
    "+W": lambda a, b: +a,
    "abs(W)": lambda a, b: abs(a),
    "relu": lambda a, b: a.relu(),
    "F.relu": lambda a, b: nn.functional.relu(a),
    "clone": lambda a, b: a.clone(),
    "W[1:3]": lambda a, b: a[1:3],
    "W[1:, :-1]": lambda a, b: a[1:, :-1],
    "W[3:1]": lambda a, b: a[3:1],
    "t": lambda a, b: a.t(),
    "torch.t": lambda a, b: torch.t(a),
    "mT": lambda a, b: a.mT,
    "H": lambda a, b: a.H,
    "transpose": lambda a, b: torch.transpose(a, 0, -1),
    "permute": lambda a, b: a.permute(1, 0),
    "same": lambda a, b: a.transpose(1, 1),
    "zeros_like": lambda a, b: torch.zeros_like(a),
    "W @ V.T": lambda a, b: a @ b.T,
    "mm": lambda a, b: torch.mm(a.T, b),
    "sparse.mm": lambda a, b: torch.sparse.mm(a, b.T) if isinstance(a, SparseTensor) else a @ b.T,
}
DENSE_RESULTS = {
    "W + dense": lambda a, b: a + X,
    "dense + W": lambda a, b: X + a,
    "W - dense": lambda a, b: a - X,
    "dense - W": lambda a, b: X - a,
    "W + row": lambda a, b: a + X[0],
    "sum": lambda a, b: a.sum(),
    "sum 0": lambda a, b: a.sum(0),
    "sum 1": lambda a, b: torch.sum(a, dim=1, keepdim=True),
    "sum -1": lambda a, b: a.sum(-1),
    "sum both": lambda a, b: a.sum((0, 1), keepdim=True),
    "mean": lambda a, b: a.mean(),
    "mean 1": lambda a, b: a.mean(1),
    "max": lambda a, b: a.max(),
    "min": lambda a, b: torch.min(a),
    "amax": lambda a, b: a.amax(),
    "norm": lambda a, b: a.norm(),
    "norm 1": lambda a, b: torch.norm(a, 1),
    "norm inf": lambda a, b: a.norm(float("inf")),
    "linalg.norm": lambda a, b: torch.linalg.norm(a),
    "vector_norm": lambda a, b: torch.linalg.vector_norm(a, 3),
    "matrix_norm": lambda a, b: torch.linalg.matrix_norm(a),
    "count_nonzero": lambda a, b: a.count_nonzero(),
    "isnan": lambda a, b: torch.isnan(a / 0 * 0),
    "isfinite": lambda a, b: a.isfinite(),
    "==": lambda a, b: a == b,
    "!= 0": lambda a, b: a != 0,
    "> dense": lambda a, b: X < a,
    "isclose": lambda a, b: torch.isclose(a, b),
    "W[2]": lambda a, b: a[2],
    "W[-1]": lambda a, b: a[-1],
    "W[0, 1]": lambda a, b: a[0, 1],
    "W[:, 2]": lambda a, b: a[:, 2],
    "W[1, 2:]": lambda a, b: a[1, 2:],
    "W[1:3, 2]": lambda a, b: a[1:3, 2],
    "W[tensor(1)]": lambda a, b: a[torch.tensor(1)],
    "select": lambda a, b: a.select(1, 3),
    "torch.select": lambda a, b: torch.select(a, 0, 1),
}


@pytest.mark.parametrize("name", SPARSE_RESULTS)
def test_sparse_results(name):
    check(SPARSE_RESULTS[name], W, V, is_sparse=True)


@pytest.mark.parametrize("name", DENSE_RESULTS)
def test_dense_results(name):
    if name == "isnan":  # at the places that are not stored torch has 0 / 0
        assert DENSE_RESULTS[name](sparse(W), None).sum() == (W != 0).sum()
        return
    check(DENSE_RESULTS[name], W, V, is_sparse=False)


def test_zero_preserving_functions():
    from sparsekern.surface.elementwise import UNARY

    w = W.clamp(-0.9, 0.9)
    for name in UNARY:
        x = w.abs() if name == "sqrt" else w
        got = getattr(torch, name)(sparse(x))
        torch.testing.assert_close(got.to_dense(), getattr(torch, name)(x), msg=name)
        assert torch.equal(getattr(sparse(x).T, name)().to_dense(), got.to_dense().T)


@st.composite
def pairs(draw):
    """Two dense matrices of one small shape; the dtypes may differ."""
    n, k = draw(st.integers(0, 5)), draw(st.integers(0, 5))
    number = st.sampled_from([0.0, 0.0, 0.0, 1.0, -2.5, 3.0, 0.5])
    entries = st.lists(number, min_size=n * k, max_size=n * k)
    pair = [
        torch.tensor(draw(entries), dtype=draw(st.sampled_from(DTYPES))).view(n, k)
        for _ in range(2)
    ]
    return *pair, draw(st.booleans()), draw(st.booleans())


def test_sums_of_many_are_accurate():
    w = torch.rand(3, 20_000)
    got = sparse(w).sum(1)
    torch.testing.assert_close(got.double(), w.double().sum(1), rtol=1e-7, atol=0)
    assert sparse(torch.ones(5000, 1, dtype=torch.bfloat16)).sum(0) == 4992  # 5000, rounded once


@settings(max_examples=60)
@given(pairs())
def test_arithmetic_of_any_pair(pair):
    a, b, a_transposed, b_transposed = pair
    A = sparse(a.T.contiguous()).T if a_transposed else sparse(a)
    B = sparse(b.T.contiguous()).T if b_transposed else sparse(b)
    for op in (operator.add, operator.sub, operator.mul):
        want = op(a, b)
        for got in (op(A, B), op(A, b), op(a, B)):
            torch.testing.assert_close(dense(got), want)
        # What came out is a valid pattern.
        C = op(A, B)
        SparseTensor(C.row_offsets, C.col_indices, C.values, (C.n, C.k))
    strided = torch.stack([b, b], -1)[..., 0]
    torch.testing.assert_close((A * strided).to_dense(), a * b)
    assert torch.equal(A == B, a == b) and torch.equal(A < b, a < b)
    assert torch.equal(A, A.clone()) and torch.allclose(A, A)
    if a.dtype == b.dtype:
        assert torch.equal(A, B) == torch.equal(a, b)
        assert torch.equal(A, b) == torch.equal(a, b)
        torch.testing.assert_close((A @ B.T).to_dense(), a @ b.T)
        torch.testing.assert_close((A.T @ B).to_dense(), a.T @ b)
    torch.testing.assert_close(A.sum(1), a.sum(1))
    if a.numel():
        torch.testing.assert_close(A.mean(), a.mean())
    for i in range(-a.shape[0], a.shape[0]):
        assert torch.equal(A[i], a[i])
        assert torch.equal(A[i:].to_dense(), a[i:]) and torch.equal(A[:i].to_dense(), a[:i])


def test_missing_entries_are_zeros_whatever_the_patterns():
    zeros = SparseTensor.from_dense(torch.zeros(2, 3), torch.ones(2, 3, dtype=torch.bool))
    assert torch.equal(zeros, SparseTensor.from_dense(torch.zeros(2, 3)))
    assert zeros.count_nonzero() == 0 and zeros.max() == 0
    negative = SparseTensor.from_dense(torch.tensor([[-1.0, 0.0]]))
    assert negative.max() == 0 and negative.min() == -1
    assert SparseTensor.from_dense(torch.tensor([[-1.0, -2.0]])).max() == -1


@pytest.mark.parametrize("name", ["max", "min", "amax", "amin"])
@pytest.mark.parametrize("stored", [[0.0, 0.0], [0.0, 3.0], [0.0, -3.0], [3.0, 3.0], [math.inf]])
def test_the_gradient_of_an_extremum_is_shared_with_missing_zeros(name, stored):
    w = torch.zeros(3, 4, dtype=torch.float64)
    mask = torch.zeros(3, 4, dtype=torch.bool)
    mask[0, : len(stored)], w[0, : len(stored)] = True, torch.tensor(stored, dtype=w.dtype)
    A, w = SparseTensor.from_dense(w, mask).requires_grad_(), w.requires_grad_()
    got, want = getattr(A, name)(), getattr(w, name)()
    assert torch.equal(got, want)
    (of_values,) = torch.autograd.grad(got, A.values)
    torch.testing.assert_close(of_values, torch.autograd.grad(want, w)[0][mask])


def test_mean_of_half_does_not_overflow():
    w = torch.full((300, 300), 40.0, dtype=torch.float16)
    assert sparse(w).mean() == 40 and torch.equal(sparse(w).mean(0), w.mean(0))


def test_large_matrices_with_few_entries():
    """N * K far beyond 2^31: nothing is computed in 32 bits, and nothing of that size made."""
    n = 60_000
    ends = torch.tensor([[0, 5, n - 1, n - 1], [n - 1, 3, 0, n - 1]])
    offsets = torch.zeros(n + 1, dtype=torch.int64)
    offsets[1:] = ends[0].bincount(minlength=n).cumsum(0)
    A = SparseTensor(offsets, ends[1], torch.tensor([1.0, 2.0, 3.0, 4.0]), (n, n))
    assert (A + A.T)[n - 1, 0] == 4 and (A - A.T)[0, n - 1] == -2 and (A * A.T)[0, n - 1] == 3
    assert torch.equal(A + A, 2 * A) and not torch.equal(A, A.T)
    assert (A @ A)[n - 1, n - 1] == 4 * 4 + 3 * 1 and A[n - 5 :].shape == (5, n)
    assert A.sum(0)[n - 1] == 5 and A.T[n - 1].sum() == 5
    half = A.half()
    assert half.sum(1)[n - 1] == 7 and half.mean() == 0 and (half @ half)[n - 1, n - 1] == 19
    x = torch.ones(n, 2)
    for letters in ("ij,ib->b", "ij,jb->b", "ij,ib->ib"):
        assert torch.einsum(letters, A, x)[-1, ...].max() == (7 if "->ib" in letters else 10)


def test_orders_of_a_norm():
    """torch.linalg.norm with an order is that of a matrix, torch.norm that of all elements."""
    w = torch.tensor([[3.0, 0.0], [4.0, 1.0]])
    W = sparse(w)
    assert torch.linalg.norm(W) == torch.linalg.norm(w) == torch.linalg.norm(W, "fro")
    for order in (1, 2, float("inf")):
        torch.testing.assert_close(torch.norm(W, order), torch.norm(w, order))
        assert torch.norm(sparse(torch.zeros(2, 3)), order) == 0
        with pytest.raises(TypeError, match="norm: of a SparseTensor as a matrix only 'fro'"):
            torch.linalg.norm(W, order)


def test_product_of_two_may_be_written_to():
    a, b = (sparse(torch.eye(3)).requires_grad_() for _ in range(2))
    y = a @ b
    y.values.mul_(2)
    y.to_dense().sum().backward()
    assert torch.equal(a.values.grad, torch.full((3,), 2.0))


def test_product_of_two():
    check(lambda a, b: a @ b.T, W, V)
    a = sparse(W.clone().requires_grad_())
    for dtype in DTYPES:
        got = sparse(W.to(dtype)) @ sparse(V.to(dtype)).T
        assert got.dtype == dtype
        torch.testing.assert_close(got.to_dense(), W.to(dtype) @ V.to(dtype).T)
    with torch.autocast("cpu", torch.bfloat16):
        assert (sparse(W.float()) @ sparse(V.float()).T).dtype == torch.bfloat16
    with pytest.raises(RuntimeError, match="cannot be multiplied"):
        sparse(W) @ sparse(V)
    with pytest.raises(RuntimeError, match="same dtype"):
        sparse(W) @ sparse(V.float()).T
    broken = SparseTensor._trusted(a.row_offsets, a.col_indices + 100, a.values, 4, 5)
    with pytest.raises(ValueError, match="col_indices: expected to lie in"):
        broken @ a.T


# Refusals name what to write


REFUSED = {
    "W + 1": (lambda w: w + 1, TypeError, "add: a number and a SparseTensor .* W.to_dense()"),
    "1 - W": (lambda w: 1 - w, TypeError, "sub: a number and a SparseTensor"),
    "W / dense": (lambda w: w / X, TypeError, "div: only a SparseTensor by a number"),
    "1 / W": (lambda w: 1 / w, TypeError, "div: only a SparseTensor by a number"),
    "dense / W": (lambda w: X / w, TypeError, "div: only a SparseTensor by a number"),
    "x += W": (lambda w: X.clone().add_(w), TypeError, "x . W is a new dense tensor"),
    "W * complex": (lambda w: w * 1j, TypeError, "the result: .* got torch.complex128"),
    "other shape": (lambda w: w + sparse(V).T, RuntimeError, r"\(4, 5\) must match .* \(5, 4\)"),
    "out": (lambda w: torch.abs(w, out=w), TypeError, "abs: out= takes no SparseTensor"),
    "bmm": (lambda w: torch.bmm(w, w), TypeError, "bmm: not .*: W has no batch; torch.matmul"),
    "baddbmm": (lambda w: torch.baddbmm(X, X, w), TypeError, "baddbmm: .* torch.matmul"),
    "addbmm": (lambda w: torch.addbmm(X, X, w), TypeError, "addbmm: .* torch.matmul"),
    "W ** -1": (lambda w: w**-1, TypeError, "pow: only .* a number above 0"),
    "W ** W": (lambda w: w**w, TypeError, "pow: only .* a number above 0"),
    "2 ** W": (lambda w: 2**w, TypeError, "pow: only .* a number above 0"),
    "exp": (lambda w: torch.exp(w), TypeError, "exp: .* use W.to_dense()"),
    "softmax": (lambda w: torch.softmax(w, 1), TypeError, "softmax: not .* W.to_dense.. is dense"),
    "cat": (lambda w: torch.cat([w, w]), TypeError, "cat: not supported with a SparseTensor"),
    "W.cumsum": (lambda w: w.cumsum(0), AttributeError, "cumsum: not supported .* W.to_dense()"),
    "W.numpy()": (lambda w: w.numpy(), AttributeError, "numpy: .* W.to_scipy()"),
    "W.nonsense": (lambda w: w.nonsense, AttributeError, "object has no attribute 'nonsense'"),
    "np.asarray": (np.asarray, TypeError, "no NumPy array: use W.to_dense"),
    "np.array": (np.array, TypeError, "no NumPy array: use W.to_dense"),
    "bool": (bool, RuntimeError, "Boolean value of a SparseTensor .* ambiguous"),
    "float": (float, RuntimeError, "a Tensor with 20 elements cannot be converted to Scalar"),
    "W[[0, 1]]": (lambda w: w[[0, 1]], TypeError, r"takes W\[i\], .* use W.to_dense()"),
    "W[mask]": (lambda w: w[X > 0], TypeError, r"takes W\[i\], .* use W.to_dense()"),
    "W[::2]": (lambda w: w[::2], TypeError, "expected a step of 1"),
    "W[9]": (lambda w: w[9], IndexError, "index 9 is out of bounds for dimension 0 with size 4"),
    "W[0] = 1": (lambda w: operator.setitem(w, 0, 1), TypeError, "item assignment"),
    "t(2)": (lambda w: w.transpose(0, 2), IndexError, "Dimension out of range"),
    "max(1)": (lambda w: w.max(1), TypeError, "max: only of all of a SparseTensor"),
    "norm(dim)": (lambda w: w.norm(dim=1), TypeError, "norm: only of all of a SparseTensor"),
    "nuclear": (lambda w: torch.linalg.matrix_norm(w, "nuc"), TypeError, "only 'fro', got 'nuc'"),
    "nn.Parameter": (nn.Parameter, TypeError, "nn.Parameter: .* use SparseLinear"),
    "init.normal_": (nn.init.normal_, TypeError, "normal_: .* fill W.values"),
    "init.xavier": (nn.init.xavier_uniform_, AttributeError, "uniform_: .* fill W.values"),
    "init.kaiming": (nn.init.kaiming_uniform_, TypeError, "kaiming_uniform_: .* fill W.values"),
    "int": (lambda w: w.to(torch.int32), TypeError, "got torch.int32"),
    "copy_": (lambda w: w.copy_(W), TypeError, "copy_: expected a SparseTensor, got Tensor"),
    "copy_ nnz": (
        lambda w: w.copy_(SparseTensor.from_dense(torch.ones_like(W))),
        ValueError,
        "copy_: expected shape .* stored values, got .* with 20",
    ),
    "autograd.grad": (
        lambda w: torch.autograd.grad(w.sum(), w),
        TypeError,
        "grad: .* take the gradient of W.values",
    ),
    "einsum of two": (
        lambda w: torch.einsum("ij,kj->ik", w, w),
        NotImplementedError,
        "einsum: .* two SparseTensors by torch.matmul",
    ),
    "einsum of three": (
        lambda w: torch.einsum("ij,j,j->i", w, X[0], X[0]),
        NotImplementedError,
        "contract two at a time",
    ),
    "addmm": (
        lambda w: torch.addmm(w, X, X.T @ X),
        NotImplementedError,
        "addmm: expected a dense input and one sparse factor",
    ),
}


@pytest.mark.parametrize("call, error, text", REFUSED.values(), ids=REFUSED)
def test_refusals_say_what_to_write(call, error, text):
    with pytest.raises(error, match=text):
        call(sparse(W))


def test_other_classes_are_asked():
    class Other:
        @classmethod
        def __torch_function__(cls, func, types, args=(), kwargs=None):
            return "mine"

    assert torch.cat([sparse(W), Other()]) == "mine"


def test_rows_of_a_parameter_are_not_parameters():
    w = sparse(W)
    assert torch.equal(torch.stack(list(w)), W)
    w.requires_grad_()
    for call in (
        lambda: list(w),
        lambda: torch.optim.SGD(w, 0.1),
        lambda: nn.utils.clip_grad_norm_(w, 1.0),
    ):
        with pytest.raises(TypeError, match=re.escape("[W.values]")):
            call()


# What a tensor tells, casts and copies


def test_attributes():
    w = sparse(W.float())
    nnz = w.nnz
    assert (len(w), w.numel(), w.dim(), w.ndimension(), w.size(), w.size(-1)) == (
        *(4, 20, 2, 2),
        W.shape,
        5,
    )
    assert w.element_size() == w.itemsize == 4 and w.nbytes == 4 * (2 * nnz + 5)
    assert w.layout == torch.sparse_csr and w.is_sparse_csr and not w.is_sparse
    assert w.T.layout == torch.sparse_csc and not w.T.is_sparse_csr
    assert (w.is_cuda, w.is_cpu, w.is_meta, w.is_leaf) == (False, True, False, True)
    assert w.is_floating_point() and torch.is_floating_point(w) and not w.is_complex()
    assert torch.numel(w) == 20 and w._nnz() == nnz and w.get_device() == -1
    assert torch.equal(w.crow_indices(), w.row_offsets)
    assert torch.equal(w.to_sparse_csr().to_dense(), W.float())
    assert torch.equal(w.to_sparse().to_dense(), W.float())
    assert weakref.ref(w)() is w and w.grad is None and w.grad_fn is None
    one = SparseTensor.from_dense(torch.tensor([[2.5]]))
    assert one.item() == float(one) == 2.5 and int(one) == 2 and bool(one)
    assert (w == None) is False and w != "w"  # noqa: E711
    assert len({w, w.T, w}) == 2 and w in [w]
    assert not hasattr(w, "cumsum") and not hasattr(SparseTensor, "cumsum")


def test_requires_grad():
    w = sparse(W)
    w.requires_grad = True
    assert w.values.requires_grad and w.requires_grad_(False) is w and not w.requires_grad
    w.requires_grad_().sum().backward()
    assert torch.equal(w.grad.to_dense(), (W != 0).double())
    assert torch.equal(w.T.grad.to_dense(), w.grad.to_dense().T)
    assert (2 * w).grad_fn is not None and not (2 * w).is_leaf
    assert not w.data.requires_grad and w.data.values.data_ptr() == w.values.data_ptr()


def test_casts():
    w = sparse(W)
    for name, dtype in (
        ("float", torch.float32),
        ("half", torch.float16),
        ("bfloat16", torch.bfloat16),
        ("double", torch.float64),
    ):
        got = getattr(w.T, name)()
        assert got.dtype == dtype and torch.equal(got.to_dense(), W.T.to(dtype))
    assert w.cpu().device.type == "cpu" and w.type(torch.float32).dtype == torch.float32
    assert w.type() == "torch.DoubleTensor" and w.type_as(W.half()).dtype == torch.float16
    assert torch.zeros_like(w, dtype=torch.float32).dtype == torch.float32
    for like in (torch.ones_like, torch.rand_like, torch.empty_like):
        assert torch.equal(like(w).col_indices, w.col_indices)
    assert torch.equal(torch.full_like(w, 2).to_dense(), 2 * (W != 0).double())


def test_writes_in_place():
    w = sparse(W)
    same = w
    w *= 2
    w /= 4
    w.mul_(X > 0)
    assert w is same
    torch.testing.assert_close(w.to_dense(), W / 2 * (X > 0))
    assert torch.count_nonzero(w.zero_().values) == 0
    moved = sparse(W[:, torch.tensor([2, 3, 4, 0, 1])])
    x = torch.ones(2, 5, dtype=W.dtype)
    assert not (x @ w.T).any()
    w.copy_(moved)
    torch.testing.assert_close(x @ w.T, x @ moved.to_dense().T)
    w.copy_(sparse(W.T.contiguous()).T)
    assert torch.equal(w.to_dense(), W)
    t = sparse(W.T.contiguous()).T
    t.copy_(moved)
    assert torch.equal(t.to_dense(), moved.to_dense())
    copied = w.clone()
    copied.col_indices[0] = 4
    assert torch.equal(w.to_dense(), W)


# Files


def saved(thing, weights_only=True):
    file = io.BytesIO()
    torch.save(thing, file)
    file.seek(0)
    return torch.load(file, weights_only=weights_only)


def test_save_and_load():
    w = sparse(W.clone().requires_grad_())
    for copied in (saved(w), pickle.loads(pickle.dumps(w)), copy.deepcopy(w), copy.copy(w)):
        assert torch.equal(copied, w) and copied.requires_grad
    for copied in (saved(w.T), pickle.loads(pickle.dumps(w.T)), copy.deepcopy(w.T)):
        assert torch.equal(copied, w.T) and copied.is_transposed
    p = SparseTensor(w.row_offsets, w.col_indices, nn.Parameter(w.values.detach()), w.shape)
    assert isinstance(saved(p).values, nn.Parameter)
    both = saved({"w": w, "t": w.T})
    assert both["w"].values.data_ptr() == both["t"].values.data_ptr()
    assert copy.copy(w).values is w.values
    both = copy.deepcopy([w, w.T])
    assert both[0].values is both[1].values and both[0].values is not w.values


def test_what_is_loaded_is_checked():
    w = sparse(W)
    for wrong in (
        SparseTensor._trusted(w.row_offsets, w.col_indices + 10**9, w.values, 4, 5),
        SparseTensor._trusted(w.row_offsets + 1, w.col_indices, w.values, 4, 5),
        SparseTensor._trusted(w.row_offsets, w.col_indices, w.values[:2], 4, 5),
        SparseTensor._trusted(w.row_offsets, w.col_indices, w.values, 4, 2**40),
    ):
        for load in (saved, lambda t: pickle.loads(pickle.dumps(t))):
            with pytest.raises(ValueError, match="expected"):
                load(wrong)
    # As earlier versions wrote it.
    slots = {"n": 4, "k": 5, "is_transposed": True}
    slots |= {name: getattr(w, name) for name in ("row_offsets", "col_indices", "values")}
    old = SparseTensor.__new__(SparseTensor)
    old.__setstate__((None, slots))
    assert torch.equal(old, w.T)
    with pytest.raises(ValueError, match="col_indices: expected to lie in"):
        old.__setstate__((None, slots | {"k": 2}))


def test_deepcopy_of_values_with_a_graph_says_what_torch_says():
    w = 2 * sparse(W.clone().requires_grad_())
    with pytest.raises(RuntimeError, match="graph leaves"):
        copy.deepcopy(w)


class Module(nn.Module):
    def __init__(self, w):
        super().__init__()
        self.register_buffer("w", SparseTensor.from_dense(w))

    def forward(self, x):
        return x @ self.w.T


def test_a_buffer_of_a_module():
    x, w = torch.randn(2, 5), W.float()
    module = Module(w)
    assert module.half().w.dtype == torch.float16 and module.float().w.dtype == torch.float32
    assert copy.deepcopy(module).to("meta").w.device.type == "meta"
    state = saved(Module(2 * w).state_dict())
    module.load_state_dict(state)
    torch.testing.assert_close(module(x), x @ (2 * w).T)
    other = Module(torch.ones(4, 5)).state_dict()
    with pytest.raises(RuntimeError, match="copy_: expected shape .* with 20"):
        module.load_state_dict(other)
    module.load_state_dict(other, assign=True)
    torch.testing.assert_close(module(x), x @ torch.ones(4, 5).T)
    torch.testing.assert_close(copy.deepcopy(module)(x), module(x))


# sddmm


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_sddmm(dtype):
    a, b = torch.randn(4, 3, dtype=dtype), torch.randn(5, 3, dtype=dtype).T
    for pattern in (sparse(W), sparse(W.T.contiguous()).T):
        got = sparsekern.sddmm(pattern, a, b)
        assert got.dtype == dtype and got.shape == W.shape
        torch.testing.assert_close(got.to_dense(), torch.where(W != 0, a @ b, 0))
        if dtype == torch.float64:
            a, b = a[:, :2], b[:2]
            w = pattern.to(dtype)
            got = torch.sparse.sampled_addmm(w, a, b, beta=0.5, alpha=2.0)
            torch.testing.assert_close(got.to_dense(), 0.5 * W + 2 * torch.where(W != 0, a @ b, 0))
            args = a.clone().requires_grad_(), b.clone().requires_grad_()
            for gradcheck in (torch.autograd.gradcheck, torch.autograd.gradgradcheck):
                assert gradcheck(lambda a, b: sparsekern.sddmm(w, a, b).values, args)  # noqa: B023


def test_sddmm_refuses():
    w, a, b = sparse(W), torch.ones(4, 3), torch.ones(3, 5)
    for arguments, error, text in (
        ((W, a, b), TypeError, "pattern: expected a SparseTensor, got Tensor"),
        ((w, 1, b), TypeError, "a: expected a dense tensor, got int"),
        ((w, a[0], b), ValueError, r"a: expected 2 dimensions, got shape \(3,\)"),
        ((w, b.T, b), ValueError, r"a: expected shape \(4, M\), got \(5, 3\)"),
        ((w, a, b.T), ValueError, r"b: expected shape \(3, 5\), got \(5, 3\)"),
        ((w, a.to("meta"), b), ValueError, "a: expected device cpu, got meta"),
        ((w, a.half(), b), TypeError, "of one dtype, .*, got torch.float16 and torch.float32"),
        ((w, a.int(), b.int()), TypeError, "got torch.int32 and torch.int32"),
    ):
        with pytest.raises(error, match=text):
            sparsekern.sddmm(*arguments)


# Meta


def test_meta():
    w = sparse(W.float()).to("meta")
    x = torch.ones(2, 3, 5, device="meta")
    assert (x @ w.T).shape == (2, 3, 4) and (w @ x.mT).shape == (2, 4, 3)
    y = nn.functional.linear(x, w, torch.ones(4, device="meta"))
    assert y.shape == (2, 3, 4) and y.device.type == "meta" and y.dtype == torch.float32
    assert torch.addmm(x[0, 0], x[0][:, :4], w).shape == (3, 5)
    again = SparseTensor(w.row_offsets, w.col_indices, w.values, w.shape)
    assert again.device.type == "meta" and again.shape == w.shape
    with pytest.raises(ValueError, match="w: expected a tensor with data, got one on the meta"):
        SparseTensor.from_dense(x[0])
    with torch.autocast("cpu", torch.bfloat16):
        assert (x @ w.T).dtype == (x @ torch.ones(5, 4, device="meta")).dtype


# torch.compile


def test_functions_alone_have_another_meaning():
    # torch.compile of torch 2.11 hashes all keys, and takes no module, as torch.cpu is one.
    assert all(map(callable, TORCH_FUNCTIONS))


def test_compile_builds_a_tensor():
    torch._dynamo.reset()

    def f(row_offsets, col_indices, values, x):
        return x @ SparseTensor(row_offsets, col_indices, values, (4, 5)).T

    compiled = torch.compile(f, fullgraph=True, backend="aot_eager")
    w, x = sparse(W), torch.randn(2, 5, dtype=W.dtype)
    values = w.values.clone().requires_grad_()
    y = compiled(w.row_offsets, w.col_indices, values, x)
    torch.testing.assert_close(y, x @ W.T)
    torch.testing.assert_close(
        torch.autograd.grad(y.sum(), values)[0], x.sum(0).expand(4, 5)[W != 0]
    )
    order = torch.cat([torch.arange(a, b).flip(0) for a, b in w.row_offsets.unfold(0, 2, 1)])
    y = compiled(w.row_offsets, w.col_indices[order], w.values[order], x)
    torch.testing.assert_close(y, x @ W.T)
    with pytest.raises(ValueError, match="col_indices: expected to lie in"):
        compiled(w.row_offsets, w.col_indices + 3, w.values, x)
    made = torch.compile(
        lambda w, x: x @ SparseTensor.from_dense(w).T, fullgraph=True, backend="aot_eager"
    )
    torch.testing.assert_close(made(W, x), x @ W.T)


def test_a_graph_that_builds_a_tensor_takes_any_width():
    torch._dynamo.reset()
    counter = torch._dynamo.testing.CompileCounter()

    def f(row_offsets, col_indices, values, x):
        shape = row_offsets.shape[0] - 1, x.shape[1]
        return x @ SparseTensor(row_offsets, col_indices, values, shape).T

    compiled, w = torch.compile(f, fullgraph=True, backend=counter), sparse(W)
    for width in (5, 6, 8, 9):
        x = torch.ones(2, width, dtype=W.dtype)
        y = compiled(w.row_offsets, w.col_indices, w.values, x)
        torch.testing.assert_close(y, x[:, :5] @ W.T)
    assert counter.frame_count == 2  # of the first width, and of any


def test_compile_functions():
    torch._dynamo.reset()

    def f(w, x):
        y = torch.addmm(x[0], x @ w.T, w) + torch.einsum("bi,ij->bj", x @ w.T, w) * w.sum()
        return (2 * w - w).abs().mm(y.T).sum() + w.norm() + torch.inner(x, w).sum()

    x = torch.randn(2, 5, dtype=W.dtype)
    got = torch.compile(f, fullgraph=True, backend="aot_eager")(sparse(W), x)
    torch.testing.assert_close(got, f(W, x))


@pytest.mark.gpu
def test_on_a_gpu():
    w, v, x = W.float().cuda(), V.float().cuda(), torch.randn(2, 5, device="cuda")
    A, B = sparse(W.float()).cuda(), sparse(v)
    assert A.is_cuda and A.row_offsets.is_cuda and torch.equal(A, sparse(w))
    for got, want in (
        (A + B, w + v),
        (A * B, w * v),
        (A - x[0], w - x[0]),
        (A @ B.T, w @ v.T),
        (A.sum(0), w.sum(0)),
        (A[1:3], w[1:3]),
        (A.T[2], w.T[2]),
        (
            torch.einsum("bij,ij->bi", x[:, None] + w, A),
            torch.einsum("bij,ij->bi", x[:, None] + w, w),
        ),
        (torch.addmm(x[0], x[:, :4], A), torch.addmm(x[0], x[:, :4], w)),
        (sparsekern.sddmm(A, x[:, :4].T, x), torch.where(w != 0, x[:, :4].T @ x, 0)),
        (saved(A), w),
    ):
        torch.testing.assert_close(dense(got), want, rtol=1e-4, atol=1e-4)
    A.row_offsets.data[2] = 10**6  # torch counts no such write
    with pytest.raises(ValueError, match="row_offsets: expected"):
        A.to_torch()


def test_product_of_two_refuses_what_it_has_not():
    W = sparse(random_dense(6, 6))
    with pytest.raises(NotImplementedError, match="no torch.func and no forward mode"):
        torch.func.grad(lambda v: (W._with_values(v, False) @ W).values.sum())(W.values)
    with torch.autograd.forward_ad.dual_level():
        with pytest.raises(NotImplementedError, match="no torch.func and no forward mode"):
            W @ W


def test_a_summand_times_zero_has_a_gradient_of_zeros():
    w = random_dense(4, 5)
    W, x = sparse(w), torch.randn(3, 5, dtype=w.dtype)
    summand = torch.full((3, 4), torch.nan, dtype=w.dtype, requires_grad=True)
    y = torch.addmm(summand, x, W.T, beta=0, alpha=2)
    torch.testing.assert_close(y, 2 * x @ w.T)
    y.sum().backward()
    assert summand.grad is not None and not summand.grad.any()
