"""Forward: y = x @ W.T as a user calls it, x and y token-major, packing of x inside the time."""

from functools import partial

import measure
import torch
import torch.nn.functional as F
from measure import Rival

import sparsekern

workloads = partial(measure.workloads, (16, 256, 1024))


@torch.no_grad()
def test_spmm(race, workload):
    W, Wd = measure.weight(workload.N, workload.K, workload.sparsity)
    x = measure.normal(workload.M, workload.K)
    # The peers want x feature-major and get it so: the copy is not timed.
    x_fm = x.t().contiguous()
    torch_W, scipy_W, scipy_x = W.to_torch(), W.to_scipy(), x_fm.numpy()

    ours = partial(sparsekern.linear, x, W)
    rivals = [
        Rival("F.linear", True, lambda: F.linear(x, Wd)),
        Rival("torch.mm", True, lambda: torch.mm(Wd, x.t()), torch.t),
        Rival("torch.sparse CSR", False, lambda: torch.mm(torch_W, x_fm), torch.t),
        Rival("scipy CSR", False, lambda: scipy_W @ scipy_x, lambda y: torch.from_numpy(y.T)),
    ]
    measure.check(ours, rivals, measure.exact(lambda x, W: x @ W.t(), x, Wd))
    race("spmm", ours, rivals, measure.describe("spmm", workload, W))
