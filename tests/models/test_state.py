"""What accelerate_ leaves of its calls: nothing. Each call finds what the first one found."""

import copy
import random

import numpy
import pytest
import torch
from pruned_models import H, pruned, same_state, sparse_is_faster
from torch import nn
from torch.nn.utils import prune

from sparsekern import accelerate_
from sparsekern.models import timing, work


@pytest.fixture(autouse=True)
def timed(monkeypatch):
    """Layers are faster sparse; the model runs as often as for a clock."""
    sparse_is_faster(monkeypatch)

    given = work.times_of

    def times_of(*arguments):
        timing.times_of(*arguments)
        return given(*arguments)

    monkeypatch.setattr(work, "times_of", times_of)


class Changing(nn.Module):
    """Counts its calls, keeps a cache for 12 tokens, makes a buffer, writes to its input and throws
    dice."""

    def __init__(self):
        super().__init__()
        self.layer, self.norm = nn.Linear(H, H), nn.BatchNorm1d(H)
        self.register_buffer("count", torch.zeros((), dtype=torch.long))
        self.register_buffer("cache", torch.zeros(12, H))
        self.register_buffer("last", None)
        self.register_buffer("places", torch.arange(4).expand(3, 4))
        self.register_buffer("graph", torch.eye(3).to_sparse())

    def forward(self, x):
        x += 1
        first, last = int(self.count), int(self.count) + len(x)
        self.cache[first:last] = x
        self.count = self.count + len(x)
        self.last = x
        self.graph.mul_(2)
        if not hasattr(self, "made"):
            self.register_buffer("made", torch.zeros(()))
        self.made += 1
        dice = torch.rand(1) + random.random() + numpy.random.random() + self.made
        y = self.layer(self.cache[:last]) * dice
        return self.norm.train()(y)


def test_buffers_inputs_and_random_numbers_are_as_they_were():
    model, x = pruned(Changing()), torch.zeros(5, H)
    model.count += 2
    buffers, before = dict(model.named_buffers()), copy.deepcopy(model.state_dict())
    threw = torch.get_rng_state(), random.getstate(), numpy.random.get_state()[2]
    report = accelerate_(model, x)
    assert report.output_error < 1e-6 and report.layers[0].tokens == {7: 1}
    assert torch.equal(torch.get_rng_state(), threw[0]) and not x.any()
    assert (random.getstate(), numpy.random.get_state()[2]) == threw[1:]
    assert model.last is None and not hasattr(model, "made")
    for name, t in buffers.items():
        assert model.get_buffer(name) is t and torch.equal(t.to_dense(), before[name].to_dense())


class Cache:
    def __init__(self):
        self.keys = torch.zeros(0, H)

    def add(self, x):
        self.keys = torch.cat([self.keys, x])
        return self.keys


class Cached(nn.Module):
    def __init__(self):
        super().__init__()
        self.layer = nn.Linear(H, H)

    def forward(self, x, cache, again):
        assert again is x
        return self.layer(cache.add(x))


@pytest.mark.parametrize("has_graph", [False, True])
def test_objects_in_the_example_are_not_changed(has_graph):
    cache, x = Cache(), torch.randn(3, H)
    cache.keys = cache.keys.requires_grad_().clone() if has_graph else cache.keys
    report = accelerate_(pruned(Cached()), {"x": x, "cache": cache, "again": x})
    assert not len(cache.keys) and report.layers[0].tokens == {3: 1}
    assert report.output_error < 1e-6


class Failing(nn.Module):
    def __init__(self, call, error):
        super().__init__()
        self.layer, self.left, self.error = nn.Linear(H, H), call, error
        self.register_buffer("count", torch.zeros(1))

    def forward(self, x):
        self.count += 1
        self.left -= 1
        if not self.left:
            raise self.error
        return self.layer(x)


ROUNDS = (
    2 * timing.ROUNDS
)  # calls for a time: after the first, and after the one with sparse layers


@pytest.mark.parametrize("call", [1, 2, ROUNDS + 1, ROUNDS + 2, ROUNDS + 3])
@pytest.mark.parametrize("kind", [KeyError, KeyboardInterrupt])
def test_an_error_in_any_call_leaves_the_model_as_it_was(call, kind):
    model = pruned(Failing(call, kind("why"))).train()
    before = copy.deepcopy(model.state_dict())
    words = {1: "did not run with it: KeyError", ROUNDS + 2: "with sparse layers: .*KeyError"}
    expected = (ValueError, words.get(call, "but not again .*KeyError"))
    error, match = (kind, "why") if kind is KeyboardInterrupt else expected
    with pytest.raises(error, match=match):
        accelerate_(model, torch.randn(3, H))
    assert same_state(model, before) and model.training and model.layer.training


class Stopped(nn.Linear):
    def train(self, mode=True):
        raise KeyboardInterrupt


def test_modes_come_back_when_eval_is_interrupted():
    model = pruned(nn.Sequential(nn.Linear(H, H), nn.Dropout())).train()
    model.append(Stopped(H, H))
    with pytest.raises(KeyboardInterrupt):
        accelerate_(model, torch.randn(3, H))
    assert all(module.training for module in model.modules())


def test_a_model_of_inference_mode_with_a_counter():
    with torch.inference_mode():
        model = pruned(Failing(100, None))

    def call(m):
        with torch.inference_mode():
            return m(torch.randn(3, H))

    assert accelerate_(model, call).output_error < 1e-6
    assert not model.count.any()


def test_nan_that_a_mask_of_torch_prune_keeps_is_named():
    model = nn.Sequential(nn.Linear(H, H))
    prune.custom_from_mask(model[0], "weight", torch.rand(H, H) > 0.75)
    with torch.no_grad():
        model[0].weight_orig[tuple(model[0].weight_mask.nonzero()[0])] = torch.nan
    with pytest.raises(ValueError, match="0.weight_orig: 1 of 4096 weights are NaN"):
        accelerate_(model, torch.randn(3, H))


def test_outputs_that_have_no_numbers_to_compare():
    def example(m):
        y = m(torch.ones(3, H))
        return y.to_sparse(), y.long()

    assert accelerate_(pruned(nn.Sequential(nn.Linear(H, H))), example).output_error is None


class Own(nn.Module):
    """Keeps what it saw where nobody else looks."""

    def __init__(self, keep):
        super().__init__()
        self.layer, self.seen, self.keep = nn.Linear(H, H), [], keep

    def forward(self, x):
        self.seen.append(self.layer(x))
        return self.keep(self.seen)


@pytest.mark.parametrize(
    ("keep", "why"),
    [
        (torch.cat, "another one in each call"),
        (sum, "another one in each call"),
        (lambda seen: seen[-1].argmax(-1), "no floating-point tensors"),
        (lambda seen: torch.cat(seen)[: 4 if len(seen) > 1 else 3], "other shapes"),
    ],
)
def test_outputs_that_cannot_be_compared(keep, why):
    report = accelerate_(pruned(Own(keep)), torch.randn(3, H))
    assert report.output_error is None and report.sparse
    assert why in report.not_compared and report.not_compared in report.summary()
