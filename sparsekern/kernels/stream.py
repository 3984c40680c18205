"""SpMM for few tokens, as in decoding: the table row `stream` (csrc/cpu/stream.h).

W is read once, in CSR order, at the speed of memory. Values are read where they are; column indices
are compressed once for each pattern. What a call checks before it believes that the indices are
those it has compressed is written in csrc/pattern/csr.h.
"""

from functools import lru_cache

import torch

from .cpu import _C, pattern_of, refuse_dtype, type_of, version_of
from .problem import Kernel, Problem

MOST_TOKENS = 16


# The least density at which the bitmap is faster, for 1, 2, up to 4 and up to 8 tokens: where the
# time of one place of W meets density * the time of one non-zero. Measured with weights in cache
# and, for one token, out of memory, where two bytes a non-zero count for more (docs/LOG.md).
_BITMAP_FROM = {16: (0.3, 0.22, 0.3, 0.5), 8: (0.45, 0.38, 0.52, 0.8)}


def stream_format(problem: Problem, lanes: int) -> str:
    """How column indices are compressed for `problem` where a register holds `lanes` floats.

    "bitmap": a bit per place of W, at most 8 tokens; a place costs the same full or empty.
    "columns": 16 bits per non-zero. 2048 x 2048 at a density of 0.25 on AVX-512: "columns" for 1
    and for 8 tokens, "bitmap" for 2.
    """
    if problem.M > 8 or lanes not in _BITMAP_FROM:
        return "columns"
    least = _BITMAP_FROM[lanes][max(0, problem.M - 1).bit_length()]
    return "bitmap" if problem.density >= least else "columns"


@lru_cache(maxsize=4096)
def _format(problem: Problem) -> "_C.Format":
    return getattr(_C.Format, stream_format(problem, _C.lanes()))


def _spmm_stream(row_offsets, col_indices, values, n, k, x, bias=None):
    tokens, nnz = x.shape[0], values.shape[0]
    y = x.new_empty(tokens, n)
    pattern_of(row_offsets, col_indices, n, k).spmm_stream(
        row_offsets.data_ptr(),
        col_indices.data_ptr(),
        version_of(row_offsets, col_indices),
        _format(Problem("spmm", "cpu", x.dtype, tokens, n, k, nnz)),
        type_of(x),
        values.data_ptr(),
        0 if bias is None else bias.data_ptr(),
        x.data_ptr(),
        y.data_ptr(),
        tokens,
        torch.get_num_threads(),
    )
    return y


def _refuse_stream(p: Problem) -> str | None:
    if p.M > MOST_TOKENS:
        return f"it serves up to {MOST_TOKENS} tokens, not {p.M}"
    if p.K > 65536:
        return f"its columns are 16 bits wide, too few for K = {p.K}"
    return refuse_dtype(p)


def _describe_stream(p: Problem) -> str:
    return f"{_C.isa()}, columns as {stream_format(p, _C.lanes())}"


KERNELS = (Kernel("stream", "spmm", "cpu", _refuse_stream, _spmm_stream, _describe_stream),)
