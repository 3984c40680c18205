"""Launches of csrc/cuda/spmm_pairs_ring.cu, which reads the layout `pairs` for up to hundreds of
tokens on Hopper's tensor cores. Pure functions of sizes."""

from functools import lru_cache

from .layout import LANES, Gpu, Launch
from .runs import choose_runs

WARPS = 16  # that multiply, with 16 rows each
PRODUCERS = 4  # and those that bring x
STEP_BYTES = 64 * 2  # of x, a token
WORDS_BYTES = 6144  # of words, two for two warps
MOST_STAGES = 8
BARRIER_BYTES = 1024
RING_BYTES = 2**17  # the most of all rings together


@lru_cache(maxsize=4096)
def configure(
    m: int, slices: int, row_steps: int, type_name: str, gpu: Gpu, groups: int = 1
) -> Launch | None:
    """Kernel and sizes for as many of m tokens as it takes; None if they need more shared memory
    than there is. `groups`: into how many parts of K a block's warps are split; their rows and
    the rings of x are so many times smaller."""
    tokens = min(128, max(32, 1 << (m - 1).bit_length()))
    rows = WARPS // groups * LANES // 2
    blocks = -(-slices * LANES // rows)
    tiles = max(1, min(-(-m // tokens), slices // max(1, blocks)))
    stages = min(MOST_STAGES, RING_BYTES // (groups * tokens * STEP_BYTES))
    smem_bytes = 1024 + BARRIER_BYTES + groups * stages * tokens * STEP_BYTES + WARPS * WORDS_BYTES
    if smem_bytes > gpu.smem_bytes:
        return None
    runs = choose_runs(blocks, row_steps, max(1, gpu.multiprocessors // tiles), 0.8)
    units = blocks * row_steps
    shares = -(-row_steps * runs // units) + 1 if units else 1
    name = f"sk_spmm_pairs_ring_{type_name}_t{tokens}"
    partial = tiles * blocks * shares * tokens * rows
    block = (WARPS + PRODUCERS) * LANES
    sizes = groups, stages, tiles
    return Launch(
        name, runs * tiles, block, smem_bytes, partial, tiles * tokens, 0, shares, sizes
    )
