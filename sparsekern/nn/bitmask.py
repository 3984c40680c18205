"""Patterns as bits: one for each place of W [N, K], uint8 [N, ceil(K / 8)], lowest bit first.

Up to 97 % zeros that is less than CSR with int32 columns. On the CPU, a few rows at a time.
"""

from collections.abc import Iterator

import numpy as np
import torch
from torch import Tensor

CHUNK_PLACES = 2**24  # a byte each while rows are packed or unpacked
ONES = np.array([byte.bit_count() for byte in range(256)], dtype=np.uint8)


def packed_shape(n: int, k: int) -> tuple[int, int]:
    """Shape of the bits of a matrix [n, k]."""
    return n, -(-k // 8)


def pack(row_offsets: Tensor, col_indices: Tensor, k: int) -> Tensor:
    """Bits uint8 [N, ceil(K / 8)] of a checked pattern, on the CPU."""
    offsets, columns = row_offsets.cpu().numpy(), col_indices.cpu().numpy()
    n, width = packed_shape(len(offsets) - 1, k)
    bits = np.zeros((n, width), dtype=np.uint8)
    for first, last in _chunks(n, k):
        counts = np.diff(offsets[first : last + 1])
        mask = np.zeros((last - first, 8 * width), dtype=bool)
        rows = np.repeat(np.arange(last - first), counts)
        mask[rows, columns[offsets[first] : offsets[last]]] = True
        bits[first:last] = np.packbits(mask, axis=1, bitorder="little")
    return torch.from_numpy(bits)


def unpack(bits: Tensor, shape: tuple[int, int], nnz: int) -> tuple[Tensor, Tensor]:
    """row_offsets int32 [N+1] and col_indices int32 [nnz] of the pattern in bits, on their device.

    ValueError unless they are bits of such a matrix with nnz of them set, found before anything of
    the size of the matrix is made."""
    n, k = shape
    wanted = packed_shape(n, k)
    if n and not k:  # any number of rows in no bytes
        raise ValueError(f"expected columns, got a bitmask of {(n, k)}")
    if bits.dtype != torch.uint8 or tuple(bits.shape) != wanted:
        raise ValueError(
            f"expected a uint8 bitmask of shape {wanted} for {(n, k)}, got {bits.dtype} of shape "
            f"{tuple(bits.shape)}"
        )
    packed = bits.cpu().contiguous().numpy()
    if k % 8 and (past := int(ONES[packed[:, -1] >> (k % 8)].sum(dtype=np.int64))):
        raise ValueError(f"expected no bits past column {k}, got {past}")
    offsets = np.zeros(n + 1, dtype=np.int64)
    for first, last in _chunks(n, k):
        offsets[first + 1 : last + 1] = ONES[packed[first:last]].sum(axis=1, dtype=np.int64)
    offsets.cumsum(out=offsets)
    if offsets[-1] != nnz:
        raise ValueError(f"expected {offsets[-1]} values, as many as bits are set, got {nnz}")
    columns = np.empty(nnz, dtype=np.int32)
    for first, last in _chunks(n, k):
        mask = np.unpackbits(packed[first:last], axis=1, count=k, bitorder="little").view(bool)
        columns[offsets[first] : offsets[last]] = mask.nonzero()[1]
    both = torch.from_numpy(offsets.astype(np.int32)), torch.from_numpy(columns)
    return both[0].to(bits.device), both[1].to(bits.device)


def _chunks(n: int, k: int) -> Iterator[tuple[int, int]]:
    """First and last row, exclusive, of as many rows at a time as memory is for."""
    step = max(1, CHUNK_PLACES // max(1, k))
    return ((first, min(n, first + step)) for first in range(0, n, step))
