"""Products of a two-way pattern on sparse tensor cores: the table rows `two_of_four`.

Where at most two of four neighbours of W are stored, in its rows and in its columns, forward and
input gradient of many tokens run through cuSPARSELt (cusparselt.py), which multiplies half of the
places. Its operand of W is half of W and a tail that says which half. The tail is made once a
pattern, by compressing what is stored and, where that is less than two of four, the first free
places beside it; never from live weights, which may be 0. The values are written before each
product, at the speed of a copy (bitmap.cu), to memory that all layers share.

That the operand holds the slots row by row is not documented. _has_slots_in_rows() looks, once for
each GPU, and the rows refuse where it is otherwise.

A place that is not stored takes no part in a product: where x is infinite or NaN, a free place
beside a stored one makes NaN of it. Such a token shows in its first results: `checked` of them have
every column that is multiplied at all. They are computed anew (csr.cu, mend).
"""

from dataclasses import dataclass
from functools import cache

import torch
from torch import Tensor

from ..derived import derived
from ..problem import Kernel, Problem
from . import bitmap as bitmaps
from . import cusparselt
from . import library as cuda_library
from .bitmap import Bitmap

LEAST_TOKENS, LEAST_SIZE = 1024, 1024  # below, W written out is as fast
MULTIPLE = 16  # of N and K; of M it is 8


@dataclass(frozen=True)
class Side:
    """What the operand of W or of W^T has beside the values."""

    tail: Tensor  # bytes
    checked: int


@dataclass(frozen=True)
class TwoOfFour:
    bitmap: Bitmap
    sides: dict[str, Side]  # by op


def make(row_offsets: Tensor, col_indices: Tensor, n: int, k: int) -> TwoOfFour | None:
    """None for a pattern that is not two-way."""
    bitmap = bitmaps.make_bitmap(row_offsets, col_indices, n, k)
    if not bitmaps.is_two_way(bitmap):
        return None
    ones = torch.ones(len(col_indices), dtype=torch.bfloat16, device=col_indices.device)
    stored = bitmaps.write_out(bitmap, ones, n, k).bool()
    return TwoOfFour(bitmap, {"spmm": _side(stored), "spmm_t": _side(stored.t())})


def _side(stored: Tensor) -> Side:
    two = with_free_places(stored)
    operand = cusparselt.compress(two.to(torch.bfloat16))
    return Side(operand[two.numel() :].clone(), _checked(two))


def _checked(two: Tensor) -> int:
    """How many of the first rows have every column that any row has."""
    first = two.to(torch.uint8).argmax(0)[two.any(0)]
    return 1 + int(first.max()) if len(first) else 0


def with_free_places(stored: Tensor) -> Tensor:
    """bool [N, K]: two of four neighbours, the stored ones and the first free ones beside them."""
    four = stored.reshape(stored.shape[0], -1, 4)
    free = ~four
    missing = 2 - four.sum(-1, keepdim=True)
    return (four | free & (free.cumsum(-1) <= missing)).view(stored.shape)
