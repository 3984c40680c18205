"""The ops: reference results, gradients of every order, and torch's machinery around them."""

import pytest
import torch
from conftest import random_dense
from torch.func import grad, vmap
from torch.utils.flop_counter import FlopCounterMode

from sparsekern import SparseTensor, ops, registered, testing
from sparsekern.kernels import prepared, reference, table
from sparsekern.kernels.cpu import lanes

N, K, M = 6, 9, 5
DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)


@pytest.fixture
def w():
    w = random_dense(N, K)
    w[2] = 0
    return w


def arguments(w, requires_grad=False):
    """(W without values, values, x, dy) for the ops."""
    W = SparseTensor.from_dense(w)
    x, dy = torch.randn(M, K, dtype=w.dtype), torch.randn(M, N, dtype=w.dtype)
    for t in (W.values, x, dy):
        t.requires_grad_(requires_grad)
    return W.row_offsets, W.col_indices, W.values, x, dy


def calls(w, requires_grad=False):
    """op -> (function of the op's two differentiable arguments, those two)."""
    ro, ci, v, x, dy = arguments(w, requires_grad)
    return {
        "spmm": (lambda v, x: ops.spmm(ro, ci, v, N, K, x), (v, x)),
        "spmm_t": (lambda v, dy: ops.spmm_t(ro, ci, v, N, K, dy), (v, dy)),
        "sddmm": (lambda dy, x: ops.sddmm(ro, ci, N, K, dy, x), (dy, x)),
    }


OPS = ("spmm", "spmm_t", "sddmm")


def test_bias_is_added_and_has_a_gradient(w):
    ro, ci, v, x, dy = arguments(w, requires_grad=True)
    for op, a, dense in ((ops.spmm, x, w.T), (ops.spmm_t, dy, w)):
        bias = torch.randn(dense.shape[1], dtype=w.dtype, requires_grad=True)
        got = op(ro, ci, v, N, K, a, bias)
        torch.testing.assert_close(got, a @ dense + bias)
        assert torch.autograd.gradcheck(
            lambda v, a, b, op=op: op(ro, ci, v, N, K, a, b), (v, a, bias)
        )
        # A bias alone makes the result differentiable.
        alone = op(ro, ci, v.detach(), N, K, a.detach(), bias)
        assert alone.requires_grad


# Results


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("case", testing.PROBLEMS, ids=lambda case: case.name)
def test_reference(case, dtype, nan_memory):
    t = case.tensors(dtype)
    pattern, sizes = (t.row_offsets, t.col_indices), (case.N, case.K)
    got = {
        "spmm": reference.spmm(*pattern, t.values, *sizes, t.x),
        "spmm_t": reference.spmm_t(*pattern, t.values, *sizes, t.dy),
        "sddmm": reference.sddmm(*pattern, *sizes, t.dy, t.x),
    }
    for op, (want, scale) in testing.exact(t).items():
        assert got[op].dtype == dtype and got[op].is_contiguous()
        # A sum in the wider type, rounded once.
        terms = {"spmm": case.K, "spmm_t": case.N, "sddmm": case.M}[op]
        wide = torch.float32 if dtype.itemsize == 2 else dtype
        bound = torch.finfo(dtype).eps + (terms + 1) * torch.finfo(wide).eps
        # Below the smallest normal number of the type the spacing of its numbers is constant.
        scale = scale.clamp(min=torch.finfo(dtype).tiny)
        assert testing.relative_error(got[op], want, scale) <= bound


def test_router_runs_what_the_table_picks(w):
    dense_w = w
    ro, ci, v, x, dy = arguments(w)
    torch.testing.assert_close(ops.spmm(ro, ci, v, N, K, x), x @ dense_w.T)
    torch.testing.assert_close(ops.spmm_t(ro, ci, v, N, K, dy), dy @ dense_w)
    torch.testing.assert_close(ops.sddmm(ro, ci, N, K, dy, x), (dy.T @ x)[dense_w != 0])


@pytest.mark.parametrize("op", OPS)
def test_strided_operands(w, op):
    f, (a, b) = calls(w)[op]
    want = f(a, b)
    strided = [t.expand(3, *t.shape).movedim(0, -1).contiguous()[..., 1] for t in (a, b)]
    assert not strided[1].is_contiguous()
    torch.testing.assert_close(f(*strided), want)
    assert f(*strided).is_contiguous()
    ones = torch.ones((), dtype=torch.float64)
    assert torch.equal(f(ones.expand(a.shape), b), f(torch.ones_like(a), b))


@pytest.mark.parametrize("op", OPS)
def test_deterministic(w, op):
    f, args = calls(w.float())[op]
    assert torch.equal(f(*args), f(*args))


# Autograd


@pytest.mark.parametrize("op", OPS)
def test_gradcheck(w, op):
    f, args = calls(w, requires_grad=True)[op]
    assert torch.autograd.gradcheck(f, args)
    assert torch.autograd.gradgradcheck(f, args)


@pytest.mark.parametrize("op", OPS)
def test_third_derivative(w, op):
    f, args = calls(w, requires_grad=True)[op]
    d1 = torch.autograd.grad(f(*args).pow(4).sum(), args, create_graph=True)
    assert torch.autograd.gradgradcheck(lambda a: (f(a, args[1]) ** 2 * 0.1).sum(), args[0])
    d2 = torch.autograd.grad(sum(d.pow(2).sum() for d in d1), args, create_graph=True)
    d3 = torch.autograd.grad(sum(d.pow(2).sum() for d in d2), args)
    assert all(d.isfinite().all() and d.any() for d in d3)


def saved_tensors(y):
    return [t for t in y.grad_fn.saved_tensors if t is not None and t.is_floating_point()]


@pytest.mark.parametrize("op", OPS)
def test_only_what_a_gradient_needs_is_saved(w, op):
    f, (a, b) = calls(w)[op]
    assert f(a, b).grad_fn is None
    frozen = f(a, b.requires_grad_())
    assert [t is a for t in saved_tensors(frozen)] == [True]
    (gradient,) = torch.autograd.grad(frozen.sum(), b)
    both = f(a.requires_grad_(), b)
    assert len(saved_tensors(both)) == 2
    assert torch.equal(torch.autograd.grad(both.sum(), (a, b))[1], gradient)
    with torch.no_grad():
        assert f(a, b).grad_fn is None


# torch.library


def raw_calls(w, requires_grad=False):
    ro, ci, v, x, dy = arguments(w, requires_grad)
    o = torch.ops.sparsekern
    return {
        "spmm": (o.spmm.default, (ro, ci, v, N, K, x)),
        "spmm_t": (o.spmm_t.default, (ro, ci, v, N, K, dy)),
        "sddmm": (o.sddmm.default, (ro, ci, N, K, dy, x)),
    }


@pytest.mark.parametrize("requires_grad", [False, True])
@pytest.mark.parametrize("permuted", [False, True])
@pytest.mark.parametrize("op", OPS)
def test_opcheck(w, op, permuted, requires_grad):
    raw, args = raw_calls(w, requires_grad)[op]
    if permuted:
        args = (*args[:-1], args[-1].T.contiguous().T)
    torch.library.opcheck(raw, args)


@pytest.mark.parametrize("op", OPS)
def test_an_op_called_by_its_name_has_its_gradients(w, op):
    """So do graphs of torch.export and torch.jit.trace, which call it so: torch would warn alone.
    torch.func, which would take them for zeros, is refused."""
    raw, args = raw_calls(w, requires_grad=True)[op]
    leaves = [t for t in args if isinstance(t, torch.Tensor) and t.requires_grad]
    got, want = (torch.autograd.grad(f(*args).sin().sum(), leaves) for f in (raw, getattr(ops, op)))
    torch.testing.assert_close(got, want, rtol=0, atol=0)

    def loss(x):
        return raw(*args[:-1], x).sum()

    x = args[-1].detach()
    for transform in (grad(loss), lambda x: torch.func.jvp(loss, (x,), (x,))):
        with pytest.raises(NotImplementedError, match=f"{op}: torch.func takes no derivative"):
            transform(x)


def test_fakes_check_shapes(w):
    ro, ci, v, x, dy = (t.to("meta") for t in arguments(w))
    for call, text in (
        (lambda: ops.spmm(ro, ci, v, N, K, dy), r"spmm: x: expected shape \[M, 9\]"),
        (lambda: ops.spmm_t(ro, ci, v, N, K, x), r"spmm_t: dy: expected shape \[M, 6\]"),
        (lambda: ops.sddmm(ro, ci, N, K, dy[1:], x), r"sddmm: dy: expected shape \[5, 6\]"),
    ):
        with pytest.raises(ValueError, match=text):
            call()


@pytest.mark.parametrize("op", OPS)
def test_flop_counter(w, op):
    f, args = calls(w, requires_grad=True)[op]
    nnz = int((w != 0).sum())
    with FlopCounterMode(display=False) as counter:
        y = f(*args)
    assert counter.get_total_flops() == 2 * M * nnz
    with FlopCounterMode(display=False) as counter:
        y.sum().backward()
    assert counter.get_total_flops() == 2 * 2 * M * nnz


def test_flops_of_packed_weights(w):
    x, nnz = torch.randn(M, K, device="meta"), int((w != 0).sum())
    with FlopCounterMode(display=False) as counter:
        torch.ops.sparsekern.spmm_packed(x, "pairs", N, K, nnz, [], [])
    assert counter.get_total_flops() == 2 * M * nnz
    x8 = torch.empty(M, 64, dtype=torch.float8_e4m3fn, device="meta")
    with FlopCounterMode(display=False) as counter:  # of the half that 2 of 4 leave
        torch.ops.sparsekern.spmm_e4m3(x8, torch.empty(9, device="meta"), 32, 1.0)
    assert counter.get_total_flops() == M * 32 * 64
    if lanes._C is not None:  # which counts its padding
        packed = lanes.pack(SparseTensor.from_dense(w.float()))
        with FlopCounterMode(display=False) as counter:
            ops.spmm_lanes(torch.randn(M, K), packed)
        assert counter.get_total_flops() == 2 * M * packed.values.numel()


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("op", OPS)
def test_raw_op_keeps_its_dtype_under_autocast(w, op, dtype):
    f, args = calls(w.to(dtype))[op]
    want = f(*args)
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(f(*args), want)


# Compile and export


@pytest.mark.parametrize("backend", ["aot_eager", "inductor"])
@pytest.mark.parametrize("op", OPS)
def test_compile(w, op, backend):
    torch._dynamo.reset()
    f, args = calls(w, requires_grad=True)[op]

    def loss(*args):
        return f(*args).sin().sum()

    got = torch.compile(loss, fullgraph=True, backend=backend)(*args)
    want = loss(*args)
    torch.testing.assert_close(got, want)
    torch.testing.assert_close(torch.autograd.grad(got, args), torch.autograd.grad(want, args))


def test_kernel_is_picked_at_run_time(w, fresh_table):
    """A compiled graph holds the op: what runs inside is not frozen by the trace."""
    torch._dynamo.reset()
    f, args = calls(w)["spmm"]
    compiled = torch.compile(f, fullgraph=True, backend="aot_eager")
    compiled(*args)
    picked = []

    def spy(problem):
        picked.append(problem.op)
        return table.pick(problem)

    table.forget_choices()
    for module in (registered, prepared):
        fresh_table.setattr(module, "pick", spy)
    compiled(*args)
    assert picked == ["spmm"]


# functorch


@pytest.mark.parametrize("size", [3, 0])
@pytest.mark.parametrize("dims", [(None, 0), (None, 1), (0, None), (0, 1)])
@pytest.mark.parametrize("op", OPS)
def test_vmap(w, op, dims, size):
    f, args = calls(w)[op]
    batch = [
        t
        if dim is None
        else torch.randn(size, *t.shape, dtype=t.dtype).movedim(0, min(dim, t.ndim))
        for t, dim in zip(args, dims, strict=True)
    ]
    got = vmap(f, in_dims=dims)(*batch)
    assert got.shape == (size, *f(*args).shape)
    for i in range(size):
        each = (t if dim is None else t.select(dim, i) for t, dim in zip(batch, dims, strict=True))
        torch.testing.assert_close(got[i], f(*each))


def test_nested_vmap(w):
    f, (v, _) = calls(w)["spmm"]
    x = torch.randn(2, 3, M, K, dtype=torch.float64)
    torch.testing.assert_close(vmap(vmap(lambda x: f(v, x)))(x), x @ w.T)


@pytest.mark.parametrize("op", OPS)
def test_func_grad(w, op):
    f, args = calls(w, requires_grad=True)[op]

    def loss(*args):
        return f(*args).sin().sum()

    want = torch.autograd.grad(loss(*args), args)
    args = tuple(t.detach() for t in args)
    torch.testing.assert_close(grad(loss, argnums=(0, 1))(*args), want)


@pytest.mark.parametrize("op", OPS)
def test_func_grad_of_grad(w, op):
    f, (a, b) = calls(w, requires_grad=True)[op]

    def loss(a):
        return f(a, b.detach()).sin().sum()

    (d,) = torch.autograd.grad(loss(a), a, create_graph=True)
    (want,) = torch.autograd.grad(d.pow(2).sum(), a)
    got = grad(lambda a: grad(loss)(a).pow(2).sum())(a.detach())
    torch.testing.assert_close(got, want)


@pytest.mark.parametrize("op", OPS)
def test_per_sample_gradients(w, op):
    f, (a, b) = calls(w)[op]
    batch = torch.randn(3, *b.shape, dtype=b.dtype)

    def loss(a, b):
        return f(a, b).sin().sum()

    got = vmap(grad(loss, argnums=(0, 1)), in_dims=(None, 0))(a, batch)
    for i in range(3):
        want = grad(loss, argnums=(0, 1))(a, batch[i])
        torch.testing.assert_close((got[0][i], got[1][i]), want)
