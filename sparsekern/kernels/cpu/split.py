"""The table row `split`: tokens in parts, each of a number that a kernel takes well.

`panel` computes 16, 32, 64 or 128 tokens at a time on AVX-512, and one token more costs as much as
all of the next such tile: 17 tokens took 2.4 times as long as 16, 65 took 1.8 times as long as 64.
So what a tile leaves over is a product of its own, by few_tokens where it takes that.
"""

import torch

from ..problem import Problem, bound_kernel
from . import few_tokens, panel
from .machine import machine

# (tokens above, tokens up to): a tile of so many tokens and a rest are faster than the next tile,
# as measured (docs/log.md).
_RESTS = ((16, 24), (32, 48), (64, 96))
_RESTS_FED = ((16, 18), *_RESTS[1:])  # where multiply-adds read L1 as fast as registers
_WIDEST = 128


def parts(m: int, is_fed: bool = False) -> tuple[int, ...]:
    """The numbers of tokens that m is cut into, m alone if it is not. 129: (128, 1); 83: (64, 16,
    3). is_fed: on a machine with l1_feeds."""
    rests = _RESTS_FED if is_fed else _RESTS
    whole = m // _WIDEST * _WIDEST
    if m > whole > 0 and m - whole <= rests[-1][1]:
        return whole, *parts(m - whole, is_fed)
    for tile, most in rests:
        if tile < m <= most:
            return tile, *parts(m - tile, is_fed)
    return (m,)


def _rows(problem: Problem):
    """The row for each part."""
    for m in parts(problem.M, machine().l1_feeds):
        part = problem._replace(M=m)
        few = few_tokens.KERNELS[0]
        yield (panel.KERNELS[0] if few.refuse(part) else few), part


def _bind(problem: Problem):
    products = [(part.M, row.bound(part)) for row, part in _rows(problem)]

    def run(row_offsets, col_indices, values, n, k, x, bias=None):
        y = x.new_empty(problem.M, n)
        first = 0
        for m, product in products:
            product(row_offsets, col_indices, values, n, k, x, bias, y, first)
            first += m
        return y

    return run


def _refuse(p: Problem) -> str | None:
    if reason := panel.refuse_dtype(p, (torch.float32,)):
        return reason
    if panel._C.lanes() != 16:
        return f"it was measured with AVX-512, not {panel._C.isa()}"
    if len(parts(p.M, machine().l1_feeds)) == 1:
        return f"{p.M} tokens are no more than a kernel computes at a time"
    reasons = (row.refuse(part) for row, part in _rows(p))
    return next((reason for reason in reasons if reason), None)


def _describe(p: Problem) -> str:
    return ", ".join(f"{part.M} tokens by {row.name}" for row, part in _rows(p))


KERNELS = (bound_kernel("split", "spmm", "cpu", _refuse, _bind, _describe),)
