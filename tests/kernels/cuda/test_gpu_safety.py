"""On a GPU: indices, sizes and numbers that are not as they should be; derivatives; graphs."""

import subprocess
import sys

import pytest
import torch
import torch.autograd.forward_ad as fwAD
from torch.func import functional_call, jvp

from sparsekern import SparseLinear, SparseTensor, explain, linear
from sparsekern.kernels import derived, table
from sparsekern.kernels.cuda import library as cuda_library
from sparsekern.kernels.cuda.choose import pack
from sparsekern.kernels.problem import Problem
from sparsekern.kernels.triton import rows as triton_rows
from sparsekern.nn import PackedLinear

pytestmark = pytest.mark.gpu
DTYPES = pytest.mark.parametrize(
    "dtype", [torch.bfloat16, torch.float16, torch.float32, torch.float64], ids=str
)
needs_kernels = pytest.mark.skipif(
    cuda_library.refusal() is not None, reason="no CUDA library, and no CuPy"
)
ERRORS = (ValueError, TypeError, RuntimeError)
# Of one rounding, and of a few thousand terms.
CLOSE = {torch.bfloat16: 2e-2, torch.float16: 3e-3, torch.float32: 1e-4, torch.float64: 1e-10}


def rows_of(op, dtype, m, n, k, nnz):
    """The rows of the table that take it on a GPU."""
    problem = Problem(op, "cuda", dtype, m, n, k, nnz)
    rows = [row for row in table.KERNELS if row.op == op and row.device in (None, "cuda")]
    return [row for row in rows if row.refuse(problem) is None]


def random_weight(n, k, density, dtype):
    w = torch.randn(n, k, device="cuda") * (torch.rand(n, k, device="cuda") < density)
    return SparseTensor.from_dense(w.to(dtype))


DAMAGE = """
import sys
import torch
from sparsekern import SparseTensor
from sparsekern.kernels import table
from sparsekern.kernels.problem import Problem

n, k, m = 96, 304, 9
WRITES = [
    ("col_indices", 5, 10**9), ("col_indices", 5, -(10**8)), ("col_indices", -1, k + 3),
    ("col_indices", 0, "next"), ("row_offsets", 3, 2**31 - 1), ("row_offsets", 0, -5),
]
count = 0
for dtype in (torch.bfloat16, torch.float32, torch.float64):
    for row in table.KERNELS:
        w = torch.randn(n, k) * (torch.rand(n, k) < 0.2)
        W = SparseTensor.from_dense(w.to(dtype)).to("cuda")
        problem = Problem(row.op, "cuda", dtype, m, n, k, W.nnz)
        if row.device == "cpu" or row.refuse(problem) and row.name != "csr":
            continue
        if row.name == "triton" and dtype != torch.float32:
            continue  # compiling takes long
        x, dy = torch.randn(m, k).to(dtype).cuda(), torch.randn(m, n).to(dtype).cuda()

        def run():
            W_ = W.row_offsets, W.col_indices
            if row.op == "sddmm":
                result = row.run(*W_, n, k, dy, x)
            else:
                result = row.run(*W_, W.values, n, k, x if row.op == "spmm" else dy)
            torch.cuda.synchronize()
            return result

        want = run()
        for name, at, value in WRITES:
            tensor = getattr(W, name)
            before = tensor.clone()
            new = before[1] if value == "next" else value
            tensor[at] = new  # counted
            try:
                run()
                sys.exit(f"{row.name} {row.op} {dtype} took {name}[{at}] = {value}")
            except ValueError as error:
                assert name in str(error) or "row_offsets" in str(error), error
            tensor.copy_(before)
            torch.testing.assert_close(run(), want)
            tensor.data[at] = new  # not counted: stale, and never out of bounds
            run()
            tensor.data.copy_(before)
            tensor += 0  # counted
            torch.testing.assert_close(run(), want)
            count += 1
print("writes", count)
"""


def test_damaged_indices_under_every_row():
    """In a process of its own: an assertion on the device would end this one's context."""
    done = subprocess.run([sys.executable, "-c", DAMAGE], capture_output=True, text=True)
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-4000:]
    assert int(done.stdout.split()[-1]) >= 8 * 6


@pytest.mark.parametrize("strict", [False, True])
@pytest.mark.parametrize("m", [1, 16, 100])
def test_a_state_dict_in_part(m, strict):
    W = random_weight(96, 300, 0.2, torch.bfloat16)
    layer = SparseLinear(300, 96, W.row_offsets, W.col_indices, W.values)
    x = torch.randn(m, 300, device="cuda").bfloat16()
    layer(x)
    bad = W.col_indices.clone()
    bad[5] = 10**9
    with pytest.raises(ERRORS, match="col_indices|Missing"):
        layer.load_state_dict({"col_indices": bad}, strict=strict)
        layer(x)
    torch.cuda.synchronize()


def test_operands_that_do_not_fit():
    W = random_weight(96, 300, 0.2, torch.bfloat16)
    layer = SparseLinear(300, 96, W.row_offsets, W.col_indices, W.values)
    x, bias = torch.randn(4, 300, device="cuda").bfloat16(), torch.zeros(96, device="cuda")
    spmm, indices = torch.ops.sparsekern.spmm, (W.row_offsets, W.col_indices)
    sizes = 96, 300
    calls = (
        lambda: functional_call(layer, {"values": W.values[:3]}, (x,)),
        lambda: functional_call(layer, {"values": torch.cat([W.values, W.values])}, (x,)),
        lambda: spmm(*indices, W.values[:5], *sizes, x),
        lambda: spmm(*indices, W.values, *sizes, x[:, :8]),
        lambda: spmm(*indices, W.values.float(), *sizes, x),
        lambda: spmm(*indices, W.values.cpu(), *sizes, x),
        lambda: spmm(*indices, W.values, *sizes, x, bias.bfloat16()[:3]),
        lambda: spmm(*indices, W.values, *sizes, x, bias),
        lambda: spmm(W.row_offsets[:9], W.col_indices, W.values, *sizes, x),
        lambda: spmm(W.row_offsets.cpu(), W.col_indices, W.values, *sizes, x),
        lambda: spmm(W.row_offsets.long(), W.col_indices.long(), W.values, *sizes, x),
        lambda: torch.ops.sparsekern.sddmm(*indices, *sizes, x, x),
    )
    for i, call in enumerate(calls):
        with pytest.raises(ERRORS):
            call()
            pytest.fail(f"call {i} was taken")
    torch.cuda.synchronize()


@pytest.mark.parametrize("tokens", [1, 16, 64])
def test_the_packed_op_checks_what_it_gets(tokens):
    W = random_weight(96, 300, 0.2, torch.bfloat16)
    packed, x = pack(W, tokens), torch.randn(2, 300, device="cuda").bfloat16()
    layer = PackedLinear(packed)
    sizes, numbers, tensors = (96, 300, W.nnz), packed.numbers(), list(packed.tensors().values())
    op = torch.ops.sparsekern.spmm_packed
    torch.testing.assert_close(op(x, layer.layout, *sizes, numbers, tensors), layer(x))
    for i, tensor in enumerate(tensors):
        for part in (tensor.cpu(), tensor[..., :-1], tensor.double()):
            with pytest.raises(ERRORS):
                op(x, layer.layout, *sizes, numbers, [*tensors[:i], part, *tensors[i + 1 :]])
    for bad in (
        (x[:, 1:], layer.layout, *sizes, numbers, tensors),
        (x, "cover2", *sizes, numbers, tensors),
        (x, layer.layout, 200, *sizes[1:], numbers, tensors),
        (x, layer.layout, *sizes, numbers, tensors, torch.zeros(95, device="cuda").bfloat16()),
        (x.half(), layer.layout, *sizes, numbers, tensors),
    ):
        with pytest.raises(ERRORS):
            op(*bad)
    torch.cuda.synchronize()


ROWS = [
    ("few_tokens", torch.bfloat16, 4),
    ("expand", torch.bfloat16, 100),
    ("expand", torch.float32, 9),
    ("expand", torch.float64, 9),
    ("triton", torch.float32, 9),
    ("dense", torch.float64, 9),
]
rows = pytest.mark.parametrize("row, dtype, m", ROWS, ids=lambda p: str(p))


@pytest.fixture
def force(fresh_table):
    def choose(row):
        if row == "triton" and not triton_rows._is_installed():
            pytest.skip("Triton is not installed")
        if row == "few_tokens" and cuda_library.refusal():
            pytest.skip(cuda_library.refusal())
        fresh_table.setenv("SPARSEKERN_KERNEL", row)

    return choose


@rows
def test_forward_mode(row, dtype, m, force):
    force(row)
    W = random_weight(64, 96, 0.3, dtype)
    w, x = W.to_dense().double(), torch.randn(m, 96, device="cuda").to(dtype)
    t = torch.randn_like(x)
    assert f"-> {row}" in explain(x, W)
    close = {"rtol": CLOSE[dtype], "atol": 20 * CLOSE[dtype]}
    with fwAD.dual_level():
        y = fwAD.unpack_dual(linear(fwAD.make_dual(x, t), W))
        torch.testing.assert_close(y.tangent.double(), t.double() @ w.t(), **close)
        torch.testing.assert_close(y.primal.double(), x.double() @ w.t(), **close)
    y, tangent = jvp(lambda x: linear(x, W), (x,), (t,))
    torch.testing.assert_close(tangent.double(), t.double() @ w.t(), **close)

    def of_values(values):
        return linear(x, SparseTensor(W.row_offsets, W.col_indices, values, (64, 96)))

    tv = torch.randn_like(W.values)
    dw = SparseTensor(W.row_offsets, W.col_indices, tv, (64, 96)).to_dense().double()
    _, tangent = jvp(of_values, (W.values,), (tv,))
    torch.testing.assert_close(tangent.double(), x.double() @ dw.t(), **close)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32], ids=str)
def test_the_worst_element_of_long_sums(dtype):
    """At most twice the worst of torch's own product, against float64."""
    n, k, m = 128, 16384, 48
    W = random_weight(n, k, 0.25, dtype)
    x, dy = torch.randn(m, k, device="cuda").to(dtype), torch.randn(m, n, device="cuda").to(dtype)
    w = W.to_dense()
    pattern, places = (W.row_offsets, W.col_indices), w != 0
    operands = {"spmm": (W.values, n, k, x), "spmm_t": (W.values, n, k, dy)}
    operands["sddmm"] = n, k, dy, x
    products = {
        "spmm": lambda w, x, dy: x @ w.t(),
        "spmm_t": lambda w, x, dy: dy @ w,
        "sddmm": lambda w, x, dy: (dy.t() @ x)[places],
    }
    for op, product in products.items():
        exact = product(w.double(), x.double(), dy.double())
        theirs = (product(w, x, dy).double() - exact).abs().max()
        for row in rows_of(op, dtype, m, n, k, W.nnz):
            if row.name == "triton" and dtype != torch.float32:
                continue  # compiling takes long, and one rounding hides the rest
            ours = (row.run(*pattern, *operands[op]).double() - exact).abs().max()
            assert ours <= 2 * theirs, (op, row.name, float(ours / theirs))


# Infinities


@needs_kernels
@DTYPES
@pytest.mark.parametrize("density", [0.1, 0.9])
def test_an_infinity_reaches_what_stored_values_connect_it_to(density, dtype):
    n, k, m = 200, 300, 80
    mask = torch.rand(n, k) < density
    mask[:, 7] = mask[11] = False
    W = SparseTensor.from_dense(torch.randn(n, k).to(dtype), mask)
    W = W.to("cuda")
    for run, width, stored in ((linear, k, mask), (None, n, mask.t())):
        x = torch.randn(m, width).to(dtype)
        x[5, 7 if run else 11], x[6, 9], x[79, 12] = torch.inf, torch.nan, -torch.inf
        bias = torch.randn(stored.shape[0]).to(dtype)
        args = W.row_offsets, W.col_indices, W.values, n, k
        op = torch.ops.sparsekern.spmm if run else torch.ops.sparsekern.spmm_t
        y = op(*args, x.cuda(), bias.cuda()).cpu()
        want = torch.zeros_like(y, dtype=torch.bool)
        want[6], want[79] = stored[:, 9], stored[:, 12]
        assert torch.equal(~y.isfinite(), want)
        w = W.to_dense().cpu().double()
        exact = x[5].nan_to_num(posinf=0).double() @ (w.t() if run else w) + bias.double()
        close = {"rtol": CLOSE[dtype], "atol": 20 * CLOSE[dtype]}
        torch.testing.assert_close(y[5].double(), exact, **close)


@needs_kernels
def test_mending_is_captured():
    W = random_weight(128, 256, 0.2, torch.float32)
    x = torch.randn(100, 256, device="cuda")
    linear(x, W)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        y = linear(x, W)
    want = linear(x, W)
    x[3, 5] = torch.inf
    graph.replay()
    assert torch.equal(~y[3].isfinite(), W.to_dense()[:, 5] != 0)
    others = torch.arange(100, device="cuda") != 3
    torch.testing.assert_close(y[others], want[others])


@pytest.mark.parametrize(
    "row, m", [*(("few_tokens", m) for m in (1, 2, 8, 16, 40, 64)), ("triton", 8), ("triton", 40)]
)
def test_a_nan_reaches_what_stored_values_connect_it_to(row, m, force):
    force(row)
    W = random_weight(200, 700, 0.2, torch.bfloat16)
    w, x = W.to_dense(), torch.randn(m, 700, device="cuda").bfloat16()
    token = m // 2
    clean = linear(x, W)
    x[token, 300] = torch.nan
    y = linear(x, W)
    others = torch.arange(m, device="cuda") != token
    assert torch.equal(y[others], clean[others])
    stored = w[:, 300] != 0
    assert stored.any() and torch.equal(y[token].isnan(), stored)


# Captured graphs


@pytest.mark.parametrize("m", [4, 100])
def test_a_captured_pattern_outlives_its_change(m):
    W = random_weight(128, 256, 0.2, torch.bfloat16)
    x = torch.randn(m, 256, device="cuda").bfloat16()
    want = linear(x, W)
    assert not derived.is_captured(W.col_indices)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        y = linear(x, W)
    assert derived.is_captured(W.col_indices)
    before = W.col_indices.clone()
    W.col_indices.fill_(10**9)
    with pytest.raises(ValueError, match="col_indices"):
        linear(x, W)
    graph.replay()  # `expand` reads the indices themselves
    torch.cuda.synchronize()
    W.col_indices.copy_(before)
    linear(x, W)  # from a new pack, while the graph reads the old one
    torch.cuda.empty_cache()
    graph.replay()
    torch.testing.assert_close(y, want)


@needs_kernels
def test_values_in_a_graph():
    """Those that require grad are packed in each replay; others by the next call outside."""
    W = random_weight(128, 256, 0.2, torch.bfloat16)
    x = torch.randn(4, 256, device="cuda").bfloat16()
    trained = SparseTensor(W.row_offsets.clone(), W.col_indices.clone(), W.values.clone(), W.shape)
    trained.values.requires_grad_()
    want = linear(x, W)
    graph = torch.cuda.CUDAGraph()
    with torch.no_grad():
        linear(x, trained)
        with torch.cuda.graph(graph):
            y, z = linear(x, W), linear(x, trained)
        W.values.mul_(2)
        trained.values.mul_(2)
    graph.replay()
    assert torch.equal(y, want) and torch.equal(z, 2 * want)
    linear(x, W)
    graph.replay()
    assert torch.equal(y, 2 * want)


def test_a_changed_pattern_is_not_captured():
    for m in (4, 100):
        W = random_weight(128, 256, 0.2, torch.bfloat16)
        x = torch.randn(m, 256, device="cuda").bfloat16()
        linear(x, W)
        W.col_indices += 0
        with pytest.raises(RuntimeError, match="call the product once before the capture"):
            with torch.cuda.graph(torch.cuda.CUDAGraph()):
                linear(x, W)
