"""The Triton kernels on a GPU: every row on every problem, every number of tokens, CUDA graphs."""

import pytest
import torch
from conftest import products
from infinities import check_stored, tokens_with_infinities, weight_with_infinities

from sparsekern import SparseTensor, explain, linear
from sparsekern.kernels.cuda import cover, expand
from sparsekern.kernels.reference import mm
from sparsekern.kernels.triton import bitmap
from sparsekern.kernels.triton import rows as triton_rows
from sparsekern.testing import PROBLEMS, Case, exact, relative_error

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not triton_rows._is_installed(), reason="Triton is not installed"),
]

# float32 sums in another order; the 16-bit types round the result once.
TOLERANCE = {torch.float32: 2e-6, torch.bfloat16: 2**-8, torch.float16: 2**-11}
dtypes = pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
SPMM = triton_rows.KERNELS[0].run  # the kernel that suits the tokens, a cover or a bitmap


def cover_dtypes(test):
    skip = pytest.mark.skipif(not cover.is_built(), reason="the C++ library is not built")
    return skip(pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)(test))


def on_gpu(t):
    """The operands of a Case on the GPU; the mask, which no kernel takes, stays."""
    return t._replace(**{name: part.cuda() for name, part in t._asdict().items() if name != "mask"})


def check(t, op, got):
    want, scale = exact(t)[op]
    # Below its smallest normal number a type rounds to a fixed step.
    scale = torch.where(scale == 0, scale, scale.clamp_min(torch.finfo(got.dtype).tiny))
    assert got.is_contiguous() and got.dtype == t.x.dtype
    assert relative_error(got.cpu(), want, scale) <= TOLERANCE[got.dtype], op


@dtypes
@pytest.mark.parametrize("case", PROBLEMS, ids=lambda case: case.name)
def test_products(case, dtype, nan_memory):
    t = case.tensors(dtype)
    for kernel in triton_rows.KERNELS:
        check(t, kernel.op, kernel.run(*products(on_gpu(t))[kernel.op]))


@dtypes
def test_every_number_of_tokens(dtype, nan_memory):
    for m in range(1, 66):
        t = Case("tokens", m, 70, 600).tensors(dtype)
        for kernel in triton_rows.KERNELS:
            check(t, kernel.op, kernel.run(*products(on_gpu(t))[kernel.op]))


@dtypes
@pytest.mark.parametrize("fill", [0.01, 0.3, 0.6, 0.95, 1.0])
def test_tiles_of_every_fill(fill, dtype, nan_memory):
    t = Case("fill", 16, 128, 512, sparsity=1 - fill).tensors(dtype)
    for kernel in triton_rows.KERNELS:
        check(t, kernel.op, kernel.run(*products(on_gpu(t))[kernel.op]))


@dtypes
@pytest.mark.parametrize("M", [1, 16, 64, 130])
def test_infinities_reach_what_a_stored_value_connects(M, dtype, nan_memory):
    n, k = 300, 1031
    w, mask, bias = weight_with_infinities(n, k, dtype, "cuda")
    W = SparseTensor.from_dense(w, mask)
    pattern = W.row_offsets, W.col_indices, W.values, n, k
    x = tokens_with_infinities(M, k, dtype, "cuda")
    dy = tokens_with_infinities(M, n, dtype, "cuda")
    config = triton_rows.spmm_config(M, n, k, dtype.itemsize)
    for b, b_t in ((None, None), (bias, torch.randn(k, device="cuda").to(dtype))):
        check_stored(SPMM(*pattern, x, b), x, w, mask, b)
        check_stored(triton_rows._spmm(*pattern, x, b, config=config), x, w, mask, b)
        check_stored(triton_rows._spmm_t(*pattern, dy, b_t), dy, w.t(), mask.t(), b_t)


@dtypes
def test_infinities_of_a_weight_that_is_written_out(dtype, nan_memory, monkeypatch):
    """The rows `expand` where no CUDA kernel can run."""
    monkeypatch.setattr(expand.cuda_library, "refusal", lambda: "none here")
    w, mask, bias = weight_with_infinities(300, 1031, dtype, "cuda")
    W = SparseTensor.from_dense(w, mask)
    weight = W.row_offsets, W.col_indices, W.values, 300, 1031
    x = tokens_with_infinities(130, 1031, dtype, "cuda")
    dy = tokens_with_infinities(130, 300, dtype, "cuda")
    for b, b_t in ((None, None), (bias, torch.randn(1031, device="cuda").to(dtype))):
        for y, x_, w_, mask_, b_ in (
            (expand.spmm(*weight, x, b), x, w, mask, b),
            (expand.spmm_t(*weight, dy, b_t), dy, w.t(), mask.t(), b_t),
        ):
            mended = ~x_.isfinite().all(1)  # what holds no infinity is torch.mm's, to the bit
            dense = mm(x_, w_.t(), b_)
            torch.testing.assert_close(y[~mended], dense[~mended], rtol=0, atol=0, equal_nan=True)
            check_stored(y[mended], x_[mended], w_, mask_, b_)


@dtypes
@pytest.mark.parametrize("split", [2, 3, 5])
def test_split(split, dtype, nan_memory):
    """Parts of K, the same bits each time, and the counters are 0 again."""
    t = Case("split", 33, 300, 1300).tensors(dtype)
    arguments = products(on_gpu(t))["spmm"]
    config = triton_rows.spmm_config(33, 300, 1300, dtype.itemsize)._replace(split=split)
    results = [triton_rows._spmm(*arguments, config=config) for _ in range(20)]
    check(t, "spmm", results[0])
    assert all(torch.equal(result, results[0]) for result in results)
    assert not any(counters.any() for counters in triton_rows._of_stream.values())


@cover_dtypes
@pytest.mark.parametrize("case", PROBLEMS, ids=lambda case: case.name)
def test_cover(case, dtype, nan_memory):
    t = case.tensors(dtype)
    if case.M <= 64:
        check(t, "spmm", triton_rows._spmm_cover(*products(on_gpu(t))["spmm"]))


@cover_dtypes
def test_cover_of_every_number_of_tokens(dtype, nan_memory):
    for m in range(1, 65):
        t = Case("tokens", m, 70, 600).tensors(dtype)
        check(t, "spmm", triton_rows._spmm_cover(*products(on_gpu(t))["spmm"]))


@cover_dtypes
@pytest.mark.parametrize("fill", [0.001, 0.01, 0.3, 0.6, 0.95, 1.0])
def test_cover_of_every_fill(fill, dtype, nan_memory):
    t = Case("fill", 16, 128, 512, sparsity=1 - fill).tensors(dtype)
    check(t, "spmm", triton_rows._spmm_cover(*products(on_gpu(t))["spmm"]))


@cover_dtypes
@pytest.mark.parametrize("split", [1, 2, 3, 5])
def test_cover_split(split, dtype, nan_memory):
    t = Case("split", 33, 300, 1300).tensors(dtype)
    arguments = products(on_gpu(t))["spmm"]
    results = [triton_rows._spmm_cover(*arguments, split=split) for _ in range(20)]
    check(t, "spmm", results[0])
    assert all(torch.equal(result, results[0]) for result in results)
    assert not any(counters.any() for counters in triton_rows._of_stream.values())


@cover_dtypes
def test_cover_of_uneven_masks(dtype, nan_memory):
    """A full row, a full tile, an empty tile."""
    W = torch.randn(200, 1000) * (torch.rand(200, 1000) < 0.1)
    W[40], W[64:96, 256:512], W[96:128, 512:768] = torch.randn(1000), torch.randn(32, 256), 0
    W, x, bias = W.to(dtype), torch.randn(16, 1000).to(dtype), torch.randn(200).to(dtype)
    A = SparseTensor.from_dense(W.cuda())
    pattern = A.row_offsets, A.col_indices, A.values, 200, 1000
    got = triton_rows._spmm_cover(*pattern, x.cuda(), bias.cuda()).cpu()
    want = x.double() @ W.double().T + bias.double()
    scale = x.double().abs() @ W.double().abs().T + bias.double().abs()
    assert relative_error(got, want, scale) <= TOLERANCE[dtype]


@pytest.mark.skipif(not cover.is_built(), reason="the C++ library is not built")
def test_cover_in_a_graph():
    """It sees new x and, from the next call outside on, new values."""
    t = on_gpu(Case("graph", 16, 256, 2048).tensors(torch.bfloat16))
    arguments = products(t)["spmm"]
    want = triton_rows._spmm_cover(*arguments)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        y = triton_rows._spmm_cover(*arguments)
    graph.replay()
    assert torch.equal(y, want)
    t.x.neg_()
    graph.replay()
    assert torch.equal(y, -want)
    t.values.mul_(2)
    assert torch.equal(triton_rows._spmm_cover(*arguments), -2 * want)


@dtypes
def test_bias(dtype):
    t = Case("bias", 40, 70, 300).tensors(dtype)
    for run, op in (
        (SPMM, "spmm"),
        (triton_rows._spmm, "spmm"),
        (triton_rows._spmm_t, "spmm_t"),
    ):
        want, scale = exact(t)[op]
        bias = torch.randn(want.shape[1]).to(dtype)
        got = run(*products(on_gpu(t))[op], bias.cuda()).cpu()
        error = relative_error(got, want + bias.double(), scale + bias.double().abs())
        assert error <= TOLERANCE[dtype], op


def test_bitmap_is_that_of_the_cpu():
    t = Case("bitmap", 1, 300, 700, sparsity=0.6).tensors()
    want = bitmap.make_bitmap(t.row_offsets, t.col_indices, 300, 700)
    got = bitmap.make_bitmap(t.row_offsets.cuda(), t.col_indices.cuda(), 300, 700)
    assert torch.equal(got.lanes.cpu(), want.lanes) and torch.equal(got.starts.cpu(), want.starts)


def test_values_at_an_odd_address():
    t = on_gpu(Case("offset", 80, 64, 512).tensors(torch.bfloat16))
    values = torch.cat([t.values[:1], t.values])[1:]
    arguments = products(t)["spmm"]
    moved = products(t._replace(values=values))["spmm"]
    assert values.data_ptr() % 16 and torch.equal(
        triton_rows._spmm(*arguments), triton_rows._spmm(*moved)
    )


@pytest.fixture
def forced(fresh_table):
    fresh_table.setenv("SPARSEKERN_KERNEL", "triton")


def test_forward_and_backward_through_the_op(forced):
    t = on_gpu(Case("op", 48, 200, 300).tensors())
    W = SparseTensor(t.row_offsets, t.col_indices, t.values.requires_grad_(), (200, 300))
    x = t.x.requires_grad_()
    assert all("-> triton" in line for line in explain(x, W).splitlines())
    linear(x, W).backward(t.dy)
    cpu = Case("op", 48, 200, 300).tensors()
    check(cpu, "spmm_t", x.grad)
    check(cpu, "sddmm", W.values.grad)


def test_cuda_graph(forced):
    """A graph of two products that split K, replayed on new operands."""
    t = on_gpu(Case("graph", 16, 256, 2048).tensors(torch.bfloat16))
    W = SparseTensor(t.row_offsets, t.col_indices, t.values, (256, 2048))
    assert triton_rows.cover_split(16, 256, 2048) > 1
    x = t.x.clone()
    linear(x, W)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        y, z = linear(x, W), linear(-x, W)
    for _ in range(3):
        x.copy_(torch.randn_like(x))
        graph.replay()
        want = linear(x, W)
        assert torch.equal(y, want) and torch.equal(z, -want)


def test_a_graph_cannot_make_a_bitmap(forced):
    t = on_gpu(Case("late", 16, 64, 96).tensors())
    W = SparseTensor(t.row_offsets, t.col_indices, t.values, (64, 96))
    with pytest.raises(RuntimeError, match="call the product once before the capture"):
        with torch.cuda.graph(torch.cuda.CUDAGraph()):
            linear(t.x, W)


def test_two_streams():
    """Products with one W on two streams at once: each stream has counters of its own."""
    t = on_gpu(Case("streams", 16, 512, 4096).tensors(torch.bfloat16))
    arguments = products(t)["spmm"]
    want = SPMM(*arguments)
    streams = [torch.cuda.Stream() for _ in range(2)]
    torch.cuda.synchronize()
    results = []
    for _ in range(50):
        for stream in streams:
            with torch.cuda.stream(stream):
                results.append(SPMM(*arguments))
    torch.cuda.synchronize()
    assert all(torch.equal(result, want) for result in results)


@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="one GPU")
@dtypes
def test_another_gpu_than_the_current_one(dtype, nan_memory):
    t = Case("gpu", 16, 70, 600).tensors(dtype)
    parts = {name: part.to("cuda:1") for name, part in t._asdict().items() if name != "mask"}
    parts["x"][3, 5] = torch.inf  # and what mends
    for kernel in triton_rows.KERNELS:
        got = kernel.run(*products(t._replace(**parts))[kernel.op])
        want = kernel.run(*products(on_gpu(t._replace(x=parts["x"].cpu())))[kernel.op])
        assert got.device.index == 1
        torch.testing.assert_close(got.cpu(), want.cpu(), rtol=0, atol=0, equal_nan=True)
