"""The pattern of W as a bitmap, for the Triton kernels: made once a pattern, on any device.

W [N, K] is cut into units of 4 rows x 256 columns; a row of units has `tiles` of them. Lane l of a
unit has columns 8 l .. 8 l + 7. Values stay in CSR order, where a row of a unit is a contiguous
piece.

    lanes  int64 [units of N, tiles, 32]  low half: bit 8 r + c is the place (row r, column 8 l + c)
                                          high half: byte r counts the stored places of row r in
                                          the lanes before this one (at most 248)
    starts int64 [units of N, tiles, 2]   where the pieces of rows 0 and 1, then 2 and 3, begin in
                                          the values: the even row in the low half

17 bits for 8 places: 0.27 bytes a place of W, whatever its density.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from ...indices import expand_rows
from ..derived import derived

UNIT_ROWS, UNIT_COLUMNS, LANES, ROWS_OF_UNITS = 4, 256, 32, 32


@dataclass(frozen=True)
class Bitmap:
    lanes: Tensor
    starts: Tensor
    tiles: int


def make_bitmap(row_offsets: Tensor, col_indices: Tensor, n: int, k: int) -> Bitmap:
    """The Bitmap of a CSR pattern; rows are padded to a multiple of ROWS_OF_UNITS units."""
    device, nnz = col_indices.device, col_indices.shape[0]
    units = -(-n // (UNIT_ROWS * ROWS_OF_UNITS)) * ROWS_OF_UNITS
    tiles = -(-k // UNIT_COLUMNS)
    rows, columns = expand_rows(row_offsets, nnz), col_indices.long()
    lane = ((rows // UNIT_ROWS) * tiles + columns // UNIT_COLUMNS) * LANES
    lane += columns % UNIT_COLUMNS // 8
    # Every place is stored once, so the sum of its bits is their union; 1 << 31 wraps.
    bits = torch.ones_like(columns) << (rows % UNIT_ROWS * 8 + columns % 8)
    words = torch.zeros(units * tiles * LANES, dtype=torch.int64, device=device)
    words = words.scatter_add_(0, lane, bits).view(units, tiles, LANES, 1)

    shifts = torch.arange(0, 32, 8, device=device)
    counts = _count_bits(words >> shifts & 255)  # [units, tiles, lanes, rows]
    before = counts.cumsum(2) - counts
    offsets = (before << shifts).sum(3)
    pieces = counts.sum(2).transpose(1, 2).reshape(units * UNIT_ROWS, tiles)
    first = torch.full((units * UNIT_ROWS, 1), nnz, dtype=torch.int64, device=device)
    first[:n, 0] = row_offsets[:-1]
    starts = first + pieces.cumsum(1) - pieces
    starts = starts.view(units, UNIT_ROWS // 2, 2, tiles).permute(2, 0, 3, 1)
    starts = starts[0] | starts[1] << 32
    return Bitmap(words.squeeze(3) | offsets << 32, starts.contiguous(), tiles)


def _count_bits(byte: Tensor) -> Tensor:
    """The number of set bits of each element, 0 .. 255."""
    byte = byte - (byte >> 1 & 0x55)
    byte = (byte & 0x33) + (byte >> 2 & 0x33)
    return (byte + (byte >> 4)) & 0x0F


def bitmap_of(row_offsets: Tensor, col_indices: Tensor, n: int, k: int) -> Bitmap:
    """make_bitmap() of checked indices, kept as derived.py says."""

    def make(row_offsets: Tensor, col_indices: Tensor) -> Bitmap:
        return make_bitmap(row_offsets, col_indices, n, k)

    return derived("bitmap", row_offsets, col_indices, n, k, make)


def places(n: int, k: int) -> int:
    """How many places of W a bitmap has, those beyond its edges with them."""
    rows, columns = UNIT_ROWS * ROWS_OF_UNITS, UNIT_COLUMNS
    return -(-n // rows) * rows * -(-k // columns) * columns
