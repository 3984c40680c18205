"""On a GPU: what is derived from a pattern, and the streams, threads and graphs that read it."""

import gc
import threading
import warnings

import pytest
import torch

from sparsekern import SparseTensor, linear, ops
from sparsekern.kernels.cuda import bitmap
from sparsekern.kernels.cuda import library as cuda_library
from sparsekern.kernels.triton import rows as triton_rows

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU"),
]
needs_kernels = pytest.mark.skipif(
    cuda_library.refusal() is not None, reason="no CUDA library, and no CuPy"
)
LATE = 100_000_000  # cycles: about 0.05 s
CLOSE = {torch.bfloat16: 2e-2, torch.float32: 1e-4}


def operands(m, n=128, k=256, dtype=torch.bfloat16):
    """W, x [M, K], dy [M, N]"""
    w = torch.randn(n, k, device="cuda") * (torch.rand(n, k, device="cuda") < 0.2)
    x, dy = (torch.randn(m, width, device="cuda").to(dtype) for width in (k, n))
    return SparseTensor.from_dense(w.to(dtype)), x, dy


@needs_kernels
@pytest.mark.parametrize("dtype", CLOSE, ids=str)
def test_what_one_stream_derives_is_there_for_the_next(dtype, monkeypatch):
    """Nobody could wait for it who does not know that it is made."""
    make = bitmap.make_bitmap

    def make_late(*args):
        torch.cuda._sleep(LATE)
        return make(*args)

    monkeypatch.setattr(bitmap, "make_bitmap", make_late)
    W, x, _ = operands(200, dtype=dtype)
    streams = [torch.cuda.Stream() for _ in range(2)]
    torch.cuda.synchronize()
    got = []
    for stream in streams:
        with torch.cuda.stream(stream):
            got.append(linear(x, W))
    torch.cuda.synchronize()
    for y in got:
        torch.testing.assert_close(
            y, x @ W.to_dense().t(), rtol=CLOSE[dtype], atol=20 * CLOSE[dtype]
        )


@pytest.mark.parametrize(
    "row, dtype, m",
    [
        *(("few_tokens", torch.bfloat16, m) for m in (1, 16, 64)),
        ("expand", torch.bfloat16, 96),
        ("expand", torch.float32, 9),
        ("triton", torch.bfloat16, 8),
        ("triton", torch.float32, 9),
        ("dense", torch.float64, 9),
    ],
    ids=str,
)
def test_nothing_that_is_kept_is_in_the_memory_of_a_graph(row, dtype, m, fresh_table):
    """torch.compile(mode="reduce-overhead") gives a graph's memory to its warm-ups, and takes all
    of it back."""
    if row == "triton" and not triton_rows._is_installed():
        pytest.skip("Triton is not installed")
    if row == "few_tokens" and cuda_library.refusal():
        pytest.skip(cuda_library.refusal())
    fresh_table.setenv("SPARSEKERN_KERNEL", row)
    W, x, dy = operands(m, k=2048, dtype=dtype)  # Triton's rows cut K into parts
    indices, w, bias = (W.row_offsets, W.col_indices), W.to_dense(), dy[0].clone()
    torch.mm(x, w.t()), torch.addmm(bias, x, w.t()), torch.mm(dy, w), torch.mm(dy.t(), x)
    triton_rows._of_stream.clear()
    triton_rows._arenas.clear()
    pool = torch.cuda.MemPool()
    with torch.no_grad(), torch.cuda.use_mem_pool(pool):
        for _ in range(2):
            linear(x, W), linear(x, W, bias)
            ops.spmm_t(*indices, W.values, *W.shape, dy)
            ops.sddmm(*indices, *W.shape, dy, x)
    torch.cuda.synchronize()
    gc.collect()
    blocks = [block for segment in pool.snapshot() for block in segment["blocks"]]
    assert blocks and not [block for block in blocks if block["state"] == "active_allocated"]


@needs_kernels
def test_a_thread_that_has_packed_nothing_captures_nothing():
    """It would pack into the graph's memory, and go on with that outside."""
    (W, x, _), got, errors = operands(4), [], []
    want = linear(x, W)

    def run():
        stream = torch.cuda.Stream()
        with torch.cuda.stream(stream):
            try:
                with torch.cuda.graph(torch.cuda.CUDAGraph(), stream=stream):
                    linear(x, W)
            except RuntimeError as error:
                errors.append(str(error))
            got.append(linear(x, W))
            graph = torch.cuda.CUDAGraph()
            with torch.cuda.graph(graph, stream=stream):
                got.append(linear(x, W))
            graph.replay()
        stream.synchronize()

    torch.cuda.synchronize()
    thread = threading.Thread(target=run)
    thread.start()
    thread.join()
    assert len(errors) == 1 and "call the product once before the capture" in errors[0]
    assert len(got) == 2 and all(torch.equal(y, want) for y in got)


@pytest.mark.parametrize("op", ["spmm", "spmm_t", "sddmm"])
@pytest.mark.parametrize("m", [4, 100])
@pytest.mark.parametrize("dtype", CLOSE, ids=str)
def test_an_op_called_by_its_name_has_its_gradients(dtype, m, op):
    """Also in a CUDA graph."""
    W, x, dy = operands(m, dtype=dtype)
    indices, values = (W.row_offsets, W.col_indices), W.values.requires_grad_()
    if op == "sddmm":
        args, h = (*indices, *W.shape, dy, x), torch.randn_like(values)
    else:
        a, like = (x, dy) if op == "spmm" else (dy, x)
        args, h = (*indices, values, *W.shape, a, torch.randn_like(like[0])), torch.randn_like(like)
    leaves = [t.requires_grad_() for t in args[2:] if isinstance(t, torch.Tensor)]

    def run(product):
        y = product(*args)
        return y, *torch.autograd.grad(y, leaves, h)

    raw, close = (
        getattr(torch.ops.sparsekern, op),
        {"rtol": CLOSE[dtype], "atol": 20 * CLOSE[dtype]},
    )
    torch.testing.assert_close(run(raw), run(getattr(ops, op)), **close)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = run(raw)
    with torch.no_grad():
        for t in leaves:
            t.normal_()
    graph.replay()
    torch.testing.assert_close(captured, run(raw), **close)


@needs_kernels
@pytest.mark.parametrize("m", [1, 16, 64, 200])
def test_nothing_is_refused_where_all_is_to_be_deterministic(m):
    """torch names each of its operations that is not; those of cuBLAS want a variable of the
    environment, and are not ours."""
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        torch.use_deterministic_algorithms(True, warn_only=True)
        try:
            W, x, dy = operands(m)
            results = []
            for _ in range(2):
                values, a = W.values.clone().requires_grad_(), x.clone().requires_grad_()
                own = SparseTensor(W.row_offsets, W.col_indices, values, W.shape)
                y = linear(a, own)
                results.append((y.detach(), *torch.autograd.grad(y, (values, a), dy)))
        finally:
            torch.use_deterministic_algorithms(False)
    assert all(map(torch.equal, *results))
    messages = [str(warning.message) for warning in caught]
    assert not [text for text in messages if "determinis" in text and "CuBLAS" not in text]
