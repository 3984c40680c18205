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

# What launches took on an H200 (docs/log.md), to compare ways to share out the same work.
BYTES_PER_US = 37e3  # into a multiprocessor
CYCLES_PER_US = 1755
FINISH_US, SHARE_US = 1.7, 3.8  # sums of a block of rows; the same that others have a share in
TILE_US_PER_BYTE, SUMS_US_PER_BYTE = 3.3e-6, 8.4e-6  # written, and read


class Way(NamedTuple):
    """How work is shared out: a block has so many warpgroups, in groups that split K, and 64 rows
    for each warpgroup of a group. `crosses`: blocks of rows are no whole number of runs."""

    warpgroups: int
    groups: int
    crosses: bool


WAYS = [
    Way(warpgroups, groups, crosses)
    for warpgroups in (2, 3, 4)
    for groups in (1, 2, 3, 4)
    for crosses in (False, True)
    if warpgroups % groups == 0
]


@lru_cache(maxsize=4096)
def configure(m: int, slices: int, row_steps: int, type_name: str, gpu: Gpu) -> Launch | None:
    """Kernel and sizes for as many of m tokens as it takes; None if they need more shared memory
    than there is."""
    found = [launch_as(way, m, slices, row_steps, type_name, gpu) for way in WAYS]
    able = [(us * -(-m // launch.tokens), launch) for launch, us in filter(None, found)]
    return min(able, key=lambda each: each[0])[1] if able else None


def launch_as(
    way: Way, m: int, slices: int, row_steps: int, type_name: str, gpu: Gpu
) -> tuple[Launch, float] | None:
    """That launch, and about how many microseconds it takes; None if it is no way for the sizes."""
    warpgroups, groups, crosses = way
    warps, rows = warpgroups * 4, warpgroups // groups * 4 * WARP_ROWS
    tokens = -(-m // -(-m // MOST_TOKENS))
    tokens = -(-tokens // 32) * 32
    blocks = max(1, -(-slices * LANES // rows))
    tiles = max(1, min(-(-m // tokens), slices // blocks))  # of tokens; each counts its arrivals
    stage_bytes = tokens * STEP * 2
    other_bytes = 2 * BARRIER_BYTES + warps * WORDS_BYTES  # rings are at a multiple of 1024
    stages = min(MOST_STAGES, (gpu.smem_bytes - other_bytes) // (groups * stage_bytes))
    most_runs = max(1, gpu.multiprocessors // tiles)
    each = most_runs // blocks if row_steps else 1
    runs = min(most_runs, blocks * row_steps) if crosses else blocks * min(each, row_steps)
    if stages < FEWEST_STAGES or (crosses and runs % blocks == 0) or not runs:
        return None
    units = blocks * row_steps
    shares = -(-row_steps * runs // units) + 1
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
    tile_bytes = rows * min(m, tokens) * 4
    sums_us = FINISH_US + groups * tile_bytes * TILE_US_PER_BYTE
    parts = 1.0  # blocks of rows of a run
    if crosses:
        parts += blocks / runs
        sums_us += SHARE_US + tile_bytes * (TILE_US_PER_BYTE + shares * SUMS_US_PER_BYTE)
    elif runs > blocks:
        sums_us += SHARE_US + tile_bytes * (TILE_US_PER_BYTE + SUMS_US_PER_BYTE)
    step_us = math.hypot(
        (groups * stage_bytes + rows * STEP) / BYTES_PER_US,
        warpgroups * 4 * tokens / 2 / CYCLES_PER_US,
    )
    steps = units / runs / groups if crosses else math.ceil(units / runs / groups)
    return launch, parts * sums_us + steps * step_us
