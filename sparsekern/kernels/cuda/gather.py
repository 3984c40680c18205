"""The layout `gather`, which CUDA cores read: the values of each row in the order in which a lane
consumes them, each with its distance to the one before.

csrc/cuda/gather.cuh describes the layout, csrc/cuda/spmm_gather.cu how it is read: pieces, as many
blocks as have some. 2.5 bytes a non-zero with 4-bit deltas, 3 with 8-bit ones, with values of 8
bits 1.5 and 2, and what lanes spend on waiting for the longest row of a slice. Packing is
vectorised over entries and runs on the device that holds W.
"""

from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import torch
from torch import Tensor

from ...indices import expand_rows
from .layout import LANES, TILE_PAD, Expansion, Gpu, Launch, Layout, Packed, sort_rows
from .row_scales import InE4m3, InInt8

GRANULE_BYTES = 16  # of the values of a lane
BLOCK_PIECES = 16  # of a thread block: one a warp
DEPTH = 4  # granules of a warp that are on their way
MOST_TOKENS = 8  # of one launch
PART_COLUMNS = 512  # of a slice that a warp writes out, or more
TILE_COLUMNS = 128  # of these at a time, in shared memory
EXPAND_BYTES = LANES * (TILE_COLUMNS + TILE_PAD) * 2 + LANES * 8
MOST_BLOCKS = 2  # of a multiprocessor
MANY_ENTRIES = 320  # of a lane in a piece


@dataclass(frozen=True)
class Gather(Packed):
    """values: [granules, 32, entries], 16 bytes a lane. deltas: uint8 [granules, 32, entries * bits
    / 8]. bounds: int32 [pieces + 1], granules before each piece. slice_of: int32 [pieces].
    first_piece: int32 [slices + 1], pieces before each slice. starts: int32 [pieces, 32], the
    column from which each lane goes on. row_order: int32 [slices * 32], the row of each lane, -1
    for none. arrived: int32 [slices], zeros: what blocks that share a slice count on in a product.
    """

    bits: int
    values: Tensor
    deltas: Tensor
    bounds: Tensor
    slice_of: Tensor
    first_piece: Tensor
    starts: Tensor
    row_order: Tensor
    arrived: Tensor

    name = "gather"

    def launch(self, m: int, gpu: Gpu) -> Launch | None:
        pieces = self.slice_of.shape[0]
        value_bytes = self.values.itemsize
        return configure(m, self.k, pieces, self.bits, self.type_name, gpu, value_bytes)

    def operands(self, launch: Launch):
        tensors = self.values, self.deltas, self.bounds, self.slice_of, self.first_piece
        sizes = self.slice_of.shape[0], self.values.shape[0]
        return (*tensors, self.starts, self.row_order), sizes

    def expansion(self):
        each = -(-self.slice_of.shape[0] // self.slices)  # pieces of a slice: no part without one
        parts = min(-(-self.k // PART_COLUMNS), each)
        tensors = self.values, self.deltas, self.bounds, self.first_piece, self.starts
        weight, sizes = (*tensors, self.row_order), (self.slices, parts)
        return Expansion(f"d{self.bits}", self.slices * parts, EXPAND_BYTES, weight, sizes)

    def parts(self):
        if self.bits not in (4, 8):
            raise ValueError(f"bits: expected 4 or 8, got {self.bits}")
        granules, pieces = self.values.shape[0], self.slice_of.shape[0]
        entries = GRANULE_BYTES // self.values.itemsize
        return {
            "values": (None, (granules, LANES, entries)),
            "deltas": (torch.uint8, (granules, LANES, entries * self.bits // 8)),
            "bounds": (torch.int32, (pieces + 1,)),
            "slice_of": (torch.int32, (pieces,)),
            "first_piece": (torch.int32, (self.slices + 1,)),
            "starts": (torch.int32, (pieces, LANES)),
            "row_order": (torch.int32, (self.slices * LANES,)),
            "arrived": (torch.int32, (self.slices,)),
        }


@dataclass(frozen=True)
class GatherInt8(InInt8, Gather):
    name = "gather_int8"


@dataclass(frozen=True)
class GatherE4m3(InE4m3, Gather):
    name = "gather_e4m3"


@lru_cache(maxsize=4096)
def configure(
    m: int, k: int, pieces: int, bits: int, type_name: str, gpu: Gpu, value_bytes: int = 2
) -> Launch | None:
    """Kernel and sizes for as many of m tokens as it takes, 8 at most; None if x of one token does
    not fit in shared memory."""
    tokens = min(MOST_TOKENS, 1 << (m - 1).bit_length())
    ring = ring_bytes(bits, value_bytes)
    while tokens and ring + x_bytes(k, tokens) > gpu.smem_bytes:
        tokens //= 2
    if not tokens:
        return None
    grid = -(-pieces // BLOCK_PIECES)
    smem_bytes = max(ring + x_bytes(k, tokens), BLOCK_PIECES * tokens * LANES * 4)
    # No more blocks on a multiprocessor than there are when all share the work: a launch that
    # starts early would fill those that are free first.
    each = max(1, min(MOST_BLOCKS, -(-grid // gpu.multiprocessors)))
    smem_bytes = max(smem_bytes, (gpu.smem_bytes + 1024) // (each + 1) - 1023)
    name = f"sk_spmm_gather_{type_name}_d{bits}_t{tokens}"
    return Launch(name, grid, BLOCK_PIECES * LANES, smem_bytes, 2 * grid * tokens * LANES, tokens)


def ring_bytes(bits: int, value_bytes: int) -> int:
    """Bytes of the granules of a block that are on their way."""
    deltas_bytes = GRANULE_BYTES // value_bytes * bits // 8
    return BLOCK_PIECES * DEPTH * LANES * (GRANULE_BYTES + deltas_bytes)


def x_bytes(k: int, tokens: int) -> int:
    """Bytes of x in shared memory."""
    return -(-k // 4) * 8 * tokens


def _multiprocessors(device: torch.device) -> int:
    """Number of multiprocessors; 132 (an H200) if `device` is not a GPU."""
    if device.type != "cuda":
        return 132
    return torch.cuda.get_device_properties(device).multi_processor_count


def choose_pieces(entries: int, slices: int, multiprocessors: int) -> int:
    """Into how many pieces W is cut: for each multiprocessor a block of 16, or two where pieces are
    long even so. Each slice has one at least (docs/log.md has the measurements)."""
    block_pieces = multiprocessors * BLOCK_PIECES
    blocks = max(entries // (MANY_ENTRIES * block_pieces), -(-slices // block_pieces))
    return block_pieces * max(1, min(MOST_BLOCKS, blocks))


def share_out(longest: Tensor, pieces: int) -> Tensor:
    """Into how many pieces each slice of so many granules is cut: `pieces` in all, or one a slice.

    All pieces run at once, so the longest one is kept within 1/16 of the shortest length possible.
    What is left over goes to slices in proportion, evenly spread over the blocks of pieces."""
    total = int(longest.sum())
    if total == 0:
        return torch.ones_like(longest)
    length, most = -(-total // pieces), int(longest.max())
    while length < most:
        middle = (length + most) // 2
        if int((-(-longest // middle)).sum()) <= pieces:
            most = middle
        else:
            length = middle + 1
    counts = (-(-longest // (length + length // 16))).clamp_(min=1)
    spare = max(0, pieces - int(counts.sum()))
    through = torch.zeros(len(longest) + 1, dtype=torch.int64, device=longest.device)
    through[1:] = longest.cumsum(0) * spare // total
    return (counts + through.diff()).minimum(longest.clamp(min=1))


class GatherLayout(Layout):
    """`pieces`, about how many, and `bits` default to what suits the GPU and to the smaller of the
    two formats."""

    kind = Gather
    kinds_of_8_bits = {torch.int8: GatherInt8, torch.float8_e4m3fn: GatherE4m3}

    def __init__(
        self,
        row_offsets: Tensor,
        col_indices: Tensor,
        n: int,
        k: int,
        pieces: int | None = None,
        bits: int | None = None,
        value_bytes: int = 2,
    ):
        super().__init__(row_offsets, col_indices, n, k, value_bytes)
        self.entries = GRANULE_BYTES // value_bytes  # of a lane in a granule
        device = col_indices.device
        nnz = col_indices.shape[0]
        self.row_order = sort_rows(row_offsets, n, max(1, n))
        slices = self.row_order.shape[0] // LANES
        lane_of_row = torch.empty(n, dtype=torch.int64, device=device)
        lane_of_row[self.row_order[:n].long()] = torch.arange(n, device=device)
        lane = lane_of_row[expand_rows(row_offsets, nnz)]  # of the padded, sorted rows
        step = self._steps(col_indices, lane, bits)
        fillers = (step - 1).clamp_(min=0) // self.cap

        # Entries of each lane, granules of each slice.
        width = torch.zeros(slices * LANES, dtype=torch.int64, device=device)
        width.scatter_add_(0, lane, fillers + 1)
        longest = -(-width.view(slices, LANES).amax(1) // self.entries)
        offsets = torch.zeros(slices + 1, dtype=torch.int64, device=device)
        offsets[1:] = longest.cumsum(0)
        self.granules = int(offsets[-1])

        # The slot of an entry in its row, then its place among all granules.
        through = (fillers + 1).cumsum(0)
        is_first = self._begins(lane)
        before = torch.where(is_first, through - fillers - 1, 0).cummax(0).values
        slot = through - before - 1
        first_granule = offsets[lane // LANES]
        self.places = self._place(first_granule, slot, lane)

        codes = torch.zeros(self.granules * LANES * self.entries, dtype=torch.uint8, device=device)
        rest = step - fillers * self.cap
        codes[self.places] = self._code(rest, col_indices)
        bridged = fillers.nonzero()[:, 0]
        times = fillers[bridged]
        entry = bridged.repeat_interleave(times)
        ordinal = torch.arange(entry.shape[0], device=device)
        ordinal -= (times.cumsum(0) - times).repeat_interleave(times)
        places = self._place(first_granule[entry], slot[entry] - 1 - ordinal, lane[entry])
        codes[places] = self.cap

        if pieces is None:
            entries = self.granules * self.entries
            pieces = choose_pieces(entries, slices, _multiprocessors(device))
        self._cut(offsets, pieces)
        self.starts = self._starts(codes, offsets)
        self.deltas = self._store(codes)

    @classmethod
    def least_smem(cls, tokens: int, k: int) -> int:
        return ring_bytes(8, 2) + x_bytes(k, 1)

    def _cut(self, offsets: Tensor, pieces: int) -> None:
        """Pieces of nearly equal length, none of two slices: as many as asked, or one a slice."""
        longest = offsets.diff()
        counts = share_out(longest, pieces)
        first = torch.zeros_like(offsets)
        first[1:] = counts.cumsum(0)
        slice_of = torch.arange(len(counts), device=offsets.device).repeat_interleave(counts)
        of_slice = torch.arange(len(slice_of), device=offsets.device) - first[slice_of]
        bounds = offsets[slice_of] + of_slice * longest[slice_of] // counts[slice_of]
        self.bounds = torch.cat([bounds, offsets[-1:]]).int()
        self.slice_of, self.first_piece = slice_of.int(), first.int()

    def _starts(self, codes: Tensor, offsets: Tensor) -> Tensor:
        """int32 [pieces, 32]: the column that each lane has come to before each piece."""
        steps = codes & 7 if self.bits == 4 else codes
        through = torch.zeros(self.granules + 1, LANES, dtype=torch.int64, device=codes.device)
        through[1:] = steps.view(-1, LANES, self.entries).sum(2, dtype=torch.int64).cumsum(0)
        slice_begins = offsets[self.slice_of.long()]
        columns = through[self.bounds[:-1].long()] - through[slice_begins]
        return (columns * (2 if self.bits == 4 else 1)).int()

    def empty(self, dtype: torch.dtype) -> dict[str, Any]:
        return {
            "bits": self.bits,
            "values": self.deltas.new_zeros(self.granules, LANES, self.entries, dtype=dtype),
            "deltas": self.deltas,
            "bounds": self.bounds,
            "slice_of": self.slice_of,
            "first_piece": self.first_piece,
            "starts": self.starts,
            "row_order": self.row_order,
            "arrived": self.row_order.new_zeros(self.row_order.shape[0] // LANES),
        }

    @staticmethod
    def _begins(lane: Tensor) -> Tensor:
        """Which entries are the first of their row; those of one are neighbours."""
        is_first = lane != lane.roll(1)
        is_first[:1] = True
        return is_first

    def _steps(self, col_indices, lane, bits):
        """Distance to the entry before in the same row, in pairs of columns (4 bits) or columns
        (8)."""
        is_first = self._begins(lane)

        def steps(shift):
            position = col_indices.long() >> shift
            return position - torch.where(is_first, 0, position.roll(1))

        if bits in (None, 4):
            lines = steps(1)
            entries = lines.shape[0] + int(((lines - 1).clamp_(min=0) // 7).sum())
            each = self.value_bytes
            if bits == 4 or (each + 0.5) * entries <= (each + 1) * lines.shape[0]:
                self.bits, self.cap = 4, 7
                return lines
        self.bits, self.cap = 8, 255
        return steps(0)

    def _place(self, first_granule, slot, lane):
        granule = first_granule + slot // self.entries
        return (granule * LANES + lane % LANES) * self.entries + slot % self.entries

    def _code(self, rest, col_indices):
        if self.bits == 8:
            return rest.to(torch.uint8)
        return (rest + ((col_indices & 1) << 3)).to(torch.uint8)

    def _store(self, codes):
        if self.bits == 4:
            codes = codes.view(-1, 8)
            codes = codes[:, :4] | codes[:, 4:] << 4
        return codes.view(-1, LANES, self.entries * self.bits // 8)
