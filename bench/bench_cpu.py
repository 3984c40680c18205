"""The products of a linear layer against every dense call and every peer that runs here (peers.py).

How each is made, and what it is held against: sparsekern/bench/products.py.
"""

from dataclasses import replace
from functools import partial
from pathlib import Path

import grids
import peers
import pytest
import torch
from grids import large_workloads as large_grid
from grids import workloads as grid

from sparsekern import Static
from sparsekern.bench import products
from sparsekern.bench.records import OTHER
from sparsekern.gpt.build import load_model

BF16 = {"dtype": torch.bfloat16}
OTHER_MASKS = ("pruned", "banded", "uneven", "trained")
TRAINED = Path(__file__).parents[1] / "out" / "dense" / "checkpoint.pt"  # make demo


def trained(dense: torch.Tensor, sparsity: float, generator: torch.Generator) -> torch.Tensor:
    """A weight of this shape in the demo's dense GPT, pruned by magnitude."""
    model, _ = load_model(TRAINED)
    weights = [m.weight.detach() for m in model.blocks.modules() if isinstance(m, torch.nn.Linear)]
    dense.copy_(next(weight for weight in weights if weight.shape == dense.shape))
    return Static(sparsity, "magnitude").mask("weight", dense)


products.MASKS["trained"] = trained


def forward_grid(quick: bool) -> list[products.Workload]:
    return (
        grid(quick, tokens=(1, 16, 256, 1024), two_threads=(16, 256))
        + grid(quick, tokens=(1,), two_threads=(1,), is_cold=True)
        + grid(quick, tokens=(1, 256, 1024), **BF16)
        + grid(quick, tokens=(1,), is_cold=True, **BF16)
    )


def masks_grid(quick: bool) -> list[products.Workload]:
    """Workloads of the shapes that the demo's GPT has."""
    found = [w for mask in OTHER_MASKS for w in grid(quick, tokens=(256,), mask=mask)]
    return [w for w in found if w.mask != "trained" or (w.N, w.K) in grids.SHAPES[:3]]


gradient_grid = partial(grid, tokens=(256, 1024), two_threads=(256,))


@pytest.mark.runs_on(workloads=forward_grid)
@torch.no_grad()
def test_spmm(race, workload):
    product = products.forward(workload)
    if workload.dtype != torch.float32:
        race(product)
    elif workload.is_cold:
        race(product, peers.cold_entries(product.W, product.x))
    else:
        race(product, peers.race_entries(product.W, product.x, is_forward=True))


@pytest.mark.runs_on(workloads=masks_grid)
@torch.no_grad()
def test_spmm_masks(race, workload):
    """Other masks than random ones, beside our own time on a random one. The trained ones are what
    users have: peers meet them too."""
    is_trained = workload.mask == "trained"
    if is_trained and not TRAINED.exists():
        pytest.skip("no trained weights: `make demo` makes them")
    product = products.forward(workload)
    at_random = products.forward(replace(workload, mask="random"))
    name = "sparsekern, random mask"
    ours = replace(at_random.ours, name=name, kind=OTHER, exact=at_random.exact)
    # Both of ours come after a dense call. The second of two in a row would find the first one's
    # leavings in cache: on one and the same mask it was 1.07 to 1.37 times as fast.
    dense, *others = product.rivals
    product = replace(product, rivals=[dense, ours, *others])
    race(
        product,
        peers.race_entries(product.W, product.x, is_forward=True) if is_trained else [],
    )


@pytest.mark.runs_on(
    workloads=lambda quick: (
        large_grid(quick, tokens=(256,)) + large_grid(quick, tokens=(1,), is_cold=True)
    )
)
@torch.no_grad()
def test_spmm_large(race, workload):
    product = products.forward(workload)
    race(product, [products.torch_csr(product.W, product.x)] if workload.M > 1 else [])


@pytest.mark.runs_on(workloads=gradient_grid)
@torch.no_grad()
def test_spmm_t(race, workload):
    product = products.input_gradient(workload)
    W = products.transpose(product.W)
    race(product, peers.race_entries(W, product.x, is_forward=False))


@pytest.mark.runs_on(workloads=gradient_grid)
@torch.no_grad()
def test_sddmm(race, workload):
    race(products.values_gradient(workload))


@pytest.mark.runs_on(workloads=gradient_grid)
def test_linear(race, workload):
    """Forward and both gradients through autograd."""
    race(products.training_step(workload))
