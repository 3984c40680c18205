"""How the C++ kernels cut a product on a CPU, and from which density on torch.mm is the faster one.

Pure functions of the problem, the machine and the number of threads. The constants were found by
measurement on machines with AVX-512, with and without AMX, and with AVX2 (docs/LOG.md).
"""

from functools import lru_cache
from typing import NamedTuple

import torch

from .problem import Problem

SMALL_WORK = 2**18  # multiply-adds below which a second thread costs more than it gives
WIDEST = 8  # vectors in a panel's row: their accumulators fill a register file of 16


class Machine(NamedTuple):
    """What a plan depends on."""

    isa: str
    lanes: int  # floats in a vector
    l1_bytes: int  # of one core; 0: unknown
    l2_bytes: int
    has_bf16_tiles: bool  # AMX: torch.mm multiplies bfloat16 at eight times the rate of float32


class Plan(NamedTuple):
    """The tokens are cut into tiles of vecs x lanes, W (for spmm_t W^T) into blocks."""

    threads: int
    vecs: int
    rows: int
    cols: int


def dense_wins_above(p: Problem, machine: Machine) -> float:
    """The density above which writing W out and calling torch.mm is faster than any sparse kernel.

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
    - Threads take whole tiles, each its own panel; so there are tiles for all, if the tokens allow.
    - A column block of x fits L1, or a little more where few of its rows are read.
    - A row block's y panel stays in L2. Where threads share the rows of a tile, there is a block
      for each; SDDMM, which always shares, has two of at least 128 rows.
    """
    n, k = (p.K, p.N) if p.op == "spmm_t" else (p.N, p.K)
    is_sddmm = p.op == "sddmm"
    threads = threads if p.M * p.nnz >= SMALL_WORK else 1

    vecs = WIDEST if machine.lanes < 16 or is_sddmm or p.density > 0.18 else 4
    while vecs > 1 and p.M <= vecs * machine.lanes * 3 // 4:
        vecs //= 2
    while vecs > 4 and not is_sddmm and p.M <= vecs * machine.lanes * (threads - 1):
        vecs //= 2
    row_bytes = vecs * machine.lanes * 4

    quarters = 3 if p.density > 0.15 else 5 if p.density > 0.04 else 8
    x_bytes = (machine.l1_bytes or 32768) * quarters // 4
    cols = min(max(x_bytes // row_bytes, 16), 65536)

    y_bytes = min(196608, machine.l2_bytes * 3 // 8 or 196608)
    blocks = -(-n // min(y_bytes // row_bytes, 65536))
    tiles = -(-p.M // (vecs * machine.lanes))
    if is_sddmm and threads > 1:
        blocks = max(blocks, min(2 * threads, n // 128))
    elif tiles % threads:
        blocks = max(blocks, threads)
    rows = max(1, -(-n // max(1, blocks)))
    return Plan(threads, vecs, rows, cols)


def describe(plan: Plan, machine: Machine) -> str:
    """One phrase for sparsekern.explain."""
    threads = "1 thread" if plan.threads == 1 else f"{plan.threads} threads"
    return (
        f"{machine.isa}, {threads}, tiles of {plan.vecs * machine.lanes} tokens, "
        f"blocks of {plan.rows} x {plan.cols}"
    )
