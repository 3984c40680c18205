"""Decode with weights of 8 bits, and what else makes a weight smaller: dense E4M3 and int4."""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import partial

import torch
from torch import Tensor

from ..kernels.cuda import library as cuda_library
from ..kernels.cuda.choose import like, pack_for
from ..kernels.cuda.few_tokens import spmm_packed
from ..kernels.cuda.layout import Packed
from ..kernels.cuda.row_scales import EIGHT_BITS, LARGEST
from ..tensor import SparseTensor
from .measure_gpu import Grid, Way
from .peers_gpu import every_few_tokens
from .records import OTHER, OURS

GRID = Grid(
    shapes=((8192, 2048), (2048, 8192), (11008, 4096), (12288, 12288)),
    tokens=(1, 16, 64),
    sparsities=(0.5, 0.75, 0.9),
    masks=("random",),
)
E4M3 = torch.float8_e4m3fn
GROUP = 128  # of a row in int4, with a scale and a zero
INNER_TILES = 8  # of the layout of torch's kernel


@dataclass(frozen=True)
class Rounded:
    """W [N, K] of fewer bits in a form that a kernel reads, and its values."""

    held: Sequence[Tensor] | Packed
    values: Tensor

    def clone(self) -> "Rounded":
        held = self.held
        if isinstance(held, Packed):
            return replace(self, held=held.clone())
        return replace(self, held=[part.clone() for part in held])

    @property
    def nbytes(self) -> int:
        held = self.held
        return held.nbytes if isinstance(held, Packed) else sum(part.nbytes for part in held)


def ways() -> list[Way]:
    return [
        *every_few_tokens(),
        *(ours(dtype, tokens) for dtype in EIGHT_BITS for tokens in GRID.tokens),
        _dense("dense E4M3", by_row=False),
        _dense("dense E4M3, row-wise", by_row=True),
        Way(
            "dense int4",
            OTHER,
            _int4,
            Rounded.clone,
            lambda x, W: torch._weight_int4pack_mm(x, W.held[0], GROUP, W.held[1]),
            lambda W: W.nbytes,
            note=f"groups of {GROUP}",
            dense_of=lambda W: W.values,
        ),
    ]


def ours(dtype: torch.dtype, tokens: int) -> Way:
    """Weights packed in 8 bits for so many tokens."""
    return Way(
        f"few_tokens {EIGHT_BITS[dtype]}",
        OURS,
        partial(_packed, dtype=dtype, tokens=tokens),
        Rounded.clone,
        lambda x, W: spmm_packed(x, W.held),
        lambda W: W.nbytes,
        where=lambda M, sparsity, mask: like(M) == like(tokens),
        missing=cuda_library.refusal(),
        dense_of=lambda W: W.values,
    )


def _packed(W: SparseTensor, dtype: torch.dtype, tokens: int) -> Rounded:
    (packed,) = pack_for(W, (tokens, tokens), values=dtype)
    return Rounded(packed, packed.expand().float() * packed.row_scales.unsqueeze(1))


def _dense(name: str, by_row: bool) -> Way:
    cast = partial(_in_e4m3, by_row=by_row)
    return Way(
        name,
        OTHER,
        partial(_dense_e4m3, by_row=by_row),
        Rounded.clone,
        _scaled_mm,
        lambda W: W.nbytes,
        prepare=cast,
        note="x in E4M3 before",
        dense_of=lambda W: W.values,
        x_of=lambda x: cast(x)[0].float() * cast(x)[1],
    )


def _in_e4m3(rows: Tensor, by_row: bool) -> tuple[Tensor, Tensor]:
    """Rows in E4M3, and their scales, as a column, or the one of all."""
    rows = rows.float()
    largest = rows.abs().amax(1, keepdim=True) if by_row else rows.abs().amax()
    scales = largest.clamp(min=1e-12) / LARGEST[E4M3]
    return (rows / scales).clamp_(-LARGEST[E4M3], LARGEST[E4M3]).to(E4M3), scales


def _dense_e4m3(W: SparseTensor, by_row: bool) -> Rounded:
    w8, scales = _in_e4m3(W.to_dense(), by_row)
    return Rounded([w8, scales.t()], w8.float() * scales)


def _scaled_mm(x: tuple[Tensor, Tensor], W: Rounded) -> Tensor:
    (x8, x_scales), (w8, w_scales) = x, W.held
    options = {"out_dtype": torch.bfloat16, "use_fast_accum": True}
    return torch._scaled_mm(x8, w8.t(), x_scales, w_scales, **options)


def _int4(W: SparseTensor) -> Rounded:
    """As torch's kernel has it: (number - 8) * scale + zero, in bfloat16, of each group."""
    dense = W.to_dense().float()
    groups = dense.view(-1, GROUP)
    least, most = groups.amin(1, keepdim=True), groups.amax(1, keepdim=True)
    scales = ((most - least).clamp_(min=1e-6) / 15).bfloat16()
    zeros = (least + 8 * scales.float()).bfloat16()
    numbers = ((groups - zeros.float()) / scales.float() + 8).round_().clamp_(0, 15)
    values = ((numbers - 8) * scales.float() + zeros.float()).view_as(dense)
    whole = numbers.view_as(dense).int()
    bytes_ = (whole[:, ::2] << 4 | whole[:, 1::2]).to(torch.uint8)
    held = torch._convert_weight_to_int4pack(bytes_, INNER_TILES)
    both = torch.stack([part.view(W.n, -1) for part in (scales, zeros)], 2)
    return Rounded([held, both.transpose(0, 1).contiguous()], values)
