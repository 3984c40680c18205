"""The kernels of bitmap.cu against torch, on the emulator and on a GPU."""

import pytest
import torch
from emulated_cuda import emulated_cuda, emulator  # noqa: F401

from sparsekern import SparseTensor
from sparsekern.kernels.cuda import bitmap as bitmaps

DTYPES = [torch.bfloat16, torch.float32, torch.float64]
SHAPES = [(1, 1), (3, 64), (37, 101), (5, 4500), (300, 9), (130, 200), (16, 16), (144, 80)]
TWO_WAY_SHAPES = [(16, 16), (16, 80), (144, 64), (272, 208), (128, 128)]


def two_way(n, k):
    """A mask of at most two of four in rows and in columns, with empty, half and full groups."""
    mask = torch.zeros(n, k, dtype=torch.bool)
    for i in torch.randperm(n * k).tolist():
        row, col = divmod(i, k)
        fits = mask[row, col // 4 * 4 : col // 4 * 4 + 4].sum() < 2
        mask[row, col] = fits and mask[row // 4 * 4 : row // 4 * 4 + 4, col].sum() < 2
    return mask & (torch.rand(n, k) < 0.7)


def slots_of(w, mask):
    """The slots [N, K / 2]: stored values, and the first free places beside them as 0."""
    n, k = w.shape
    w, mask = w.view(n, k // 4, 4), mask.view(n, k // 4, 4)
    # Stored places first, then free ones from the left; the first two, in their order.
    order = (
        (torch.arange(4, device=w.device) - 4 * mask.long()).argsort(-1)[..., :2].sort(-1).values
    )
    return (w * mask).gather(-1, order).view(n, k // 2)


def check_written_out_and_collected(n, k, dtype, device):
    mask = torch.rand(n, k, device=device) < torch.rand(n, 1, device=device)
    w = torch.randn(n, k, device=device).to(dtype) * mask
    W = SparseTensor.from_dense(w, mask)
    bitmap = bitmaps.make_bitmap(W.row_offsets, W.col_indices, n, k)
    assert torch.equal(bitmaps.write_out(bitmap, W.values, n, k), w)
    assert torch.equal(bitmaps.collect(bitmap, w, W.nnz), W.values)
    if dtype is torch.bfloat16:
        wide = bitmaps.collect(bitmap, w, W.nnz, torch.float32)
        assert torch.equal(wide, W.values.float()) and wide.dtype is torch.float32


def check_operands_of_two_of_four(n, k, device):
    mask = two_way(n, k).to(device)
    w = torch.randn(n, k, device=device).bfloat16()
    W = SparseTensor.from_dense(w * mask, mask)
    bitmap = bitmaps.make_bitmap(W.row_offsets, W.col_indices, n, k)
    rest = torch.randint(0, 255, (n * k // 8 // 16 * 16 + 16,), dtype=torch.uint8, device=device)
    slots = torch.empty(n * k // 2 + rest.numel() // 2, dtype=torch.bfloat16, device=device)
    for fill, w_, mask_ in ((bitmaps.fill, w, mask), (bitmaps.fill_transposed, w.t(), mask.t())):
        slots.fill_(torch.nan)
        fill(bitmap, W.values, rest, slots, n, k)
        want = slots_of(w_.contiguous(), mask_.contiguous())
        assert torch.equal(slots[: n * k // 2].view_as(want), want)
        assert torch.equal(slots[n * k // 2 :].view(torch.uint8), rest)


@pytest.mark.parametrize("backward", [False, True])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("n, k", SHAPES)
def test_written_out_and_collected(n, k, dtype, backward, emulated_cuda, nan_memory):  # noqa: F811
    emulated_cuda.backward(backward)
    check_written_out_and_collected(n, k, dtype, "cpu")


@pytest.mark.parametrize("backward", [False, True])
@pytest.mark.parametrize("n, k", TWO_WAY_SHAPES)
def test_operands_of_two_of_four(n, k, backward, emulated_cuda):  # noqa: F811
    emulated_cuda.backward(backward)
    check_operands_of_two_of_four(n, k, "cpu")


@pytest.mark.gpu
@pytest.mark.sanitize
def test_on_a_gpu(nan_memory):
    for n, k in SHAPES:
        for dtype in DTYPES:
            check_written_out_and_collected(n, k, dtype, "cuda")
    for n, k in TWO_WAY_SHAPES:
        check_operands_of_two_of_four(n, k, "cuda")
