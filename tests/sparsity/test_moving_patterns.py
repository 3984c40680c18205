"""What stands beside a pattern that changes: averages, optimizers, compiled models, CUDA graphs."""

import copy
import pickle
import warnings
import weakref

import pytest
import torch
import torch._dynamo.testing  # not brought by torch._dynamo
import torch.nn.functional as F
from torch import nn
from torch.distributed.checkpoint.state_dict import get_optimizer_state_dict
from torch.optim.swa_utils import (
    AveragedModel,
    get_ema_avg_fn,
    get_ema_multi_avg_fn,
)
from torch.utils.checkpoint import checkpoint

from sparsekern import SparseLinear, Static, densify_, sparsify_
from sparsekern.kernels import derived
from sparsekern.nn import adopt_values_, forget_graphs_
from sparsekern.sparsity import (
    GMP,
    SET,
    Group,
    IterativePruning,
    Magnitude,
    RigL,
    check_optimizer_state,
    match_patterns_,
)
from sparsekern.sparsity.algorithm import SOON
from sparsekern.sparsity.pattern import places_of, set_pattern

DECAY = 0.9


@pytest.fixture(autouse=True)
def one_thread():
    before = torch.get_num_threads()
    torch.set_num_threads(1)  # these tensors are tiny
    yield
    torch.set_num_threads(before)


def mlp() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(16, 24), nn.BatchNorm1d(24), nn.GELU(), nn.Linear(24, 8))


def plain() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(16, 24), nn.GELU(), nn.Linear(24, 8))


def batch(step: int) -> tuple[torch.Tensor, torch.Tensor]:
    x = torch.randn(32, 16, generator=torch.Generator().manual_seed(step))
    return x, x[:, :8].sin()


def gradients(model: nn.Module, step: int) -> None:
    model.zero_grad()
    x, y = batch(step)
    F.mse_loss(model(x), y).backward()


def fit(model: nn.Module, optimizer, steps: int, first: int = 0, each=lambda: None) -> None:
    for step in range(first, first + steps):
        gradients(model, step)
        optimizer.step()
        each()


def start(algorithm, model: nn.Module):
    model = algorithm.apply(model)
    return model, algorithm.apply(torch.optim.AdamW(model.parameters(), 1e-2))


def layers(model: nn.Module) -> list[SparseLinear]:
    return [m for m in model.modules() if isinstance(m, SparseLinear)]


def patterns(model: nn.Module) -> list[list[int]]:
    return [places_of(layer).tolist() for layer in layers(model)]


def mask_of(layer: SparseLinear) -> torch.Tensor:
    mask = torch.zeros(layer.out_features * layer.in_features)
    return mask.index_fill_(0, places_of(layer), 1).view(layer.out_features, -1)


# Averages

CUBIC = {"type": "cubic", "init": 0.0, "final": 0.9, "steps": 8}
MOVING = {
    "rigl": lambda: RigL(0.75, update={"freq": 2}),
    "set": lambda: SET(0.75, update={"freq": 2}),
    "gmp": lambda: GMP(CUBIC, update={"freq": 3}),
    "iterative": lambda: IterativePruning(0.9, rounds=4, freq=2),
}
AVERAGES = {
    "swa": ({}, lambda mean, new, n: mean + (new - mean) / (n + 1)),
    "avg_fn": ({"avg_fn": get_ema_avg_fn(DECAY)}, lambda mean, new, n: mean.lerp(new, 1 - DECAY)),
    "multi": (
        {"multi_avg_fn": get_ema_multi_avg_fn(DECAY)},
        lambda mean, new, n: mean.lerp(new, 1 - DECAY),
    ),
}


class DenseAverage:
    """The average of to_dense(), at the places that are stored."""

    def __init__(self, model: nn.Module, average) -> None:
        self.model, self.average, self.count, self.means = model, average, 0, []

    def update(self) -> None:
        now = [layer.weight.detach().to_dense() for layer in layers(self.model)]
        if self.count:
            now = [self.average(m, w, self.count) for m, w in zip(self.means, now, strict=True)]
        masks = [mask_of(layer) for layer in layers(self.model)]
        self.means = [w * mask for w, mask in zip(now, masks, strict=True)]
        self.count += 1


@pytest.mark.parametrize(
    ("kind", "use_buffers"), [("swa", True), ("avg_fn", False), ("multi", True), ("multi", False)]
)
@pytest.mark.parametrize("name", MOVING)
def test_an_average_is_that_of_the_dense_weights(name, kind, use_buffers):
    model, optimizer = start(MOVING[name](), mlp())
    settings, formula = AVERAGES[kind]
    average = AveragedModel(model, use_buffers=use_buffers, **settings)
    want = DenseAverage(model, formula)
    first = patterns(model)
    fit(model, optimizer, 3)  # the pattern changes before the first update, too
    for step in range(3, 12):
        fit(model, optimizer, 1, step)
        average.update_parameters(model)
        want.update()
    assert patterns(average) == patterns(model) != first
    for layer, mean in zip(layers(average), want.means, strict=True):
        torch.testing.assert_close(layer.weight.to_dense(), mean, atol=1e-6, rtol=1e-6)
        assert layer.col_indices.dtype == torch.int32
    average.eval()
    x = batch(0)[0]
    y = F.linear(x, want.means[0], average.module[0].bias)
    y = F.linear(F.gelu(average.module[1](y)), want.means[1], average.module[3].bias)
    torch.testing.assert_close(average(x), y)


@pytest.mark.parametrize("columns", [128, 5000])
def test_averaged_buffers_leave_indices_alone(columns):
    """(0.9999 * 106 + 0.0001 * 106) rounded down is 105."""
    model = sparsify_(nn.Sequential(nn.Linear(columns, 8)), Static(0.9))
    average = AveragedModel(model, multi_avg_fn=get_ema_multi_avg_fn(0.9999), use_buffers=True)
    version = average.module[0].col_indices._version
    for _ in range(5):
        average.update_parameters(model)
    assert patterns(average) == patterns(model)
    assert average.module[0].col_indices._version == version  # nothing derived is made anew
    x = torch.randn(3, columns)
    torch.testing.assert_close(average(x), model(x))


def test_an_average_of_a_model_in_ddp_or_compiled_follows():
    algorithm = SET(0.75, update={"freq": 1})
    model, optimizer = start(algorithm, plain())
    wrapped = torch.compile(model, backend="eager")
    average = AveragedModel(model)
    fit(wrapped, optimizer, 3, each=lambda: average.update_parameters(wrapped))
    assert patterns(average) == patterns(model)


def test_an_average_made_too_early_and_other_uses_of_it():
    model = plain()
    average = AveragedModel(model)
    average.update_parameters(model)  # dense models average as before
    algorithm = Static(0.5)
    model = algorithm.apply(model)
    with pytest.raises(ValueError, match="make the average of the model after it became sparse"):
        average.update_parameters(model)
    with pytest.raises(TypeError, match="AveragedModel, which follows the patterns"):
        algorithm.apply(AveragedModel(model))


def test_an_average_by_hand():
    model, optimizer = start(RigL(0.75, update={"freq": 2}), plain())
    average = copy.deepcopy(model)
    want = DenseAverage(model, lambda mean, new, n: mean.lerp(new, 1 - DECAY))
    want.update()

    @torch.no_grad()
    def update():
        assert match_patterns_(average, model) is average
        for a, p in zip(average.parameters(), model.parameters(), strict=True):
            a.lerp_(p, 1 - DECAY)
        want.update()

    fit(model, optimizer, 9, each=update)
    for layer, mean in zip(layers(average), want.means, strict=True):
        torch.testing.assert_close(layer.weight.to_dense(), mean, atol=1e-6, rtol=1e-6)


@pytest.mark.parametrize("how", ["lerp", "data"])
def test_an_average_by_hand_that_does_not_follow_is_told(how):
    model, optimizer = start(RigL(0.75, update={"steps": [0, 4]}), plain())
    average = copy.deepcopy(model)

    def update():
        for a, p in zip(average.parameters(), model.parameters(), strict=True):
            if how == "data":
                a.data.mul_(DECAY).add_(p.data, alpha=1 - DECAY)
            else:
                a.detach().lerp_(p.detach(), 1 - DECAY)

    with warnings.catch_warnings():
        warnings.simplefilter("error")
        fit(model, optimizer, 3, each=update)
    with pytest.warns(UserWarning, match="a copy of .* call sparsekern.sparsity.match_patterns_"):
        fit(model, optimizer, 1)


def test_other_copies_are_nobodys_business():
    model, optimizer = start(SET(0.75, update={"freq": 2}), plain())
    kept, loaded, trained, swa = copy.deepcopy(model), *(copy.deepcopy(model) for _ in range(3))
    swa, ema = AveragedModel(model), copy.deepcopy(model)
    other = torch.optim.SGD(trained.parameters(), 0.1)
    pruned, served = Magnitude(0.9).apply(copy.deepcopy(model)), copy.deepcopy(model).bfloat16()

    @torch.no_grad()
    def update():
        loaded.load_state_dict(model.state_dict())
        swa.update_parameters(model)
        match_patterns_(ema, model)
        for a, p in zip(ema.parameters(), model.parameters(), strict=True):
            a.lerp_(p, 0.1)

    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for step in range(6):
            fit(trained, other, 1, step)
            fit(model, optimizer, 1, step, update)
    assert pruned[0].weight.sparsity > 0.89 and served[0].values.dtype == torch.bfloat16
    assert patterns(loaded) == patterns(swa) == patterns(ema) == patterns(model)
    assert patterns(kept) == patterns(trained) != patterns(model)


# Optimizers


def longer_state(optimizer, layer: SparseLinear, key: str, by: int = -3) -> None:
    t = optimizer.state[layer.values][key]
    optimizer.state[layer.values][key] = t.new_zeros(t.shape[0] + by)


@pytest.mark.parametrize("by", [-3, 5])
@pytest.mark.parametrize(
    ("make", "key"),
    [
        (lambda p: torch.optim.AdamW(p, fused=True), "exp_avg"),
        (lambda p: torch.optim.AdamW(p, foreach=True), "exp_avg_sq"),
        (lambda p: torch.optim.SGD(p, momentum=0.9), "momentum_buffer"),
        (lambda p: torch.optim.Adagrad(p), "sum"),
        (lambda p: torch.optim.RMSprop(p), "square_avg"),
    ],
)
@pytest.mark.parametrize("algorithm", [None, "static"])
def test_state_of_another_length_is_refused_before_a_step(algorithm, make, key, by):
    model = plain()
    if algorithm is None:
        model = sparsify_(model, Static(0.5))
        optimizer = make(model.parameters())
    else:
        algorithm = Static(0.5)
        model = algorithm.apply(model)
        optimizer = algorithm.apply(make(model.parameters()))
    fit(model, optimizer, 1)
    check_optimizer_state(optimizer)
    longer_state(optimizer, model[2], key, by)
    before = copy.deepcopy(model.state_dict())
    name = "2" if algorithm else "SparseLinear"
    with pytest.raises(
        RuntimeError, match=rf"'{key}' has shape \({96 + by},\).* 96 values in {name}"
    ):
        fit(model, optimizer, 1)
    assert all(torch.equal(t, before[key]) for key, t in model.state_dict().items())


def test_a_checkpoint_of_another_pattern_is_refused():
    other, others = start(Static(0.8), plain())
    fit(other, others, 1)
    model, optimizer = start(Static(0.5), plain())
    optimizer.load_state_dict(others.state_dict())
    with pytest.raises(RuntimeError, match="its state is that of another pattern"):
        check_optimizer_state(optimizer)
    with pytest.raises(RuntimeError, match="its state is that of another pattern"):
        fit(model, optimizer, 1)


@pytest.mark.parametrize("count", [96, 50])
def test_a_state_dict_from_before_a_change_is_that_of_its_pattern(count):
    """It shares the memory of the weights, as torch's does; a change does not write into it."""
    model, optimizer = start(Static(0.75), plain())
    fit(model, optimizer, 1)
    layer = model[0]
    kept, moments = model.state_dict(), optimizer.state_dict()["state"]
    before = layer.weight.detach().to_dense(), copy.deepcopy(optimizer.state[layer.values])
    set_pattern(layer, torch.arange(count), [optimizer])
    fit(model, optimizer, 1)
    assert not torch.equal(layer.weight.to_dense(), before[0])
    model.load_state_dict(kept)
    assert torch.equal(layer.weight.to_dense(), before[0])
    place = [p is layer.values for p in model.parameters()].index(True)
    assert torch.equal(moments[place]["exp_avg"], before[1]["exp_avg"])


@pytest.mark.parametrize("is_whole", [False, True])
def test_values_in_a_buffer_of_others_stay_there(is_whole):
    """As ZeroRedundancyOptimizer sends parameters in buckets, which one of them may fill."""
    model, optimizer = start(SET(0.75, update={"freq": 1}), plain())
    parameters = [layer.values for layer in layers(model)][: 1 if is_whole else 2]
    bucket = nn.utils.parameters_to_vector(parameters).detach()
    nn.utils.vector_to_parameters(bucket, parameters)
    optimizer.buckets = [[bucket]]
    first = patterns(model)
    fit(model, optimizer, 1)
    assert patterns(model) != first
    assert torch.equal(nn.utils.parameters_to_vector(parameters), bucket)


def test_state_of_another_pattern_of_the_same_size_is_refused():
    """As where the best weights are taken back, and the optimizer goes on."""
    model, optimizer = start(algorithm := SET(0.75, update={"freq": 2}), plain())
    fit(model, optimizer, 1)
    kept = copy.deepcopy([model.state_dict(), optimizer.state_dict()])
    fit(model, optimizer, 1, 1)
    model.load_state_dict(kept[0])
    with pytest.raises(RuntimeError, match="0 has got another pattern since the last step, but"):
        fit(model, optimizer, 1, 2)
    optimizer.load_state_dict(kept[1])
    fit(model, optimizer, 2, 2)
    kept = copy.deepcopy([model.state_dict(), optimizer.state_dict()])
    fit(model, optimizer, 1, 4)
    optimizer.load_state_dict(kept[1])  # in this order, too
    model.load_state_dict(kept[0])
    model.load_state_dict({k: t.clone() for k, t in model.state_dict().items()})  # its own
    fit(model, optimizer, 1, 4)
    for _ in range(2):  # in place, too, as torch.distributed.checkpoint loads
        model.load_state_dict(kept[0])
        for held, saved in zip(model.parameters(), kept[1]["state"].values(), strict=True):
            for name, t in optimizer.state[held].items():
                t.copy_(saved[name])
        fit(model, optimizer, 1, 4)
    algorithm.apply(fresh := torch.optim.AdamW(model.parameters(), 1e-2))
    model.load_state_dict(Static(0.75).apply(plain()).state_dict())
    fit(model, fresh, 1)


@pytest.mark.parametrize("is_followed", [True, False])
@pytest.mark.parametrize("make", [torch.optim.SGD, torch.optim.AdamW])
@pytest.mark.parametrize("rate", [1e-2, torch.tensor(1e-2)])
def test_a_step_that_torch_takes_for_the_state_alone_is_none(make, rate, is_followed):
    """get_optimizer_state_dict, where the optimizer has none: of SGD at each call."""
    model = (algorithm := SET(0.75)).apply(plain())
    optimizer = make(model.parameters(), rate)
    if is_followed:
        algorithm.apply(optimizer)
    before, weights = patterns(model), copy.deepcopy(model.state_dict())
    for _ in range(3):
        get_optimizer_state_dict(model, optimizer)
    assert patterns(model) == before and algorithm.steps == 0
    assert all(torch.equal(t, weights[name]) for name, t in model.state_dict().items())
    if is_followed:
        for group in optimizer.param_groups:  # a step of a warm-up
            group["lr"] = 0.0
        fit(model, optimizer, 1)
        assert patterns(model) != before and algorithm.steps == 1


def test_a_step_of_frozen_layers_is_one():
    """At a rate of 0 and without gradients: it is not the one for the state, which has them."""
    model = (algorithm := SET(0.75)).apply(plain())
    model[0].requires_grad_(False)
    rests, trains = (torch.optim.SGD(model[i].parameters(), lr) for i, lr in ((0, 0.0), (2, 1e-2)))
    for optimizer in (rests, trains):
        algorithm.apply(optimizer)
    rests.step()
    fit(model, trains, 1)
    assert algorithm.steps == 1


@pytest.mark.parametrize("fused", [False, True])
def test_a_step_that_a_gradient_scaler_leaves_out_is_none(fused):
    model = (algorithm := RigL(0.75, update={"freq": 1})).apply(plain())
    optimizer = algorithm.apply(torch.optim.AdamW(model.parameters(), 1e-2, fused=fused))
    scaler = torch.amp.GradScaler("cpu", init_scale=4.0)
    for step, factor in enumerate((1, torch.inf, 1)):
        before = patterns(model)
        model.zero_grad()
        scaler.scale(model(batch(step)[0]).square().mean() * factor).backward()
        scaler.step(optimizer)
        scaler.update()
        assert (patterns(model) == before) == (factor == torch.inf)
    assert algorithm.steps == 2 == optimizer.state[model[0].values]["step"]


def test_state_that_is_no_sparse_layers_is_none_of_our_business():
    p = nn.Parameter(torch.zeros(4))
    p.grad = torch.ones(4)
    optimizer = torch.optim.SGD([p], momentum=0.5)
    optimizer.state[p]["momentum_buffer"] = torch.zeros(1, 4)[:, :3]
    check_optimizer_state(optimizer)


class Accelerated(torch.optim.Optimizer):
    """As accelerate wraps an optimizer: no __init__ of Optimizer, so no hooks."""

    def __init__(self, optimizer):
        self.optimizer = optimizer

    state = property(lambda self: self.optimizer.state)
    param_groups = property(lambda self: self.optimizer.param_groups)

    def step(self, closure=None):
        self.optimizer.step(closure)


def test_a_wrapped_optimizer():
    algorithm, plain_one = (SET(0.75, update={"freq": 2}) for _ in range(2))
    model = algorithm.apply(plain())
    wrapped = Accelerated(torch.optim.AdamW(model.parameters(), 1e-2))
    assert algorithm.apply(wrapped) is wrapped
    fit(model, wrapped, 6)
    assert algorithm.steps == 6
    twin, optimizer = start(plain_one, plain())
    fit(twin, optimizer, 6)
    assert patterns(model) == patterns(twin)
    assert torch.equal(model[0].values, twin[0].values)


class Outer(torch.optim.Optimizer):
    """As SAM or Lookahead: an optimizer with state, and another one in it."""

    def __init__(self, inner):
        super().__init__(inner.param_groups, {})
        self.base_optimizer = inner

    def step(self, closure=None):
        for group in self.param_groups:
            for p in group["params"]:
                slow = self.state[p].setdefault("slow", torch.zeros_like(p))
                slow.lerp_(p.detach(), 0.5)
        self.base_optimizer.step()


def test_state_in_a_wrapper_and_in_what_it_wraps_moves():
    algorithm = SET(0.5, update={"steps": [0, 3]})
    model = algorithm.apply(plain())
    outer = algorithm.apply(Outer(torch.optim.AdamW(model.parameters(), 1e-2)))
    fit(model, outer, 2)
    layer = model[0]
    gradients(model, 2)
    before = copy.deepcopy(model), places_of(layer)
    states = copy.deepcopy([dict(o.state[layer.values]) for o in (outer, outer.base_optimizer)])
    moments = [s[k] for s, k in zip(states, ("slow", "exp_avg"), strict=True)]
    set_pattern(layer, torch.arange(100), [outer])
    kept = torch.isin(before[1], torch.arange(100))
    now = outer.state[layer.values]["slow"], outer.base_optimizer.state[layer.values]["exp_avg"]
    for t, moment in zip(now, moments, strict=True):
        want = torch.zeros(100).index_put((before[1][kept],), moment[kept])
        assert torch.equal(t, want)


def test_rewinding_empties_a_wrapper_and_what_it_wraps():
    model = (algorithm := IterativePruning(0.5, rounds=1, freq=2, rewind=0)).apply(plain())
    outer = algorithm.apply(Outer(torch.optim.AdamW(model.parameters(), 1e-2)))
    fit(model, outer, 2)
    assert not outer.state and not outer.base_optimizer.state


def test_rewinding_when_another_optimizer_has_taken_over():
    """Whose other parameters come after those of the one that stayed."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(16, 16), nn.GELU(), nn.Linear(16, 16))
    algorithm = IterativePruning(0.5, rounds=2, freq=3, rewind=1)
    algorithm.apply(model)
    parts = [algorithm.apply(torch.optim.AdamW(m.parameters(), 0.1)) for m in (model[0], model[2])]
    for step in range(3):
        model(batch(step)[0]).sin().sum().backward()
        for part in parts:
            part.step()
        if step == 0:
            early = [m.bias.detach().clone() for m in (model[0], model[2])]
            wrapped = nn.Sequential(nn.Sequential(model))  # whose layers have other names
            algorithm.apply(wrapped)
        if step == 1:
            parts[0] = algorithm.apply(torch.optim.AdamW(model[0].parameters(), 0.01))
    assert model[0].values.shape[0] < 0.8 * 16 * 16
    assert torch.equal(model[0].bias, early[0]) and torch.equal(model[2].bias, early[1])
    parts[0].param_groups[0]["params"].append(nn.Parameter(torch.zeros(16)))
    with pytest.raises(RuntimeError, match="rewind: expected the other parameters that"):
        algorithm.update_pattern()
    algorithm._early.pop(model[2])
    with pytest.raises(RuntimeError, match="rewind: the weights of 0.0.2 at step 1 are not known"):
        algorithm.update_pattern()


# Optimizers whose state begins with another number than zero.
BEGINNINGS = [
    (lambda p: torch.optim.Rprop(p, lr=1e-3), "step_size", 1e-3),
    (lambda p: torch.optim.Adagrad(p, initial_accumulator_value=0.5), "sum", 0.5),
    (lambda p: torch.optim.AdamW(p), "exp_avg_sq", 0),
]


@pytest.mark.parametrize("make, key, first", BEGINNINGS, ids=["Rprop", "Adagrad", "AdamW"])
@pytest.mark.parametrize("how", ["set_pattern", "densify_"])
def test_state_of_new_weights_begins_as_that_of_others(how, make, key, first):
    model = Static(0.5).apply(plain())
    optimizer = make(model.parameters())
    fit(model, optimizer, 2)
    layer = model[0]
    weight, old = layer.values, mask_of(layer).bool()
    if how == "densify_":
        densify_(model, optimizer)
        weight, new = model[0].weight, ~old
    else:
        set_pattern(layer, torch.arange(200), [optimizer])
        new = ~old.flatten()[:200]
    assert new.any() and (optimizer.state[weight][key][new] == first).all()
    assert (optimizer.state[weight][key][~new] != first).any()


def test_values_split_among_optimizers():
    """One for each layer: the run of a single one, and steps are counted once."""
    alone = SET(0.75, update={"freq": 2})
    twin, single = start(alone, plain())
    algorithm = SET(0.75, update={"freq": 2})
    model = algorithm.apply(plain())
    parts = [algorithm.apply(torch.optim.AdamW(m.parameters(), 1e-2)) for m in (model[0], model[2])]
    for step in range(7):
        gradients(model, step)
        for part in parts:
            part.step()
    fit(twin, single, 7)
    assert algorithm.steps == 7
    assert patterns(model) == patterns(twin)
    for a, b in zip(model.parameters(), twin.parameters(), strict=True):
        assert torch.equal(a, b)


def test_an_optimizer_in_the_backward_pass():
    algorithm = RigL(0.75, update={"freq": 2})
    model = algorithm.apply(plain())
    first = patterns(model)
    for p in model.parameters():
        optimizer = torch.optim.SGD([p], 1e-2)
        if p.ndim == 1 and any(p is layer.values for layer in layers(model)):
            algorithm.apply(optimizer)
        p.register_post_accumulate_grad_hook(lambda p, o=optimizer: o.step())
    for step in range(4):
        gradients(model, step)
    assert algorithm.steps == 4 and patterns(model) != first


def test_values_that_no_optimizer_holds():
    algorithm = SET(0.75, update={"freq": 2})
    model = algorithm.apply(plain())
    optimizer = algorithm.apply(torch.optim.SGD(model[0].parameters(), 1e-2))
    with pytest.raises(RuntimeError, match="no optimizer .* holds the values of 2; call"):
        fit(model, optimizer, 1)
    model[2].values.requires_grad_(False)
    fit(model, optimizer, 1)


def test_a_group_and_optimizers_for_each_part():
    group = Group({"0": SET(0.75, update={"freq": 1}), "2": SET(0.5, update={"freq": 1})})
    model = group.apply(plain())
    first = patterns(model)
    parts = [group.apply(torch.optim.SGD(m.parameters(), 1e-2)) for m in (model[0], model[2])]
    gradients(model, 0)
    for part in parts:
        part.step()
    assert all(a != b for a, b in zip(first, patterns(model), strict=True))


def test_an_algorithm_that_follows_nobody():
    algorithm = RigL(0.75, update={"freq": 100, "stop": 300})
    model = algorithm.apply(plain())
    optimizer = torch.optim.SGD(model.parameters(), 1e-2)
    with pytest.raises(RuntimeError, match=r"RigL: .* values of 0, 2, but .* apply"):
        fit(model, optimizer, 2)
    algorithm.apply(optimizer)
    algorithm.steps = 300
    fit(model, torch.optim.SGD(model.parameters(), 1e-2), 3)  # no update is to come any more


def test_another_optimizer_takes_over():
    """The one before makes no steps any more: the algorithm does not wait for them."""
    model, first = start(algorithm := SET(0.75, update={"freq": 2}), plain())
    fit(model, first, 3)
    second = algorithm.apply(torch.optim.AdamW(model.parameters(), 1e-2))
    before, twin = places_of(model[0]), copy.deepcopy(first.state[model[0].values])
    fit(model, second, 1, 3)
    assert algorithm.steps == 4 and not torch.equal(before, places_of(model[0]))
    stays, was = (
        torch.isin(*p) for p in ((places_of(model[0]), before), (before, places_of(model[0])))
    )
    moment = first.state[model[0].values]["exp_avg"]  # it may come back
    assert torch.equal(moment[stays], twin["exp_avg"][was]) and not moment[~stays].any()
    for step, each in enumerate((first, second) * 4):  # as of two tasks
        fit(model, each, 1, 4 + step)
    assert algorithm.steps == 8
    fit(model, first, 4)  # without a word to the algorithm: it sees after one step
    assert algorithm.steps == 11
    ref = weakref.ref(second)
    del second, each
    assert ref() is None


def test_an_optimizer_that_rests_may_step_whenever_it_likes():
    model, first = start(algorithm := SET(0.75, update={"freq": 2}), plain())
    others = []
    for step in range(4):
        others.append(algorithm.apply(torch.optim.AdamW(model.parameters(), 1e-2)))
        fit(model, first, 1, step)
    fit(model, first, 4)
    assert algorithm.steps >= 4


@pytest.fixture
def rested():
    """A Magnitude, its model, and two optimizers with state, of which the first one rests."""
    model, first = start(algorithm := Magnitude(0.75, param_filter="0"), plain())
    fit(model, first, 2)
    second = algorithm.apply(torch.optim.AdamW(model.parameters(), 1e-2))
    fit(model, second, 2)
    assert algorithm.optimizers == [second] and first in algorithm._hooked
    set_pattern(model[0], torch.arange(200), [first, second])  # which it may prune again
    for optimizer in (first, second):
        optimizer.state[model[0].values]["exp_avg"] = torch.arange(200.0)
    model[0].values.data = torch.arange(200.0)
    return algorithm, model, first, second


def test_optimizers_that_rest_follow_where_magnitude_is_applied_again(rested):
    algorithm, model, *both = rested
    algorithm.apply(model)
    assert places_of(model[0]).tolist() == list(range(104, 200))
    for optimizer in both:
        assert optimizer.state[model[0].values]["exp_avg"].tolist() == list(range(104, 200))
        fit(model, optimizer, 1)


@pytest.mark.parametrize("is_group", [False, True])
def test_optimizers_that_rest_go_back_where_one_fails(rested, is_group, monkeypatch):
    algorithm, model, *both = rested
    if is_group:
        with torch.no_grad():
            model[2].weight.fill_(torch.nan)
        algorithm = Group([algorithm, Magnitude(0.5, param_filter="2")])
    else:
        monkeypatch.setattr("sparsekern.sparsity.oneshot.compared", lambda *_: 1 / 0)
    with pytest.raises((ValueError, ZeroDivisionError)):
        algorithm.apply(model)
    assert places_of(model[0]).tolist() == list(range(200))
    for optimizer in both:
        assert optimizer.state[model[0].values]["exp_avg"].tolist() == list(range(200))


def test_a_group_that_fails_keeps_the_run_of_its_algorithms():
    algorithm = SET(0.75, update={"freq": 2, "stop": 5})
    model, optimizer = start(algorithm, plain())
    fit(model, optimizer, 3)
    with pytest.raises(ValueError, match="make one for each model"):
        Group([algorithm, SET(0.5, param_filter="2")]).apply(plain())
    assert algorithm.steps == 3 and algorithm.optimizers == [optimizer]
    assert list(algorithm.layers.values()) == layers(model)


@pytest.mark.filterwarnings("ignore:Initializing zero-element tensors")
@pytest.mark.parametrize("family", ["unstructured", "two-way"])
def test_layers_without_places_are_left_alone(family):
    algorithm = RigL(0.75, update={"freq": 1}, family=family)
    model, optimizer = start(algorithm, nn.Sequential(nn.Linear(16, 0), nn.Linear(0, 8)))
    fit(model, optimizer, 2)
    assert algorithm.steps == 2


def test_frozen_layers_keep_their_patterns():
    model = (algorithm := SET(0.75, update={"freq": 1})).apply(plain())
    model[2].values.requires_grad_(False)
    before = patterns(model)
    fit(model, algorithm.apply(torch.optim.SGD(model[0].parameters(), 1e-2)), 2)
    assert [a == b for a, b in zip(before, patterns(model), strict=True)] == [False, True]


def test_another_algorithm_takes_over():
    """As in a notebook whose cell runs again."""
    model = plain()
    for _ in range(2):
        algorithm = pickle.loads(pickle.dumps(SET(0.75, update={"freq": 1})))
        model, optimizer = start(algorithm, model)
        fit(model, optimizer, 3)
        before = patterns(model)
        fit(model, optimizer, 1)
        assert patterns(model) != before


@pytest.mark.parametrize("make", [Magnitude, lambda sparsity: Group({"*": Magnitude(sparsity)})])
def test_a_model_is_pruned_further_in_training(make):
    """By another algorithm: the state follows, and the one before does not grow the zeros back."""
    model, optimizer = start(RigL(0.5, update={"freq": 2}), plain())
    fit(model, optimizer, 3)
    before, values = places_of(model[0]), model[0].values
    moment = optimizer.state[values]["exp_avg"].clone()
    make(0.75).apply(model)
    stays = torch.isin(before, places_of(model[0]))
    assert torch.equal(optimizer.state[values]["exp_avg"], moment[stays])
    first = patterns(model)
    fit(model, optimizer, 4, 3)
    assert patterns(model) == first and values.shape[0] == 24 * 16 / 4
    make(0.9).apply(model)
    fit(model, optimizer, 1)


@pytest.mark.parametrize("steps", [0, 3])
def test_layers_that_became_dense_are_no_algorithms(steps):
    """Neither the first step afterwards nor the next update looks for them, and they are freed."""
    model = plain()
    model[0] = nn.Sequential(model[0])
    model, optimizer = start(algorithm := RigL(0.75, update={"freq": 2}), model)
    fit(model, optimizer, steps)
    old = weakref.ref(model[0][0])
    densify_(model[0], optimizer)
    before = places_of(model[2])
    fit(model, optimizer, 3, steps)
    assert old() is None
    assert algorithm.layers == {"2": model[2]} and algorithm.steps == steps + 3
    assert not torch.equal(before, places_of(model[2]))
    densify_(model, optimizer)
    weight = model[2].weight.clone()
    fit(model, optimizer, 3)
    assert algorithm.layers == {} and algorithm.achieved == 0 and (weight != model[2].weight).all()


def test_an_optimizer_that_densify_was_not_given_is_told():
    model = plain()
    early = torch.optim.SGD(model.parameters(), 1e-2)
    sparsify_(model, Static(0.75))
    late = torch.optim.SGD(model.parameters(), 1e-2)
    fit(model, late, 1)
    model[0] = densify_(model[0])
    late.zero_grad()
    for optimizer in (early, late):
        with pytest.raises(RuntimeError, match=r"a weight of shape \[24, 16\] was before densify_"):
            fit(model, optimizer, 1)
    late.add_param_group({"params": [model[0].weight]})
    fit(model, late, 1)
    early.add_param_group({"params": [model[0].weight, model[2].values]})
    fit(model, early, 1)


@pytest.mark.parametrize("name", MOVING)
def test_a_pickled_algorithm_goes_on_with_its_optimizer(name):
    model, optimizer = start(algorithm := MOVING[name](), plain())
    fit(model, optimizer, 3)
    kept = pickle.dumps((model, optimizer, algorithm))
    fit(model, optimizer, 3, 3)
    again, its_optimizer, its_algorithm = pickle.loads(kept)
    its_algorithm.apply(its_optimizer)
    fit(again, its_optimizer, 3, 3)
    assert patterns(again) == patterns(model)


def test_static_patterns_and_steps_by_hand_need_nobody():
    model = Static(0.75).apply(plain())
    fit(model, torch.optim.SGD(model.parameters(), 1e-2), 3)
    algorithm = SET(0.75, update={"freq": 1})
    model = algorithm.apply(plain())

    def count():
        algorithm.steps += 1
        algorithm.update_pattern()

    fit(model, torch.optim.SGD(model.parameters(), 1e-2), 3, each=count)


class Blocks(torch.optim.SGD):
    """State that has another shape than the parameter, as optimizers with 8 bits have."""

    def step(self, closure=None):
        for p in self.param_groups[0]["params"]:
            self.state[p]["absmax"] = torch.ones(2)
        return super().step(closure)


def test_state_that_cannot_follow():
    model, _ = start(algorithm := SET(0.75, update={"freq": 2}), plain())
    optimizer = algorithm.optimizers[0]
    algorithm.optimizers.clear()
    algorithm.apply(Blocks(model.parameters(), 1e-2))
    before = patterns(model)
    with pytest.raises(RuntimeError, match=r"'absmax' of shape \(2,\) for the 96 values of 0"):
        fit(model, algorithm.optimizers[0], 2)
    assert patterns(model) == before and optimizer is not algorithm.optimizers[0]
    lbfgs = torch.optim.LBFGS(model.parameters())
    gradients(model, 0)
    lbfgs.step(lambda: F.mse_loss(model(batch(0)[0]), batch(0)[1]))
    with pytest.raises(RuntimeError, match="LBFGS keeps the steps of all parameters in one vector"):
        set_pattern(model[0], torch.arange(9), [lbfgs])
    assert patterns(model) == before


def test_densify_refuses_state_of_another_shape():
    model, optimizer = start(Static(0.5), plain())
    fit(model, optimizer, 1)
    longer_state(optimizer, model[2], "exp_avg")
    with pytest.raises(ValueError, match=r"'exp_avg' of shape \(93,\) for the 96 values"):
        densify_(model, optimizer)
    assert len(layers(model)) == 2


class Lists(torch.optim.SGD):
    """As ZeroRedundancyOptimizer: parameters in a cache of its own."""

    def __init__(self, parameters):
        super().__init__(parameters, 1e-2)
        self.cache = [{"params": self.param_groups[0]["params"][:1]}]


def densified(make, steps: int):
    model = Static(0.5).apply(plain())
    optimizer = make(model.parameters())
    fit_closed(model, optimizer, steps)
    return densify_(model, optimizer), optimizer


def adopted(make, steps: int):
    model = plain()
    optimizer = make(model.parameters())
    fit_closed(model, optimizer, steps)
    sparsify_(model, Static(0.5))
    return model, adopt_values_(optimizer)


def fit_closed(model: nn.Module, optimizer, steps: int) -> None:
    x, y = batch(0)

    def loss() -> torch.Tensor:
        optimizer.zero_grad()
        result = F.mse_loss(model(x), y)
        result.backward()
        return result

    for _ in range(steps):
        optimizer.step(loss)


@pytest.mark.parametrize("made", [densified, adopted])
def test_optimizers_that_keep_parameters_in_a_place_of_their_own(made):
    model, optimizer = made(torch.optim.LBFGS, 0)
    before = [p.detach().clone() for p in model.parameters()]
    fit_closed(model, optimizer, 1)
    assert not any(torch.equal(*pair) for pair in zip(before, model.parameters(), strict=True))
    with pytest.raises(ValueError, match="optimizer: LBFGS keeps the steps of all parameters"):
        made(torch.optim.LBFGS, 1)
    with pytest.raises(ValueError, match="optimizer: Lists keeps parameters in 'cache' too"):
        made(Lists, 0)


@pytest.mark.parametrize("zero", ["none", "zeros", "kept"])
@pytest.mark.parametrize("becomes", ["sparse", "dense"])
def test_an_optimizer_of_what_was_replaced_is_told(becomes, zero):
    """Its gradients of before may be there still."""
    model = plain() if becomes == "sparse" else Static(0.5).apply(plain())
    optimizer = torch.optim.SGD(model.parameters(), 1e-2)
    others = torch.optim.SGD([nn.Parameter(torch.zeros(3)), *model[0].parameters()], 1e-2)
    fit(model, optimizer, 1)
    first = copy.deepcopy(model[0].bias)
    sparsify_(model, Static(0.5)) if becomes == "sparse" else densify_(model)
    if zero != "kept":
        optimizer.zero_grad(zero == "none")
    gradients(model, 1)
    with pytest.raises(RuntimeError, match="optimizer: it holds .*would not train"):
        optimizer.step()
    assert torch.equal(model[0].bias, first)
    others.add_param_group({"params": next(model[0].parameters())})  # it holds both
    others.step()


@pytest.mark.parametrize("becomes", ["sparse", "dense"])
def test_what_was_replaced_may_be_trained_elsewhere(becomes):
    """As a teacher's: the layer is another model's, too."""
    model = plain() if becomes == "sparse" else Static(0.5).apply(plain())
    teacher = nn.Sequential(*model)
    optimizer = torch.optim.SGD(teacher.parameters(), 1e-2)
    fit(teacher, optimizer, 1)
    sparsify_(model, Static(0.5)) if becomes == "sparse" else densify_(model)
    gradients(model, 1)
    fit(teacher, optimizer, 2)


def sparse(model: nn.Module) -> None:
    sparsify_(model, Static(0.5), prune_again=True)


@pytest.mark.parametrize("older", [0, 1, 2])
def test_an_optimizer_of_what_was_replaced_several_times(older):
    """It is told whatever stands there by now, and adopts that, if it has state that can."""
    model, changes = plain(), [sparse, densify_, sparse]
    for change in changes[:older]:
        change(model)
    optimizer = torch.optim.SGD(model.parameters(), 1e-2, momentum=0.9)
    fit(model, optimizer, 1)
    for change in changes[older:]:
        change(model)
    before = model[0].values.detach().clone()
    with pytest.raises(RuntimeError, match="optimizer: it holds the .* that SparseLinear"):
        fit(model, optimizer, 1)
    if older == 1:
        with pytest.raises(ValueError, match="'momentum_buffer' for the values that a layer had"):
            adopt_values_(optimizer)
        optimizer.state.clear()
    fit(model, adopt_values_(optimizer), 1)
    assert not torch.equal(before, model[0].values)


def test_an_optimizer_older_than_the_sparse_model_is_told_what_to_do():
    model = plain()
    optimizer = torch.optim.SGD(model.parameters(), 1e-2)
    sparse(model)
    densify_(model, optimizer)
    with pytest.raises(RuntimeError, match="older than the sparse model to adopt_values_ first"):
        fit(model, optimizer, 1)


class Failing(Static):
    def mask(self, name: str, weight: torch.Tensor) -> torch.Tensor:
        if name == "2":
            raise ZeroDivisionError
        return super().mask(name, weight)


@pytest.mark.parametrize("is_group", [False, True])
def test_nobody_adopts_layers_of_what_failed(is_group):
    """Even where the exception keeps them alive, as a notebook's last one does."""
    model = plain()
    optimizer = torch.optim.SGD(model.parameters(), 1e-2)
    with pytest.raises((ZeroDivisionError, ValueError)) as kept:
        if is_group:
            Group([Static(0.5, param_filter="0"), Static(0.5, param_filter="no")]).apply(model)
        else:
            sparsify_(model, Failing(0.5))
    held = [*optimizer.param_groups[0]["params"]]
    adopt_values_(optimizer)
    assert all(map(torch.equal, held, optimizer.param_groups[0]["params"]))
    assert kept.tb is not None


@pytest.mark.parametrize("before", [lambda: Static(0.5), lambda: SET(0.5)])
def test_another_algorithm_that_follows_nobody(before):
    """It says so although the optimizer is known."""
    model, optimizer = start(before(), plain())
    fit(model, optimizer, 1)
    (algorithm := SET(0.5)).apply(model)
    with pytest.raises(RuntimeError, match=r"SET: .* values of 0, 2, but .* apply"):
        fit(model, optimizer, 2)
    assert algorithm.steps == 0


def test_state_of_an_optimizer_that_nobody_follows_moves_too():
    model, first = start(algorithm := SET(0.75, update={"freq": 2}), plain())
    second = torch.optim.AdamW(model.parameters(), 1e-2)
    fit(model, first, 1)
    fit(model, second, 1, 1)
    before, moment = places_of(model[0]), second.state[model[0].values]["exp_avg"].clone()
    fit(model, first, 1, 2)
    assert algorithm.steps == 2
    stays = torch.isin(places_of(model[0]), before)
    moved = second.state[model[0].values]["exp_avg"]
    assert not stays.all() and not moved[~stays].any()
    assert torch.equal(moved[stays], moment[torch.isin(before, places_of(model[0]))])


@pytest.mark.parametrize("how", ["taken", "dense"])
def test_an_algorithm_does_not_wait_for_optimizers_of_what_it_gave_up(how):
    model = nn.ModuleList([plain(), plain()])
    (algorithm := SET(0.75, update={"freq": 2})).apply(model)
    parts = [algorithm.apply(torch.optim.AdamW(m.parameters(), 1e-2)) for m in model]
    stale = torch.optim.AdamW(model[0].parameters(), 1e-2)
    for part, optimizer in zip(model, (*parts, stale), strict=False):
        fit(part, optimizer, 1)
    fit(model[0], stale, 1)
    densify_(model[0], parts[0]) if how == "dense" else Static(0.75).apply(model[0])
    fit(model[1], parts[1], 2)
    assert algorithm.steps == 3 and list(algorithm.layers) == ["1.0", "1.2"]


def test_former_algorithms_are_freed():
    model = plain()
    optimizer = torch.optim.SGD(model.parameters(), 1e-2)
    kept = []
    for _ in range(3):
        algorithm = IterativePruning(0.5, rounds=2, freq=10, rewind=1)
        algorithm.apply(model, prune_again=True)
        algorithm.apply(optimizer)
        fit(model, optimizer, 2)
        kept.append(weakref.ref(algorithm))
    assert [ref() for ref in kept] == [None, None, algorithm]
    layer = weakref.ref(model[0])
    densify_(model, optimizer)
    fit(model, optimizer, 1)
    assert layer() is None and not algorithm._early and not algorithm._early_others


RISING = {"type": "linear", "init": 0.0, "slope": 0.01}


@pytest.mark.parametrize(
    "make",
    [
        lambda: RigL(0.5),
        lambda: SET(0.5, update=lambda step: step % 3 == 0),
        lambda: GMP(RISING),
        lambda: IterativePruning(0.5, rounds=1, freq=9),
        lambda: Group({"0": SET(0.5), "2": Static(0.5)}),
    ],
    ids=["rigl", "set", "gmp", "iterative", "group"],
)
def test_an_algorithm_that_nobody_kept_is_told(make):
    model = make().apply(plain())
    before = model[0].values.detach().clone()
    with pytest.raises(RuntimeError, match="steps the values of 0.* algorithm is no longer there"):
        fit(model, torch.optim.SGD(model.parameters(), 1e-2), 1)
    assert torch.equal(before, model[0].values)
    Static(0.5, init_method="from_zeros").apply(model)  # as the error says
    fit(model, torch.optim.SGD(model.parameters(), 1e-2), 1)
    layer = weakref.ref(model[0])
    del model
    assert layer() is None


def test_an_algorithm_that_nobody_kept_is_told_only_where_it_would_do_something():
    for algorithm in (Static(0.5), SET(0.5, update={"steps": [0]})):
        model = algorithm.apply(plain())
        del algorithm
        fit(model, torch.optim.SGD(model.parameters(), 1e-2), 2)
    model = (algorithm := SET(0.5, update={"freq": 2, "stop": 9})).apply(plain())
    algorithm.load_state_dict(algorithm.state_dict() | {"steps": 9})  # past its last update
    del algorithm
    fit(model, torch.optim.SGD(model.parameters(), 1e-2), 2)
    frozen = SET(0.5, param_filter="0").apply(plain())
    frozen[0].requires_grad_(False)
    fit(frozen, torch.optim.SGD(frozen.parameters(), 1e-2), 2)
    (algorithm := SET(0.5)).apply(model)
    optimizer = algorithm.apply(torch.optim.SGD(model.parameters(), 1e-2))
    before, ref = places_of(model[0]), weakref.ref(algorithm)
    del algorithm  # the optimizer keeps it
    with pytest.raises(ValueError, match="param_filter: 'no' matches no layer"):
        Group([SET(0.5, param_filter="0"), SET(0.5, param_filter="no")]).apply(model)
    fit(model, optimizer, 1)
    assert ref() is not None and not torch.equal(before, places_of(model[0]))


def test_rewinding_refuses_values_that_another_algorithm_moved():
    model = plain()
    group = Group(
        {"0": SET(0.5, update={"freq": 1}), "2": IterativePruning(0.6, rounds=2, freq=3, rewind=1)}
    )
    optimizer = group.apply(torch.optim.SGD(group.apply(model).parameters(), 1e-2))
    fit(model, optimizer, 2)
    before = model[0].values.detach().clone()
    with pytest.raises(RuntimeError, match="rewind: the values of SparseLinear.* another pattern"):
        fit(model, optimizer, 1)
    assert torch.equal(before, model[0].values)
    state = group.state_dict()["algorithms"][1]
    again = IterativePruning(0.6, rounds=2, freq=3, rewind=1, param_filter="2")
    again.apply(model)
    again.apply(optimizer)
    again.load_state_dict(state)
    with pytest.raises(RuntimeError, match="rewind: the values of SparseLinear.* another pattern"):
        fit(model, optimizer, 1)


def test_an_update_that_lbfgs_cannot_follow_is_refused_before_the_step():
    model = (algorithm := SET(0.75, update={"freq": 1})).apply(plain())
    optimizer = algorithm.apply(torch.optim.LBFGS(model.parameters()))
    before = model[0].values.detach().clone()
    with pytest.raises(RuntimeError, match="sparsity: LBFGS keeps the steps of all parameters"):
        fit_closed(model, optimizer, 1)
    assert torch.equal(before, model[0].values)


def test_densify_refuses_state_of_another_kind():
    with pytest.raises(ValueError, match="densify_: Adafactor keeps other state for a matrix"):
        densified(torch.optim.Adafactor, 1)


# torch.compile


@pytest.fixture
def frames():
    """Compiles whole graphs, and counts them."""
    torch._dynamo.reset()
    counter = torch._dynamo.testing.CompileCounterWithBackend("aot_eager")
    yield counter
    torch._dynamo.reset()


def test_pruning_compiles_no_graph_for_each_size(frames):
    algorithm = IterativePruning(0.8, rounds=12, freq=1)
    model, optimizer = start(algorithm, plain())
    twin, twins = start(IterativePruning(0.8, rounds=12, freq=1), plain())
    compiled = torch.compile(model, fullgraph=True, backend=frames)
    sizes = set()
    for step in range(13):
        fit(compiled, optimizer, 1, step)
        fit(twin, twins, 1, step)
        sizes.add(layers(model)[0].values.shape[0])
    assert len(sizes) >= 12 and frames.frame_count <= 2
    for a, b in zip(model.parameters(), twin.parameters(), strict=True):
        torch.testing.assert_close(a, b)


def test_layers_of_many_sizes_share_a_graph(frames):
    for nnz in range(3, 15):
        mask = torch.arange(6 * 9).view(6, 9) < nnz
        layer = SparseLinear.from_linear(nn.Linear(9, 6), mask)
        layer.compile(fullgraph=True, backend=frames)
        x = torch.randn(4, 9)
        torch.testing.assert_close(layer(x), F.linear(x, layer.weight.to_dense(), layer.bias))
    assert frames.frame_count <= 2


@pytest.mark.parametrize("backend", ["inductor", "eager"])
def test_rigl_under_compile_does_what_it_does_without(backend):
    """The first update comes long after the first compilation."""
    torch._dynamo.reset()
    algorithm = RigL(0.75, update={"freq": 5})
    model, optimizer = start(algorithm, plain())
    twin, twins = start(RigL(0.75, update={"freq": 5}), plain())
    first = patterns(model)
    compiled = torch.compile(model, fullgraph=True, backend=backend)
    if backend == "eager":  # the whole step, too
        step = torch.compile(optimizer.step, backend=backend)
        fit(compiled, type("Stepped", (), {"step": staticmethod(step)}), 12)
    else:
        fit(compiled, optimizer, 12)
    fit(twin, twins, 12)
    assert algorithm.steps == 12
    assert patterns(model) == patterns(twin) != first
    torch.testing.assert_close(model[0].values, twin[0].values, atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize("use_reentrant", [False, True])
def test_rigl_under_activation_checkpointing(use_reentrant):
    class Checkpointed(nn.Module):
        def __init__(self, inner):
            super().__init__()
            self.inner = inner

        def forward(self, x):
            return checkpoint(self.inner, x.requires_grad_(), use_reentrant=use_reentrant)

    model, optimizer = start(RigL(0.75, update={"freq": 2}), plain())
    twin, twins = start(RigL(0.75, update={"freq": 2}), plain())
    fit(Checkpointed(model), optimizer, 4)
    fit(twin, twins, 4)
    assert patterns(model) == patterns(twin)


def test_rigl_under_functorch():
    """Gradients of torch.func, put into .grad by hand."""
    model, optimizer = start(RigL(0.75, update={"freq": 2}), plain())
    twin, twins = start(RigL(0.75, update={"freq": 2}), plain())
    for step in range(4):
        x, y = batch(step)
        parameters = dict(model.named_parameters())
        found = torch.func.grad(lambda p: F.mse_loss(torch.func.functional_call(model, p, x), y))(  # noqa: B023
            parameters
        )
        for name, p in parameters.items():
            p.grad = found[name]
        optimizer.step()
    fit(twin, twins, 4)
    assert patterns(model) == patterns(twin)


def test_layers_that_share_their_indices_see_their_own_gradients():
    a = SparseLinear.from_linear(nn.Linear(16, 16), torch.rand(16, 16) < 0.3)
    b = SparseLinear(16, 16, a.row_offsets, a.col_indices, a.values.detach().clone(), a.bias)
    assert a.row_offsets is b.row_offsets
    algorithm = RigL(0.7, update={"freq": 1})
    model = algorithm.apply(nn.ModuleList([a, b]))
    algorithm.apply(torch.optim.SGD(model.parameters(), 0.0))
    x = torch.randn(5, 16)
    a(x).sum().backward()
    torch.testing.assert_close(algorithm._block("0", a, 0, 16), x.sum(0).expand(16, 16))
    assert not algorithm._block("1", b, 0, 16).any()


@pytest.mark.parametrize("set_to_none", [True, False])
def test_gradients_that_were_thrown_away_make_nothing_grow(set_to_none):
    """As those of a generator's loss in a discriminator, or of a step that overflowed."""
    algorithm, twins = (RigL(0.75, update={"freq": 1}) for _ in range(2))
    model, optimizer = start(algorithm, plain())
    twin, twin_optimizer = start(twins, plain())
    for step in range(3):
        (model(batch(9)[0]) * torch.inf).sum().backward()
        optimizer.zero_grad(set_to_none)
        for m in (model, twin):
            for part in range(2):  # micro-batches, which do count
                m(batch(step + part)[0]).square().mean().backward()
        optimizer.step(), twin_optimizer.step()
        optimizer.zero_grad(set_to_none), twin_optimizer.zero_grad()
        assert patterns(model) == patterns(twin)
    assert len(layers(model)[0].values._post_accumulate_grad_hooks) == 1  # the others are gone


@pytest.mark.parametrize("is_loaded", [False, True])
@pytest.mark.parametrize("count", [8, 16])
def test_a_graph_of_another_pattern_has_no_backward_pass(is_loaded, count):
    """Its gradient would have another length than the values, or stand for other places."""
    layer = SparseLinear.from_linear(nn.Linear(8, 8), torch.eye(8, dtype=torch.bool))
    y, other = layer(torch.randn(2, 8)), copy.deepcopy(layer)
    set_pattern(other if is_loaded else layer, torch.arange(count))
    if is_loaded:
        layer.load_state_dict(other.state_dict())
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        y.sum().backward()
    assert layer.values.grad is None


def test_gradients_of_inputs_make_nothing_grow():
    """As of a penalty on them, or an attack."""
    layer = SparseLinear.from_linear(nn.Linear(8, 8, bias=False), torch.rand(8, 8) < 0.5)
    algorithm = RigL(0.5, update={"freq": 1})
    model = algorithm.apply(nn.Sequential(layer))
    algorithm.apply(torch.optim.SGD(model.parameters(), 0.1))
    weight = layer.weight.detach().to_dense().requires_grad_()
    start = torch.randn(5, 8)
    for product in (model, lambda x: F.linear(x, weight)):
        x = start.clone().requires_grad_()
        (attack,) = torch.autograd.grad(product(x).sin().sum(), x)
        x = (x + attack.sign()).detach().requires_grad_()
        (slope,) = torch.autograd.grad(product(x).sin().sum(), x, create_graph=True)
        (product(x).square().sum() + slope.square().sum()).backward()
    torch.testing.assert_close(algorithm._block("0", layer, 0, 8), weight.grad)


def test_rigl_sees_layers_that_were_moved_before_an_update():
    algorithm = RigL(0.75, update={"freq": 1})
    model, optimizer = start(algorithm, plain())
    before = patterns(model)
    model.share_memory()
    fit(model, optimizer, 1)
    assert patterns(model) != before


def test_layers_that_share_their_values_are_refused():
    """Moved once for each layer, they would lie in the places of neither."""
    first = SparseLinear.from_linear(nn.Linear(8, 8, bias=False), torch.rand(8, 8) < 0.5)
    model = nn.Sequential(first, copy.copy(first))
    model[1]._buffers, model[1]._parameters = dict(first._buffers), dict(first._parameters)
    algorithm = SET(0.5, update={"freq": 1})
    model = algorithm.apply(model)
    optimizer = algorithm.apply(torch.optim.SGD(model.parameters(), 0.1))
    before = first.to_linear().weight.detach().clone()
    model(torch.ones(2, 8)).sum().backward()
    with pytest.raises(RuntimeError, match="0 and 1 share their values"):
        optimizer.step()
    assert torch.equal(first.to_linear().weight, before)


def test_gradients_that_nobody_saw_are_an_error():
    """As those of a replayed CUDA graph."""
    algorithm = RigL(0.75, update={"freq": 1})
    model, optimizer = start(algorithm, plain())
    before = patterns(model)
    for p in model.parameters():
        p.grad = torch.ones_like(p)
    with pytest.raises(RuntimeError, match="values of 0, 2 have gradients, but .* not seen"):
        optimizer.step()
    assert patterns(model) == before
    gradients(model, 0)
    algorithm._seen["2"]._noted.clear()
    with pytest.warns(UserWarning, match="values of 2 have gradients.* keep their patterns"):
        optimizer.step()
    assert patterns(model)[0] != before[0]


# CUDA graphs


@pytest.fixture
def captured(monkeypatch):
    """Says of one layer that a CUDA graph reads its pattern."""

    def note(layer: SparseLinear) -> None:
        t = layer.col_indices
        monkeypatch.setitem(derived._captured, id(t), weakref.ref(t))

    return note


def test_a_captured_pattern_does_not_change(captured):
    algorithm = SET(0.75, update={"freq": 1})
    model, optimizer = start(algorithm, plain())
    before, state = patterns(model), copy.deepcopy(model.state_dict())
    captured(model[2])
    with pytest.raises(RuntimeError, match="2: a captured CUDA graph reads the pattern"):
        fit(model, optimizer, 1)
    with pytest.raises(RuntimeError, match="a captured CUDA graph reads the pattern"):
        set_pattern(model[2], torch.arange(9))
    assert patterns(model) == before
    model.load_state_dict(state)  # its own pattern: other values are what a graph reads anew
    assert model[2].col_indices is not None and derived.is_captured(model[2].col_indices)
    other = Static(0.5).apply(plain()).state_dict()
    values = model[2].values.detach().clone()
    with pytest.raises(RuntimeError, match=r"2\.col_indices: a captured CUDA graph"):
        model.load_state_dict(other)
    assert patterns(model)[1] == before[1] and torch.equal(model[2].values, values)
    forget_graphs_(model)
    model.load_state_dict(other)
    assert patterns(model)[1] != before[1]


def test_captures_that_pass(captured):
    """Of a sampler, whose graph is gone when it has its tokens; others stay."""
    first, second = (Static(0.75).apply(plain())[2] for _ in range(2))
    captured(first)
    with derived.passing_captures():
        captured(second)
    assert derived.is_captured(first.col_indices) and not derived.is_captured(second.col_indices)


@pytest.mark.gpu
def test_a_graph_that_was_captured_stays_right_or_its_pattern_stays():
    model = Static(0.75).apply(plain()).cuda()
    x = batch(0)[0].cuda()
    with torch.no_grad():
        model(x)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            y = model(x)
        before = patterns(model)
        with pytest.raises(RuntimeError, match="a captured CUDA graph reads the pattern"):
            set_pattern(model[0], torch.arange(9, device="cuda"))
        assert patterns(model) == before
        model[0].values.mul_(2)
        graph.replay()
        torch.testing.assert_close(y, model(x))


@pytest.mark.gpu
@pytest.mark.parametrize("backend", ["inductor", None])
def test_patterns_move_on_a_gpu_as_on_a_cpu(backend):
    runs = []
    for device in ("cpu", "cuda"):
        torch._dynamo.reset()
        algorithm = RigL(0.75, update={"freq": 2})
        model = algorithm.apply(plain()).to(device)
        optimizer = algorithm.apply(torch.optim.SGD(model.parameters(), 1e-2))
        average = AveragedModel(model, use_buffers=True, avg_fn=get_ema_avg_fn(DECAY))
        call = torch.compile(model, backend=backend) if backend and device == "cuda" else model
        for step in range(4):
            x, y = (t.to(device) for t in batch(step))
            optimizer.zero_grad()
            F.mse_loss(call(x), y).backward()
            optimizer.step()
            average.update_parameters(model)
        assert patterns(average) == patterns(model)
        runs.append(average.cpu()(batch(0)[0]))
    torch.testing.assert_close(*runs, atol=1e-3, rtol=1e-3)


def test_kernels_are_told_which_patterns_will_change_soon():
    model = nn.Sequential(nn.Linear(16, 8), nn.Linear(8, 4))
    algorithm = SET(0.5, update={"steps": [0, 2, 2 + 2 * SOON]})
    algorithm.apply(model)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)

    def are_passing():
        (found,) = {derived.is_passing(layer.row_offsets) for layer in model}
        return found

    assert not are_passing()
    algorithm.apply(optimizer)
    seen = [are_passing()]
    for _ in range(2):
        model(torch.ones(1, 16)).sum().backward()
        optimizer.step()
        seen.append(are_passing())
    assert seen == [True, True, False]
    algorithm.load_state_dict({"steps": 1 + 2 * SOON})
    assert are_passing()
