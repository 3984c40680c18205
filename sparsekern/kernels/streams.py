"""W as the CUDA cores read it: delta streams, laid out in the order in which lanes consume them.

csrc/cuda/stream.cuh describes the layout. 2.5 bytes a non-zero with 4-bit deltas, 3 with 8-bit
ones, and what lanes spend on waiting for the longest of a warp. Packing is vectorised over entries
and runs on the device that holds W.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from ..tensor import expand_rows
from .layout import LANES, Packed, multiprocessors, sort_rows

GRANULE = 8  # entries of a lane
PANEL = 128  # columns: what a part is made of
ROW_BLOCK = 128  # rows sorted by nnz
MOST_SUMS = 8  # counters of a slice: one for each token


@dataclass(frozen=True)
class Streams(Packed):
    """values: 16-bit floats [granules, 32, 8]. deltas: uint8 [granules, 32, bits]. offsets: int32
    [slices * parts + 1], granules before each part of each slice. row_order: int32 [slices * 32],
    the row of each lane, -1 for none. arrived: int32 [slices * 8], zeros: what blocks that share
    rows count on in a product.
    """

    bits: int
    parts: int
    values: Tensor
    deltas: Tensor
    offsets: Tensor
    row_order: Tensor
    arrived: Tensor


def choose_parts(n: int, k: int, multiprocessors: int, is_uneven: bool = False) -> int:
    """Into how many parts of columns W is cut, so that a GPU has work everywhere.

    The least power of two, up to 16, that makes two blocks of 128 rows and one part for each
    multiprocessor. More would cost memory, because lanes wait for one another at the end of each
    part, and sums of parts. On 132 multiprocessors: 28672 x 8192 is cut in 2, 12288 x 12288 in 4,
    2048 x 8192 in 16. Of uneven rows at least 8 parts: then a thread block takes one slice of 32
    rows, and none of its warps waits for those of a longer slice.
    """
    panels = -(-k // PANEL)
    blocks = -(-n // ROW_BLOCK)
    parts = 8 if is_uneven else 1
    while parts < min(panels, 16) and parts * blocks < 2 * multiprocessors:
        parts *= 2
    return min(parts, max(1, panels))


def are_uneven(row_offsets: Tensor, row_order: Tensor) -> bool:
    """Whether the longest of 4 neighbouring slices has many more entries than they have in the
    mean: more than rows of random masks differ."""
    lengths = row_offsets.diff().long()[row_order.long()] * (row_order >= 0)
    longest = lengths.view(-1, LANES).amax(1)
    blocks = torch.nn.functional.pad(longest, (0, -len(longest) % 4)).view(-1, 4)
    return bool(4 * blocks.amax(1).sum() > 1.2 * blocks.sum())


class StreamsLayout:
    """The index part of a pack, and `places`: where each value of W lies in the packed values.

    `parts` and `bits` default to what suits the GPU and to the smaller of the two formats.
    """

    def __init__(
        self,
        row_offsets: Tensor,
        col_indices: Tensor,
        n: int,
        k: int,
        parts: int | None = None,
        bits: int | None = None,
    ):
        device = col_indices.device
        self.row_order = sort_rows(row_offsets, n, ROW_BLOCK)
        if parts is None:
            is_uneven = n > 0 and are_uneven(row_offsets, self.row_order)
            parts = choose_parts(n, k, multiprocessors(device), is_uneven)
        self.n, self.k, self.parts = n, k, parts
        nnz = col_indices.shape[0]
        panels = -(-k // PANEL)
        slices = self.row_order.shape[0] // LANES
        lane_of_row = torch.empty(n, dtype=torch.int64, device=device)
        lane_of_row[self.row_order[:n].long()] = torch.arange(n, device=device)

        first_column = torch.tensor(
            [p * panels // parts * PANEL for p in range(parts + 1)], device=device
        )
        part = torch.searchsorted(first_column, col_indices, right=True).sub_(1)
        lane = lane_of_row[expand_rows(row_offsets, nnz)]  # of the padded, sorted rows
        stream = lane * parts + part
        step = self._steps(col_indices, stream, first_column[part], bits)
        fillers = (step - 1).clamp_(min=0) // self.cap

        # Entries of each stream, granules of each part of a slice.
        width = torch.zeros(slices * LANES * parts, dtype=torch.int64, device=device)
        width.scatter_add_(0, stream, fillers + 1)
        longest = width.view(slices, LANES, parts).amax(1)
        self.offsets = torch.zeros(slices * parts + 1, dtype=torch.int64, device=device)
        self.offsets[1:] = (-(-longest // GRANULE)).flatten().cumsum(0)
        self.granules = int(self.offsets[-1])

        # The slot of an entry in its stream, then its place among all granules.
        through = (fillers + 1).cumsum(0)
        is_first = self._begins(stream)
        before = torch.where(is_first, through - fillers - 1, 0).cummax(0).values
        slot = through - before - 1
        first_granule = self.offsets[(lane // LANES) * parts + part]
        self.places = self._place(first_granule, slot, lane)

        codes = torch.zeros(self.granules * LANES * GRANULE, dtype=torch.uint8, device=device)
        rest = step - fillers * self.cap
        codes[self.places] = self._code(rest, col_indices)
        bridged = fillers.nonzero()[:, 0]
        times = fillers[bridged]
        entry = bridged.repeat_interleave(times)
        ordinal = torch.arange(entry.shape[0], device=device)
        ordinal -= (times.cumsum(0) - times).repeat_interleave(times)
        places = self._place(first_granule[entry], slot[entry] - 1 - ordinal, lane[entry])
        codes[places] = self.cap
        self.deltas = self._store(codes)
        self.offsets = self.offsets.int()

    def fill(self, values: Tensor) -> Streams:
        """A pack with these values, in the order of the CSR indices."""
        packed = Streams(
            self.n,
            self.k,
            values.shape[0],
            self.bits,
            self.parts,
            values.new_zeros(self.granules, LANES, GRANULE),
            self.deltas,
            self.offsets,
            self.row_order,
            self.row_order.new_zeros(self.row_order.shape[0] // LANES * MOST_SUMS),
        )
        self.refill_(packed, values)
        return packed

    def refill_(self, packed: Streams, values: Tensor) -> None:
        """Other values in a pack of this layout."""
        packed.values.view(-1)[self.places] = values.detach()

    @staticmethod
    def _begins(stream: Tensor) -> Tensor:
        """Which entries are the first of their stream; those of one are neighbours."""
        is_first = stream != stream.roll(1)
        is_first[:1] = True
        return is_first

    def _steps(self, col_indices, stream, first_column, bits):
        """Distance to the entry before in the same stream, in pairs of columns (4 bits) or columns
        (8)."""
        is_first = self._begins(stream)

        def steps(shift):
            position = col_indices.long() >> shift
            return position - torch.where(is_first, first_column >> shift, position.roll(1))

        if bits in (None, 4):
            lines = steps(1)
            entries = lines.shape[0] + int(((lines - 1).clamp_(min=0) // 7).sum())
            if bits == 4 or 2.5 * entries <= 3.0 * lines.shape[0]:
                self.bits, self.cap = 4, 7
                return lines
        self.bits, self.cap = 8, 255
        return steps(0)

    def _place(self, first_granule, slot, lane):
        granule = first_granule + slot // GRANULE
        return (granule * LANES + lane % LANES) * GRANULE + slot % GRANULE

    def _code(self, rest, col_indices):
        if self.bits == 8:
            return rest.to(torch.uint8)
        return (rest + ((col_indices & 1) << 3)).to(torch.uint8)

    def _store(self, codes):
        codes = codes.view(-1, LANES, GRANULE)
        if self.bits == 8:
            return codes
        return codes[..., :4] | codes[..., 4:] << 4
