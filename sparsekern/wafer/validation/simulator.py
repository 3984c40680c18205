"""An event-level mesh: when every wavelet arrives, every AXPY ends and every partial sum leaves.

y[M, N] = x[M, K] @ W[N, K].T on rows x cols PEs. K is cut over the columns of PEs, M over the rows.
Column c receives its nonzeros of W at the top, output by output, one wavelet a cycle; each PE
passes them down and works on them in order. When a PE has all its nonzeros of output n, its partial
sum joins the chain that runs along the row from column 0 to the last. Rules:

    arrival  one wavelet a cycle and link, one hop a cycle down; a PE queues a few wavelets, and a
             full PE stops its column
    AXPY     `axpy_cycles` of the PE's datapath for a nonzero
    window   a PE starts no nonzero of output n before its partial sum of n - window has left
    chain    output n leaves column c when the sum from c - 1 has come, its own is complete, the
             link has sent n - 1, and column c + 1 has completed its own n to add to
    add      takes `add_cycles` of the datapath from the PE that adds

The order of events on each link and PE is fixed, so no event queue is needed: every time is a
maximum over earlier times plus a constant.
"""

import numpy as np

from ..balance import Mask
from ..mesh import Mesh

QUEUE_WAVELETS = 8  # of one PE


def simulate_cycles(mesh: Mesh, mask: Mask) -> float:
    """Cycles from the first wavelet's start to the last output's end."""
    k_per_col = -(-mask.shape[1] // mesh.cols)
    counts = mask.counts(mesh.cols, k_per_col)  # [N, cols]
    rows, cols = mesh.rows, mesh.cols
    down = mesh.hop_cycles * np.arange(rows)[:, None]
    along = mesh.chain_cycles * np.arange(cols)

    free = np.zeros((rows, cols))  # when the datapath is
    arrived = down - 1.0 + np.zeros(cols)  # when the last wavelet came to each PE
    starts = np.zeros((QUEUE_WAVELETS, rows, cols))  # of the last AXPYs, a ring for each column
    taken = np.zeros(cols, dtype=int)  # wavelets so far
    left = np.zeros((mesh.window, rows, cols))  # when partial sums left, a ring over outputs
    for n, needed in enumerate(counts):
        may_start = left[n % mesh.window]
        for i in range(needed.max(initial=0)):
            active = np.flatnonzero(needed > i)
            slot = taken[active] % QUEUE_WAVELETS
            # Below, a router holds one wavelet: the one above it moves when it has moved on.
            room = np.maximum(starts[slot, :, active].T, arrived[:, active] + 1)
            room[:-1] = np.maximum(room[:-1], arrived[1:, active])
            came = np.maximum.accumulate(room - down, axis=0) + down
            start = np.maximum.reduce([came, free[:, active], may_start[:, active]])
            arrived[:, active] = came
            starts[slot, :, active] = start.T
            free[:, active] = start + mesh.axpy_cycles
            taken[active] += 1
        ready = np.maximum(free, may_start)  # own partial sum complete
        leave = np.maximum(ready, left[(n - 1) % mesh.window] + mesh.send_cycles if n else 0)
        leave[:, :-1] = np.maximum(leave[:, :-1], ready[:, 1:] - mesh.chain_cycles)
        leave = np.maximum.accumulate(leave - along, axis=1) + along
        left[n % mesh.window] = leave
        free[:, 1:] += mesh.add_cycles
    return float(leave.max() + mesh.send_cycles)


def simulate_chain_cycles(pes: int, wavelets: int, chain_cycles: float) -> float:
    """A Reduce of one vector over a row of PEs that have nothing else to do."""
    mesh = Mesh(1, pes, 1, 1, wavelets, 1, chain_cycles=chain_cycles)
    return simulate_cycles(mesh, Mask.from_dense(np.zeros((1, pes), dtype=bool)))
