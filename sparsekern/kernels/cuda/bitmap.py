"""A pattern as a bitmap: W written out, its values collected, and 2:4 operands filled from it.

Bit j of word c of a row of W [N, K] stands for column 64 c + j; `starts` says where the values of a
word begin. 12 bytes for 64 places, whatever the density. csrc/cuda/bitmap.cu has the kernels. The
bitmap is made from a checked copy of the indices (derived.py) and nobody else can write to it, so
the kernels need no check of their own.
"""

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from ...indices import expand_rows
from ..derived import derived
from .library import start

COLUMNS = 64  # of a word
THREADS, BLOCK_WORDS = 256, 64  # of a block
TILE_ROWS = 128
TILE_BYTES = 4 * (TILE_ROWS * (COLUMNS // 2 + 1) + TILE_ROWS // 32) + 2 * TILE_ROWS * COLUMNS // 8
PART_BYTES = 16
_CHUNK = 2**26  # entries that are looked at together


@dataclass(frozen=True)
class Bitmap:
    words: Tensor  # int64 [N, row_words]
    starts: Tensor  # int32 [N, row_words]

    @property
    def tensors(self) -> tuple[Tensor, Tensor]:
        return self.words, self.starts

    @property
    def row_words(self) -> int:
        return self.words.shape[1]


def make_bitmap(row_offsets: Tensor, col_indices: Tensor, n: int, k: int) -> Bitmap:
    """The Bitmap of a CSR pattern of [n, k]."""
    row_words = max(1, -(-k // COLUMNS))
    words = col_indices.new_zeros(n * row_words, dtype=torch.int64)
    rows = expand_rows(row_offsets, col_indices.shape[0])
    for first in range(0, col_indices.shape[0], _CHUNK):
        columns = col_indices[first : first + _CHUNK].long()
        word = rows[first : first + _CHUNK] * row_words + columns // COLUMNS
        # Every place is stored once, so the sum of its bits is their union; 1 << 63 wraps.
        words.scatter_add_(0, word, torch.ones_like(columns) << columns % COLUMNS)
    counts = _BITS.to(words.device)[words.view(torch.uint8).int()].view(-1, 8).sum(1)
    starts = (counts.cumsum(0) - counts).int()
    return Bitmap(words.view(n, row_words), starts.view(n, row_words))


_BITS = torch.tensor([byte.bit_count() for byte in range(256)], device="cpu")


def bitmap_of(row_offsets: Tensor, col_indices: Tensor, n: int, k: int) -> Bitmap:
    """make_bitmap() of checked indices, kept as derived.py says."""

    def make(row_offsets: Tensor, col_indices: Tensor) -> Bitmap:
        return make_bitmap(row_offsets, col_indices, n, k)

    return derived("cuda bitmap", row_offsets, col_indices, n, k, make)


def is_two_way(bitmap: Bitmap) -> bool:
    """Whether at most two of four neighbours are stored, in rows and in columns of W: of columns
    4 i to 4 i + 3 in each row, and of rows 4 i to 4 i + 3 in each column. Waits for the GPU."""
    words = bitmap.words
    fours = F.pad(words, (0, 0, 0, -words.shape[0] % 4)).view(-1, 4, bitmap.row_words)
    many_in_column = _three_of(*fours.unbind(1))
    many_in_row = _three_of(words, words >> 1, words >> 2, words >> 3) & _FIRST_OF_FOUR
    return not (many_in_column.any() | many_in_row.any())


_FIRST_OF_FOUR = 0x1111111111111111


def _three_of(a: Tensor, b: Tensor, c: Tensor, d: Tensor) -> Tensor:
    """The bits that are set in three of them or more."""
    return a & b & (c | d) | c & d & (a | b)


def write_out(bitmap: Bitmap, values: Tensor, n: int, k: int) -> Tensor:
    """W [N, K], dense, in the dtype of values [nnz]."""
    w = values.new_empty(n, k)
    if w.numel():
        start(*write_out_launch(bitmap, values, w, w.element_size(), k))
    return w


def collect(bitmap: Bitmap, w: Tensor, nnz: int, dtype: torch.dtype | None = None) -> Tensor:
    """The entries [nnz] of w [N, K], contiguous, at the places of the pattern; those of bfloat16 in
    float32, if that is the `dtype`."""
    values = w.new_empty(nnz, dtype=dtype)
    if nnz:
        name = "wide" if values.dtype is not w.dtype else str(w.element_size())
        start(*collect_launch(bitmap, w, values, w.element_size(), w.shape[1], name))
    return values


def fill(bitmap: Bitmap, values: Tensor, tail: Tensor, operand: Tensor, n: int, k: int) -> None:
    """Write the slots [N, K / 2] of W to `operand`, and after them the bytes `tail`.

    values are of 16 bits, the pattern has at most two of four neighbours in a row, K is a multiple
    of 16."""
    start(*fill_launch(bitmap, values, tail, operand, n, k))


def fill_transposed(
    bitmap: Bitmap, values: Tensor, tail: Tensor, operand: Tensor, n: int, k: int
) -> None:
    """The same for the slots [K, N / 2] of W^T: at most two of four in a column, N such a
    multiple."""
    start(*fill_transposed_launch(bitmap, values, tail, operand, n, k))


# The arguments of start(). Tensors that a call brings may be slots of it (steps.py).


def write_out_launch(bitmap: Bitmap, values, w, element_bytes: int, k: int) -> tuple:
    """write_out()."""
    count = bitmap.words.numel()
    name, blocks = f"sk_bitmap_write_out_{element_bytes}", -(-count // BLOCK_WORDS)
    return name, blocks, THREADS, 0, (*bitmap.tensors, values, w), count, bitmap.row_words, k


def collect_launch(
    bitmap: Bitmap, w, values, element_bytes: int, k: int, kind: str | None = None
) -> tuple:
    """collect(), by the kernel of this kind: by default that of the size of an element."""
    count = bitmap.words.numel()
    name, blocks = f"sk_bitmap_collect_{kind or element_bytes}", -(-count // BLOCK_WORDS)
    smem_bytes, tensors = THREADS * 8 * element_bytes, (*bitmap.tensors, w, values)
    return name, blocks, THREADS, smem_bytes, tensors, count, bitmap.row_words, k


def fill_launch(bitmap: Bitmap, values, tail: Tensor, operand, n: int, k: int) -> tuple:
    """fill()."""
    count, parts = bitmap.words.numel(), len(tail) // PART_BYTES
    blocks = -(-count // BLOCK_WORDS) + -(-parts // THREADS)
    tensors, sizes = (*bitmap.tensors, values, tail, operand), (bitmap.row_words, n, k, parts)
    return "sk_bitmap_fill", blocks, THREADS, 0, tensors, count, *sizes


def fill_transposed_launch(bitmap: Bitmap, values, tail: Tensor, operand, n: int, k: int) -> tuple:
    """fill_transposed()."""
    parts = len(tail) // PART_BYTES
    blocks = -(-n // TILE_ROWS) * bitmap.row_words + -(-parts // THREADS)
    tensors, sizes = (*bitmap.tensors, values, tail, operand), (bitmap.row_words, n, k, parts)
    return "sk_bitmap_fill_transposed", blocks, THREADS, TILE_BYTES, tensors, *sizes
