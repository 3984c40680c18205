"""Dense products of prepared calls: the stand-in for cuBLASLt, and torch where there is none."""

import threading

import pytest
import torch
from emulated_cublaslt import cublaslt_library, dense  # noqa: F401
from emulated_cusparselt import (  # noqa: F401
    check,
    cusparselt_library,
    emulated_cuda,
    emulator,
    stand_in,
)
from test_emulated_prepared import K, N, as_on_a_gpu, call, layer, regular  # noqa: F401

from sparsekern import ops
from sparsekern.indices import expand_rows
from sparsekern.kernels.cuda import cublaslt
from sparsekern.kernels.operands import native
from sparsekern.kernels.problem import Problem
from sparsekern.kernels.steps import A, Steps
from sparsekern.testing import relative_error

pytestmark = [
    pytest.mark.usefixtures("stand_in", "dense", "fresh_table"),
    pytest.mark.skipif(native is None, reason="the C++ library is not built"),
]


def test_each_thread_gets_a_handle_of_torchs(monkeypatch):
    makers = []
    handle = lambda: makers.append(threading.get_ident())  # noqa: E731
    monkeypatch.setattr(torch.cuda, "current_blas_handle", handle)
    monkeypatch.setattr(cublaslt, "_here", cublaslt._Here())
    sparse, x = regular().requires_grad_(False), torch.randn(80, K).bfloat16()

    def run():
        sparse(x), sparse(x)

    run()
    thread = threading.Thread(target=run)
    thread.start()
    thread.join()
    assert len(makers) == len(set(makers)) == 2


def train(sparse, x):
    """y and the gradients of x and of the values, held to float64."""
    x = x.clone().requires_grad_()
    y = sparse(x)
    h = torch.randn_like(y)
    y.backward(h)
    w, bias = sparse.weight.detach().to_dense(), sparse.bias
    flat, dy = x.detach().flatten(0, -2), h.flatten(0, -2)
    check(y.detach().flatten(0, -2), flat, w, None if bias is None else bias.detach())
    check(x.grad.flatten(0, -2), dy, w.T)
    at = expand_rows(sparse.row_offsets, sparse.values.numel()), sparse.col_indices
    exact = (dy.double().T @ flat.double())[at]
    scale = (dy.double().abs().T @ flat.double().abs())[at]
    assert relative_error(sparse.values.grad, exact, scale) <= 2**-8
    if bias is not None:
        exact, scale = torch.sum(dy.double(), 0), torch.sum(dy.double().abs(), 0)
        assert relative_error(bias.grad, exact, scale) <= 2**-8
    sparse.zero_grad()


@pytest.mark.parametrize("tokens", [(65,), (2, 3, 16)])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("lacks", ["", "workspace", "sums"])
def test_products(tokens, dtype, bias, lacks, dense):  # noqa: F811
    if lacks:
        getattr(dense, f"without_{lacks}")(True)
    n, k = 37, 51  # of no multiple
    sparse, _ = layer(torch.rand(n, k) < 0.5, dtype, bias)
    before = dense.products()
    for _ in range(2):
        train(sparse, torch.randn(*tokens, k, dtype=dtype))
    assert dense.products() - before == 6


def test_an_algorithm_is_asked_for_once_a_shape(dense):  # noqa: F811
    x, before = torch.randn(80, K).bfloat16(), dense.asked()
    for _ in range(3):
        train(regular(), x)  # another pattern each
    assert dense.asked() - before == 3


@pytest.mark.parametrize("missing", ["algorithms", "library", "functions"])
def test_torch_multiplies_where_the_library_does_not(missing, dense, monkeypatch):  # noqa: F811
    if missing == "algorithms":
        dense.without_algorithms(True)
    else:
        name = "libnone.so" if missing == "library" else "libm.so.6"
        monkeypatch.setattr(cublaslt, "soname", lambda: name)
    before = dense.products()
    for tokens in (80,), (4, 20):
        train(regular(), torch.randn(*tokens, K).bfloat16())
    assert dense.products() == before


def test_what_failed_for_want_of_memory_is_tried_again(dense):  # noqa: F811
    x, before = torch.randn(80, K).bfloat16(), dense.products()
    dense.without_memory(True)
    train(regular(), x)
    assert dense.products() == before
    dense.without_memory(False)
    train(regular(), x)
    assert dense.products() - before == 3


def test_threads_share_an_algorithm(dense):  # noqa: F811
    """The stand-in refuses two with one handle; a bias of another thread gives other results."""
    sparse = [regular().requires_grad_(False) for _ in range(4)]
    x, wrong = torch.randn(80, K).bfloat16(), []
    want = [s(x) for s in sparse]

    def run(i):
        for _ in range(5):
            if not torch.equal(call(sparse[i], x), want[i]):
                wrong.append(i)

    threads = [threading.Thread(target=run, args=(i,)) for i in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not wrong


def test_a_failed_product_is_an_error():
    product = cublaslt.product_of(Problem("spmm_t", "cpu", torch.bfloat16, 8, 16, 32, 0), None)
    words = cublaslt._library().words_address
    start, x = native.dense_product(words), torch.zeros(8, 16, dtype=torch.bfloat16)
    w, dx = x.new_zeros(product.scratch_elements), x.new_empty(8, 32)
    start(1, 1, 1, 0, 7, product, w, x, dx, None, w)
    assert not dx.any()
    with pytest.raises(RuntimeError, match=r"cublasLtMatmul: CUBLAS_.*_VALUE \(status 7\)"):
        start(1, 1, 1, 0, 7, product, w, x.view(-1)[1:], dx, None, w)
    with pytest.raises(TypeError, match="cublasLtMatmul: expected 6 arguments"):
        start(1, 1, 1, 0, 7, product, w, x, dx, None)


def test_both_gradients_share_one_scratch(monkeypatch):
    """W written out and dW, one after the other in the same memory."""
    sparse, x = regular(), torch.randn(80, K).bfloat16()
    made = []
    new_empty = torch.Tensor.new_empty

    def noted(t, *args, **named):
        made.append(new_empty(t, *args, **named))
        return made[-1]

    operands = sparse.row_offsets, sparse.col_indices, sparse.values.detach()
    dy = torch.randn(80, N).bfloat16()
    monkeypatch.setattr(torch.Tensor, "new_empty", noted)
    with torch.no_grad():
        dx, dvalues = native.call(ops.SPMM_GRADIENTS, *operands, N, K, dy, x)
    scratch, *results = made[-3:]
    assert scratch.numel() >= N * K and [t.shape for t in results] == [dx.shape, dvalues.shape]


@pytest.mark.parametrize("tokens", [(80,), (4, 20), (1100,)])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=str)
def test_all_gradients_are_one_call(tokens, dtype, monkeypatch):
    """With sums of the library's, or of torch's; nothing is left to Python."""
    sparse = regular(dtype)
    x = torch.randn(*tokens, K, dtype=dtype)
    train(sparse, x)
    monkeypatch.setattr(torch.Tensor, "sum", None)
    train(sparse, x)


def test_scratch_is_as_large_as_asked():
    steps = Steps(torch.device("cpu"))
    small = steps.scratch(A, 10)
    assert steps.scratch(A, 4) == small == steps.scratch(A, 10)
    assert steps.scratch(A, 11) != small
