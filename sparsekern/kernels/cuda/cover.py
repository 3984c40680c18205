"""W as the sparse tensor cores read it: columns in groups of four, of which a row has one value.

csrc/packing/cover.h says how a tile of 32 rows and 256 columns is covered, csrc/cuda/spmm_cover.cu
how it is read. 0.594 bytes for each row and slot, and 1 to 2.4 times as many slots as columns:
docs/math.md has the table. Packing runs on the CPU, in C++.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from .layout import LANES, Packed, as_stored, check_fill, check_indices, sort_rows

try:
    from ... import _C
except ImportError:
    _C = None

WINDOW = 256  # columns
ROW_BLOCK = 128  # rows sorted by nnz: the fewest of a thread block
RECORD_BYTES = 608


def is_built() -> bool:
    return _C is not None


@dataclass(frozen=True)
class Cover(Packed):
    """records: 16-bit floats [steps, bytes / 2] (values, then positions and columns as bits).
    steps: int32 [slices * windows + 1], those before each tile. row_order: int32 [slices * 32],
    the row of each lane, -1 for none. arrived: int32 [slices], zeros: what blocks that share rows
    count on in a product.
    """

    records: Tensor
    steps: Tensor
    row_order: Tensor
    arrived: Tensor

    @property
    def windows(self) -> int:
        return -(-self.k // WINDOW)

    def parts(self):
        return {
            "records": (None, (self.records.shape[0], RECORD_BYTES // 2)),
            "steps": (torch.int32, (self.slices * self.windows + 1,)),
            "row_order": (torch.int32, (self.slices * LANES,)),
            "arrived": (torch.int32, (self.slices,)),
        }


class CoverLayout:
    """The index part of a pack, and `places`: where each value of W lies in the records. The C++
    library checks the indices."""

    def __init__(self, row_offsets: Tensor, col_indices: Tensor, n: int, k: int):
        check_indices(row_offsets, col_indices, n)
        device = col_indices.device
        self.n, self.k = n, k
        self.row_order = sort_rows(row_offsets, n, ROW_BLOCK)
        row_order, offsets = self.row_order.cpu(), row_offsets.cpu()
        indices = col_indices.cpu()
        slices, windows = row_order.shape[0] // LANES, -(-k // WINDOW)
        cover = _C.Cover(
            offsets.data_ptr(),
            indices.data_ptr(),
            n,
            k,
            indices.shape[0],
            row_order.data_ptr(),
            slices,
            torch.get_num_threads(),
        )
        steps = torch.empty(slices * windows + 1, dtype=torch.int32)
        records = torch.zeros(cover.steps, RECORD_BYTES // 2, dtype=torch.int16)
        places = torch.empty(indices.shape[0], dtype=torch.int64)
        cover.write(steps.data_ptr(), records.data_ptr(), places.data_ptr())
        self.steps, self.places = steps.to(device), places.to(device)
        self.records = records.to(device)

    def fill(self, values: Tensor) -> Cover:
        """A pack with these values, in the order of the CSR indices."""
        check_fill(values, self.places.shape[0])
        records = self.records.clone().view(values.dtype)
        cover = Cover(
            self.n,
            self.k,
            values.shape[0],
            records,
            self.steps,
            self.row_order,
            self.row_order.new_zeros(self.row_order.shape[0] // LANES),
        )
        cover.check()
        self.refill_(cover, values)
        return cover

    def refill_(self, packed: Cover, values: Tensor) -> None:
        """Other values in a pack of this layout."""
        packed.check_values(values)
        packed.records.view(-1)[self.places] = as_stored(values)
