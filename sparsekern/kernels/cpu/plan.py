"""How the C++ kernels cut a product on a CPU, and from which density on a dense one is faster.

Pure functions of the problem, the machine and the number of threads. The constants were found by
measurement on machines with AVX-512, with one and two loads a cycle, with and without AMX, and with
AVX2 (docs/log.md).
"""

from functools import lru_cache
from typing import NamedTuple

import torch

from ..problem import Problem
from .machine import Machine

SMALL_WORK = 2**18  # multiply-adds below which a second thread costs more than it gives
LONGEST_SUM = 96  # non-zeros added up one by one, so that rounding errors stay small
LEAST_FULL = 8  # times the rows of a block are as many as a column has for a non-zero, or more
LEAST_LANES = 8  # of registers with pairs of bfloat16: smaller ones were not measured
FEW_TILES, LONG_SEGMENT = 4, 32  # values are read in place for no more, and no fewer in a row
WIDEST = 8  # vectors in a panel's row: their accumulators fill a register file of 16


class Plan(NamedTuple):
    """The tokens are cut into tiles of vecs x lanes / tile_parts, W (spmm_t: W^T) into blocks. With
    `pairs`, bfloat16 stays so in panels, and a register has twice the lanes. With `in_place` the
    values are not brought into walking order first. With `two_sums` a tile of 4 vectors adds up
    every other non-zero for itself.

    The fields are those of `_C.Plan` (csrc/cpu/products.h), by name."""

    threads: int
    vecs: int
    tile_parts: int
    rows: int
    cols: int
    row_parts: int  # what a thread's task takes
    col_parts: int
    pairs: bool
    in_place: bool
    two_sums: bool


def dense_wins_above(p: Problem, machine: Machine) -> float:
    """The density above which writing W out and multiplying densely is faster than any sparse
    kernel, where nobody has measured it on the machine at hand (see crossover.py).

    A dense layer, whose W is written out already, is faster above density_of_dense_rate.
    """
    tokens = 10 if _feeds(p, machine) else 30  # that cost as much as writing W out
    if p.dtype == torch.bfloat16 and machine.has_bf16_tiles:
        tokens = 230
    elif p.dtype == torch.bfloat16 and machine.has_bf16_products:
        tokens = 5
    return density_of_dense_rate(p, machine) * (1 + tokens / max(1, p.M))


def density_of_dense_rate(p: Problem, machine: Machine) -> float:
    """The density at which a product of many tokens takes as long as a dense one: the rate of a
    sparse kernel over that of the dense product that `expand` calls."""
    if p.dtype == torch.bfloat16 and machine.has_bf16_tiles:
        return 0.06
    if p.dtype == torch.bfloat16 and machine.has_bf16_products:
        if machine.has_dots:
            return 0.66 if p.op == "sddmm" else 0.55
        return 0.38 if machine.has_pairs and p.op != "sddmm" else 0.27
    return 0.85 if _feeds(p, machine) else 0.55


@lru_cache(maxsize=4096)
def make_plan(p: Problem, machine: Machine, threads: int) -> Plan:
    """The plan of the `panel` kernels.

    - A wide tile reads fewer values of W per multiply-add, a narrow one moves fewer accumulators
      per row and column block: which matters more, and how much of L1 a column block of x takes,
      is in _most_vecs and _share. Panels of bfloat16 stay so where the machine multiplies them as
      fast, for there is twice as much of x in a column block.
    - SpMM's threads take whole tiles, each with a panel of its own, so there are tiles for all if
      the tokens allow. Those left over are packed by several threads, each for a part of the rows.
    - SDDMM's threads take a part of the rows and columns of W and go through all tiles, so that
      nobody waits; the grid is the one whose cells have the fewest rows and columns to pack.
    - SpMM sums each column block from 0, so its blocks, and with them the bits of the result, are
      the same for any number of threads. More than two threads are taken to share an L1 in pairs,
      which a virtual machine does not show: the widest tiles are then halved, which sums in the
      same order.
    - A row block's y panel stays in L2, and a column block of x near L1, unless blocks would be
      nearly empty: to make a schedule takes time for each row in each column block, and for spmm_t
      for each row of W in each row block of W^T, whether it holds anything or not.
    - Few tiles do not pay for values in walking order, if a row has some lines of them in a block.
    """
    n, k = (p.K, p.N) if p.op == "spmm_t" else (p.N, p.K)
    is_sddmm, real_bytes = p.op == "sddmm", 8 if p.dtype == torch.float64 else 4
    threads = threads if p.M * p.nnz >= SMALL_WORK else 1
    pairs = p.dtype == torch.bfloat16 and p.M > machine.lanes >= LEAST_LANES
    pairs &= machine.has_dots if is_sddmm else machine.has_pairs
    lanes, element_bytes = (machine.lanes * 2, 2) if pairs else (machine.lanes, real_bytes)

    vecs = _most_vecs(p, machine, pairs)
    # Where loads are no bottleneck, two thirds of 2 registers cost less than 2 tiles of 1.
    while vecs > 1 and p.M <= vecs * lanes * (2 if vecs == 2 and _feeds(p, machine) else 3) // 4:
        vecs //= 2
    too_few = p.M <= vecs * lanes * (threads - 1)
    tile_parts = 2 if vecs == WIDEST and (too_few or threads > 2) and not is_sddmm else 1
    width = vecs * lanes // tile_parts  # tokens

    share = _share(p, machine, vecs) * (2 / 3 if is_sddmm and threads > 2 else 1)
    column_bytes = vecs * lanes * element_bytes  # of x, in a whole tile
    cols = int((machine.l1_bytes or 32768) * share) // column_bytes
    if not is_sddmm:  # narrow panels deal a segment out to several sums
        sets = 2 if pairs and machine.has_dots else {1: 4, 2: 2}.get(vecs, 1)
        cols = min(cols, int(LONGEST_SUM * sets / max(p.density, 1e-9)))

    row_parts = col_parts = 1
    if is_sddmm:
        grids = [(r, threads // r) for r in range(1, threads + 1) if threads % r == 0]
        row_parts, col_parts = min(grids, key=lambda grid: n / grid[0] + k / grid[1])
    elif left := -(-p.M // width) % threads:
        row_parts = -(-threads // left)
    of_one = int(1 / max(p.density, 1e-9))  # columns of a row that hold a non-zero
    cols = min(max(cols, 16, min(of_one, -(-k // col_parts))), 65536)
    y_bytes = min(196608, machine.l2_bytes * 3 // 8 or 196608)
    part_rows = max(1, -(-n // row_parts))
    row_bytes = width * (element_bytes if is_sddmm else real_bytes)
    most_rows = max(y_bytes // row_bytes, of_one // LEAST_FULL)
    blocks = -(-part_rows // min(most_rows, 65536))
    rows = -(-part_rows // blocks)
    in_place = p.op == "spmm" and p.dtype != torch.bfloat16 and _feeds(p, machine)
    in_place &= p.M <= FEW_TILES * vecs * lanes and cols * p.density >= LONG_SEGMENT
    # Multiply-adds on 4 vectors wait for the ones before. Not measured where loads are in the way.
    two_sums = vecs == 4 and not is_sddmm and not pairs and _feeds(p, machine)
    return Plan(
        threads, vecs, tile_parts, rows, cols, row_parts, col_parts, pairs, in_place, two_sums
    )


def _feeds(p: Problem, machine: Machine) -> bool:
    """Registers of 64 bytes, and multiply-adds that read L1 as fast as they run: two loads a cycle,
    of which L2 gives less than half."""
    return machine.l1_feeds and machine.lanes * (8 if p.dtype == torch.float64 else 4) == 64


def _most_vecs(p: Problem, machine: Machine, pairs: bool) -> int:
    """Of a tile, if there are as many tokens."""
    is_sddmm = p.op == "sddmm"
    if pairs and not is_sddmm:  # two sets of sums
        tile = 4 * 2 * machine.lanes  # tokens; not where the last one would be half empty
        is_wasteful = 0 < p.M % tile <= tile // 2 and p.M < 4 * tile
        return 4 if machine.has_dots and p.density > 0.07 and not is_wasteful else 2
    if machine.lanes * (8 if p.dtype == torch.float64 else 4) < 64:
        return WIDEST
    if _feeds(p, machine):
        return WIDEST if p.density > (0.18 if is_sddmm else 0.35) else 4
    return WIDEST if is_sddmm or p.density > 0.18 else 4


def _share(p: Problem, machine: Machine, vecs: int) -> float:
    """Of L1, that a column block of x takes. Where L2 is far behind it fits. Elsewhere it is a
    little more where few of its rows are read, and in SDDMM, which reads a row of dy for each row
    and column block."""
    if _feeds(p, machine):
        return 3 / 4 if p.density > 0.15 else 1
    if p.op == "sddmm":
        return 5 / 4 if p.density > 0.07 else 2
    if p.density > 0.07:
        return 2 / 3 if vecs == 4 else 3 / 4
    return 5 / 4 if p.density > 0.03 else 2


def describe(plan: Plan, machine: Machine) -> str:
    """One phrase for sparsekern.explain."""
    threads = "1 thread" if plan.threads == 1 else f"{plan.threads} threads"
    width = plan.vecs * machine.lanes * (1 + plan.pairs) // plan.tile_parts
    blocks = f"tiles of {width} tokens, blocks of {plan.rows} x {plan.cols}"
    parts = f", W in {plan.row_parts} x {plan.col_parts} parts"
    return f"{machine.isa}, {threads}, {blocks}{parts * (plan.row_parts * plan.col_parts > 1)}"
