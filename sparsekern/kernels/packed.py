"""W as the CUDA kernels read it: delta streams, laid out in the order in which lanes consume them.

csrc/cuda/stream.cuh describes the layout. 2.5 bytes a non-zero with 4-bit deltas, 3 with 8-bit
ones, and what lanes spend on waiting for one another: 2-6 % on random masks up to 80 % sparsity.

Packing is vectorised over entries; only the recurrence that keeps lanes within four windows of one
another walks along the columns, 32 at a step. It runs on the device that holds W.
"""

from dataclasses import dataclass, replace

import torch
from torch import Tensor

from ..tensor import SparseTensor, expand_rows

LANES = 32  # rows of a slice
GRANULE = 8  # entries of a lane
PANEL = 128  # columns: what a part is made of
WINDOW = 32  # columns
RING = 4  # windows
SLICES_AT_ONCE = 4  # of a block of rows
MOST_SUMS = 8  # counters of a slice: one for each token of the gather kernel


TENSORS = ("values", "deltas", "offsets", "counts", "row_order", "arrived")


@dataclass(frozen=True)
class Packed:
    """One frozen W [N, K] as delta streams.

    values: 16-bit floats [granules, 32, 8]. deltas: uint8 [granules, 32, bits]. offsets: int32
    [slices * parts + 1], granules before each part of each slice. counts: int16 [slices, windows],
    granules of each window. row_order: int32 [slices * 32], the row of each lane, -1 for none.
    arrived: int32 [slices * 8], zeros: what blocks that share rows count on in a product.
    """

    n: int
    k: int
    nnz: int
    bits: int
    parts: int
    values: Tensor
    deltas: Tensor
    offsets: Tensor
    counts: Tensor
    row_order: Tensor
    arrived: Tensor

    @property
    def slices(self) -> int:
        return self.counts.shape[0]

    @property
    def nbytes(self) -> int:
        """Bytes that the packed weight holds."""
        return sum(tensor.nbytes for tensor in self.tensors().values())

    def tensors(self) -> dict[str, Tensor]:
        return {name: getattr(self, name) for name in TENSORS}

    def clone(self) -> "Packed":
        """A copy with memory of its own."""
        return replace(self, **{name: t.clone() for name, t in self.tensors().items()})


def choose_parts(n: int, k: int, multiprocessors: int) -> int:
    """Into how many parts of columns W is cut, so that a GPU has work everywhere.

    The least power of two, up to 16, that makes two blocks of 128 rows and one part for each
    multiprocessor. More would cost memory, because lanes wait for one another at the end of each
    part, and sums of parts. On 132 multiprocessors: 28672 x 8192 is cut in 2, 12288 x 12288 in 4,
    2048 x 8192 in 16; within 10 % of the best of seven numbers for each (docs/LOG.md).
    """
    panels = -(-k // PANEL)
    blocks = -(-n // (LANES * SLICES_AT_ONCE))
    parts = 1
    while parts < min(panels, 16) and parts * blocks < 2 * multiprocessors:
        parts *= 2
    return min(parts, max(1, panels))


def pack(weight: SparseTensor, parts: int | None = None, bits: int | None = None) -> Packed:
    """Delta streams of `weight`, on its device.

    `parts` and `bits` default to what suits the GPU (132 multiprocessors where there is none) and
    to the smaller of the two formats. TypeError unless values are bfloat16 or float16.
    """
    if weight.values.dtype not in (torch.bfloat16, torch.float16):
        raise TypeError(f"weight: expected bfloat16 or float16 values, got {weight.values.dtype}")
    layout = Layout(weight.row_offsets, weight.col_indices, weight.n, weight.k, parts, bits)
    return layout.fill(weight.values)


def _multiprocessors(device: torch.device) -> int:
    if device.type != "cuda":
        return 132
    return torch.cuda.get_device_properties(device).multi_processor_count


class Layout:
    """The index part of a pack, and `places`: where each value of W lies in the packed values."""

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
        if parts is None:
            parts = choose_parts(n, k, _multiprocessors(device))
        self.n, self.k, self.parts = n, k, parts
        nnz = col_indices.shape[0]
        panels = -(-k // PANEL)
        windows = panels * (PANEL // WINDOW)
        slices = -(-n // LANES)
        # Rows of like nnz share a slice, inside of blocks whose results are written together.
        block = torch.arange(n, device=device) // (LANES * SLICES_AT_ONCE)
        lengths = (row_offsets[1:] - row_offsets[:-1]).long()
        order = (block * (k + 1) + k - lengths).argsort(stable=True)
        lane_of_row = torch.empty_like(order)
        lane_of_row[order] = torch.arange(n, device=device)
        self.row_order = torch.full((slices * LANES,), -1, dtype=torch.int32, device=device)
        self.row_order[:n] = order.int()

        first_window = torch.tensor(
            [p * panels // parts * (PANEL // WINDOW) for p in range(parts + 1)], device=device
        )
        part_of_window = torch.searchsorted(
            first_window, torch.arange(windows, device=device), right=True
        ).sub_(1)

        # Every tensor of one element an entry is int32 where it can be: there may be 10^8 entries.
        lane = lane_of_row[expand_rows(row_offsets, nnz)]  # of the padded, sorted rows
        window = (col_indices // WINDOW).long()
        part = part_of_window[window]
        stream = lane * parts + part
        step = self._steps(col_indices, stream, first_window[part], bits)
        fillers = (step - 1).clamp_(min=0) // self.cap

        # Entries of each (lane, window), and when each window begins and ends in each lane.
        width = torch.zeros(slices * LANES * windows, dtype=torch.int64, device=device)
        cell = lane * windows + window
        width.scatter_add_(0, cell, fillers + 1)
        width = width.view(slices, LANES, windows)
        begin, complete = _schedule(width, first_window.tolist())
        self.counts = complete.diff(dim=1, prepend=complete.new_zeros(slices, 1))
        starts = torch.zeros_like(self.counts, dtype=torch.bool)
        starts[:, first_window[:-1][first_window[:-1] < windows]] = True
        self.counts = torch.where(starts, complete, self.counts)
        if windows and int(self.counts.max()) > 32767:
            raise ValueError(f"weight: expected K that a window can step over, got {k} columns")

        per_part = torch.zeros(slices, parts, dtype=torch.int64, device=device)
        per_part.scatter_add_(1, part_of_window.expand(slices, -1), self.counts)
        self.offsets = torch.zeros(slices * parts + 1, dtype=torch.int64, device=device)
        self.offsets[1:] = per_part.flatten().cumsum(0)
        self.granules = int(self.offsets[-1])
        self.counts = self.counts.to(torch.int16)

        # The slot of an entry in its stream, then its place among all granules.
        count = fillers + 1
        through = count.cumsum(0)
        row_width = width.view(-1, windows)[lane_of_row]
        row_first = row_width.flatten().cumsum(0) - row_width.flatten()
        natural_cell = expand_rows(row_offsets, nnz) * windows + window
        slot = begin.view(-1)[cell] + through - row_first[natural_cell] - 1
        slice_part = (lane // LANES) * parts + part
        first_granule = self.offsets[slice_part]
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

    def fill(self, values: Tensor) -> Packed:
        """A pack with these values, in the order of the CSR indices."""
        values = values.detach()
        packed_values = values.new_zeros(self.granules * LANES * GRANULE)
        packed_values[self.places] = values
        return Packed(
            self.n,
            self.k,
            values.shape[0],
            self.bits,
            self.parts,
            packed_values.view(-1, LANES, GRANULE),
            self.deltas,
            self.offsets,
            self.counts,
            self.row_order,
            self.row_order.new_zeros(self.counts.shape[0] * MOST_SUMS),
        )

    def refill_(self, packed: Packed, values: Tensor) -> None:
        """Other values in a pack of this layout."""
        packed.values.view(-1)[self.places] = values.detach()

    def _steps(self, col_indices, stream, first_window, bits):
        """Distance to the entry before in the same stream, in lines (4 bits) or columns (8)."""

        def steps(shift):
            position = col_indices.long() >> shift
            before = position.roll(1)
            is_first = stream != stream.roll(1)
            is_first[:1] = True
            return position - torch.where(is_first, first_window * (WINDOW >> shift), before)

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


def _schedule(width: Tensor, first_window: list[int]) -> tuple[Tensor, Tensor]:
    """When lanes meet each window.

    width [slices, 32, windows]: entries of each lane. Returns begin [slices, 32, windows], the slot
    at which a lane begins a window, and complete [slices, windows], the granules of the part after
    which no lane has any entry of the window left. A lane begins window w after its own w - 1, and
    after w - 4 is complete in all lanes: then its place in a ring of four is free.
    """
    slices, lanes, windows = width.shape
    begin = torch.empty_like(width)
    complete = width.new_zeros(slices, windows)
    starts = set(first_window)
    end = width.new_zeros(slices, lanes)
    done: list[Tensor] = []
    for w in range(windows):
        if w in starts:
            end = torch.zeros_like(end)
            done = []
        at = torch.maximum(end, done[-RING][:, None] * GRANULE) if len(done) >= RING else end
        begin[:, :, w] = at
        # A lane with nothing in a window passes it in no time.
        end = torch.where(width[:, :, w] > 0, at + width[:, :, w], end)
        granules = -(-end.amax(dim=1) // GRANULE)
        done.append(torch.maximum(granules, done[-1]) if done else granules)
        complete[:, w] = done[-1]
    return begin, complete
