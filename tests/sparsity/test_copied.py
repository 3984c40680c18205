"""A copied optimizer has lost its hooks: an algorithm copied with it says so."""

import copy
import gc
import pickle

import pytest
import torch
from torch import nn

from sparsekern.sparsity import SET, RigL, Static

COPIES = [copy.deepcopy, lambda parts: pickle.loads(pickle.dumps(parts))]


def step(model: nn.Module, optimizer: torch.optim.Optimizer, count: int) -> None:
    for _ in range(count):
        optimizer.zero_grad()
        model(torch.randn(4, 16)).square().sum().backward()
        optimizer.step()


@pytest.fixture
def parts():
    algorithm = RigL(0.5, update={"freq": 1})
    model = algorithm.apply(nn.Sequential(nn.Linear(16, 16)))
    optimizer = algorithm.apply(torch.optim.AdamW(model.parameters()))
    step(model, optimizer, 3)
    return algorithm, model, optimizer


@pytest.mark.parametrize("copied", COPIES)
def test_a_copied_algorithm_that_follows_no_optimizer_is_an_error(parts, copied):
    _, model, optimizer = copied(parts)
    with pytest.raises(RuntimeError, match="RigL: an optimizer steps .* does not follow it"):
        step(model, optimizer, 5)
    algorithm, model, optimizer = copied(parts)
    algorithm.apply(optimizer)
    step(model, optimizer, 5)
    assert algorithm.steps == 8 and parts[0].steps == 3
    step(*parts[1:], 2)
    assert parts[0].steps == 5


def test_another_model_takes_an_algorithm_of_its_own(parts):
    algorithm, model, optimizer = parts
    other = nn.Sequential(nn.Linear(16, 16))
    with pytest.raises(
        ValueError, match="this RigL follows .* other layers, and is at their step 3"
    ):
        algorithm.apply(other)
    assert type(other[0]) is nn.Linear
    algorithm.apply(nn.Sequential(model))  # the same layers, wrapped
    step(model, optimizer, 1)
    assert algorithm.steps == 4


def test_the_algorithm_of_another_copy_is_named(parts):
    algorithm, model = copy.deepcopy(parts[0]), copy.deepcopy(parts[1])
    with pytest.raises(ValueError, match="the algorithm that was copied with them"):
        algorithm.apply(torch.optim.AdamW(model.parameters()))


@pytest.mark.parametrize("copied", COPIES)
def test_a_copied_algorithm_that_nobody_kept_is_an_error(parts, copied):
    model, optimizer = copied(parts)[1:]
    gc.collect()  # the memo of a copy and its state have cycles
    with pytest.raises(RuntimeError, match="RigL: .* values of 0, but the algorithm is no longer"):
        step(model, optimizer, 1)
    Static(0.5).apply(model)
    step(model, optimizer, 5)
    step(*parts[1:], 2)
    assert parts[0].steps == 5


def test_a_copied_algorithm_that_is_done_and_not_kept_is_nothing(parts):
    algorithm = SET(0.5, update={"freq": 1, "stop": 3})
    model = algorithm.apply(nn.Sequential(nn.Linear(16, 16)))
    optimizer = algorithm.apply(torch.optim.AdamW(model.parameters()))
    step(model, optimizer, 3)
    model, optimizer = copy.deepcopy((algorithm, model, optimizer))[1:]
    step(model, optimizer, 5)
