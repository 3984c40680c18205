"""The event-level mesh: by hand, by its rules, and beside the closed form (many more products of
the two are V28, in test_wafer_validate.py)."""

from dataclasses import replace

import numpy as np
import pytest

from sparsekern.wafer.balance import Mask
from sparsekern.wafer.inference import reduce_cycles
from sparsekern.wafer.machine import WSE2
from sparsekern.wafer.mesh import Mesh, mesh_cycles
from sparsekern.wafer.validation.mesh import GRID, masks
from sparsekern.wafer.validation.simulator import simulate_chain_cycles, simulate_cycles

FULL = Mask.from_dense(np.ones((6, 8), dtype=bool))


def test_one_pe_by_hand():
    mesh = Mesh(1, 1, axpy_cycles=5, add_cycles=2, send_cycles=1, window=4)
    # 48 AXPYs in a row and the last output's way out; one column adds nothing.
    assert simulate_cycles(mesh, FULL) == 48 * 5 + 1


def test_two_rows_are_one_hop_later():
    mesh = Mesh(1, 1, axpy_cycles=5, add_cycles=2, send_cycles=1, window=4)
    assert simulate_cycles(replace(mesh, rows=2), FULL) == simulate_cycles(mesh, FULL) + 1


def test_two_columns_share_the_work_and_the_second_adds():
    mesh = Mesh(1, 2, axpy_cycles=5, add_cycles=2, send_cycles=1, window=4)
    # 24 AXPYs; the second adds 5 sums before its last output is complete, then passes that on.
    assert simulate_cycles(mesh, FULL) == 24 * 5 + 5 * 2 + 1


def test_a_slow_link_bounds_the_time():
    mesh = Mesh(1, 2, axpy_cycles=1, add_cycles=0, send_cycles=50, window=4)
    assert simulate_cycles(mesh, FULL) == pytest.approx(6 * 50, abs=15)


def test_fast_pes_wait_for_their_wavelets():
    mesh = Mesh(4, 1, axpy_cycles=0.1, add_cycles=0, send_cycles=0, window=64)
    assert simulate_cycles(mesh, FULL) == pytest.approx(48 + 3, abs=1)


@pytest.mark.parametrize("wavelets", [1, 64, 1024])
@pytest.mark.parametrize("pes", [2, 16, 512])
def test_a_chain_reduces_as_its_formula_says(pes, wavelets):
    simulated = simulate_chain_cycles(pes, wavelets, WSE2.chain_cycles)
    assert simulated == reduce_cycles(WSE2, pes, wavelets)


def test_more_room_is_never_slower_and_dense_needs_none():
    rng = np.random.default_rng(0)
    mesh = Mesh(4, 16, axpy_cycles=5, add_cycles=4, send_cycles=8, window=1)
    sparse = Mask.from_dense(rng.random((128, 128)) < 0.1)
    times = [simulate_cycles(replace(mesh, window=w), sparse) for w in (1, 4, 16, 128)]
    assert times == sorted(times, reverse=True) and times[0] > 1.2 * times[-1]


def test_an_empty_mask_still_sends_its_sums():
    mesh = Mesh(2, 4, axpy_cycles=5, add_cycles=1, send_cycles=3, window=4)
    empty = Mask.from_dense(np.zeros((10, 8), dtype=bool))
    assert simulate_cycles(mesh, empty) == pytest.approx(10 * 3, abs=25)


def test_the_closed_form_matches_where_nothing_is_sparse():
    mesh = Mesh(GRID, GRID, axpy_cycles=9, add_cycles=8, send_cycles=16, window=8)
    mask = Mask.from_dense(np.ones((64, 128), dtype=bool))
    closed = mesh_cycles(mesh, 64, 4, mask).total
    assert closed == pytest.approx(simulate_cycles(mesh, mask), rel=0.05)
    assert closed == mesh_cycles(mesh, 64, 4, 1.0).total


def test_a_density_alone_misses_uneven_columns():
    """Why actual masks are taken: the distribution knows of no fuller columns."""
    uneven = masks(384, 768, 0.2, seed=0)["uneven columns"]
    mesh = Mesh(GRID, GRID, axpy_cycles=4, add_cycles=3, send_cycles=6, window=8)
    simulated = simulate_cycles(mesh, uneven)
    actual, assumed = (
        mesh_cycles(mesh, 384, 24, pattern).total for pattern in (uneven, uneven.density)
    )
    assert abs(actual / simulated - 1) < 0.05 < abs(assumed / simulated - 1)
