"""The layout `pairs`, which dense tensor cores read: pairs of neighbouring columns, those without a
value left out.

csrc/cuda/pairs.cuh describes the layout, csrc/cuda/spmm_pairs.cu how it is read. For a random mask
of density d it takes 3/32 + 2 (1 - (1 - d)^2) bytes for each place of W, with values of 8 bits
3/32 + 1 - (1 - d)^2. Packing is a count and a
running sum, in torch, on the device of W.
"""

from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import torch
from torch import Tensor

from ...indices import expand_rows
from ..problem import Problem
from . import pairs_ring
from .csr import is_nearly_empty
from .layout import LANES, TILE_PAD, Expansion, Gpu, Launch, Layout, Packed
from .row_scales import InE4m3, InInt8
from .runs import MANY_TILES, RUN_WARPS, TILE_COLUMNS, choose_runs, launch_runs

STEP = 64  # columns
SLOTS = 32  # of a lane in a step
HEAD = LANES + LANES // 2  # words of a step before its values: masks, starts
MOST_WORDS = 2**31 - 2**12
BUFFER_BYTES = 4352  # of words, two a warp, each with a barrier of 8 bytes
WINDOW = 64  # tokens times steps of x
MOST_TOKENS = 64  # of a launch
SMALL = 2**25  # places of W up to which pairs_ring.py is faster with 32 tokens already
# Shared memory of a warp that writes W out: its tile, the words of a step.
EXPAND_BYTES = LANES * (STEP + TILE_PAD) * 2 + (HEAD + SLOTS * LANES) * 4


@dataclass(frozen=True)
class Pairs(Packed):
    """words: [words, values in 4 bytes] (masks and starts of a step as bits, then its pairs, then
    zeros up to a multiple of 16 bytes). steps: int32 [slices * row steps + 1], the words before
    each. arrived: int32 [slices], zeros: what blocks that share rows count on in a product.
    """

    words: Tensor
    steps: Tensor
    arrived: Tensor

    name = "pairs"

    most_tokens = 256  # beyond, W written out is as fast or faster (docs/log.md)

    def launch(self, m: int, gpu: Gpu) -> Launch | None:
        sizes = m, self.slices, self.row_steps, self.type_name, gpu
        fewest = 16 if self.n * self.k <= SMALL else 32
        if m > fewest and gpu.has_warpgroups:
            return pairs_ring.configure(*sizes)
        return configure(*sizes) if m <= MOST_TOKENS else None

    def operands(self, launch: Launch):
        how = launch.ring or (launch.group_warps,)
        sizes = self.slices, self.row_steps, *how, launch.shares, self.words.shape[0]
        return (self.words, self.steps), sizes

    def expansion(self):
        weight, sizes = (self.words, self.steps), (self.n, self.slices, self.row_steps)
        return Expansion("pairs", self.slices * self.row_steps, EXPAND_BYTES, weight, sizes)

    @property
    def row_steps(self) -> int:
        return -(-self.k // STEP)

    def parts(self):
        return {
            "words": (None, (self.words.shape[0], 4 // self.words.itemsize)),
            "steps": (torch.int32, (self.slices * self.row_steps + 1,)),
            "arrived": (torch.int32, (self.slices,)),
        }


@dataclass(frozen=True)
class PairsInt8(InInt8, Pairs):
    name = "pairs_int8"
    most_tokens = MOST_TOKENS


@dataclass(frozen=True)
class PairsE4m3(InE4m3, Pairs):
    name = "pairs_e4m3"
    most_tokens = MOST_TOKENS


class PairsLayout(Layout):
    kind = Pairs
    kinds_of_8_bits = {torch.int8: PairsInt8, torch.float8_e4m3fn: PairsE4m3}

    def __init__(
        self, row_offsets: Tensor, col_indices: Tensor, n: int, k: int, value_bytes: int = 2
    ):
        super().__init__(row_offsets, col_indices, n, k, value_bytes)
        device, nnz = col_indices.device, col_indices.shape[0]
        slices, row_steps = -(-n // LANES), -(-k // STEP)
        rows, columns = expand_rows(row_offsets, nnz), col_indices.long()
        step = rows // LANES * row_steps + columns // STEP
        # Of mma's operand A: tile of 16 rows, half of these, row; 16 columns, half, pair.
        row, column = rows % LANES, columns % STEP
        register = row // 8 % 2 + column // 8 % 2 * 2
        slot = column // 16 * 8 + row // 16 * 4 + register
        lane = row % 8 * 4 + column % 8 // 2
        pair = (step * LANES + lane) * SLOTS + slot

        has_value = torch.zeros(slices * row_steps * LANES * SLOTS, dtype=torch.bool, device=device)
        has_value[pair] = True
        each = has_value.view(-1, LANES, SLOTS)
        slots = torch.arange(SLOTS, device=device)
        masks = (each << (slots % 4 * 8 + slots // 4 + value_bytes) % 32).sum(2)  # [steps, lanes]
        counts, of_word = each.sum(2), 2 // value_bytes  # pairs in 4 bytes
        quads = (-(-counts.sum(1) // of_word) + HEAD + 3) // 4  # of 16 bytes, [steps]
        starts = 2 * value_bytes * (counts.cumsum(1) - counts)
        starts[:, 0] = quads  # in place of a 0
        first = torch.zeros(slices * row_steps + 1, dtype=torch.int64, device=device)
        torch.cumsum(4 * quads, 0, out=first[1:])
        if int(first[-1]) >= MOST_WORDS:
            raise ValueError(f"W: {n} x {k} with {nnz} values is too large for 32-bit offsets")
        # The pairs stand in their order, behind the head of their step.
        order = torch.cumsum(has_value, 0, dtype=torch.int64)
        before = order[:: LANES * SLOTS] - has_value[:: LANES * SLOTS].long()  # [steps]
        at = (first[step] + HEAD) * of_word + order[pair] - 1 - before[step]
        self.places = 2 * at + column % 2
        words = torch.zeros(int(first[-1]), dtype=torch.int32, device=device)
        head = torch.cat([masks, starts[:, ::2] | starts[:, 1::2] << 16], 1)
        at = first[:-1, None] + torch.arange(HEAD, device=device)
        words[at] = head.int()  # bit 31 wraps
        dtype = {2: torch.int16, 1: torch.int8}[value_bytes]
        self.words, self.steps = words.view(-1, 1).view(dtype), first.int()

    @classmethod
    def least_smem(cls, tokens: int, k: int) -> int:
        return smem_bytes(RUN_WARPS)

    @classmethod
    def refuse(cls, problem: Problem) -> str | None:
        n, k, nnz = problem.N, problem.K, problem.nnz
        # As many as there may be: each value has a word of its own, each step is filled up.
        words = -(-n // LANES) * -(-k // STEP) * (HEAD + 3) + nnz
        if words >= MOST_WORDS:
            return "its offsets have 32 bits, too few for the pairs of W"
        return "W is too empty for pairs" if is_nearly_empty(problem) else None

    def empty(self, dtype: torch.dtype) -> dict[str, Any]:
        arrived = self.steps.new_zeros(-(-self.n // LANES))
        return {"words": self.words.clone().view(dtype), "steps": self.steps, "arrived": arrived}


@lru_cache(maxsize=4096)
def configure(m: int, slices: int, row_steps: int, type_name: str, gpu: Gpu) -> Launch | None:
    """Kernel and sizes for up to 64 tokens; None if they need more shared memory than there is.
    Groups of 4 warps are the fastest for W of up to 5 tiles a warp, where no run has two blocks of
    rows."""
    tokens = max(16, 1 << (m - 1).bit_length())
    windows = -(-row_steps // (WINDOW // tokens))
    tiles = slices * row_steps * STEP / TILE_COLUMNS
    is_large = tiles > MANY_TILES * RUN_WARPS * gpu.multiprocessors
    busy = 0.8 if is_large else 0.7
    for group_warps in (8,) if is_large else (4, 8):
        blocks = -(-slices // group_warps)
        runs = choose_runs(blocks, windows, gpu.multiprocessors, busy)
        if runs % max(1, blocks) == 0:
            break
    while group_warps < RUN_WARPS and smem_bytes(group_warps) > gpu.smem_bytes:
        group_warps *= 2
        runs = choose_runs(-(-slices // group_warps), windows, gpu.multiprocessors, busy)
    needed = smem_bytes(group_warps)
    if needed > gpu.smem_bytes:
        return None
    name = f"sk_spmm_pairs_{type_name}_t{tokens}"
    return launch_runs(name, tokens, slices, windows, group_warps, runs, needed)


def smem_bytes(group_warps: int) -> int:
    """Bytes of shared memory: two windows of x of each group, at a multiple of 1024, and the words
    of each warp."""
    x_bytes = RUN_WARPS // group_warps * 2 * WINDOW * STEP * 2
    return 1024 + x_bytes + RUN_WARPS * 2 * (BUFFER_BYTES + 8)
