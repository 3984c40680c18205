"""Cycles of one PE in SpMM kernels written in CSL, fitted to a public data set, and its errors.

The data: pr0f3ss/SpMM_Cerebras, commit d886fbe, benchmarks/{CSC,COO,CSR,GEMM}_benchmark.csv; fp32,
WSE-2, by the SDK's flow (simulator or hardware: not stated). A sparse [N, K] times B dense [K, M]
on width x height PEs. It has no licence, so it is not part of this project: give its folder.

    CSC  nnz (a + b M) + c K / width      the outer loop runs over the tile's columns
    CSR  nnz (a + b M) + c N / height     ... over its rows
    COO  nnz imbalance (a + b M)          every PE is padded to the fullest one
    GEMM c (N / height) (K / width) M

nnz = N K density / (width height), of one PE. Rows of the 768 and of the 1024 family of sizes are
never on both sides of a split; nor is a tile that occurs in both families.
"""

import csv
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from ..balance import binomial_imbalance

FORMATS = ("CSC", "CSR", "COO", "GEMM")
COLUMNS = ("width", "height", "N", "K", "M", "density", "avg_cycles", "max_cycles")
FAMILIES = (768, 1024)


@dataclass(frozen=True)
class Fit:
    """Coefficients of all rows: cycles a nonzero, an element, a turn of the outer loop; errors
    (mean, worst) of coefficients that were fitted on one family and met the other."""

    coefficients: tuple[float, ...]
    fit_error: tuple[float, float]
    held_out: dict[int, tuple[float, float]]  # by the family that was tested


@dataclass(frozen=True)
class Summary:
    """Summary of a data set: no row of it is kept."""

    fit: Fit
    imbalance_error: tuple[float, float] | None  # of the formula, nothing fitted


def load(path: Path, kind: str) -> list[dict[str, float]]:
    file = path / f"{kind}_benchmark.csv"
    if not file.is_file():
        raise FileNotFoundError(f"data: {file} does not exist")
    with open(file, newline="") as lines:
        rows = list(csv.DictReader(lines))
    missing = [name for name in COLUMNS if not rows or name not in rows[0]]
    if missing:
        raise ValueError(f"data: {file} has no column {', '.join(missing)}")
    return [{name: float(row[name]) for name in COLUMNS} for row in rows]


def features(row: dict[str, float], kind: str) -> list[float]:
    n, k = row["N"] / row["height"], row["K"] / row["width"]
    density = row["density"] / 100
    nnz, m = n * k * density, row["M"]
    if kind == "GEMM":
        return [n * k * m]
    if kind == "COO":
        nnz *= predicted_imbalance(row)
        return [nnz, nnz * m]
    return [nnz, nnz * m, k if kind == "CSC" else n]


def predicted_imbalance(row: dict[str, float]) -> float:
    pes = int(row["width"] * row["height"])
    return binomial_imbalance(pes, row["N"] * row["K"] / pes, row["density"] / 100)


def tile(row: dict[str, float]) -> tuple[float, ...]:
    return row["N"] / row["height"], row["K"] / row["width"], row["M"], row["density"]


def family(row: dict[str, float]) -> int:
    return 768 if row["K"] % 768 == 0 else 1024


def least_squares(rows: list[dict[str, float]], kind: str) -> np.ndarray:
    """Coefficients with the least squares of relative errors."""
    cycles = np.array([row["avg_cycles"] for row in rows])
    matrix = np.array([features(row, kind) for row in rows]) / cycles[:, None]
    return np.linalg.lstsq(matrix, np.ones(len(rows)), rcond=None)[0]


def errors(rows: list[dict[str, float]], kind: str, coefficients: np.ndarray) -> np.ndarray:
    predicted = np.array([features(row, kind) for row in rows]) @ coefficients
    return np.abs(predicted / np.array([row["avg_cycles"] for row in rows]) - 1)


def _mean_and_worst(values: np.ndarray) -> tuple[float, float]:
    return float(values.mean()), float(values.max())


def summarise(rows: list[dict[str, float]], kind: str) -> Summary:
    held_out = {}
    for tested in FAMILIES:
        fitted = [row for row in rows if family(row) != tested]
        seen = {tile(row) for row in fitted}
        new = [row for row in rows if family(row) == tested and tile(row) not in seen]
        held_out[tested] = _mean_and_worst(errors(new, kind, least_squares(fitted, kind)))
    coefficients = least_squares(rows, kind)
    fit = Fit(
        tuple(map(float, coefficients)), _mean_and_worst(errors(rows, kind, coefficients)), held_out
    )
    imbalance = None
    if kind in ("CSC", "CSR"):
        measured = np.array([row["max_cycles"] / row["avg_cycles"] for row in rows])
        predicted = np.array([predicted_imbalance(row) for row in rows])
        imbalance = _mean_and_worst(np.abs(predicted / measured - 1))
    return Summary(fit, imbalance)


FITTED: dict[str, Summary] = {
    "CSC": Summary(
        Fit(
            (37.37, 1.2382, 123.24),
            (0.0103, 0.0196),
            {768: (0.0230, 0.0357), 1024: (0.0374, 0.0585)},
        ),
        imbalance_error=(0.0265, 0.0712),
    ),
    "CSR": Summary(
        Fit(
            (33.42, 1.2705, 63.80),
            (0.0056, 0.0168),
            {768: (0.0114, 0.0206), 1024: (0.0140, 0.0172)},
        ),
        imbalance_error=(0.0399, 0.1204),
    ),
    "COO": Summary(
        Fit((47.70, 1.2375), (0.0253, 0.0783), {768: (0.0299, 0.0759), 1024: (0.0381, 0.0670)}),
        imbalance_error=None,
    ),
    "GEMM": Summary(
        Fit((2.3603,), (0.0265, 0.0278), {768: (0.0516, 0.0522), 1024: (0.0544, 0.0547)}),
        imbalance_error=None,
    ),
}
