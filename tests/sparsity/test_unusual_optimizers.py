"""Optimizers that keep numbers where no pattern can reach them, steps that CUDA graphs capture, and
training in several threads."""

import copy
import sys
import threading

import pytest
import torch
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode

from sparsekern import Static
from sparsekern.sparsity import GMP, SET, RigL
from sparsekern.sparsity.optimizers import makes_state_alone
from sparsekern.sparsity.pattern import places_of

RISING = {"type": "cubic", "init": 0.0, "final": 0.75, "steps": 4}


def model_of(*sizes: int) -> nn.Sequential:
    return nn.Sequential(*(nn.Linear(n, k) for n, k in zip(sizes, sizes[1:], strict=False)))


def step(model: nn.Module, optimizer: torch.optim.Optimizer) -> None:
    optimizer.zero_grad()
    model(torch.randn(8, 16)).square().sum().backward()
    optimizer.step()


class Momenta(torch.optim.Optimizer):
    """Heavy ball, with its momenta in an attribute, a parameter group or a state for all."""

    def __init__(self, params, place: str):
        super().__init__(params, {})
        parameters = [p for group in self.param_groups for p in group["params"]]
        self.parameters = parameters  # which are no numbers of its own
        momenta = [torch.zeros_like(p) for p in parameters]
        if place == "attribute":
            self.momenta = dict(zip(parameters, momenta, strict=True))
        elif place == "group":
            self.param_groups[0]["momenta"] = momenta
        else:
            self.state["momenta"] = momenta

    @torch.no_grad()
    def step(self, closure=None):
        for p in self.parameters:
            p.sub_(p.grad, alpha=1e-3)


@pytest.mark.parametrize("place", ["attribute", "group", "state"])
@pytest.mark.parametrize(
    "make", [lambda u: SET(0.5, update=u), lambda u: GMP(RISING, update=u)], ids=["set", "gmp"]
)
def test_numbers_beside_the_state_cannot_follow(make, place):
    algorithm = make({"freq": 2})
    model = algorithm.apply(model_of(16, 16, 16))
    optimizer = algorithm.apply(Momenta(model.parameters(), place))
    step(model, optimizer)
    before = model[0].values.detach().clone()
    with pytest.raises(RuntimeError, match="Momenta keeps numbers of its own .* values of 0 in"):
        step(model, optimizer)
    assert torch.equal(before, model[0].values) and algorithm.steps == 1


class Lookahead(torch.optim.Optimizer):
    """It knows the state of what it wraps, as an attribute."""

    def __init__(self, inner: torch.optim.Optimizer):
        super().__init__(inner.param_groups, {})
        self.optimizer, self.fast_state = inner, inner.state

    def step(self, closure=None):
        self.optimizer.step()


def test_the_state_of_a_wrapped_optimizer_may_be_an_attribute():
    algorithm = SET(0.5, update={"freq": 1})
    model = algorithm.apply(model_of(16, 16, 16))
    optimizer = algorithm.apply(Lookahead(torch.optim.AdamW(model.parameters())))
    before = places_of(model[0])
    for _ in range(3):
        step(model, optimizer)
    assert algorithm.steps == 3 and not torch.equal(before, places_of(model[0]))


def test_models_train_in_several_threads():
    """The lists of layers, algorithms and optimizers are of the whole process."""
    errors = []

    def train():
        try:
            for _ in range(10):
                algorithm = RigL(0.5, update={"freq": 1})
                model = algorithm.apply(model_of(16, 16, 16))
                optimizer = algorithm.apply(torch.optim.AdamW(model.parameters()))
                for _ in range(3):
                    step(model, optimizer)
                assert algorithm.steps == 3
        except Exception as error:
            errors.append(error)

    interval = sys.getswitchinterval()
    sys.setswitchinterval(1e-5)
    try:
        threads = [threading.Thread(target=train) for _ in range(6)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    finally:
        sys.setswitchinterval(interval)
    assert not errors


def test_values_that_no_optimizer_holds_any_more():
    """The step before an update asks again: a layer that nobody trains would lose weights."""
    algorithm = SET(0.5, update={"freq": 2})
    model = algorithm.apply(model_of(16, 16, 16))
    optimizer = torch.optim.AdamW([{"params": layer.parameters()} for layer in model])
    step(model, algorithm.apply(optimizer))
    del optimizer.param_groups[1]
    before = places_of(model[1])
    with pytest.raises(RuntimeError, match="no optimizer .* holds the values of 1; .* or freeze"):
        step(model, optimizer)
    model[1].requires_grad_(False)
    step(model, optimizer)
    assert algorithm.steps == 2 and torch.equal(before, places_of(model[1]))


def test_a_step_that_a_graph_captures_is_one(monkeypatch):
    """At a rate of 0, too: gradients on a GPU cannot be read there."""
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: True)
    with FakeTensorMode():  # which no bool() can read
        p = nn.Parameter(torch.zeros(4, device="cuda:0"))
        p.grad = torch.zeros_like(p)
        assert not makes_state_alone(torch.optim.SGD([p], 0.0))


@pytest.mark.gpu
@pytest.mark.parametrize("is_followed", [True, False])
@pytest.mark.parametrize("rate", [0.0, 1e-2])
def test_steps_are_captured_at_any_rate(rate, is_followed):
    model = (algorithm := Static(0.75)).apply(model_of(16, 16, 16).cuda())
    optimizer = torch.optim.AdamW(model.parameters(), rate, capturable=True)
    if is_followed:
        algorithm.apply(optimizer)
    x = torch.randn(8, 16, device="cuda")
    torch.cuda.synchronize()

    def run() -> None:
        optimizer.zero_grad()
        model(x).square().sum().backward()
        optimizer.step()

    with torch.cuda.stream(torch.cuda.Stream()):
        run(), run()
        torch.cuda.synchronize()
        before, graph = model[0].values.detach().clone(), torch.cuda.CUDAGraph()
        graph.capture_begin(capture_error_mode="thread_local")
        try:
            run()
        finally:
            graph.capture_end()
        graph.replay()
        torch.cuda.synchronize()
    assert torch.equal(model[0].values, before) == (rate == 0)


def test_an_optimizer_that_rests_holds_its_values():
    """It may step again: those that others hold alone take several steps in between."""
    algorithm = SET(0.5, update={"freq": 2})
    model = algorithm.apply(model_of(16, 16, 16))
    both = algorithm.apply(torch.optim.AdamW(model.parameters()))
    first = algorithm.apply(torch.optim.SGD(model[0].parameters(), 0.01))
    before = places_of(model[1])
    for optimizer in 3 * (both, first, first, first, first):
        step(model, optimizer)
    assert algorithm.steps > 2 and not torch.equal(before, places_of(model[1]))


def test_a_state_dict_that_an_optimizer_keeps_follows_nothing():
    """As ZeroRedundancyOptimizer keeps those of all ranks, on the one that saves them."""
    algorithm = SET(0.5, update={"freq": 2})
    model = algorithm.apply(model_of(16, 16, 16))
    optimizer = algorithm.apply(torch.optim.AdamW(model.parameters()))
    step(model, optimizer)
    optimizer.saved = [copy.deepcopy(optimizer.state_dict())]
    before = places_of(model[0])
    step(model, optimizer)
    assert algorithm.steps == 2 and not torch.equal(before, places_of(model[0]))
