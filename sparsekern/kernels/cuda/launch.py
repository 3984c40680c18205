"""How the kernels for few tokens are launched: pure functions of a problem's sizes and the GPU's.

spmm_gather.cu takes pieces of delta streams, as many blocks as have pieces. spmm_cover.cu and
spmm_pairs.cu share out the work as runs.cuh says: windows of blocks of rows are cut into runs of
equal length, one for each multiprocessor. 12288 x 12288, 16 tokens of a cover, 132 multiprocessors:
2304 windows of 48 blocks of 256 rows, in 132 runs.
"""

from functools import lru_cache
from typing import NamedTuple

from . import cover, pairs
from .gather import BLOCK_PIECES, GRANULE, MOST_BLOCKS
from .layout import LANES

GATHER_TOKENS, GATHER_DEPTH = 8, 4  # as in spmm_gather.cu; the tokens of one launch
RUN_WARPS = 16  # as in runs.cuh
FEW_TILES, MANY_TILES = 1.5, 5  # for each warp; few: one beginning and one end are most of the time
COVER_TOKENS, COVER_DEPTH = 32, 7  # as in spmm_cover.cu
PAIRS_WORDS_BYTES, PAIRS_WINDOW = 2 * (4352 + 8), 64  # as in spmm_pairs.cu; tokens times steps


class Launch(NamedTuple):
    """How a kernel is launched for one problem."""

    kernel: str
    grid: int
    block: int
    smem_bytes: int
    partial: int  # float32 elements of workspace
    tokens: int  # the most of the kernel
    group_warps: int = 0  # of runs: warps that share x
    shares: int = 0  # of runs: most that share rows


class Gpu(NamedTuple):
    """The properties of a GPU that a launch is fitted to."""

    multiprocessors: int
    smem_bytes: int  # the most of a block


@lru_cache(maxsize=4096)
def configure_gather(
    m: int, k: int, pieces: int, bits: int, type_name: str, gpu: Gpu
) -> Launch | None:
    """Kernel and sizes for as many of m tokens as it takes, 8 at most; None if x of one token does
    not fit in shared memory."""
    tokens = min(GATHER_TOKENS, 1 << (m - 1).bit_length())
    ring = ring_bytes(bits)
    while tokens and ring + gather_x(k, tokens) > gpu.smem_bytes:
        tokens //= 2
    if not tokens:
        return None
    grid = -(-pieces // BLOCK_PIECES)
    smem_bytes = max(ring + gather_x(k, tokens), BLOCK_PIECES * tokens * LANES * 4)
    # No more blocks on a multiprocessor than there are when all share the work: a launch that
    # starts early would fill those that are free first.
    each = max(1, min(MOST_BLOCKS, -(-grid // gpu.multiprocessors)))
    smem_bytes = max(smem_bytes, (gpu.smem_bytes + 1024) // (each + 1) - 1023)
    name = f"sk_spmm_gather_{type_name}_d{bits}_t{tokens}"
    return Launch(name, grid, BLOCK_PIECES * LANES, smem_bytes, 2 * grid * tokens * LANES, tokens)


def ring_bytes(bits: int) -> int:
    """Bytes of the granules of a block that are on their way."""
    return BLOCK_PIECES * GATHER_DEPTH * LANES * (2 * GRANULE + bits)


def gather_x(k: int, tokens: int) -> int:
    """Bytes of x in shared memory."""
    return -(-k // 4) * 8 * tokens


@lru_cache(maxsize=4096)
def configure_cover(m: int, slices: int, windows: int, type_name: str, gpu: Gpu) -> Launch:
    """Kernel and sizes for as many of m tokens of a cover as it takes, 32 at most."""
    tokens = min(COVER_TOKENS, max(8, 1 << (m - 1).bit_length()))
    tiles_per_warp = slices * windows / (RUN_WARPS * gpu.multiprocessors)
    group_warps = choose_group_warps(tokens, tiles_per_warp)
    while group_warps < RUN_WARPS and cover_smem(tokens, group_warps) > gpu.smem_bytes:
        group_warps *= 2
    busy = 0.7 if tiles_per_warp <= FEW_TILES else 0.8 if tokens <= 16 else 0.9
    runs = choose_runs(-(-slices // group_warps), windows, gpu.multiprocessors, busy)
    name, smem_bytes = f"sk_spmm_cover_{type_name}_t{tokens}", cover_smem(tokens, group_warps)
    return _launch_runs(name, tokens, slices, windows, group_warps, runs, smem_bytes)


def choose_group_warps(tokens: int, tiles_per_warp: float) -> int:
    """How many of a block's 16 warps share x of a window, and a block's rows / 32: 16, 8 or 4.

    Many read x less often; few leave fewer sums to add up. docs/log.md has the measurements.
    """
    if tiles_per_warp <= FEW_TILES:
        return 4
    return 8 if tokens <= 16 or tiles_per_warp <= MANY_TILES else 16


def choose_runs(blocks: int, windows: int, multiprocessors: int, busy: float) -> int:
    """How many runs of equal length. A run that has windows of two blocks of rows begins anew
    within, so none does if the part `busy` of the multiprocessors can have one."""
    for_each = min(windows, multiprocessors // max(1, blocks))
    if blocks * for_each >= busy * multiprocessors or for_each == windows:
        return max(1, blocks * for_each)
    return max(1, min(multiprocessors, blocks * windows))


@lru_cache(maxsize=4096)
def configure_pairs(m: int, slices: int, row_steps: int, type_name: str, gpu: Gpu) -> Launch:
    """Kernel and sizes for up to 64 tokens of pairs. Groups of 4 warps are the fastest for W of up
    to 5 tiles a warp, where no run has two blocks of rows."""
    tokens = max(16, 1 << (m - 1).bit_length())
    windows = -(-row_steps // (PAIRS_WINDOW // tokens))
    tiles = slices * row_steps * pairs.STEP / cover.WINDOW
    is_large = tiles > MANY_TILES * RUN_WARPS * gpu.multiprocessors
    busy = 0.8 if is_large else 0.7
    for group_warps in (8,) if is_large else (4, 8):
        blocks = -(-slices // group_warps)
        runs = choose_runs(blocks, windows, gpu.multiprocessors, busy)
        if runs % max(1, blocks) == 0:
            break
    while group_warps < RUN_WARPS and pairs_smem(group_warps) > gpu.smem_bytes:
        group_warps *= 2
        runs = choose_runs(-(-slices // group_warps), windows, gpu.multiprocessors, busy)
    name, smem_bytes = f"sk_spmm_pairs_{type_name}_t{tokens}", pairs_smem(group_warps)
    return _launch_runs(name, tokens, slices, windows, group_warps, runs, smem_bytes)


def _launch_runs(
    name: str,
    tokens: int,
    slices: int,
    windows: int,
    group_warps: int,
    runs: int,
    smem_bytes: int,
) -> Launch:
    """Launch of a kernel whose work runs.cuh splits into runs."""
    groups, blocks = RUN_WARPS // group_warps, -(-slices // group_warps)
    units = blocks * windows
    shares = -(-windows * runs // units) + 1 if units else 1
    partial = blocks * shares * tokens * group_warps * LANES
    smem_bytes = max(smem_bytes, groups * tokens * (group_warps * LANES + 4) * 4)  # or its sums
    return Launch(name, runs, RUN_WARPS * LANES, smem_bytes, partial, tokens, group_warps, shares)


def cover_smem(tokens: int, group_warps: int) -> int:
    """Bytes of shared memory: two windows of x of each group and the records of each warp."""
    x_bytes = RUN_WARPS // group_warps * 2 * tokens * cover.WINDOW * 2
    return x_bytes + RUN_WARPS * COVER_DEPTH * cover.RECORD_BYTES


def pairs_smem(group_warps: int) -> int:
    """Bytes of shared memory: two windows of x of each group, at a multiple of 1024, and the words
    of each warp."""
    x_bytes = RUN_WARPS // group_warps * 2 * PAIRS_WINDOW * pairs.STEP * 2
    return 1024 + x_bytes + RUN_WARPS * PAIRS_WORDS_BYTES
