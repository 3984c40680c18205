"""Values of W rounded to 8 bits, each row with a scale of its own: what the layouts gather_int8,
gather_e4m3 and so on hold.

The scale is the largest value of the row over the largest number of the type, in float32: nothing
is calibrated. Products are those of the rounded values times the scales, in float32, with x as it
is. A value that rounds to 0 counts as not stored: an infinity or NaN in x does not meet it.
"""

from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar

import torch
from torch import Tensor

from ...indices import expand_rows
from ...tensor import SparseTensor

EIGHT_BITS = {torch.int8: "int8", torch.float8_e4m3fn: "e4m3"}
LARGEST = {torch.int8: 127.0, torch.float8_e4m3fn: 448.0}


@dataclass(frozen=True)
class Scaled:
    """What a layout has beside with values of 8 bits: what each row of them is multiplied by. The
    values stand there as bytes, since not all that torch does takes E4M3. x and the result are
    bfloat16."""

    values_dtype: ClassVar[torch.dtype]
    scales: Tensor  # float32 [N]

    if TYPE_CHECKING:
        n: int

    def parts(self) -> dict[str, tuple[torch.dtype | None, tuple[int, ...]]]:
        parts = super().parts()  # type: ignore[misc]
        parts = {name: (dtype or torch.uint8, shape) for name, (dtype, shape) in parts.items()}
        return parts | {"scales": (torch.float32, (self.n,))}

    @property
    def dtype(self) -> torch.dtype:
        return torch.bfloat16

    @property
    def type_name(self) -> str:
        return EIGHT_BITS[self.values_dtype]

    @property
    def row_scales(self) -> Tensor | None:
        return self.scales


@dataclass(frozen=True)
class InInt8(Scaled):
    values_dtype = torch.int8


@dataclass(frozen=True)
class InE4m3(Scaled):
    values_dtype = torch.float8_e4m3fn


def check_values_type(values: object) -> None:
    """ValueError unless it is a type of 8 bits."""
    if values not in tuple(EIGHT_BITS):
        raise ValueError(
            f"values: expected torch.int8, torch.float8_e4m3fn or None, got {values!r}"
        )


def round_rows(weight: SparseTensor, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """The values of `weight` [N, K], bfloat16, in 8 bits [nnz], and the scales [N], float32.

    A row without values, or with zeros alone, has the scale 0. TypeError for other values,
    ValueError where one is not finite.
    """
    if weight.values.dtype is not torch.bfloat16:
        raise TypeError(f"weight: expected bfloat16 values, got {weight.values.dtype}")
    values = weight.values.detach().float()
    rows = expand_rows(weight.row_offsets, weight.nnz).long()
    if len(bad := (~values.isfinite()).nonzero()):
        first = int(bad[0])
        raise ValueError(
            f"weight: expected finite values, to be held in {dtype}, got {values[first].item()} in "
            f"row {int(rows[first])}"
        )
    largest = values.new_zeros(weight.n).scatter_reduce_(0, rows, values.abs(), "amax")
    scales = largest / LARGEST[dtype]
    each = scales[rows]
    parts = torch.where(each > 0, values / each, 0).clamp_(-LARGEST[dtype], LARGEST[dtype])
    return (parts.round_() if dtype is torch.int8 else parts).to(dtype), scales
