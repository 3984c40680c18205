"""Where a SparseTensor once differed from its dense twin: derivatives, dtypes and errors."""

import re

import pytest
import torch
import torch.autograd.forward_ad as fwAD
import torch.nn.functional as F
from conftest import outcome, random_dense, sparse
from torch.func import grad, jvp, vmap

from sparsekern import SparseTensor

W = random_dense(6, 4)
X = torch.randn(6, 4, dtype=torch.float64)


def both_ways(w):
    """w as it is stored, and as a transpose, with values that require grad."""
    for transposed in (False, True):
        base = sparse((w.T if transposed else w).detach().requires_grad_())
        yield base.values, base.T if transposed else base


def test_product_of_two_has_any_derivative():
    for a_density, b_density in ((0.5, 0.4), (0, 0.5), (1, 0.3)):
        b = random_dense(4, 5, b_density)
        for u, A in both_ways(random_dense(6, 4, a_density)):
            for v, B in both_ways(b):

                def product(u, v, A=A, B=B):
                    a, b = A._with_values(u, A.is_transposed), B._with_values(v, B.is_transposed)
                    return (a @ b).values

                assert torch.autograd.gradcheck(product, (u, v))
                assert torch.autograd.gradgradcheck(product, (u, v))


def test_a_penalty_on_the_gradient_of_a_product_of_two():
    """The gradient of a sum needs none of its own, and so once had no graph."""
    S = sparse(W.clone().requires_grad_())
    stored = (S @ S.T).detach()._coordinates()
    losses = [
        _penalty(f(), S.values) + S.values.pow(2).sum()
        for f in (lambda: (S @ S.T).values, lambda: (S.to_dense() @ S.to_dense().T)[stored])
    ]
    got, want = (torch.autograd.grad(loss, S.values)[0] for loss in losses)
    torch.testing.assert_close(got, want)


def _penalty(y, leaf):
    (g,) = torch.autograd.grad(y.sum(), leaf, create_graph=True)
    return g.pow(2).sum()


@pytest.mark.parametrize(
    "call",
    [
        lambda w: w.sum((0, 0)),
        lambda w: w.sum((0, -2), keepdim=True),
        lambda w: w.mean(dtype=torch.int64),
        lambda w: w * X[None].expand(2, 6, 4)[..., :3],
        lambda w: w * X[:5],
        lambda w: torch.tensordot(w, X[:5], ([0], [0])),
        lambda w: torch.tensordot(w, X.float(), ([0], [0])),
        lambda w: torch.inner(X[:, :3], w),
        lambda w: torch.inner(w, X.float()),
        lambda w: torch.addmm(X[:, 0], X, w.T, beta=1j),
    ],
)
def test_errors_are_torchs(call):
    want, got = outcome(lambda: call(W))[1], outcome(lambda: call(sparse(W)))[1]
    assert want is not None and got == want


@pytest.mark.parametrize(
    "call, error, text",
    [
        (lambda w: w * X[None], NotImplementedError, r"mul: not supported .* \(1, 6, 4\)"),
        (lambda w: w.permute(0), RuntimeError, r"permute: expected a permutation of \(0, 1\)"),
        (lambda w: w.sum(1.5), TypeError, "float"),
        (lambda w: torch.sum(w, 0, out=X), TypeError, r"sum\(\) got .* 'out'"),
        (lambda w: torch.mul(w, 2, out=X), TypeError, r"mul\(\) got .* 'out'"),
        (lambda w: torch.add(w, X, out=X), TypeError, r"add\(\) got .* 'out'"),
        (lambda w: X.clone().copy_(w), TypeError, r"copy_: .*W\.to_dense"),
        (
            lambda w: grad(lambda x: F.linear(x, w, x[0]).sum())(X),
            RuntimeError,
            r"tensor \(6\) must match the existing size \(4\)",
        ),
    ],
)
def test_refusals_name_the_function(call, error, text):
    with pytest.raises(error, match=text):
        call(sparse(W.clone().requires_grad_()))


def test_norms_of_nothing_stored_have_a_graph():
    for shape in ((3, 4), (0, 4)):
        S = sparse(torch.zeros(shape, requires_grad=True))
        for p in (0, 1, 2, 3.0) + ((float("inf"),) if 0 not in shape else ()):
            y = S.norm(p)
            assert y.requires_grad and y.item() == 0
            y.backward()


def test_parts_of_a_transpose_have_all_derivatives():
    for v, S in both_ways(W):
        other = torch.randn_like(v)

        def part(v, S=S):
            return S._with_values(v, S.is_transposed)[1:4, :3].to_dense()

        torch.testing.assert_close(part(v), W[1:4, :3])
        assert torch.autograd.gradcheck(part, (v,), check_forward_ad=True)
        torch.testing.assert_close(jvp(part, (v,), (other,))[1], part(other))
        torch.testing.assert_close(
            vmap(part)(torch.stack([v, other])), torch.stack([part(v), part(other)])
        )
        with fwAD.dual_level():
            assert fwAD.unpack_dual(part(fwAD.make_dual(v.detach(), other))).tangent is not None


def test_what_is_written_in_place_is_not_cast():
    w, x = W.float(), X.float()
    with torch.autocast("cpu", torch.bfloat16):
        for a, b in ((x.T, w), (w.T, x)):
            want, got = (torch.ones(4, 4).addmm_(*pair) for pair in ((a, b), _one_sparse(a, b, w)))
            torch.testing.assert_close(got, want)
        torch.testing.assert_close(
            torch.ones(6).addmv_(sparse(w), x[0]), torch.ones(6).addmv_(w, x[0])
        )
        with pytest.raises(RuntimeError, match=re.escape("same dtype")):
            torch.ones(4, 4).addmm_(x.T.bfloat16(), sparse(w))


def _one_sparse(a, b, w):
    return (a, sparse(w)) if b is w else (sparse(w).T, b)


EQUATIONS = {
    "ij->j": (),
    "ij->ji": (),
    "ij,ij->ij": (6, 4),
    "ij,j->ij": (4,),
    "ij,->ij": (),
    "ij,b->ijb": (3,),
    "ij,b->jb": (3,),
    "ij,bj->bi": (3, 4),
    "ij,ij->i": (6, 4),
}


@pytest.mark.parametrize("columns", [4, 1])
@pytest.mark.parametrize("is_cast", [False, True])
def test_einsum_has_the_dtype_of_torchs(is_cast, columns):
    """Where it makes no matrix product, autocast does not cast and types are promoted."""
    w = W[:, :columns]
    for equation, shape in EQUATIONS.items():
        for w_dtype in (torch.float32, torch.float16, torch.float64):
            for dtype in (w_dtype, torch.float32, torch.bfloat16):
                x = torch.randn(tuple(columns if s == 4 else s for s in shape)).to(dtype)
                more = (x,) if "," in equation else ()
                calls = [
                    lambda w=w, e=equation, m=more: torch.einsum(e, w, *m)
                    for w in (w.to(w_dtype), sparse(w.to(w_dtype)))
                ]
                with torch.autocast("cpu", torch.bfloat16, enabled=is_cast):
                    (want, want_error), (got, error) = map(outcome, calls)
                assert error == want_error
                if want is not None:
                    got = got.to_dense() if isinstance(got, SparseTensor) else got
                    torch.testing.assert_close(got, want, rtol=2e-2, atol=2e-2)


def test_products_of_tensordot_and_inner_are_cast():
    w, x = W.float(), X.float()
    with torch.autocast("cpu", torch.bfloat16):
        for call in (
            lambda w: torch.tensordot(w, x, ([0], [0])),
            lambda w: torch.tensordot(x[0], w, 0),
            lambda w: torch.inner(x, w),
            lambda w: torch.inner(w, torch.tensor(2.0)),
        ):
            torch.testing.assert_close(call(sparse(w)), call(w), rtol=2e-2, atol=2e-2)
