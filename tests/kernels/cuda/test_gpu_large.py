"""On a GPU: W, and products, of more than 2^31 places."""

import pytest
import torch

from sparsekern import SparseTensor, explain, linear
from sparsekern.kernels.cuda import library as cuda_library

pytestmark = pytest.mark.gpu
DTYPES = pytest.mark.parametrize(
    "dtype", [torch.bfloat16, torch.float16, torch.float32, torch.float64], ids=str
)
CLOSE = {torch.bfloat16: 2e-2, torch.float16: 3e-3, torch.float32: 1e-4, torch.float64: 1e-10}


def grid_weight(n, k, each, dtype):
    """`each` places in each row, one in each k / each columns, the last place of W among them."""
    step = k // each
    columns = torch.arange(each, device="cuda") * step
    columns = columns + torch.randint(step, (n, each), device="cuda")
    columns[-1, -1] = k - 1
    offsets = torch.arange(n + 1, device="cuda") * each
    values = torch.randn(n * each, device="cuda").to(dtype)
    return SparseTensor(offsets, columns.flatten().int(), values, (n, k)), columns


@DTYPES
@pytest.mark.parametrize(
    "n, k, each, m",
    [
        (60000, 60000, 1, 1),
        (60000, 60000, 1, 4),
        (60000, 60000, 1, 100),
        (2**17, 2**15 + 64, 64, 100),  # too full for `csr`
        (2**11, 2**21, 2**12, 40),
    ],
)
def test_places_of_w_beyond_two_to_the_31(n, k, each, m, dtype):
    if torch.cuda.get_device_properties(0).total_memory < 100 * 2**30:
        pytest.skip("needs a GPU of 100 GiB")
    torch.cuda.empty_cache()
    W, columns = grid_weight(n, k, each, dtype)
    x, dy = torch.randn(m, k, device="cuda").to(dtype), torch.randn(m, n, device="cuda").to(dtype)
    last = 500  # rows, whose places lie beyond
    dy[:, :-last] = 0
    close = {"rtol": CLOSE[dtype], "atol": 20 * CLOSE[dtype]}
    columns, values = columns[-last:], W.values.view(n, each)[-last:].double()
    y = linear(x, W)
    want = torch.einsum("mre,re->mr", x.double()[:, columns], values)
    torch.testing.assert_close(y[:, -last:].double(), want, **close)
    del y, want
    spmm_t, sddmm = torch.ops.sparsekern.spmm_t, torch.ops.sparsekern.sddmm
    dx = spmm_t(W.row_offsets, W.col_indices, W.values, n, k, dy)
    each_dx = dy[:, -last:, None].double() * values
    want = torch.zeros(m, k, dtype=torch.float64, device="cuda")
    want.index_add_(1, columns.flatten(), each_dx.flatten(1))
    torch.testing.assert_close(dx.double(), want, **close)
    del dx, want, each_dx
    if each == 2**12 and dtype == torch.float64:
        return  # dW, N x K, and what it is made from: enough of one kind
    dvalues = sddmm(W.row_offsets, W.col_indices, n, k, dy, x).view(n, each)
    want = torch.einsum("mre,mr->re", x.double()[:, columns], dy[:, -last:].double())
    torch.testing.assert_close(dvalues[-last:].double(), want, **close)
    assert not dvalues[:-last].any()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=str)
def test_places_of_y_beyond_two_to_the_31(dtype):
    """And an infinity in the last token."""
    n, k, m = 2**17, 64, 2**14 + 2**7
    if torch.cuda.get_device_properties(0).total_memory < 100 * 2**30:
        pytest.skip("needs a GPU of 100 GiB")
    torch.cuda.empty_cache()
    W, columns = grid_weight(n, k, 8, dtype)
    x = torch.randn(m, k, device="cuda").to(dtype)
    x[-1, 3] = torch.inf
    y = linear(x, W)
    has_column = (columns == 3).any(1)
    if cuda_library.refusal() is None:
        assert torch.equal(~y[-1].isfinite(), has_column)
    want = torch.einsum("mre,re->mr", x[-3:].double()[:, columns], W.values.view(n, 8).double())
    close = {"rtol": CLOSE[dtype], "atol": 5 * CLOSE[dtype]}
    torch.testing.assert_close(y[-3:-1].double(), want[:-1], **close)
    assert not y[-1, has_column].isfinite().any()


def test_a_nearly_empty_weight_is_not_written_out():
    W, _ = grid_weight(60000, 60000, 1, torch.float64)
    x = torch.randn(4, 60000, dtype=torch.float64, device="cuda")
    assert "-> csr" in explain(x, W)
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    W.values.requires_grad_()
    linear(x.requires_grad_(), W).square().sum().backward()
    assert torch.cuda.max_memory_allocated() - before < 2**28
