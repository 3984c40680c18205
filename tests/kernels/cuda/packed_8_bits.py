"""Packed values of 8 bits, and what their products are to be: those of the rounded weights."""

import pytest
import torch
from torch import Tensor

from sparsekern import SparseTensor
from sparsekern.kernels.cuda import cover
from sparsekern.kernels.cuda.choose import layout_of
from sparsekern.kernels.cuda.few_tokens import spmm_packed
from sparsekern.kernels.cuda.gather import GatherLayout
from sparsekern.kernels.cuda.layout import Packed
from sparsekern.kernels.cuda.row_scales import EIGHT_BITS, LARGEST, round_rows
from sparsekern.testing import relative_error

GATHERS = {"d4": (4, 50), "d8": (8, 999)}  # bits, pieces
needs_library = pytest.mark.skipif(not cover.is_built(), reason="the C++ library is not built")
layouts = pytest.mark.parametrize(
    "layout", [*GATHERS, pytest.param("cover", marks=needs_library), "pairs"]
)
types = pytest.mark.parametrize("dtype", EIGHT_BITS, ids=EIGHT_BITS.get)


def packed_as(layout: str, w: Tensor | SparseTensor, dtype: torch.dtype) -> tuple[Packed, Tensor]:
    """w, dense or a SparseTensor, in one of the layouts, and the weights that it stands for."""
    W = w if isinstance(w, SparseTensor) else SparseTensor.from_dense(w)
    codes, scales = round_rows(W, dtype)
    if layout in GATHERS:
        bits, pieces = GATHERS[layout]
        made = GatherLayout(W.row_offsets, W.col_indices, *W.shape, pieces, bits, value_bytes=1)
    else:
        made = layout_of(W, layout, 1)
    whole = SparseTensor(W.row_offsets, W.col_indices, codes.double(), W.shape).to_dense()
    return made.fill_rounded(codes, scales), whole * scales.double()[:, None]


def check(packed: Packed, rounded: Tensor, x: Tensor, bias: Tensor | None = None) -> Tensor:
    want, scale = x.double() @ rounded.T, x.double().abs() @ rounded.abs().T
    if bias is not None:
        want, scale = want + bias.double(), scale + bias.double().abs()
    y = spmm_packed(x, packed, bias)
    scale = torch.where(scale == 0, scale, scale.clamp_min(torch.finfo(torch.bfloat16).tiny))
    assert relative_error(y, want, scale) <= 2**-8  # one rounding of the result
    assert not packed.arrived.any()
    return y


def weight_of_every_number(dtype: torch.dtype, device: str = "cpu") -> Tensor:
    """[40, numbers], bfloat16: each row has one value of each number of the type but 0, times a
    power of two."""
    numbers = torch.arange(256, dtype=torch.uint8).view(dtype).float()
    numbers = numbers[numbers.isfinite() & (numbers.abs() <= LARGEST[dtype]) & (numbers != 0)]
    w = torch.stack([numbers.roll(i) for i in range(40)]) * 2.0 ** torch.arange(-20, 20)[:, None]
    return w.bfloat16().to(device)
