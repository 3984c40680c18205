"""How the C++ kernels cut a product on a CPU, and from which density on torch.mm is the faster one.

Pure functions of the problem, the machine and the number of threads. The constants were found by
measurement on machines with AVX-512, with and without AMX, and with AVX2 (docs/log.md).
"""

from functools import lru_cache
from typing import NamedTuple

import torch

from ..problem import Problem

SMALL_WORK = 2**18  # multiply-adds below which a second thread costs more than it gives
LONGEST_SUM = 96  # non-zeros added up one by one, so that rounding errors stay small
WIDEST = 8  # vectors in a panel's row: their accumulators fill a register file of 16


class Machine(NamedTuple):
    """The properties of a machine that a plan depends on."""

    isa: str
    lanes: int  # floats in a vector, or doubles where those are what is computed in
    l1_bytes: int  # of one core; 0: unknown
    l2_bytes: int
    has_bf16_tiles: bool  # AMX: torch.mm multiplies bfloat16 at eight times the rate of float32


class Plan(NamedTuple):
    """The tokens are cut into tiles of vecs x lanes / tile_parts, W (spmm_t: W^T) into blocks.

    The fields are those of `_C.Plan` (csrc/cpu/products.h), by name."""

    threads: int
    vecs: int
    tile_parts: int
    rows: int
    cols: int
    row_parts: int  # what a thread's task takes
    col_parts: int


def machine_name(machine: Machine) -> str:
    """Key of the crossover table: machines with equal keys get equal plans."""
    tiles = " tiles" * machine.has_bf16_tiles
    return f"{machine.isa} {machine.l1_bytes} {machine.l2_bytes}{tiles}"


def dense_wins_above(p: Problem, machine: Machine) -> float:
    """The density above which writing W out and calling torch.mm is faster than any sparse kernel,
    where nobody has measured it on the machine at hand (see crossover.py).

    share * (1 + tokens / M): `share` is the rate of a sparse kernel over that of torch.mm for many
    tokens, `tokens` how many of them cost torch.mm as much as writing W out.
    """
    uses_tiles = p.dtype == torch.bfloat16 and machine.has_bf16_tiles
    share, tokens = (0.06, 230) if uses_tiles else (0.55, 30)
    return share * (1 + tokens / max(1, p.M))


@lru_cache(maxsize=4096)
def make_plan(p: Problem, machine: Machine, threads: int) -> Plan:
    """The plan of the `panel` kernels.

    - A wide tile reads fewer values of W per multiply-add, a narrow one moves fewer accumulators
      per row and column block: with 16 lanes the second matters more below a density of 0.18,
      except in SDDMM, whose reduction a wide tile shares among more tokens.
    - SpMM's threads take whole tiles, each with a panel of its own, so there are tiles for all if
      the tokens allow. Those left over are packed by several threads, each for a part of the rows.
    - SDDMM's threads take a part of the rows and columns of W and go through all tiles, so that
      nobody waits; the grid is the one whose cells have the fewest rows and columns to pack.
    - A column block of x fits L1, or a little more where few of its rows are read, and in SDDMM,
      which reads a row of dy for each row and column block.
    - SpMM sums each column block from 0, so its blocks, and with them the bits of the result, are
      the same for any number of threads. More than two threads are taken to share an L1 in pairs,
      which a virtual machine does not show: the widest tiles are then halved, which sums in the
      same order.
    - A row block's y panel stays in L2.
    """
    n, k = (p.K, p.N) if p.op == "spmm_t" else (p.N, p.K)
    is_sddmm, real_bytes = p.op == "sddmm", 8 if p.dtype == torch.float64 else 4
    threads = threads if p.M * p.nnz >= SMALL_WORK else 1

    vecs = WIDEST if machine.lanes * real_bytes < 64 or is_sddmm or p.density > 0.18 else 4
    while vecs > 1 and p.M <= vecs * machine.lanes * 3 // 4:
        vecs //= 2
    too_few = p.M <= vecs * machine.lanes * (threads - 1)
    tile_parts = 2 if vecs == WIDEST and (too_few or threads > 2) and not is_sddmm else 1
    width = vecs * machine.lanes // tile_parts  # tokens

    if is_sddmm:
        share = 5 / 4 if p.density > 0.07 else 2
        share = share * 2 / 3 if threads > 2 else share
    elif p.density > 0.07:
        share = 2 / 3 if vecs == 4 else 3 / 4
    else:
        share = 5 / 4 if p.density > 0.03 else 2
    column_bytes = vecs * machine.lanes * real_bytes  # of x, in a whole tile
    cols = int((machine.l1_bytes or 32768) * share) // column_bytes
    if not is_sddmm:  # narrow panels deal a segment out to several sums
        cols = min(cols, int(LONGEST_SUM * {1: 4, 2: 2}.get(vecs, 1) / max(p.density, 1e-9)))
    cols = min(max(cols, 16), 65536)

    row_parts = col_parts = 1
    if is_sddmm:
        grids = [(r, threads // r) for r in range(1, threads + 1) if threads % r == 0]
        row_parts, col_parts = min(grids, key=lambda grid: n / grid[0] + k / grid[1])
    elif left := -(-p.M // width) % threads:
        row_parts = -(-threads // left)
    y_bytes = min(196608, machine.l2_bytes * 3 // 8 or 196608)
    part_rows = max(1, -(-n // row_parts))
    blocks = -(-part_rows // min(y_bytes // (width * real_bytes), 65536))
    rows = -(-part_rows // blocks)
    return Plan(threads, vecs, tile_parts, rows, cols, row_parts, col_parts)


def describe(plan: Plan, machine: Machine) -> str:
    """One phrase for sparsekern.explain."""
    threads = "1 thread" if plan.threads == 1 else f"{plan.threads} threads"
    width = plan.vecs * machine.lanes // plan.tile_parts
    blocks = f"tiles of {width} tokens, blocks of {plan.rows} x {plan.cols}"
    parts = f", W in {plan.row_parts} x {plan.col_parts} parts"
    return f"{machine.isa}, {threads}, {blocks}{parts * (plan.row_parts * plan.col_parts > 1)}"
