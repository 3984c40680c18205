"""The layout `cover`, which sparse tensor cores read: columns in groups of four, of which a row has
one value.

csrc/packing/cover.h says how a tile of 32 rows and 256 columns is covered, csrc/cuda/spmm_cover.cu
how it is read. 0.594 bytes for each row and slot, 0.344 with values of 8 bits, and 1 to 2.4 times
as many slots as columns: docs/math.md has the table. Packing runs on the CPU, in C++.
"""

from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import torch
from torch import Tensor

from ..problem import Problem
from .csr import is_nearly_empty
from .layout import LANES, TILE_PAD, Expansion, Gpu, Launch, Layout, Packed, sort_rows
from .row_scales import InE4m3, InInt8
from .runs import FEW_TILES, MANY_TILES, RUN_WARPS, choose_runs, launch_runs

try:
    from ... import _C
except ImportError:
    _C = None

WINDOW = 256  # columns
ROW_BLOCK = 128  # rows sorted by nnz: the fewest of a thread block
RECORD_VALUES, RECORD_INDEX_BYTES = 256, 96
RECORD_BYTES = 2 * RECORD_VALUES + RECORD_INDEX_BYTES  # with values of 16 bits
# Records of a warp in shared memory or on their way there, by the bytes of a value.
DEPTHS = {2: 7, 1: 12}
MOST_TOKENS = 32  # of one launch
EXPAND_BYTES = LANES * (WINDOW + TILE_PAD) * 2 + RECORD_BYTES  # of a warp that writes W out


def is_built() -> bool:
    return _C is not None


@dataclass(frozen=True)
class Cover(Packed):
    """records: [steps, bytes / value's] (values, then positions and columns as bits).
    steps: int32 [slices * windows + 1], those before each tile. row_order: int32 [slices * 32],
    the row of each lane, -1 for none. arrived: int32 [slices], zeros: what blocks that share rows
    count on in a product.
    """

    records: Tensor
    steps: Tensor
    row_order: Tensor
    arrived: Tensor

    name = "cover"

    def launch(self, m: int, gpu: Gpu) -> Launch | None:
        sizes = self.slices, self.windows, self.type_name, gpu, self.records.itemsize
        return configure(m, *sizes)

    def operands(self, launch: Launch):
        sizes = self.slices, self.windows, launch.group_warps, launch.shares, self.records.shape[0]
        return (self.records, self.steps, self.row_order), sizes

    def expansion(self):
        sizes = self.slices, self.windows
        weight = self.records, self.steps, self.row_order
        return Expansion("cover", sizes[0] * sizes[1], EXPAND_BYTES, weight, sizes)

    @property
    def windows(self) -> int:
        return -(-self.k // WINDOW)

    def parts(self):
        return {
            "records": (None, (self.records.shape[0], _record_elements(self.records.itemsize))),
            "steps": (torch.int32, (self.slices * self.windows + 1,)),
            "row_order": (torch.int32, (self.slices * LANES,)),
            "arrived": (torch.int32, (self.slices,)),
        }


@dataclass(frozen=True)
class CoverInt8(InInt8, Cover):
    name = "cover_int8"


@dataclass(frozen=True)
class CoverE4m3(InE4m3, Cover):
    name = "cover_e4m3"


def _record_elements(value_bytes: int) -> int:
    return RECORD_VALUES + RECORD_INDEX_BYTES // value_bytes


class CoverLayout(Layout):
    """Made by the C++ library, which checks the indices."""

    kind = Cover
    kinds_of_8_bits = {torch.int8: CoverInt8, torch.float8_e4m3fn: CoverE4m3}

    def __init__(
        self, row_offsets: Tensor, col_indices: Tensor, n: int, k: int, value_bytes: int = 2
    ):
        super().__init__(row_offsets, col_indices, n, k, value_bytes)
        device = col_indices.device
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
        steps = torch.empty(slices * windows + 1, dtype=torch.int32, device="cpu")
        elements, dtype = _record_elements(value_bytes), {2: torch.int16, 1: torch.int8}
        records = torch.zeros(cover.steps, elements, dtype=dtype[value_bytes], device="cpu")
        places = torch.empty(indices.shape[0], dtype=torch.int64, device="cpu")
        cover.write(steps.data_ptr(), records.data_ptr(), places.data_ptr(), value_bytes)
        self.steps, self.places = steps.to(device), places.to(device)
        self.records = records.to(device)

    @classmethod
    def least_smem(cls, tokens: int, k: int) -> int:
        return smem_bytes(_kernel_tokens(tokens), RUN_WARPS)

    @classmethod
    def refuse(cls, problem: Problem) -> str | None:
        return "W is too empty for a cover" if is_nearly_empty(problem) else None

    def empty(self, dtype: torch.dtype) -> dict[str, Any]:
        return {
            "records": self.records.clone().view(dtype),
            "steps": self.steps,
            "row_order": self.row_order,
            "arrived": self.row_order.new_zeros(self.row_order.shape[0] // LANES),
        }


@lru_cache(maxsize=4096)
def configure(
    m: int, slices: int, windows: int, type_name: str, gpu: Gpu, value_bytes: int = 2
) -> Launch | None:
    """Kernel and sizes for as many of m tokens as it takes, 32 at most; None if they need more
    shared memory than there is."""
    tokens = _kernel_tokens(m)
    tiles_per_warp = slices * windows / (RUN_WARPS * gpu.multiprocessors)
    group_warps = choose_group_warps(tokens, tiles_per_warp)
    while group_warps < RUN_WARPS and smem_bytes(tokens, group_warps, value_bytes) > gpu.smem_bytes:
        group_warps *= 2
    needed = smem_bytes(tokens, group_warps, value_bytes)
    if needed > gpu.smem_bytes:
        return None
    busy = 0.7 if tiles_per_warp <= FEW_TILES else 0.8 if tokens <= 16 else 0.9
    runs = choose_runs(-(-slices // group_warps), windows, gpu.multiprocessors, busy)
    name = f"sk_spmm_cover_{type_name}_t{tokens}"
    return launch_runs(name, tokens, slices, windows, group_warps, runs, needed)


def choose_group_warps(tokens: int, tiles_per_warp: float) -> int:
    """How many of a block's 16 warps share x of a window, and a block's rows / 32: 16, 8 or 4.

    Many read x less often; few leave fewer sums to add up. docs/log.md has the measurements.
    """
    if tiles_per_warp <= FEW_TILES:
        return 4
    return 8 if tokens <= 16 or tiles_per_warp <= MANY_TILES else 16


def smem_bytes(tokens: int, group_warps: int, value_bytes: int = 2) -> int:
    """Bytes of shared memory: two windows of x of each group and the records of each warp."""
    x_bytes = RUN_WARPS // group_warps * 2 * tokens * WINDOW * 2
    record_bytes = _record_elements(value_bytes) * value_bytes
    return x_bytes + RUN_WARPS * DEPTHS[value_bytes] * record_bytes


def _kernel_tokens(m: int) -> int:
    return min(MOST_TOKENS, max(8, 1 << (m - 1).bit_length()))
