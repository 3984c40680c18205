"""Launches of csrc/cuda/spmm_pairs_ring.cu, which reads the layout `pairs` for up to hundreds of
tokens on Hopper's tensor cores. Pure functions of sizes."""

import math
from functools import lru_cache

from .layout import LANES, Gpu, Launch
from .runs import choose_runs

WARPS = 16  # that multiply
PRODUCERS = 4  # warps that bring x
WARP_ROWS = 16
STEP = 64  # columns
WORDS_BYTES = 6144  # of words, two for two warps
MOST_STAGES = 8  # of a ring
BARRIER_BYTES = 1024
RING_BYTES = 2**17  # the most of all rings together
FEWEST_TOKENS, MOST_TOKENS = 32, 128  # of a tile
BUSY = 0.8

# What launches took on an H200 (docs/log.md), to compare ways to share out the same work.
BYTES_PER_US = 37e3  # into a multiprocessor
CYCLES_PER_US = 1755
FINISH_US, SHARE_US = 1.7, 3.1  # sums of a block of rows; the same that others have a share in
TILE_US_PER_BYTE, SUMS_US_PER_BYTE = 3.3e-6, 8.4e-6  # written, and read by the last one


@lru_cache(maxsize=4096)
def configure(m: int, slices: int, row_steps: int, type_name: str, gpu: Gpu) -> Launch | None:
    """Kernel and sizes for as many of m tokens as it takes; None if they need more shared memory
    than there is."""
    ways = [_launch(m, slices, row_steps, type_name, gpu, groups) for groups in (1, 2, 4)]
    if max(launch.smem_bytes for launch, _ in ways) > gpu.smem_bytes:
        return None
    return min(ways, key=lambda way: way[1] * -(-m // way[0].tokens))[0]


def _launch(
    m: int, slices: int, row_steps: int, type_name: str, gpu: Gpu, groups: int
) -> tuple[Launch, float]:
    """A launch whose blocks split K among so many groups of warps, and about how many us it takes.
    Rows of a block and rings of x are so many times smaller."""
    tokens = min(MOST_TOKENS, max(FEWEST_TOKENS, 1 << (m - 1).bit_length()))
    rows = WARPS // groups * WARP_ROWS
    blocks = max(1, -(-slices * LANES // rows))
    tiles = max(1, min(-(-m // tokens), slices // blocks))  # of tokens; each counts its arrivals
    stage_bytes = tokens * STEP * 2
    stages = min(MOST_STAGES, RING_BYTES // (groups * stage_bytes))
    ring_bytes = groups * stages * stage_bytes
    smem_bytes = 2 * BARRIER_BYTES + ring_bytes + WARPS * WORDS_BYTES  # rings at a multiple of 1024
    runs = choose_runs(blocks, row_steps, max(1, gpu.multiprocessors // tiles), BUSY)
    units = blocks * row_steps
    shares = -(-row_steps * runs // units) + 1 if units else 1
    launch = Launch(
        f"sk_spmm_pairs_ring_{type_name}_t{tokens}",
        runs * tiles,
        (WARPS + PRODUCERS) * LANES,
        smem_bytes,
        tiles * blocks * shares * tokens * rows,
        tiles * tokens,
        shares=shares,
        ring=(groups, stages, tiles),
    )
    parts = 1 if runs % blocks == 0 else 1 + blocks / runs  # blocks of rows of a run
    tile_bytes = rows * min(m, tokens) * 4
    sums_us = FINISH_US + groups * tile_bytes * TILE_US_PER_BYTE
    if runs > blocks or runs % blocks:
        sums_us += SHARE_US + tile_bytes * (TILE_US_PER_BYTE + shares * SUMS_US_PER_BYTE)
    step_us = math.hypot(
        (groups * stage_bytes + rows * STEP) / BYTES_PER_US,
        WARPS // 4 * 4 * tokens / 2 / CYCLES_PER_US,
    )
    return launch, parts * sums_us + units / runs / groups * step_us
