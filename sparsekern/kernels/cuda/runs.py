"""How the kernels for several tokens share out their work, as csrc/cuda/runs.cuh says.

Windows of blocks of rows are cut into runs of equal length, one for each multiprocessor. For 16
tokens, a cover of 12288 x 12288 and 132 multiprocessors: 2304 windows of 48 blocks of 256 rows, in
132 runs. Pure functions of sizes.
"""

from .layout import LANES, Launch

RUN_WARPS = 16
TILE_COLUMNS = 256  # a tile has 32 rows
FEW_TILES, MANY_TILES = 1.5, 5  # for each warp; few: one beginning and one end are most of the time


def choose_runs(blocks: int, windows: int, multiprocessors: int, busy: float) -> int:
    """How many runs of equal length. A run that has windows of two blocks of rows begins anew
    within, so none does if the part `busy` of the multiprocessors can have one."""
    for_each = min(windows, multiprocessors // max(1, blocks))
    if blocks * for_each >= busy * multiprocessors or for_each == windows:
        return max(1, blocks * for_each)
    return max(1, min(multiprocessors, blocks * windows))


def launch_runs(
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
