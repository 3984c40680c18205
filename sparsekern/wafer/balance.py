"""Load imbalance: the fullest of many parts over their mean, from a distribution; and masks.

A part holds `trials` places of W, each kept with probability `density`. With P parts the expected
maximum of P normals is z(P) standard deviations, and

    imbalance = 1 + z(P) sqrt((1 - d) / (d trials)),   never above 1 / d: no part is more than full
"""

import math
from dataclasses import dataclass
from functools import lru_cache
from operator import index
from statistics import NormalDist

import numpy as np

EULER_GAMMA = 0.5772156649015329
# In windows of outputs: how far columns of PEs drift apart before the slowest holds back the
# others, and over how many they keep step at least. Fitted on the simulator: docs/math.md.
WINDOW_DRIFT = 5.0
WINDOWS_IN_STEP = 8


@lru_cache
def expected_normal_maximum(parts: int) -> float:
    """Expected maximum of `parts` independent standard normals (Gumbel's limit); 0 for one part."""
    if parts < 2:
        return 0.0
    quantile = NormalDist().inv_cdf
    first = quantile(1 - 1 / parts)
    return max(0.0, first + EULER_GAMMA * (quantile(1 - 1 / (parts * math.e)) - first))


def binomial_imbalance(parts: int, trials: float, density: float) -> float:
    if not 0 < density <= 1:
        raise ValueError(f"density: expected 0 < density <= 1, got {density}")
    spread = math.sqrt((1 - density) / (density * trials))
    return min(1 + expected_normal_maximum(parts) * spread, 1 / density)


def outputs_in_step(
    parts: int, k_per_part: float, density: float, outputs: int, window: int
) -> float:
    """Over how many outputs the parts must keep step, when none may be `window` outputs ahead.

    Over L outputs the fullest part falls z sqrt(L k d (1-d)) nonzeros behind the mean; windows
    allow WINDOW_DRIFT window k d: as much at L = (WINDOW_DRIFT window)^2 k d / (z^2 (1-d))."""
    z = expected_normal_maximum(parts)
    if density == 1 or z == 0:
        return outputs
    drifted = (WINDOW_DRIFT * window) ** 2 * k_per_part * density / (z * z * (1 - density))
    return min(outputs, max(WINDOWS_IN_STEP * window, drifted))


def windowed_imbalance(
    parts: int, k_per_part: float, density: float, outputs: int, window: int
) -> float:
    """Imbalance of columns of PEs that each own `k_per_part` inputs, over steps of outputs."""
    if window < 1:
        raise ValueError(f"window: expected at least 1 output, got {window}")
    in_step = outputs_in_step(parts, k_per_part, density, outputs, window)
    return binomial_imbalance(parts, in_step * k_per_part, density)


@dataclass(frozen=True)
class Mask:
    """A pattern of W [N, K] in CSR: arrays of NumPy, or what NumPy reads, as a tensor on a CPU.

    `Mask(W.shape, W.row_offsets, W.col_indices)` is that of a SparseTensor. ValueError for parts
    that do not fit each other."""

    shape: tuple[int, int]
    row_offsets: np.ndarray  # [N + 1]
    col_indices: np.ndarray  # [nnz]

    def __post_init__(self) -> None:
        try:
            shape = tuple(map(index, self.shape))
        except (TypeError, ValueError):
            shape = ()
        if len(shape) != 2 or min(shape) < 1:
            raise ValueError(f"shape: expected (N, K), both at least 1, got {self.shape!r:.60}")
        object.__setattr__(self, "shape", shape)
        for name in ("row_offsets", "col_indices"):
            value = np.asarray(getattr(self, name))
            if value.ndim != 1 or (value.size and value.dtype.kind not in "iu"):
                raise ValueError(
                    f"{name}: expected whole numbers in one row, got {value.dtype} "
                    f"{list(value.shape)}"
                )
            object.__setattr__(self, name, value.astype(np.int64))
        (n, k), nnz = shape, self.col_indices.size
        offsets, columns = self.row_offsets, self.col_indices
        is_whole = offsets.size == n + 1 and (offsets[0], offsets[-1]) == (0, nnz)
        if not is_whole or (np.diff(offsets) < 0).any():
            raise ValueError(
                f"row_offsets: expected {n + 1} numbers that rise from 0 to the {nnz} col_indices, "
                f"got {offsets!r:.60}"
            )
        if nnz and not 0 <= columns.min() <= columns.max() < k:
            raise ValueError(
                f"col_indices: expected 0 to {k - 1}, got {columns.min()} to {columns.max()}"
            )
        places = np.repeat(np.arange(n), np.diff(offsets)) * k + columns
        is_sorted = (np.diff(places) > 0).all()
        if not is_sorted and np.unique(places).size < nnz:
            raise ValueError("col_indices: expected each column once in a row, got one twice")

    @classmethod
    def from_dense(cls, kept: np.ndarray) -> "Mask":
        """From bool [N, K], True where a weight is kept; a tensor on a CPU will do."""
        kept = np.asarray(kept)
        if kept.ndim != 2 or kept.dtype != bool:
            raise ValueError(
                f"kept: expected bool [N, K], True where a weight is kept, got {kept.dtype} "
                f"{list(kept.shape)}"
            )
        row_offsets = np.concatenate([[0], np.count_nonzero(kept, axis=1).cumsum()])
        return cls(kept.shape, row_offsets, np.nonzero(kept)[1])

    @property
    def nnz(self) -> int:
        return int(self.row_offsets[-1])

    @property
    def density(self) -> float:
        return self.nnz / (self.shape[0] * self.shape[1])

    def transposed(self) -> "Mask":
        n, k = self.shape
        rows = np.repeat(np.arange(n), np.diff(self.row_offsets))
        places = np.sort(self.col_indices * n + rows)
        row_offsets = np.concatenate([[0], np.bincount(self.col_indices, minlength=k).cumsum()])
        return Mask((k, n), row_offsets, places % n)

    def counts(self, parts: int, k_per_part: int, outputs: int = 1) -> np.ndarray:
        """Nonzeros [N / outputs, parts] of so many rows together in each part of `k_per_part`
        columns."""
        n = self.shape[0]
        blocks = -(-n // outputs)
        rows = np.repeat(np.arange(n) // outputs, np.diff(self.row_offsets))
        places = rows * parts + self.col_indices // k_per_part
        return np.bincount(places, minlength=blocks * parts).reshape(blocks, parts)
