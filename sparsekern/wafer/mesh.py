"""The closed form: cycles of one product on a mesh of PEs (docs/math.md, "The wafer").

y[M, N] = x[M, K] @ W[N, K].T, K cut over the columns of PEs and M over the rows. W streams down the
columns; each nonzero starts one AXPY over the tokens of a PE; sums of the N outputs are reduced
along the rows.
"""

from dataclasses import dataclass

import numpy as np

from .balance import Mask, windowed_imbalance

BLOCKS_IN_WINDOW = 8  # of outputs of an actual mask that are followed together


@dataclass(frozen=True)
class Mesh:
    rows: int
    cols: int
    axpy_cycles: float  # of a PE, for one nonzero
    add_cycles: float  # of a PE, for one output: its neighbour's sum
    send_cycles: float  # of one output's sums over one link
    window: int  # outputs a PE may be ahead of what it has sent
    hop_cycles: float = 1
    chain_cycles: float = 6  # from the head of a sum at one PE to its head at the next


@dataclass(frozen=True)
class MeshCycles:
    compute: float  # AXPYs of the mean column, and additions of partial sums
    waiting: float  # for the fullest column; with an actual mask, for any column or link
    arrival: float  # weights (or their gradients) over the columns' links
    reduction: float  # partial sums (or output gradients) over the rows' links
    latency: float  # exposed: the way down, the first output, the chain along a row
    imbalance: float  # of the fullest column over the mean one, >= 1
    fullest: float  # AXPYs of the fullest column, and additions

    @property
    def overlapped(self) -> float:
        return max(self.compute + self.waiting, self.arrival, self.reduction)

    @property
    def total(self) -> float:
        return self.overlapped + self.latency

    @property
    def bound(self) -> str:
        """The longest of what no overlap hides."""
        terms = {"reduction": self.reduction, "arrival": self.arrival, "compute": self.fullest}
        return max(terms, key=terms.__getitem__)


def mesh_cycles(mesh: Mesh, n: int, k_per_col: int, density: float | Mask) -> MeshCycles:
    """`density` of uniformly random places, or the actual mask of W."""
    if isinstance(density, Mask):
        nnz_per_col = density.nnz / mesh.cols
        imbalance = _fullest_column(mesh, density, k_per_col) / (nnz_per_col or 1) or 1.0
    else:
        nnz_per_col = n * k_per_col * density
        imbalance = windowed_imbalance(mesh.cols, k_per_col, density, n, mesh.window)
    axpys = nnz_per_col * mesh.axpy_cycles
    compute = axpys + (n * mesh.add_cycles if mesh.cols > 1 else 0)  # one column adds nothing
    waiting = axpys * (imbalance - 1)
    latency = (
        (mesh.rows - 1) * mesh.hop_cycles
        + (mesh.cols - 1) * mesh.chain_cycles
        + axpys / n
        + mesh.send_cycles
    )
    fullest = compute + waiting
    if isinstance(density, Mask):
        waiting = max(waiting, masked_cycles(mesh, density, k_per_col) - latency - compute)
    return MeshCycles(
        compute=compute,
        waiting=waiting,
        arrival=nnz_per_col * imbalance,
        reduction=n * mesh.send_cycles,
        latency=latency,
        imbalance=imbalance,
        fullest=fullest,
    )


def _fullest_column(mesh: Mesh, mask: Mask, k_per_col: int) -> int:
    return int(mask.counts(mesh.cols, k_per_col, mask.shape[0]).max())


def masked_cycles(mesh: Mesh, mask: Mask, k_per_col: int) -> float:
    """Cycles until the last output has left, every block of outputs followed from column to column.

    A column starts a block when its sums of a window before have left, and works off its nonzeros.
    A block leaves when the column before has sent it, it is complete here and at the neighbour that
    adds to it, and the link has sent the block before. All rows of PEs do the same, a hop later."""
    together = max(1, mesh.window // BLOCKS_IN_WINDOW)
    # A nonzero takes its AXPY, or the cycle in which it arrives.
    work = max(mesh.axpy_cycles, 1.0) * mask.counts(mesh.cols, k_per_col, together)  # [b, cols]
    outputs = np.full(len(work), together)
    outputs[-1] = mask.shape[0] - together * (len(work) - 1)
    along = mesh.chain_cycles * np.arange(mesh.cols)
    left = np.zeros((mesh.window // together, mesh.cols))  # when blocks left: a ring
    free = np.zeros(mesh.cols)
    leave = np.full(mesh.cols, -mesh.send_cycles, dtype=float)
    for block, (busy, count) in enumerate(zip(work, outputs, strict=True)):
        slot = block % len(left)
        ready = np.maximum(free, left[slot]) + busy
        leave = np.maximum(ready, leave + count * mesh.send_cycles)
        leave[:-1] = np.maximum(leave[:-1], ready[1:] - mesh.chain_cycles)
        leave = np.maximum.accumulate(leave - along) + along
        left[slot] = leave
        ready[1:] += count * mesh.add_cycles
        free = ready
    return float(leave.max()) + mesh.send_cycles + (mesh.rows - 1) * mesh.hop_cycles
