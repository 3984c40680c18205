"""Tensors on a GPU: every row of the kernel table that runs there, and everything around them."""

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from sparsekern import SparseLinear, SparseTensor, explain, linear
from sparsekern.kernels import table
from sparsekern.kernels.problem import Problem
from sparsekern.testing import PROBLEMS, Case, exact, relative_error

pytestmark = pytest.mark.gpu

# float32 sums in another order; the 16-bit types round the result once.
TOLERANCE = {torch.float32: 2e-6, torch.bfloat16: 2**-8, torch.float16: 2**-11}


@pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
@pytest.mark.parametrize("case", PROBLEMS, ids=lambda case: case.name)
def test_products(case, dtype):
    t = case.tensors(dtype)
    n, k = t.mask.shape
    pattern = t.row_offsets.cuda(), t.col_indices.cuda()
    values, x, dy = t.values.cuda(), t.x.cuda(), t.dy.cuda()
    operands = {"spmm": (values, n, k, x), "spmm_t": (values, n, k, dy), "sddmm": (n, k, dy, x)}
    for op, (want, scale) in exact(t).items():
        # Below its smallest normal number a type rounds to a fixed step.
        scale = torch.where(scale == 0, scale, scale.clamp_min(torch.finfo(dtype).tiny))
        problem = Problem(op, "cuda", dtype, case.M, n, k, len(t.values))
        rows = [row for row in table.KERNELS if row.op == op and row.device in (None, "cuda")]
        assert len(rows) > 1
        for row in rows:
            if row.refuse(problem) is None:
                got = row.run(*pattern, *operands[op]).cpu()
                # cuBLAS may add parts of a 16-bit product in 16 bits.
                factor = 2 if row.name == "expand" else 1
                assert relative_error(got, want, scale) <= factor * TOLERANCE[dtype], (op, row.name)


def test_drop_in_and_explain():
    w = torch.randn(40, 30, device="cuda") * (torch.rand(40, 30, device="cuda") < 0.5)
    W, x = SparseTensor.from_dense(w), torch.randn(2, 5, 30, device="cuda")
    for y in (torch.matmul(x, W.T), x @ W.T, F.linear(x, W), linear(x, W)):
        torch.testing.assert_close(y, x @ w.T)
    assert "-> expand" in explain(x, W) and "few_tokens refused: it takes bfloat16" in explain(x, W)
    with pytest.raises(RuntimeError) as sparse_error:
        torch.matmul(x.cpu(), W.T)
    with pytest.raises(RuntimeError) as dense_error:
        torch.matmul(x.cpu(), w.T)
    assert str(sparse_error.value) == str(dense_error.value)


@pytest.mark.parametrize("dtype", [None, torch.bfloat16], ids=["float32", "autocast"])
def test_a_training_step_is_that_of_the_dense_layer(dtype):
    dense = torch.nn.Linear(64, 48).cuda()
    mask = torch.rand_like(dense.weight) < 0.25
    with torch.no_grad():
        dense.weight.mul_(mask)
    layer, x = SparseLinear.from_linear(dense, mask), torch.randn(33, 64, device="cuda")
    for module in (dense, layer):
        with torch.autocast("cuda", dtype=dtype, enabled=dtype is not None):
            module(x).square().mean().backward()
    tolerance = {"rtol": 1e-4, "atol": 1e-6} if dtype is None else {"rtol": 3e-2, "atol": 3e-4}
    torch.testing.assert_close(layer.values.grad, dense.weight.grad[mask], **tolerance)
    torch.testing.assert_close(layer.bias.grad, dense.bias.grad, **tolerance)


def test_cuda_graph():
    t = Case("graph", 16, 64, 96).tensors()
    W = SparseTensor(t.row_offsets.cuda(), t.col_indices.cuda(), t.values.cuda(), (64, 96))
    x = t.x.cuda()
    side = torch.cuda.Stream()
    with torch.cuda.stream(side):
        linear(x, W)
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        y = linear(x, W)
    x.copy_(torch.randn_like(x))
    graph.replay()
    torch.testing.assert_close(y, x @ W.to_dense().T, rtol=1e-4, atol=1e-4)


def test_torch_compile_captures_a_pattern_that_is_new():
    """What is derived in its warm-ups outlives them."""

    def model(mask):
        torch.manual_seed(0)
        layers = [nn.Linear(96, 64), nn.GELU(), nn.Linear(64, 96)]
        layers[0] = SparseLinear.from_linear(layers[0], mask)
        layers[2] = SparseLinear.from_linear(layers[2], mask.t().contiguous())
        return nn.Sequential(*layers).cuda()

    mask = torch.rand(64, 96) < 0.3
    eager, compiled = model(mask), model(mask)
    fast = torch.compile(compiled, mode="reduce-overhead")
    for _ in range(6):
        x = torch.randn(128, 96, device="cuda")
        torch.compiler.cudagraph_mark_step_begin()
        for module in (eager, fast):
            with torch.autocast("cuda", torch.bfloat16):
                module(x).square().mean().backward()
        for a, b in zip(eager.parameters(), compiled.parameters(), strict=True):
            torch.testing.assert_close(b.grad, a.grad, rtol=3e-2, atol=3e-4)
            with torch.no_grad():
                for p in (a, b):
                    p -= 0.1 * a.grad
        eager.zero_grad()
        compiled.zero_grad()


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
def test_cupy_shares_memory(dtype):
    cupy = pytest.importorskip("cupy")
    sparse = pytest.importorskip("cupyx.scipy.sparse")
    device = torch.device("cuda", torch.cuda.device_count() - 1)
    w = torch.randn(40, 30, dtype=dtype, device=device)
    w *= torch.rand(40, 30, device=device) < 0.5
    W = SparseTensor.from_dense(w)
    a = W.to_cupy()
    assert isinstance(a, sparse.csr_matrix) and a.shape == (40, 30)
    back = SparseTensor.from_cupy(a)
    for part, array, again in (
        (W.values, a.data, back.values),
        (W.col_indices, a.indices, back.col_indices),
        (W.row_offsets, a.indptr, back.row_offsets),
    ):
        assert part.data_ptr() == array.data.ptr == again.data_ptr()
        assert again.device == device and torch.equal(part, again)
    W.values.mul_(2)
    with cupy.cuda.Device(device.index):  # cupy computes on its current device, not on that of `a`
        again = torch.from_dlpack(a.toarray())
    assert torch.equal(again, W.to_dense())
    assert torch.equal(SparseTensor.from_cupy(W.T.to_cupy()).to_dense(), W.to_dense().T)


def test_from_cupy_converts_and_checks():
    sparse = pytest.importorskip("cupyx.scipy.sparse")
    cupy = pytest.importorskip("cupy")
    device = torch.device("cuda", torch.cuda.device_count() - 1)  # cupy's current one is another
    w = torch.randn(9, 7, device=device) * (torch.rand(9, 7, device=device) < 0.5)
    a = SparseTensor.from_dense(w).to_cupy()
    for name in ("coo", "csc"):
        with cupy.cuda.Device(device.index):
            other = a.asformat(name)
        W = SparseTensor.from_cupy(other)
        assert W.device == device and torch.equal(W.to_dense(), w)
    parts = cupy.ones(2, "f"), cupy.array([2, 0], "i"), cupy.array([0, 2], "i")
    parts[0][1] = 3
    W = SparseTensor.from_cupy(sparse.csr_matrix(parts, shape=(1, 3)))
    assert W.to_dense().tolist() == [[3, 0, 1]]  # sorted, values and all
    parts[1][:] = 2
    with pytest.raises(ValueError, match="col_indices: .* a duplicate"):
        SparseTensor.from_cupy(sparse.csr_matrix(parts, shape=(1, 3)))


def test_from_cupy_waits_for_the_stream_that_cupy_computes_on():
    cupy = pytest.importorskip("cupy")
    pytest.importorskip("cupyx.scipy.sparse")
    w = torch.randn(90, 70, device="cuda") * (torch.rand(90, 70, device="cuda") < 0.5)
    a, stream = SparseTensor.from_dense(w).to_cupy().tocoo(), cupy.cuda.Stream(non_blocking=True)
    torch.cuda.synchronize()
    with stream:
        with torch.cuda.stream(torch.cuda.ExternalStream(stream.ptr)):
            torch.cuda._sleep(50_000_000)
        a.data *= 2
        W = SparseTensor.from_cupy(a)
    assert torch.equal(W.to_dense(), 2 * w)
