"""Products of few tokens, as in decoding: the table rows `few_tokens` (csrc/cpu/few_tokens.h).

W is read once, in CSR order, at the speed of memory. Values are read where they are; column indices
are compressed once for each pattern. What a call checks before it believes that the indices are
those it has compressed is written in csrc/pattern/csr.h.
"""

import torch

from ..derived import versions
from ..problem import Problem, bound_kernel
from .machine import machine
from .panel import _C, pattern_of, refuse_dtype, type_of

MOST_TOKENS = 16
MOST_TOKENS_T = 8  # of spmm_t
MOST_TOKENS_WIDE = 4  # with more columns than 16 bits have numbers
_WIDE = 65536
BLOCKS_PAY = 0.15  # density from which on rows are long enough for blocks of columns in L1


# For 1, 2, up to 4 and up to 8 tokens: formats, each with the least density at which it is faster
# than those after it. Measured with weights in cache and, for one token, out of memory, where two
# bytes a non-zero count for more (docs/log.md).
_FORMATS: dict[int, tuple[dict[str, float], ...]] = {
    16: (
        {"bitmap": 0.32, "window64": 0.16, "window128": 0.08},
        {"bitmap": 0.23},
        {"bitmap": 0.35},
        {"bitmap": 0.5},
    ),
    8: ({"bitmap": 0.45}, {"bitmap": 0.38}, {"bitmap": 0.52}, {"bitmap": 0.8}),
}


def index_format(problem: Problem, lanes: int) -> str:
    """How column indices are compressed for `problem` where a register holds `lanes` floats.

    "bitmap": a bit per place of W, at most 8 tokens; a place costs the same full or empty.
    "window64", "window128": for one token; up to 16 non-zeros of a row that lie in so many columns.
    "columns": 16 bits per non-zero.
    "columns32": 32, for K > 65536 and at most 4 tokens.

    2048 x 2048 at a density of 0.25 on AVX-512: "window64" for 1 token, "bitmap" for 2, "columns"
    for 4.
    """
    if problem.K > _WIDE:
        return "columns32"
    if problem.M > 8 or lanes not in _FORMATS:
        return "columns"
    formats = _FORMATS[lanes][max(0, problem.M - 1).bit_length()]
    return next((name for name, least in formats.items() if problem.density >= least), "columns")


def _bind(problem: Problem):
    m, n_, type_ = problem.M, problem.N, type_of(problem.dtype)
    x_bytes, y_bytes = (size * problem.dtype.itemsize for size in (problem.K, n_))  # of a token
    format_ = getattr(_C.Format, index_format(problem, _C.lanes()))

    def run(row_offsets, col_indices, values, n, k, x, bias=None, y=None, first=0):
        """With y, of M tokens of x and y from `first` on."""
        y = x.new_empty(m, n_) if y is None else y
        pattern_of(row_offsets, col_indices, n, k).spmm_few_tokens(
            row_offsets.data_ptr(),
            col_indices.data_ptr(),
            *versions(row_offsets, col_indices),
            format_,
            type_,
            values.data_ptr(),
            0 if bias is None else bias.data_ptr(),
            x.data_ptr() + first * x_bytes,
            y.data_ptr() + first * y_bytes,
            m,
            torch.get_num_threads(),
        )
        return y

    return run


def _bind_t(problem: Problem):
    m, k_, type_ = problem.M, problem.K, type_of(problem.dtype)

    def run(row_offsets, col_indices, values, n, k, dy, bias=None):
        y = dy.new_empty(m, k_)
        pattern_of(row_offsets, col_indices, n, k).spmm_t_few_tokens(
            row_offsets.data_ptr(),
            col_indices.data_ptr(),
            *versions(row_offsets, col_indices),
            type_,
            values.data_ptr(),
            0 if bias is None else bias.data_ptr(),
            dy.data_ptr(),
            y.data_ptr(),
            m,
            torch.get_num_threads(),
        )
        return y

    return run


def _refuse(p: Problem) -> str | None:
    if reason := refuse_dtype(p, (torch.float32, torch.bfloat16)):
        return reason
    if p.M > MOST_TOKENS:
        return f"it serves up to {MOST_TOKENS} tokens, not {p.M}"
    if p.M > 8 and p.density > BLOCKS_PAY and not _fits_l1(p):
        return f"x of {p.M} tokens does not fit L1, where panel multiplies it in blocks"
    if p.K > _WIDE and p.M > MOST_TOKENS_WIDE:
        return f"with K = {p.K} it serves up to {MOST_TOKENS_WIDE} tokens, not {p.M}"
    return None


def _fits_l1(p: Problem) -> bool:
    """Whether x does, or the machine reads L2 as fast."""
    here = machine()
    return not here.l1_feeds or 4 * here.lanes * p.K <= (here.l1_bytes or 32768)


def _refuse_t(p: Problem) -> str | None:
    if p.M > MOST_TOKENS_T:
        return f"it serves up to {MOST_TOKENS_T} tokens, not {p.M}"
    return refuse_dtype(p)


def _describe(p: Problem) -> str:
    return f"{_C.isa()}, columns as {index_format(p, _C.lanes())}"


def _describe_t(p: Problem) -> str:
    return f"{_C.isa()}, one non-zero after the other"


KERNELS = (
    bound_kernel("few_tokens", "spmm", "cpu", _refuse, _bind, _describe),
    bound_kernel("few_tokens", "spmm_t", "cpu", _refuse_t, _bind_t, _describe_t),
)
