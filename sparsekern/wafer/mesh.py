"""The closed form: cycles of one product on a mesh of PEs (docs/math.md, "The wafer").

y[M, N] = x[M, K] @ W[N, K].T, K cut over the columns of PEs and M over the rows. W streams down the
columns; each nonzero starts one AXPY over the tokens of a PE; sums of the N outputs are reduced
along the rows.
"""

from dataclasses import dataclass

from .balance import Mask, windowed_imbalance


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
    waiting: float  # what the fullest column has more than the mean one
    arrival: float  # weights (or their gradients) over the columns' links
    reduction: float  # partial sums (or output gradients) over the rows' links
    latency: float  # exposed: the way down, the first output, the chain along a row
    imbalance: float  # of the fullest column over the mean one, >= 1

    @property
    def overlapped(self) -> float:
        return max(self.compute + self.waiting, self.arrival, self.reduction)

    @property
    def total(self) -> float:
        return self.overlapped + self.latency

    @property
    def bound(self) -> str:
        if self.overlapped == self.reduction:
            return "reduction"
        return "arrival" if self.overlapped == self.arrival else "compute"


def mesh_cycles(mesh: Mesh, n: int, k_per_col: int, density: float | Mask) -> MeshCycles:
    """`density` of uniformly random places, or the actual mask of W."""
    if isinstance(density, Mask):
        nnz_per_col = density.nnz / mesh.cols
        imbalance = density.imbalance(mesh.cols, k_per_col, mesh.window)
    else:
        nnz_per_col = n * k_per_col * density
        imbalance = windowed_imbalance(mesh.cols, k_per_col, density, n, mesh.window)
    axpys = nnz_per_col * mesh.axpy_cycles
    return MeshCycles(
        compute=axpys + n * mesh.add_cycles,
        waiting=axpys * (imbalance - 1),
        arrival=nnz_per_col * imbalance,
        reduction=n * mesh.send_cycles,
        latency=(mesh.rows - 1) * mesh.hop_cycles
        + (mesh.cols - 1) * mesh.chain_cycles
        + axpys / n
        + mesh.send_cycles,
        imbalance=imbalance,
    )
