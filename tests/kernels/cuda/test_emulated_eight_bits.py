"""Packed values of 8 bits with a scale for each row, without a GPU: emulated thread by thread.

Products are held to those of the rounded weights, in float64.
"""

import pytest
import torch
from emulated_cuda import emulated_cuda, emulator  # noqa: F401
from infinities import check_stored, tokens_with_infinities, weight_with_infinities
from packed_8_bits import check, layouts, packed_as, types, weight_of_every_number
from test_emulated_cuda import random_weight

from sparsekern import SparseTensor
from sparsekern.kernels.cuda import few_tokens
from sparsekern.kernels.cuda.choose import pack_for
from sparsekern.kernels.cuda.few_tokens import spmm_packed
from sparsekern.kernels.cuda.layout import Gpu
from sparsekern.kernels.cuda.row_scales import LARGEST, round_rows
from sparsekern.testing import PROBLEMS

emulated = pytest.mark.usefixtures("emulated_cuda")
H200 = Gpu(132, 227 * 1024, has_warpgroups=True)


@pytest.fixture(autouse=True)
def gpu(monkeypatch):
    monkeypatch.setattr(few_tokens, "gpu_of", lambda device: H200)


@types
def test_values_are_rounded_by_rows(dtype):
    w = random_weight(40, 300, 0.4).float() * torch.logspace(-20, 20, 40)[:, None]
    w[3], w[4] = 0, 0
    w[4, 7] = 1
    mask = w != 0
    mask[3, :5] = True  # zeros alone, which are stored
    w[9] *= 1e-40 / w[9].abs().max()  # below the smallest normal number
    W = SparseTensor.from_dense(w.bfloat16(), mask)
    codes, scales = round_rows(W, dtype)
    assert codes.dtype is dtype and scales.dtype is torch.float32
    assert scales[3] == 0 and scales[4] == torch.tensor(1 / LARGEST[dtype])
    whole = SparseTensor(W.row_offsets, W.col_indices, codes.float(), W.shape).to_dense()
    assert (whole.abs().amax(1)[W.row_offsets.diff() > 0][4:] == LARGEST[dtype]).all()
    exact = W.to_dense().double()
    error = (whole.double() * scales[:, None] - exact).norm(dim=1) / exact.norm(dim=1)
    bound = 0.01 if dtype is torch.int8 else 0.04
    assert (error[[i for i in range(40) if i not in (3, 9)]] < bound).all() and error[9] < 0.05


@types
@pytest.mark.parametrize("bad", [torch.inf, -torch.inf, torch.nan])
def test_what_is_not_finite_is_refused(dtype, bad):
    w = random_weight(40, 64, 0.4)
    w[17, 5] = bad
    with pytest.raises(
        ValueError, match=rf"weight: expected finite .* {dtype}, got {bad} in row 17"
    ):
        pack_for(SparseTensor.from_dense(w, w != 0), (1, 1), values=dtype)
    with pytest.raises(TypeError, match="weight: expected bfloat16 values, got torch.float16"):
        pack_for(SparseTensor.from_dense(torch.ones(4, 4).half()), (1, 1), values=dtype)


@emulated
@types
@layouts
def test_every_number_is_exact(layout, dtype):
    """Each row has one value of each code, x one token a column: products are the codes."""
    w = weight_of_every_number(dtype)
    packed, rounded = packed_as(layout, w, dtype)
    assert torch.equal(rounded, w.double())
    k = w.shape[1]
    assert torch.equal(packed.expand().float() * packed.scales[:, None], w.float())
    for first, m in ((0, 1), (1, 16), (17, 64), (81, 64)):
        x = torch.zeros(m, k).bfloat16()
        x[torch.arange(m), first + torch.arange(m)] = 1
        assert torch.equal(spmm_packed(x, packed), w[:, first : first + m].T)


@emulated
@types
@layouts
def test_awkward_problems(layout, dtype, nan_memory):
    for case in [c for c in PROBLEMS if c.M <= 64 and c.N <= 100]:
        t = case.tensors(torch.bfloat16)
        W = SparseTensor(t.row_offsets, t.col_indices, t.values, t.mask.shape)
        check(*packed_as(layout, W, dtype), t.x)


@emulated
@types
@layouts
def test_numbers_of_tokens(layout, dtype, nan_memory, monkeypatch, emulated_cuda):  # noqa: F811
    """Ragged sizes, an empty row, one of zeros, one that is full, tiles of every fill; few
    multiprocessors, so that blocks share rows, and many."""
    w = random_weight(150, 515, 0.3)
    for i in range(0, 515, 64):
        w[70:, i : i + 64] = random_weight(80, min(64, 515 - i), i / 451)
    w[7], w[9], mask = 1.5, 0, w != 0
    mask[11], w[11] = True, 0
    packed, rounded = packed_as(layout, SparseTensor.from_dense(w, mask), dtype)
    bias = torch.randn(150).bfloat16()
    for m in (1, 2, 3, 8, 17, 64):
        gpu = H200._replace(multiprocessors=3 if m % 2 else 132)
        monkeypatch.setattr(few_tokens, "gpu_of", lambda device, gpu=gpu: gpu)
        x = torch.randn(m, 515).bfloat16()
        y = check(packed, rounded, x, bias)
        if m in (2, 17):
            emulated_cuda.backward(True)
            assert torch.equal(y, spmm_packed(x, packed, bias))
            emulated_cuda.backward(False)


@emulated
@types
@layouts
def test_infinities_reach_what_a_stored_value_connects(layout, dtype, nan_memory):
    w, mask, bias = weight_with_infinities(70, 261, torch.bfloat16)
    w = torch.where(w.isfinite(), w, 1.0)
    packed, rounded = packed_as(layout, SparseTensor.from_dense(w, mask), dtype)
    for m in (2, 16, 40, 300):
        x = tokens_with_infinities(m, 261, torch.bfloat16)
        b = bias if m > 2 else None
        check_stored(spmm_packed(x, packed, b), x, rounded, rounded != 0, b)


@emulated
@types
def test_pairs_without_warpgroups(dtype, nan_memory, monkeypatch, emulated_cuda):  # noqa: F811
    packed, rounded = packed_as("pairs", random_weight(40, 130, 0.3), dtype)
    emulated_cuda.warpgroups(False)
    monkeypatch.setattr(few_tokens, "gpu_of", lambda device: H200._replace(has_warpgroups=False))
    for m in (5, 30, 64):
        check(packed, rounded, torch.randn(m, 130).bfloat16())
