"""Backward: the gradient of x (spmm_t) and that of W's values (sddmm), token-major operands."""

from functools import partial

import measure
import torch
from measure import Rival

from sparsekern import ops
from sparsekern.tensor import expand_rows

workloads = partial(measure.workloads, (256, 1024))


@torch.no_grad()
def test_spmm_t(race, workload):
    N, K = workload.N, workload.K
    W, Wd = measure.weight(N, K, workload.sparsity)
    dy = measure.normal(workload.M, N)
    # The peers get their layout and an explicit transpose of W: neither copy is timed.
    dy_fm = dy.t().contiguous()
    torch_W, scipy_W, scipy_dy = W.T.to_torch(), W.T.to_scipy(), dy_fm.numpy()

    ours = partial(ops.spmm_t, W.row_offsets, W.col_indices, W.values, N, K, dy)
    rivals = [
        Rival("torch.mm", True, lambda: torch.mm(dy, Wd)),
        Rival("torch.sparse CSR", False, lambda: torch.mm(torch_W, dy_fm), torch.t),
        Rival("scipy CSR", False, lambda: scipy_W @ scipy_dy, lambda y: torch.from_numpy(y.T)),
    ]
    measure.check(ours, rivals, measure.exact(lambda dy, W: dy @ W, dy, Wd))
    race("spmm_t", ours, rivals, measure.describe("spmm_t", workload, W))


@torch.no_grad()
def test_sddmm(race, workload):
    N, K = workload.N, workload.K
    W, _ = measure.weight(N, K, workload.sparsity)
    x, dy = measure.normal(workload.M, K), measure.normal(workload.M, N)
    dy_fm, torch_W = dy.t().contiguous(), W.to_torch()
    stored = expand_rows(W.row_offsets, W.nnz), W.col_indices

    ours = partial(ops.sddmm, W.row_offsets, W.col_indices, N, K, dy, x)
    rivals = [
        # The whole dense gradient, without the mask.
        Rival("torch.mm", True, lambda: torch.mm(dy.t(), x), lambda dw: dw[stored]),
        Rival(
            "torch.sparse.sampled_addmm",
            False,
            lambda: torch.sparse.sampled_addmm(torch_W, dy_fm, x, beta=0),
            lambda dw: dw.values(),
        ),
    ]
    measure.check(ours, rivals, measure.exact(lambda dy, x: (dy.t() @ x)[stored], dy, x))
    race("sddmm", ours, rivals, measure.describe("sddmm", workload, W))
