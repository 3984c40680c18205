"""Gradual pruning of layers that are sparser than its schedule, as in a run that goes on without
the algorithm's state."""

import copy
import warnings

import pytest
import torch
from torch import nn

from sparsekern.sparsity import GMP, IterativePruning, Static

CUBIC = {"type": "cubic", "init": 0.0, "final": 0.75, "steps": 6}
FALLING = {"type": "linear", "init": 0.75, "slope": -0.25 / 6}


def start(algorithm) -> tuple:
    model = algorithm.apply(nn.Sequential(nn.Linear(16, 16), nn.Linear(16, 16)))
    return algorithm, model, algorithm.apply(torch.optim.AdamW(model.parameters()))


def fit(model: nn.Module, optimizer: torch.optim.Optimizer, steps: int) -> None:
    for _ in range(steps):
        optimizer.zero_grad()
        model(torch.randn(8, 16)).square().sum().backward()
        optimizer.step()


@pytest.mark.parametrize(
    "make",
    [
        lambda: GMP(CUBIC, update={"freq": 2}),
        lambda: IterativePruning(0.75, rounds=3, freq=2),
    ],
    ids=["gmp", "iterative"],
)
def test_without_its_state_it_says_that_weights_grow(make):
    algorithm, *run = start(make())
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        fit(*run, 6)
    assert algorithm.achieved == pytest.approx(0.75, abs=0.01)
    states = [copy.deepcopy(part.state_dict()) for part in (*run, algorithm)]
    for with_state in (False, True):
        algorithm, *again = start(make())
        for part, state in zip((*again, algorithm), states, strict=False):
            if part is not algorithm or with_state:
                part.load_state_dict(state)
        if with_state:
            with warnings.catch_warnings():
                warnings.simplefilter("error")
                fit(*again, 2)
            assert algorithm.achieved == pytest.approx(0.75, abs=0.01)
        else:
            with pytest.warns(UserWarning, match=r"sparsity 0.75 of the layers falls to 0\.\d+, "):
                fit(*again, 2)


def test_a_schedule_that_falls_may_grow_weights():
    algorithm, *run = start(GMP(FALLING, update={"freq": 2}))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        fit(*run, 6)
    assert algorithm.achieved == pytest.approx(0.5, abs=0.01)


def test_layers_that_are_sparse_already():
    model = Static(0.9).apply(nn.Sequential(nn.Linear(16, 16)))
    algorithm = GMP(CUBIC, update={"freq": 2})
    optimizer = algorithm.apply(torch.optim.AdamW(algorithm.apply(model).parameters()))
    with pytest.warns(UserWarning, match="sparsity 0.898 of the layers falls to"):
        fit(model, optimizer, 2)


def test_layers_of_a_few_weights_are_as_sparse_as_they_can_be():
    cubic = {"type": "cubic", "init": 0.97, "final": 0.98, "steps": 6}
    model = nn.Sequential(*(nn.Linear(4, 4) for _ in range(3)))
    algorithm = GMP(cubic, update={"freq": 2})
    optimizer = algorithm.apply(torch.optim.AdamW(algorithm.apply(model).parameters()))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for _ in range(2):
            optimizer.zero_grad()
            model(torch.randn(8, 4)).square().sum().backward()
            optimizer.step()
