"""Algorithms whose layers are frozen, as those under LoRA adapters."""

import warnings

import pytest
import torch
from torch import nn

from sparsekern import SparseLinear
from sparsekern.sparsity import GMP, SET, RigL
from sparsekern.sparsity.pattern import places_of

EACH_STEP = {"freq": 1}


def model_of(algorithm, trained: bool) -> nn.Sequential:
    """A sparse layer, trained or frozen, and a dense one that is trained."""
    model = nn.Sequential(nn.Linear(16, 16), nn.Linear(16, 4))
    algorithm.param_filter = ("0",)
    model = algorithm.apply(model)
    assert isinstance(model[0], SparseLinear)
    model[0].values.requires_grad_(trained)
    return model


def step(model: nn.Module, optimizer: torch.optim.Optimizer) -> None:
    optimizer.zero_grad()
    model(torch.randn(8, 16)).square().sum().backward()
    optimizer.step()


@pytest.mark.parametrize("kind", [SET, RigL])
def test_where_all_layers_are_frozen_an_update_says_that_nothing_changes(kind):
    algorithm = kind(0.5, update=EACH_STEP)
    model = model_of(algorithm, trained=False)
    optimizer = algorithm.apply(torch.optim.SGD(model.parameters(), 0.1))
    before = places_of(model[0])
    with pytest.warns(UserWarning, match=f"{kind.__name__}: all its layers are frozen"):
        step(model, optimizer)
    assert torch.equal(places_of(model[0]), before) and algorithm.steps == 1
    model[0].values.requires_grad_(True)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        step(model, optimizer)
    assert not torch.equal(places_of(model[0]), before)


def test_gradual_pruning_prunes_frozen_layers():
    cubic = {"type": "cubic", "init": 0.0, "final": 0.75, "steps": 2}
    algorithm = GMP(cubic, update=EACH_STEP)
    model = model_of(algorithm, trained=False)
    optimizer = algorithm.apply(torch.optim.SGD(model.parameters(), 0.1))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for _ in range(3):
            step(model, optimizer)
    assert algorithm.achieved == 0.75
