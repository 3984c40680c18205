"""V28: the closed form against the event-level mesh, on problems that fitted nothing. Class S."""

from collections.abc import Callable
from itertools import product

import numpy as np

from ..balance import WINDOW_DRIFT, WINDOWS_IN_STEP, Mask
from ..mesh import Mesh, mesh_cycles
from .points import Point, error_point
from .simulator import simulate_cycles

GRID = 32
MEAN, WORST = 0.05, 0.10
SHAPES = ((384, 768), (768, 384))  # N x K
DENSITIES = (0.05, 0.2, 0.5)
WINDOW_AND_TOKENS = ((4, 24), (8, 12), (32, 100))
PROBLEMS = tuple(product(SHAPES, DENSITIES, WINDOW_AND_TOKENS))
UNEVEN_SIGMA = 0.3  # of the log-normal scales of rows or columns in a pruned W


def masks(n: int, k: int, density: float, seed: int) -> dict[str, Mask]:
    """Uniformly random, and of the largest magnitudes where rows or columns have unlike scales."""
    rng = np.random.default_rng(seed)
    scores = {"random": rng.random((n, k))}
    for name, shape in (("uneven rows", (n, 1)), ("uneven columns", (1, k))):
        scale = np.exp(UNEVEN_SIGMA * rng.standard_normal(shape))
        scores[name] = np.abs(rng.standard_normal((n, k))) * scale
    kept = max(1, round(density * n * k))
    return {
        name: Mask.from_dense(score >= np.partition(score.ravel(), -kept)[-kept])
        for name, score in scores.items()
    }


def mesh_errors(advance: Callable[[], None] = lambda: None) -> dict[str, list[float]]:
    """Relative errors by kind of mask: of the distribution for random ones, and of actual masks.
    `advance` is called after each of the PROBLEMS."""
    errors: dict[str, list[float]] = {}
    for seed, ((n, k), density, (window, tokens)) in enumerate(PROBLEMS):
        vector_cycles = -(-tokens // 4)
        mesh = Mesh(GRID, GRID, 1 + vector_cycles, vector_cycles, -(-tokens // 2), window)
        for name, mask in masks(n, k, density, seed).items():
            simulated = simulate_cycles(mesh, mask)
            given = {f"{name}, actual mask": mask}
            if name == "random":
                given["random, from the density"] = mask.density
            for label, pattern in given.items():
                closed = mesh_cycles(mesh, n, -(-k // GRID), pattern).total
                errors.setdefault(label, []).append(abs(closed / simulated - 1))
        advance()
    return errors


def mesh_calibration() -> Point:
    """Fit of WINDOW_DRIFT and WINDOWS_IN_STEP, balance.py: 300 random masks on meshes of 2 x 200 to
    32 x 32, densities of 1 to 70%, windows of 2 to 64 outputs."""
    quantity = f"mesh: window drift {WINDOW_DRIFT:g}, least windows {WINDOWS_IN_STEP}"
    errors, limits = (0.012, 0.086), (MEAN, WORST)
    return error_point("V28", "S", quantity, errors, limits, "simulator.py", is_stored=True)


def mesh_points(advance: Callable[[], None] = lambda: None) -> list[Point]:
    points = []
    for label, values in mesh_errors(advance).items():
        quantity = f"{len(values)} products on {GRID} x {GRID} PEs: cycles; {label}"
        errors = (sum(values) / len(values), max(values))
        points.append(error_point("V28", "S", quantity, errors, (MEAN, WORST), "simulator.py"))
    return points
