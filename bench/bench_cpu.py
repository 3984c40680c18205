"""The three products as a user calls them, operands token-major, packing of x inside the time.

Against the best dense call of torch and OpenBLAS, and every peer that runs here (peers.py).
"""

from dataclasses import replace
from functools import partial

import measure
import peers
import pytest
import torch
import torch.nn.functional as F
from measure import DENSE, Rival, Workload, ours

import sparsekern
from sparsekern import ops
from sparsekern.tensor import expand_rows

grid = measure.workloads


def dense_forward(x, W) -> list[Rival]:
    """x [M, K] @ W [N, K].T by every dense call, in the dtype of the operands."""
    dtype = "" if x.dtype == torch.float32 else " bf16"
    rivals = [
        Rival(f"F.linear{dtype}", DENSE, lambda: F.linear(x, W)),
        Rival(f"torch.mm{dtype}", DENSE, lambda: torch.mm(W, x.t()), torch.t),
    ]
    if x.shape[0] == 1:
        v = x[0]
        rivals.append(Rival(f"torch.mv{dtype}", DENSE, lambda: torch.mv(W, v), lambda y: y[None]))
    if x.dtype == torch.float32:
        rivals.append(openblas(x, W.t()))
    return rivals


def openblas(a, b) -> Rival:
    """NumPy's a @ b."""
    a, b = a.numpy(), b.numpy()
    if a.shape[0] == 1:
        return Rival("OpenBLAS", DENSE, lambda: a[0] @ b, lambda y: torch.from_numpy(y)[None])
    return Rival("OpenBLAS", DENSE, lambda: a @ b, torch.from_numpy)


def exact_forward(x, W):
    return measure.exact(lambda x, W: x @ W.t(), x, W)


@pytest.mark.runs_on(workloads=partial(grid, tokens=(1, 16, 256, 1024), two_threads=(16, 256)))
@torch.no_grad()
def test_spmm(race, workload):
    """Warm with one token: the weights of a single layer, called again and again, stay in cache."""
    W, Wd = measure.weight(workload)
    x = measure.normal(workload.M, workload.K)
    rivals = dense_forward(x, Wd) + peers.race_entries(W, x, is_forward=True)
    race(
        "spmm",
        ours(partial(sparsekern.linear, x, W)),
        rivals,
        measure.describe("spmm", workload, W),
        exact_forward(x, Wd),
        repeat=workload.M == 1,
    )


@pytest.mark.runs_on(workloads=partial(grid, tokens=(1,), two_threads=(1,), is_cold=True))
@torch.no_grad()
def test_spmm_cold(race, workload):
    """One token and weights from memory, as in decoding: everyone goes through copies of its own,
    and between two uses of one all competitors read theirs."""
    W, Wd = measure.weight(workload)
    x = measure.normal(workload.M, workload.K)
    light = [peer for peer in peers.PEERS if peer.is_light and not peer.missing]
    rivals = cold_dense(x, Wd) + [
        measure.rotate(peer.multiply(each, x) for each in measure.cold_copies(W)) for peer in light
    ]
    race(
        "spmm",
        cold_ours(x, W),
        rivals,
        measure.describe("spmm", workload, W),
        exact_forward(x, Wd),
        repeat=True,
    )


def cold_ours(x, W, name: str = "sparsekern") -> Rival:
    copies = measure.cold_copies(W)
    return measure.rotate(ours(partial(sparsekern.linear, x, each), name) for each in copies)


def cold_dense(x, W) -> list[Rival]:
    return [
        measure.rotate(dense_forward(x, each)[i] for each in measure.cold_copies(W))
        for i in range(len(dense_forward(x, W)))
    ]


BF16 = {"dtype": torch.bfloat16}


@pytest.mark.runs_on(
    workloads=lambda quick: (
        grid(quick, tokens=(1, 256), **BF16) + grid(quick, tokens=(1,), is_cold=True, **BF16)
    )
)
@torch.no_grad()
def test_spmm_bf16(race, workload):
    """bf16 weights and tokens, against dense in bf16 and in fp32, and against our own fp32."""
    W, Wd = measure.weight(workload)
    x = measure.normal(workload.M, workload.K).bfloat16()
    wide = measure.with_values(W, W.values.float()), Wd.float(), x.float()
    if workload.is_cold:
        runner = cold_ours(x, W)
        rivals = cold_dense(x, Wd) + cold_dense(wide[2], wide[1])
        rivals.append(cold_ours(wide[2], wide[0], "sparsekern fp32"))
    else:
        runner = ours(partial(sparsekern.linear, x, W))
        rivals = dense_forward(x, Wd) + dense_forward(wide[2], wide[1])
        rivals.append(ours(partial(sparsekern.linear, wide[2], wide[0]), "sparsekern fp32"))
    race(
        "spmm",
        runner,
        rivals,
        measure.describe("spmm", workload, W),
        exact_forward(x, Wd),
        repeat=workload.M == 1,
    )


@pytest.mark.runs_on(workloads=partial(grid, tokens=(256,), mask="pruned"))
@torch.no_grad()
def test_spmm_pruned(race, workload):
    """A W pruned by magnitude, its rows of log-normal scales, beside our own time at random."""
    W, Wd = measure.weight(workload)
    random_W, random_Wd = measure.weight(replace(workload, mask="random"))
    x = measure.normal(workload.M, workload.K)
    at_random = replace(
        ours(partial(sparsekern.linear, x, random_W), "sparsekern, random mask"),
        exact=exact_forward(x, random_Wd),
    )
    counts = W.row_offsets.diff()
    info = {"row_nnz": {"min": counts.min().item(), "max": counts.max().item()}}
    race(
        "spmm",
        ours(partial(sparsekern.linear, x, W)),
        [*dense_forward(x, Wd), at_random],
        measure.describe("spmm", workload, W) | info,
        exact_forward(x, Wd),
    )


gradients = pytest.mark.runs_on(workloads=partial(grid, tokens=(256, 1024), two_threads=(256,)))


@gradients
@torch.no_grad()
def test_spmm_t(race, workload: Workload):
    N, K = workload.N, workload.K
    W, Wd = measure.weight(workload)
    dy = measure.normal(workload.M, N)
    rivals = [
        Rival("torch.mm", DENSE, lambda: torch.mm(dy, Wd)),
        Rival("torch.mm of transposes", DENSE, lambda: torch.mm(Wd.t(), dy.t()), torch.t),
        openblas(dy, Wd),
        *peers.race_entries(transpose(W), dy, is_forward=False),
    ]
    race(
        "spmm_t",
        ours(partial(ops.spmm_t, W.row_offsets, W.col_indices, W.values, N, K, dy)),
        rivals,
        measure.describe("spmm_t", workload, W),
        measure.exact(lambda dy, W: dy @ W, dy, Wd),
    )


def transpose(W):
    """W^T in CSR of its own: peers without a transposed product get it ready made."""
    return sparsekern.SparseTensor.from_torch(W.T.to_torch())


@gradients
@torch.no_grad()
def test_sddmm(race, workload: Workload):
    N, K = workload.N, workload.K
    W, _ = measure.weight(workload)
    x, dy = measure.normal(workload.M, K), measure.normal(workload.M, N)
    stored = expand_rows(W.row_offsets, W.nnz), W.col_indices
    # Dense calls make the whole gradient, without the mask.
    rivals = [
        Rival("torch.mm", DENSE, lambda: torch.mm(dy.t(), x), lambda dw: dw[stored]),
        Rival(
            "torch.mm of transposes", DENSE, lambda: torch.mm(x.t(), dy), lambda dw: dw.t()[stored]
        ),
        replace(openblas(dy.t(), x), result=lambda dw: torch.from_numpy(dw)[stored]),
        peers.sampled_addmm(W, dy, x),
    ]
    race(
        "sddmm",
        ours(partial(ops.sddmm, W.row_offsets, W.col_indices, N, K, dy, x)),
        rivals,
        measure.describe("sddmm", workload, W),
        measure.exact(lambda dy, x: (dy.t() @ x)[stored], dy, x),
    )
