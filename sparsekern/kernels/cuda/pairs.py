"""W as the tensor cores read it: pairs of neighbouring columns, those without a value left out.

csrc/cuda/pairs.cuh describes the layout, csrc/cuda/spmm_pairs.cu how it is read. For a random mask
of density d it takes 3/32 + 2 (1 - (1 - d)^2) bytes for each place of W. Packing is a count and a
running sum, in torch, on the device of W.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from ...indices import expand_rows
from .layout import LANES, Packed, as_stored, check_fill, check_indices

STEP = 64  # columns
SLOTS = 32  # of a lane in a step
HEAD = LANES + LANES // 2  # words of a step before its values: masks, starts
MOST_WORDS = 2**31 - 2**12


def most_words(n: int, k: int, nnz: int) -> int:
    """As many words as W may take: each value one of its own, each step filled up."""
    return -(-n // LANES) * -(-k // STEP) * (HEAD + 3) + nnz


@dataclass(frozen=True)
class Pairs(Packed):
    """words: 16-bit floats [words, 2] (masks and starts of a step as bits, then its pairs, then
    zeros up to a multiple of 16 bytes). steps: int32 [slices * row steps + 1], the words before
    each. arrived: int32 [slices], zeros: what blocks that share rows count on in a product.
    """

    words: Tensor
    steps: Tensor
    arrived: Tensor

    @property
    def row_steps(self) -> int:
        return -(-self.k // STEP)

    def parts(self):
        return {
            "words": (None, (self.words.shape[0], 2)),
            "steps": (torch.int32, (self.slices * self.row_steps + 1,)),
            "arrived": (torch.int32, (self.slices,)),
        }


class PairsLayout:
    """The index part of a pack, and `places`: where each value of W lies, in 16-bit units."""

    def __init__(self, row_offsets: Tensor, col_indices: Tensor, n: int, k: int):
        check_indices(row_offsets, col_indices, n)
        self.n, self.k = n, k
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
        masks = (each << (slots % 4 * 8 + slots // 4 + 2) % 32).sum(2)  # [steps, lanes], int64
        counts = each.sum(2)
        quads = (counts.sum(1) + HEAD + 3) // 4  # of 16 bytes, [steps]
        starts = 4 * (counts.cumsum(1) - counts)
        starts[:, 0] = quads  # in place of a 0
        first = torch.zeros(slices * row_steps + 1, dtype=torch.int64, device=device)
        torch.cumsum(4 * quads, 0, out=first[1:])
        if int(first[-1]) >= MOST_WORDS:
            raise ValueError(f"W: {n} x {k} with {nnz} values is too large for 32-bit offsets")
        # The words of pairs stand in the order of pairs, behind the head of their step.
        order = torch.cumsum(has_value, 0, dtype=torch.int64)
        before = order[:: LANES * SLOTS] - has_value[:: LANES * SLOTS].long()  # [steps]
        at = first[step] + HEAD + order[pair] - 1 - before[step]
        self.places = 2 * at + column % 2
        words = torch.zeros(int(first[-1]), dtype=torch.int32, device=device)
        head = torch.cat([masks, starts[:, ::2] | starts[:, 1::2] << 16], 1)
        at = first[:-1, None] + torch.arange(HEAD, device=device)
        words[at] = head.int()  # bit 31 wraps
        self.words, self.steps = words.view(torch.int16).view(-1, 2), first.int()

    def fill(self, values: Tensor) -> Pairs:
        """A pack with these values, in the order of the CSR indices."""
        check_fill(values, self.places.shape[0])
        words = self.words.clone().view(values.dtype)
        arrived = torch.zeros(-(-self.n // LANES), dtype=torch.int32, device=words.device)
        packed = Pairs(self.n, self.k, values.shape[0], words, self.steps, arrived)
        packed.check()
        self.refill_(packed, values)
        return packed

    def refill_(self, packed: Pairs, values: Tensor) -> None:
        """Other values in a pack of this layout."""
        packed.check_values(values)
        packed.words.view(-1)[self.places] = as_stored(values)
