"""Launches of csrc/cuda/spmm_pairs_ring.cu, which reads the layout `pairs` for up to hundreds of
tokens on Hopper's tensor cores. Pure functions of sizes."""

import math
from functools import lru_cache
from typing import NamedTuple

from .layout import LANES, Gpu, Launch

PRODUCERS = 4  # warps that bring x
WARP_ROWS = 16  # of each other warp
STEP = 64  # columns
WORDS_BYTES = 6144  # of words, two for two warps
FEWEST_STAGES, MOST_STAGES = 3, 8  # of a ring
BARRIER_BYTES = 1024
MOST_TOKENS = 128  # of a tile

# Fitted to launches on an H200 (docs/log.md), to compare ways to share out the same work.
BYTES_PER_US = 76e3  # of x and W, into a multiprocessor
CYCLES_PER_US = 1000  # of products, 128 x 16 for 8 tokens
LAUNCH_US, SHARED_US = 5.0, 2.0  # with its sums; if others have a share in these
SUMS_US_PER_BYTE = 4.6e-6  # of what all have of a block of rows
ACROSS_US = 10.0  # where runs have several blocks of rows


class Way(NamedTuple):
    """How work is shared out: the warpgroups of a block, and into how many groups they split K. A
    block has 64 rows for each warpgroup of a group."""

    warpgroups: int
    groups: int


WAYS = [Way(4, 1), Way(4, 2), Way(4, 4), Way(3, 1), Way(3, 3), Way(2, 1), Way(2, 2)]


@lru_cache(maxsize=4096)
def configure(m: int, slices: int, row_steps: int, type_name: str, gpu: Gpu) -> Launch | None:
    """Kernel and sizes for as many of m tokens as it takes; None if they need more shared memory
    than there is, or if W has no columns."""
    found = [launch_as(way, m, slices, row_steps, type_name, gpu) for way in WAYS]
    able = [(us * -(-m // launch.tokens), launch) for launch, us in filter(None, found)]
    return min(able, key=lambda each: each[0])[1] if able else None


def launch_as(
    way: Way, m: int, slices: int, row_steps: int, type_name: str, gpu: Gpu
) -> tuple[Launch, float] | None:
    """That launch, and a measure of how long it takes; None if it is no way for the sizes."""
    warpgroups, groups = way
    warps, rows = warpgroups * 4, warpgroups // groups * 4 * WARP_ROWS
    tokens = -(-m // -(-m // MOST_TOKENS))  # of a tile
    tokens = -(-tokens // 32) * 32
    blocks = max(1, -(-slices * LANES // rows))
    tiles = max(1, min(-(-m // tokens), slices // blocks))  # each counts its arrivals
    stage_bytes = tokens * STEP * 2
    other_bytes = 2 * BARRIER_BYTES + warps * WORDS_BYTES  # rings are at a multiple of 1024
    stages = min(MOST_STAGES, (gpu.smem_bytes - other_bytes) // (groups * stage_bytes))
    if stages < FEWEST_STAGES or not row_steps:
        return None
    # As many runs for each block of rows, or, where there are too many blocks, equal ones.
    most_runs = max(1, gpu.multiprocessors // tiles)
    runs = blocks * min(most_runs // blocks, row_steps) or most_runs
    shares = -(-runs // blocks) + 1
    launch = Launch(
        f"sk_spmm_pairs_ring_{type_name}_t{tokens}",
        runs * tiles,
        (warps + PRODUCERS) * LANES,
        other_bytes + groups * stages * stage_bytes,
        tiles * blocks * shares * tokens * rows,
        tiles * tokens,
        shares=shares,
        ring=(groups, stages, tiles),
    )
    step_us = math.hypot(
        (groups * stage_bytes + rows * STEP) / BYTES_PER_US,
        warpgroups * 4 * tokens / 2 / CYCLES_PER_US,
    )
    us = LAUNCH_US + math.ceil(blocks * row_steps / runs / groups) * step_us
    if runs != blocks:
        us += SHARED_US + (shares - 1) * rows * min(m, tokens) * 4 * SUMS_US_PER_BYTE
    return launch, us + ACROSS_US * (runs < blocks)
