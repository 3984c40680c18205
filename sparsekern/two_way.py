"""Two-way patterns: of W [N, K] at most 2 of each 4 neighbours are stored, along both axes.

Neighbours are aligned: rows 4i to 4i + 3 and columns 4j to 4j + 3 are a block, and a block has at
most 2 entries in each row and 2 in each column. Blocks at the end may be smaller: what is missing
counts as not stored. Both W and its transpose then fit sparse tensor cores (2:4).

How such patterns are drawn and chosen: sparsity/two_way.py.
"""

from torch import Tensor

from .indices import expand_rows

CHUNK = 2**22  # entries looked at together


def is_two_way(row_offsets: Tensor, col_indices: Tensor, k: int) -> bool:
    """Whether a checked CSR pattern with K columns is two-way, however it came about.

    O(nnz), but for sorting, and if rows have about the same nnz in bounded memory. The first place
    too many ends it. It waits for the GPU that holds the pattern.
    """
    n, nnz = row_offsets.shape[0] - 1, col_indices.shape[0]
    rows = max(1, CHUNK * n // max(1, nnz) // 4) * 4
    bounds = row_offsets[::rows].tolist() + [nnz]
    for i in range(0, n, rows):
        start, end = bounds[i // rows : i // rows + 2]
        offsets = row_offsets[i : i + rows + 1] - start
        row, col = expand_rows(offsets, end - start), col_indices[start:end]
        along_row = row * (-(-k // 4)) + col // 4  # ascending, as the pattern is sorted
        along_col = (row // 4 * k + col).sort().values
        if any((group[2:] == group[:-2]).any() for group in (along_row, along_col)):
            return False
    return True
