"""The mesh once more, by brute force: every PE, router and link moves cycle by cycle.

Written from the rules in docs/math.md alone. It shares nothing with the simulator of events and the
recursion but the mesh's sizes and the mask, which it reads as bool [N, K].
"""

from collections import deque
from dataclasses import dataclass, field

import numpy as np
import pytest

from sparsekern.wafer.balance import Mask
from sparsekern.wafer.mesh import Mesh, mesh_cycles
from sparsekern.wafer.validation.simulator import simulate_cycles

QUEUE_WAVELETS = 8
MOST_CYCLES, NEVER = 20_000, 10**9


@dataclass
class Pe:
    """One processing element: what it still has to do, and until when it is busy."""

    wavelets: deque = field(default_factory=deque)  # that came: the output of each
    busy_until: int = 0
    complete: dict = field(default_factory=dict)  # output: the cycle its own sum is ready
    sent: dict = field(default_factory=dict)  # output: the cycle it leaves
    output: int = 0  # that it works on
    done: int = 0  # nonzeros of it


def tick_cycles(mesh: Mesh, kept: np.ndarray) -> int:
    """Cycles until the last output's sums have left the last column of PEs."""
    n = len(kept)
    per_col = -(-kept.shape[1] // mesh.cols)
    needs = [
        kept[:, c * per_col : (c + 1) * per_col].sum(axis=1).tolist() for c in range(mesh.cols)
    ]
    feeds = [deque(i for i in range(n) for _ in range(needs[c][i])) for c in range(mesh.cols)]
    pes = [[Pe() for _ in range(mesh.cols)] for _ in range(mesh.rows)]
    flying = [[deque() for _ in range(mesh.cols)] for _ in range(mesh.rows)]  # (cycle, output)

    for now in range(MOST_CYCLES):
        for c in range(mesh.cols):
            _stream(mesh, pes, flying, feeds, c, now)
        for row in pes:
            while any([_work(mesh, pe, needs[c], n, c > 0, now) for c, pe in enumerate(row)]) | any(
                [_send(mesh, row, c, n, now) for c in range(mesh.cols)]
            ):
                pass
        last = [row[-1].sent.get(n - 1) for row in pes]
        if all(cycle is not None for cycle in last):
            return max(last) + mesh.send_cycles
    raise AssertionError("the mesh hangs")


def _stream(mesh: Mesh, pes, flying, feeds, c: int, now: int) -> None:
    """A wavelet a cycle moves down, where the PE below has room for it."""
    for r in reversed(range(mesh.rows)):
        above = flying[r][c]
        if above and above[0][0] <= now and len(pes[r][c].wavelets) < QUEUE_WAVELETS:
            pes[r][c].wavelets.append(above.popleft()[1])
            if r + 1 < mesh.rows:
                flying[r + 1][c].append((now + mesh.hop_cycles, pes[r][c].wavelets[-1]))
    if feeds[c] and not flying[0][c] and len(pes[0][c].wavelets) < QUEUE_WAVELETS:
        flying[0][c].append((now, feeds[c].popleft()))


def _work(mesh: Mesh, pe: Pe, needs: list[int], n: int, adds: bool, now: int) -> bool:
    """Begin what can begin now; whether anything did."""
    before = pe.output - mesh.window
    has_room = before < 0 or pe.sent.get(before, NEVER) <= now
    if pe.output == n or now < pe.busy_until or not has_room:
        return False
    if pe.done == needs[pe.output]:
        pe.complete[pe.output] = now
        pe.busy_until = now + (mesh.add_cycles if adds else 0)
        pe.output, pe.done = pe.output + 1, 0
        return True
    if not pe.wavelets:
        return False
    assert pe.wavelets.popleft() == pe.output
    pe.busy_until, pe.done = now + mesh.axpy_cycles, pe.done + 1
    return True


def _send(mesh: Mesh, row: list[Pe], c: int, n: int, now: int) -> bool:
    """Send the sum of the next output on, if it can go now."""
    pe = row[c]
    output = len(pe.sent)
    if output == n or pe.complete.get(output, NEVER) > now:
        return False
    if output and pe.sent[output - 1] + mesh.send_cycles > now:
        return False
    if c and row[c - 1].sent.get(output, NEVER) > now:
        return False
    if c + 1 < mesh.cols and row[c + 1].complete.get(output, NEVER) > now:
        return False
    pe.sent[output] = now
    return True


RNG = np.random.default_rng(0)
N = K = 40
ROWS, COLUMNS = np.indices((N, K))
MASKS = {
    "random": RNG.random((N, K)) < 0.2,
    "full": ROWS >= 0,
    "empty": ROWS < 0,
    "uneven columns": RNG.random((N, K)) < 0.6 * COLUMNS / K,
    "uneven rows": RNG.random((N, K)) < 0.6 * ROWS / N,
    "few full rows, then none": ROWS < N // 8,
    "half of the columns": COLUMNS < K // 2,
    "blocks on the diagonal": ROWS * 4 // N == COLUMNS * 4 // K,
    "blocks against the diagonal": ROWS * 4 // N == 3 - COLUMNS * 4 // K,
    "a band": abs(ROWS - COLUMNS) < 6,
}
# Sums are at their next PE at once: a longer chain sets the clocks of columns apart, no more.
MESHES = {
    "one PE": Mesh(1, 1, 5, 2, 1, window=4, chain_cycles=0),
    "a short window": Mesh(2, 8, 4, 3, 6, window=2, chain_cycles=0),
    "a long window": Mesh(2, 8, 4, 3, 6, window=16, chain_cycles=0),
    "slow links": Mesh(3, 6, 2, 1, 30, window=4, chain_cycles=0),
}


@pytest.mark.parametrize("mask", MASKS)
@pytest.mark.parametrize("mesh", MESHES)
def test_simulator_and_closed_form_are_what_single_cycles_add_up_to(mesh, mask):
    mesh, kept = MESHES[mesh], MASKS[mask]
    found = tick_cycles(mesh, kept)
    pattern = Mask.from_dense(kept)
    assert simulate_cycles(mesh, pattern) == pytest.approx(found, abs=1)
    closed = mesh_cycles(mesh, N, -(-K // mesh.cols), pattern)
    assert closed.total == pytest.approx(found, rel=0.03)
    assert closed.compute <= closed.fullest <= closed.compute * closed.imbalance


@pytest.mark.parametrize("window", [16, 40])
def test_outputs_that_are_followed_together_lose_little(window):
    """Windows of 16 outputs and more are followed in blocks of an eighth."""
    n, k, cols = 384, 160, 10
    rows, columns = np.indices((n, k))
    mesh = Mesh(2, cols, 7, 6, 12, window, chain_cycles=6)
    for kept in (
        rows < n // 16,
        rows * 4 // n == columns * 4 // k,
        rows * 4 // n == 3 - columns * 4 // k,
        abs(rows * k / n - columns) < 20,
        RNG.random((n, k)) < 0.1,
    ):
        mask = Mask.from_dense(kept)
        closed = mesh_cycles(mesh, n, k // cols, mask).total
        assert closed == pytest.approx(simulate_cycles(mesh, mask), rel=0.05)
