"""Sparsity algorithms on whole models: budgets, schedules, dynamic patterns, optimizer state."""

import copy
import math
import warnings

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from sparsekern import SparseLinear, SparseTensor, densify_, sparsify_
from sparsekern.kernels import observed
from sparsekern.nn import adopt_values_
from sparsekern.sparsity import (
    GMP,
    SET,
    Group,
    IterativePruning,
    Magnitude,
    RigL,
    SparseGPT,
    Static,
    Wanda,
    configure,
)
from sparsekern.sparsity.budget import budgets
from sparsekern.sparsity.pattern import places_of, set_pattern
from sparsekern.sparsity.schedules import schedule, update_steps
from sparsekern.sparsity.select import generator, largest, largest_of_each, random_outside
from sparsekern.sparsity.sparsegpt import sparsegpt

SIZES = {"up": (48, 16), "down": (16, 48), "out": (8, 16)}


class Net(nn.Module):
    def __init__(self):
        super().__init__()
        for name, (n, k) in SIZES.items():
            setattr(self, name, nn.Linear(k, n))
        self.head = nn.Linear(8, 4)

    def forward(self, x):
        return self.head(self.out(x + self.down(F.relu(self.up(x)))))


def net(seed: int = 0) -> Net:
    torch.manual_seed(seed)
    return Net()


def batch(step: int, rows: int = 32) -> tuple[torch.Tensor, torch.Tensor]:
    x = torch.randn(rows, 16, generator=torch.Generator().manual_seed(step))
    return x, x[:, :4].sin() + x[:, 4:8]


def fit(model, optimizer, steps: int, first: int = 0) -> list[float]:
    losses = []
    for step in range(first, first + steps):
        x, y = batch(step)
        optimizer.zero_grad()
        loss = F.mse_loss(model(x), y)
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    return losses


def adamw(model, **settings):
    return torch.optim.AdamW(model.parameters(), **{"lr": 1e-2, "weight_decay": 0.1} | settings)


def start(algorithm, seed: int = 0):
    model = algorithm.apply(net(seed))
    return model, algorithm.apply(adamw(model))


def nnz(model) -> dict[str, int]:
    return {n: m.values.shape[0] for n, m in model.named_modules() if isinstance(m, SparseLinear)}


def patterns(model) -> dict[str, list[int]]:
    modules = model.named_modules()
    return {n: places_of(m).tolist() for n, m in modules if isinstance(m, SparseLinear)}


# Choices


def test_largest_takes_the_first_of_equals_and_nan():
    scores = torch.tensor([1.0, 3.0, 3.0, math.nan, 3.0, 0.0])
    assert largest(scores, 3).tolist() == [1, 2, 3]
    assert largest(scores, 0).tolist() == [] and largest(scores, 9).tolist() == list(range(6))
    assert largest(torch.randn(1000).bfloat16(), 137).shape == (137,)


def test_largest_of_each_is_one_choice():
    scores = {"a": torch.rand(3, 5), "b": torch.rand(7), "c": torch.zeros(4)}
    found = largest_of_each(scores, 9)
    together = torch.cat([s.flatten() for s in scores.values()]).sort(descending=True).values
    chosen = torch.cat([scores[n].flatten()[found[n]] for n in scores])
    assert torch.equal(chosen.sort(descending=True).values, together[:9])


def test_random_outside_is_outside_and_uniform():
    kept = torch.tensor([0, 1, 4, 9])
    counts = torch.zeros(10)
    for seed in range(600):
        new = random_outside(kept, 10, 3, generator(seed))
        assert new.unique().shape == (3,) and not torch.isin(new, kept).any()
        counts[new] += 1
    assert (counts[[2, 3, 5, 6, 7, 8]] - 300).abs().max() < 5 * (600 * 0.25) ** 0.5


@pytest.mark.parametrize("sparsity", [0.0, 0.3, 0.75, 0.97, 1.0])
@pytest.mark.parametrize("kind", ["uniform", "erk"])
def test_budgets_are_exact(kind, sparsity):
    shapes = SIZES | {"long": (1, 500)}
    counts = budgets(shapes, sparsity, kind)
    if kind == "uniform":
        assert counts == {name: round((1 - sparsity) * n * k) for name, (n, k) in shapes.items()}
    else:
        total = sum(n * k for n, k in shapes.values())
        assert sum(counts.values()) == round((1 - sparsity) * total)
    assert all(0 <= counts[name] <= n * k for name, (n, k) in shapes.items())


def test_erk_keeps_small_layers_denser():
    counts = budgets(SIZES, 0.8, "erk")
    density = {name: counts[name] / (n * k) for name, (n, k) in SIZES.items()}
    assert density["out"] > density["up"] == pytest.approx(density["down"], abs=0.01)
    scale = [density[name] * n * k / (n + k) for name, (n, k) in SIZES.items()]
    assert scale == pytest.approx([scale[0]] * 3, rel=0.02)


# Schedules

SCHEDULES = [
    ("linear", {"type": "linear", "init": 0.0, "slope": 0.0075}, 0.0, 0.75),
    ("cubic", {"type": "cubic", "init": 0.1, "final": 0.838, "steps": 100}, 0.1, 0.838),
    ("exp", {"type": "exp", "init": 0.0, "gamma": -0.03, "final": 0.9}, 0.0, 0.855191),
    ("cosine", {"type": "cosine", "init": 0.0, "half_period": 100, "minimum": 0.9}, 0.0, 0.9),
    ("power", {"type": "power", "init": 0.9, "beta": 0.99}, 0.9, 0.329429),
]


@pytest.mark.parametrize(("name", "spec", "first", "last"), SCHEDULES)
def test_schedules_and_gmp_hit_their_targets_to_one_weight(name, spec, first, last):
    at = schedule("sparsity", spec)
    assert (at(0), at(100)) == (pytest.approx(first, abs=1e-6), pytest.approx(last, abs=1e-6))
    algorithm = GMP(spec, update={"freq": 20, "stop": 101})
    model, optimizer = start(algorithm)
    for done in range(20, 101, 20):
        fit(model, optimizer, 20, done - 20)
        want = {n: round((1 - at(done)) * a * b) for n, (a, b) in SIZES.items()}
        assert all(abs(count - want[n]) <= 1 for n, count in nnz(model).items()), done
    assert nnz(model).keys() == SIZES.keys()


@pytest.mark.parametrize("distribution", ["erk", "global"])
def test_gmp_with_a_budget_for_all_layers(distribution):
    spec = {"type": "cubic", "init": 0.0, "final": 0.8, "steps": 10}
    algorithm = GMP(spec, "magnitude", distribution=distribution, update={"freq": 5, "stop": 11})
    model, optimizer = start(algorithm)
    fit(model, optimizer, 12)
    total = sum(n * k for n, k in SIZES.values())
    assert sum(nnz(model).values()) == round(0.2 * total)
    assert algorithm.achieved == pytest.approx(0.8, abs=1 / total)


def test_global_magnitude_has_one_threshold():
    model, dense = net(), net()
    Magnitude(0.7, distribution="global").apply(model)
    kept = torch.cat([model.get_submodule(n).values.abs() for n in SIZES])
    weights = torch.cat([dense.get_submodule(n).weight.flatten().abs() for n in SIZES])
    assert kept.shape[0] == round(0.3 * weights.shape[0])
    assert torch.equal(kept.sort().values, weights.sort().values[-kept.shape[0] :])


def test_update_steps():
    every = update_steps({"freq": 100, "stop": 350})
    assert [step for step in range(1, 1000) if every(step)] == [100, 200, 300]
    late = update_steps({"freq": 10, "start": 25, "stop": 45})
    assert [step for step in range(100) if late(step)] == [25, 35]
    assert [step for step in range(9) if update_steps({"steps": [2, 5]})(step)] == [2, 5]
    assert all(map(update_steps(None), range(5)))


# Dynamic patterns


def dense_gradients(model, x, y) -> dict[str, torch.Tensor]:
    """d loss / d W [N, K] of the whole weight, by a dense twin."""
    twin = densify_(copy.deepcopy(model))
    F.mse_loss(twin(x), y).backward()
    return {name: twin.get_submodule(name).weight.grad for name in SIZES}


@pytest.mark.parametrize("block_elems", [1, 100, 2**22])
def test_rigl_grows_the_largest_dense_gradients(block_elems):
    """Against brute force: drop by magnitude, then argsort of the whole dense gradient."""
    algorithm = RigL(0.8, update={"freq": 3}, drop_fraction=0.4, block_elems=block_elems)
    model, optimizer = start(algorithm)
    fit(model, optimizer, 2)
    gradients = dense_gradients(model, *batch(2))
    before = patterns(model)
    copied, again = copy.deepcopy((model, optimizer.state_dict()))
    shadow = adamw(copied)
    shadow.load_state_dict(again)
    fit(copied, shadow, 1, 2)  # the weights after the step, without the update
    fit(model, optimizer, 1, 2)
    for name in SIZES:
        layer = copied.get_submodule(name)
        count = layer.values.shape[0]
        drop = round(0.4 * count)
        order = layer.values.detach().abs().argsort(descending=True, stable=True)
        survivors = places_of(layer)[order[: count - drop]]
        score = gradients[name].abs().flatten()
        score[survivors] = -1
        grown = score.argsort(descending=True, stable=True)[:drop]
        want = torch.cat([survivors, grown]).sort().values
        got = places_of(model.get_submodule(name))
        assert torch.equal(got, want), name
        assert got.tolist() != before[name]
        new = ~torch.isin(got, torch.tensor(before[name]))
        assert new.any() and (model.get_submodule(name).values[new] == 0).all()


def test_rigl_never_holds_the_whole_gradient(monkeypatch):
    algorithm = RigL(0.8, update={"freq": 1}, block_elems=64)
    model, optimizer = start(algorithm)
    block, sizes = algorithm._block, []

    def noted(*args):
        sizes.append(block(*args).numel())
        return block(*args)

    monkeypatch.setattr(algorithm, "_block", noted)
    fit(model, optimizer, 1)
    assert max(sizes) <= 64 and sum(sizes) == sum(n * k for n, k in SIZES.values())


def test_rigl_keeps_inputs_on_update_steps_alone_and_sums_micro_batches():
    algorithm = RigL(0.8, update={"freq": 2})
    model, optimizer = start(algorithm)
    assert not algorithm._seen
    fit(model, optimizer, 1)
    assert algorithm._seen.keys() == SIZES.keys()
    for step in (5, 6):
        F.mse_loss(model(batch(step)[0]), batch(step)[1]).backward()
    want = dense_gradients(model, *batch(5)), dense_gradients(model, *batch(6))
    layer = model.get_submodule("up")
    got = algorithm._block("up", layer, 3, 7)
    torch.testing.assert_close(got, (want[0]["up"] + want[1]["up"])[3:7])
    optimizer.step()
    assert not algorithm._seen and not observed.is_observed(layer.row_offsets)


def test_rigl_skips_a_gradient_that_is_not_finite():
    algorithm = RigL(0.8, update={"freq": 1})
    model, optimizer = start(algorithm)
    before = patterns(model)
    (model(torch.full((2, 16), math.inf)).sum()).backward()
    for p in model.parameters():
        p.grad.zero_()
    with pytest.warns(UserWarning, match="dense gradient of .* is not finite; the patterns stay"):
        optimizer.step()
    assert patterns(model) == before


def test_rigl_leaves_a_layer_without_gradient_alone():
    algorithm = RigL(0.5, update={"freq": 1})
    model, optimizer = start(algorithm)
    before = patterns(model)
    for p in model.parameters():
        p.grad = torch.zeros_like(p)
    optimizer.step()
    assert patterns(model) == before


@pytest.mark.parametrize("make", [SET, RigL])
def test_dynamic_patterns_keep_their_size_and_repeat_under_a_seed(make):
    def run(seed=0):
        cosine = {"type": "cosine", "init": 0.3, "half_period": 20}
        algorithm = make(0.75, seed=seed, drop_fraction=cosine, update={"freq": 4, "stop": 16})
        model, optimizer = start(algorithm)
        first = patterns(model)
        losses = fit(model, optimizer, 20)
        return losses, first, patterns(model)

    losses, first, last = run()
    assert losses[-1] < losses[0]
    assert first != last
    assert {n: len(p) for n, p in first.items()} == {n: len(p) for n, p in last.items()}
    assert all(p == sorted(set(p)) for p in last.values())
    assert run() == (losses, first, last)
    assert run(seed=1)[2] != last


def test_a_sparsity_schedule_of_a_dynamic_algorithm():
    """An update drops 30 % and grows up to the target, if it is not below it already: of 768
    weights 384, then 269 + 38 = 307, 215 + 15 = 230, 161 where 154 were wanted, 113 for 77."""
    spec = {"type": "linear", "init": 0.5, "slope": 0.05}
    model, optimizer = start(SET(spec, update={"freq": 2, "stop": 9}))
    for step, want in enumerate([384, 307, 307, 230, 230, 161, 161, 113, 113]):
        fit(model, optimizer, 1, step)
        assert nnz(model)["up"] == want, step


# Optimizer state


def test_state_follows_its_weights_and_newborns_start_at_zero():
    model, optimizer = start(Static(0.5))
    fit(model, optimizer, 3)
    layer = model.up
    before = {
        k: SparseTensor._trusted(layer.row_offsets, layer.col_indices, t, 48, 16).to_dense()
        for k, t in {**optimizer.state[layer.values], "values": layer.values.detach()}.items()
        if t.ndim == 1
    }
    assert before.keys() == {"exp_avg", "exp_avg_sq", "values"}
    old, parameter = places_of(layer), layer.values
    new = torch.cat([old[::2], random_outside(old, 48 * 16, 50, generator(1))]).sort().values
    set_pattern(layer, new, [optimizer])
    assert layer.values is parameter and parameter.shape == new.shape
    assert torch.equal(places_of(layer), new)
    stays = torch.isin(new, old)
    for key, dense in before.items():
        now = parameter.detach() if key == "values" else optimizer.state[parameter][key]
        assert torch.equal(now[stays], dense.flatten()[new[stays]])
        assert (now[~stays] == 0).all()
    SparseTensor(layer.row_offsets, layer.col_indices, parameter, (48, 16))  # a valid pattern
    fit(model, optimizer, 2)


@pytest.mark.parametrize("optimizer", [torch.optim.SGD, torch.optim.AdamW, torch.optim.RMSprop])
def test_pruned_weights_never_revive(optimizer):
    """Under weight decay and momentum: there is no place where they could."""
    settings = {"momentum": 0.9} if optimizer is not torch.optim.AdamW else {}
    algorithm = GMP(
        {"type": "cubic", "init": 0.0, "final": 0.9, "steps": 10}, update={"freq": 2, "stop": 11}
    )
    model = algorithm.apply(net())
    opt = algorithm.apply(optimizer(model.parameters(), lr=1e-3, weight_decay=0.1, **settings))
    removed = {name: set() for name in SIZES}
    for step in range(20):
        before = patterns(model)
        fit(model, opt, 1, step)
        for name, places in patterns(model).items():
            removed[name] |= set(before[name]) - set(places)
            assert not removed[name] & set(places)
    assert all(removed.values())
    zeros = densify_(model).up.weight == 0
    assert zeros.sum() >= len(removed["up"])


def test_state_and_gradients_are_stored_at_nnz():
    model, optimizer = start(Static(0.75))
    fit(model, optimizer, 1)
    for layer in (model.up, model.down):
        assert layer.values.grad.numel() == layer.values.numel() == 48 * 16 // 4
        state = optimizer.state[layer.values]
        assert all(t.numel() in (1, 48 * 16 // 4) for t in state.values())


def test_densify_keeps_the_function_and_the_optimizer_state():
    model, optimizer = start(Static(0.75))
    fit(model, optimizer, 5)
    x, y = batch(5)
    before = model(x)
    values, layer = model.up.values, model.up
    moment = optimizer.state[values]["exp_avg"].clone()
    mask = torch.zeros(48 * 16, dtype=torch.bool).index_fill_(0, places_of(layer), True)
    densify_(model, optimizer)
    torch.testing.assert_close(model(x), before)
    assert values not in optimizer.state
    assert {id(p) for g in optimizer.param_groups for p in g["params"]} == {
        id(p) for p in model.parameters()
    }
    dense = optimizer.state[model.up.weight]["exp_avg"]
    assert dense.shape == (48, 16) and torch.equal(dense.flatten()[mask], moment)
    assert (dense.flatten()[~mask] == 0).all()
    fit(model, optimizer, 1, 5)
    assert (model.up.weight.flatten()[~mask] != 0).any()  # revived, from zero


def test_densify_keeps_values_that_layers_share():
    first = SparseLinear.from_linear(nn.Linear(8, 8), torch.rand(8, 8) < 0.5)
    second = copy.copy(first)
    second._buffers, second._parameters = dict(first._buffers), dict(first._parameters)
    model = nn.Sequential(first, second)
    optimizer = torch.optim.AdamW(model.parameters())
    model(torch.ones(2, 8)).sum().backward()
    optimizer.step()
    before = model(torch.ones(2, 8))
    other = copy.deepcopy(model)
    other[1].row_offsets = torch.full_like(first.row_offsets, first.values.shape[0])
    other[1].row_offsets[0], other[1].col_indices = 0, first.col_indices.sort().values
    with pytest.raises(ValueError, match="densify_: 1 shares its values with another layer"):
        densify_(other)
    assert isinstance(other[0], SparseLinear)
    densify_(model, optimizer)
    assert model[0].weight is model[1].weight
    assert any(p is model[0].weight for p in optimizer.param_groups[0]["params"])
    torch.testing.assert_close(model(torch.ones(2, 8)), before)


def test_state_of_a_single_weight_moves_along():
    model = nn.Sequential(nn.Linear(1, 1))
    optimizer = torch.optim.AdamW(model.parameters())
    for _ in range(2):
        model(torch.ones(2, 1)).sum().backward()
        optimizer.step()
        algorithm = Static(0.0)
        model = algorithm.apply(model)
        algorithm.apply(optimizer)
    assert optimizer.state[model[0].values]["exp_avg"].shape == (1,)


# Pruning by rounds, and at once


def test_iterative_pruning_with_rewinding():
    algorithm = IterativePruning(0.8, rounds=4, freq=5, rewind=2)
    model, optimizer = start(algorithm)
    fit(model, optimizer, 2)
    early = {n: densify_(copy.deepcopy(model)).get_submodule(n).weight.detach() for n in SIZES}
    bias = model.head.bias.detach().clone()
    for done in range(1, 5):
        fit(model, optimizer, 5 if done > 1 else 3, 5 * done)
        density = 0.2 ** (done / 4)
        assert nnz(model) == {name: round(density * n * k) for name, (n, k) in SIZES.items()}
        for name in SIZES:
            layer = model.get_submodule(name)
            assert torch.equal(layer.values.detach(), early[name].flatten()[places_of(layer)])
        assert torch.equal(model.head.bias.detach(), bias) and not optimizer.state
    fit(model, optimizer, 10)
    assert algorithm.achieved == pytest.approx(0.8, abs=1e-3)


def test_iterative_pruning_without_rewinding_goes_on():
    model, optimizer = start(IterativePruning(0.75, rounds=2, freq=3))
    losses = fit(model, optimizer, 30)
    assert nnz(model) == {name: n * k // 4 for name, (n, k) in SIZES.items()}
    assert losses[-1] < losses[0] and optimizer.state


def test_rewinding_in_several_processes_is_refused(monkeypatch):
    monkeypatch.setattr("sparsekern.sparsity.gradual.is_distributed", lambda: True)
    with pytest.raises(NotImplementedError, match="rewind: not available with several processes"):
        start(IterativePruning(0.75, rounds=2, freq=3, rewind=1))


def trained() -> Net:
    model = net()
    fit(model, adamw(model, weight_decay=0.0), 150)
    return model


def calibration() -> list[torch.Tensor]:
    # Inputs of very different scale, where magnitude alone is a bad guide.
    return [batch(step, 64)[0] for step in range(900, 904)]


def calibrated_loss(model) -> float:
    return sum(F.mse_loss(model(batch(s, 64)[0]), batch(s, 64)[1]).item() for s in range(900, 904))


def one_shot(make, sparsity: float, model: Net) -> Net:
    settings = {} if make is Magnitude else {"calibration": calibration()}
    return make(sparsity, **settings).apply(model)


@pytest.mark.parametrize("make", [Magnitude, Wanda, SparseGPT])
def test_one_shot_counts_and_repeated_pruning(make):
    model = one_shot(make, 0.5, trained())
    first = patterns(model)
    assert nnz(model) == {name: n * k // 2 for name, (n, k) in SIZES.items()}
    one_shot(make, 0.8, model)
    for name, (n, k) in SIZES.items():
        layer = model.get_submodule(name)
        assert layer.values.shape[0] == round(0.2 * n * k)
        assert set(places_of(layer).tolist()) <= set(first[name])
    with pytest.raises(ValueError, match="sparsity: up stores 154 weights already, fewer than the"):
        one_shot(make, 0.5, model)


def test_sparsegpt_loses_least():
    dense = trained()
    losses = {
        make: calibrated_loss(one_shot(make, 0.6, copy.deepcopy(dense)))
        for make in (Magnitude, Wanda, SparseGPT)
    }
    assert losses[SparseGPT] < 0.9 * losses[Magnitude]
    assert losses[SparseGPT] < losses[Wanda]


def test_wanda_against_its_formula():
    model = trained()
    dense = copy.deepcopy(model)
    one_shot(Wanda, 0.5, model)
    x = torch.cat(calibration())
    scores = dense.up.weight.abs() * x.norm(dim=0)
    kept = scores >= scores.topk(8, dim=1).values[:, -1:]
    assert torch.equal(model.up.weight.to_dense(), dense.up.weight * kept)


def test_sparsegpt_reconstructs_better_than_masking(monkeypatch):
    """||X (W - W')||: less than without the correction; exact at sparsity 0."""
    monkeypatch.setattr("sparsekern.sparsity.sparsegpt.COLUMNS", 16)
    mix = torch.randn(40, 40) / 6
    x, w = torch.randn(500, 40) @ mix, torch.randn(24, 40)
    everywhere = torch.ones(24, 40, dtype=torch.bool)
    [(new, places)] = sparsegpt([w], [everywhere], x.t() @ x, [24 * 20])
    mask = torch.zeros(24 * 40, dtype=torch.bool).index_fill_(0, places, True).view(24, 40)
    assert mask.sum() == 24 * 20 and torch.equal(new != 0, mask)

    def error(other):
        return (x @ (w - other).t()).norm()

    magnitude = torch.zeros(24 * 40).index_fill_(0, largest(w.abs().flatten(), 480), 1).view(24, 40)
    assert error(new) < 0.8 * error(w * mask) and error(new) < 0.8 * error(w * magnitude)
    [(same, _)] = sparsegpt([w], [everywhere], x.t() @ x, [24 * 40])
    torch.testing.assert_close(same, w)


class Branches(nn.Module):
    """Two layers in a row, and one that some inputs do not reach."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.a, self.b, self.c = nn.Linear(8, 8), nn.Linear(8, 8), nn.Linear(8, 8)
        self.frozen = nn.Dropout(0.5).eval()

    def forward(self, x, use_c=True):
        y = self.frozen(self.b(self.a(x) * 1e20 if x.min() < -50 else self.a(x)))
        return self.c(y) if use_c else y


def unreached(x):
    return [(x, False)]


def not_finite(x):
    return [torch.full_like(x, math.inf)]


def too_large(x):
    return [x - 100]


FAILURES = [
    (unreached, "calibration: no input reached c"),
    (not_finite, "calibration: the inputs of a are not finite"),
    (too_large, "calibration: the squared inputs of b overflow float32"),
]
NO_FACTOR = (None, "calibration: the Hessian of the inputs of c has no Cholesky factor")


@pytest.mark.parametrize("is_sparse", [False, True])
@pytest.mark.parametrize(
    ("make", "inputs", "message"),
    [(make, *failure) for make in (Wanda, SparseGPT) for failure in FAILURES]
    + [(SparseGPT, *NO_FACTOR)],
)
def test_one_shot_pruning_that_fails_leaves_the_model(
    make, inputs, message, is_sparse, monkeypatch
):
    """In whatever layer: weights, patterns, modules, hooks and modes are as before."""
    if inputs is None:
        real, calls = torch.linalg.cholesky, []

        def cholesky(h, **settings):
            calls.append(h)
            if len(calls) == 3:
                raise torch.linalg.LinAlgError("not positive-definite")
            return real(h, **settings)

        monkeypatch.setattr(torch.linalg, "cholesky", cholesky)
    model = Branches().train()
    model.frozen.eval()
    if is_sparse:
        Static(0.3, param_filter=["a", "b"]).apply(model)
    before, modules = copy.deepcopy(model.state_dict()), list(model.modules())
    x = torch.randn(64, 8)
    algorithm = make(0.75, calibration=inputs(x) if inputs else [x])
    with pytest.raises(ValueError, match=message):
        algorithm.apply(model)
    assert list(model.modules()) == modules and not algorithm.layers
    assert all(torch.equal(t, before[name]) for name, t in model.state_dict().items())
    assert model.training and model.a.training and not model.frozen.training
    assert not any(m._forward_pre_hooks for m in modules)


@pytest.mark.parametrize("make", [Wanda, SparseGPT])
def test_calibration_in_every_form(make):
    x = torch.randn(64, 8)
    forms = [[x], [(x, True)], [[x]], [{"x": x, "use_c": True}], iter([x])]
    states = [make(0.5, calibration=form).apply(Branches()).state_dict() for form in forms]
    for state in states[1:]:
        assert all(torch.equal(t, states[0][name]) for name, t in state.items())
    for wrong in ({"x": x}, "text", 3):
        with pytest.raises(ValueError, match="calibration: expected a list of inputs"):
            make(0.5, calibration=wrong)


def test_later_layers_see_the_pruned_earlier_ones():
    """And the replaced modules themselves keep the weights that they had."""
    model, x = Branches(), torch.randn(64, 8)
    dense, old = copy.deepcopy(model), model.a
    Wanda(0.5, calibration=[x]).apply(model)
    assert torch.equal(old.weight, dense.a.weight)
    norms = model.a(x).norm(dim=0)  # of the pruned one
    scores = dense.b.weight.abs() * norms
    kept = scores >= scores.topk(4, dim=1).values[:, -1:]
    assert torch.equal(model.b.weight.to_dense() != 0, kept)


class Fails(Static):
    def _first_places(self, name, weight, count):
        if name == "out":
            raise MemoryError(name)
        return super()._first_places(name, weight, count)


def test_a_group_of_which_one_fails_changes_nothing():
    model = Static(0.3, param_filter="down").apply(net())
    before, modules = copy.deepcopy(model.state_dict()), list(model.modules())
    group = Group([Magnitude(0.6, param_filter="*"), Static(0.5, param_filter="nothing")])
    with pytest.raises(ValueError, match="'nothing' matches no layer"):
        group.apply(model)
    group = Group([Magnitude(0.6, param_filter=["up", "down"]), Fails(0.5, param_filter="out")])
    with pytest.raises(MemoryError):
        group.apply(model)
    assert list(model.modules()) == modules
    assert all(torch.equal(t, before[name]) for name, t in model.state_dict().items())
    assert not group.layers
    optimizer = adamw(Static(0.5).apply(model))
    with pytest.raises(ValueError, match="expected the model before the optimizer"):
        group.apply(optimizer)


@pytest.mark.parametrize("rewind", [None, 1])
def test_an_update_that_fails_changes_nothing(monkeypatch, rewind):
    algorithm = IterativePruning(0.8, rounds=2, freq=2, rewind=rewind)
    model, optimizer = start(algorithm)
    fit(model, optimizer, 1)
    from sparsekern.sparsity import gradual

    calls, states = [], []

    def failing(layer, places, optimizers=()):
        if not calls:
            states.append(copy.deepcopy((model.state_dict(), optimizer.state_dict())))
        calls.append(layer)
        if len(calls) == 2:
            raise MemoryError
        return set_pattern(layer, places, optimizers)

    early = copy.deepcopy(algorithm.state_dict()["early"])
    monkeypatch.setattr(gradual, "set_pattern", failing)
    with pytest.raises(MemoryError):
        fit(model, optimizer, 1, 1)
    weights, state = states[0]
    assert all(torch.equal(t, weights[name]) for name, t in model.state_dict().items())
    for i, moments in optimizer.state_dict()["state"].items():
        assert all(torch.equal(t, state["state"][i][key]) for key, t in moments.items())
    assert all(torch.equal(t, early[name]) for name, t in algorithm.state_dict()["early"].items())


# Which layers


def test_filters_requires_dense_and_head():
    model = net()
    model.down.weight.requires_dense = True
    assert nnz(Static(0.5).apply(model)).keys() == {"up", "out"}
    assert nnz(Static(0.5, param_filter="*.weight").apply(net())).keys() == {*SIZES, "head"}
    assert nnz(Static(0.5, param_filter=["up", "*d.weight"]).apply(net())).keys() == {"up", "head"}
    with pytest.raises(ValueError, match=r"'mlp\*' matches no layer; there are: up, down, out"):
        Static(0.5, param_filter="mlp*").apply(net())


def test_group_gives_each_layer_to_the_first_that_matches():
    group = Group({"up*": Static(0.5), "*": SET(0.75, update={"freq": 2})})
    model = group.apply(net())
    optimizer = group.apply(adamw(model))
    first = patterns(model)
    fit(model, optimizer, 4)
    assert {
        n: len(p) / (a * b)
        for (n, p), (a, b) in zip(first.items(), [*SIZES.values(), (4, 8)], strict=True)
    } == {"up": 0.5, "down": 0.25, "out": 0.25, "head": 0.25}
    last = patterns(model)
    assert last["up"] == first["up"] and last["down"] != first["down"]
    assert [part["steps"] for part in group.state_dict()["algorithms"]] == [4, 4]


def test_an_optimizer_made_too_early():
    model, algorithm = net(), Static(0.5)
    optimizer = adamw(model)
    with pytest.raises(ValueError, match="expected the model before the optimizer"):
        algorithm.apply(optimizer)
    algorithm.apply(model)
    with pytest.raises(ValueError, match="does not hold the values of up; make it after"):
        algorithm.apply(adamw(net()))


@pytest.mark.parametrize("make", [Static, RigL, Group])
def test_an_optimizer_made_before_gets_the_values(make):
    """In the place of the dense weights, with its state at the places that are stored."""
    model, x = net(), torch.randn(8, 16)
    optimizer = adamw(model)
    fit(model, optimizer, 2)
    dense = {n: (p, optimizer.state[p]["exp_avg"].clone()) for n, p in model.named_parameters()}
    algorithm = make({"*": Static(0.5)}) if make is Group else make(0.5)
    algorithm.apply(model)
    optimizer.zero_grad()
    model(x).sum().backward()
    with pytest.raises(RuntimeError, match=r"call sparsekern.nn.adopt_values_\(optimizer\)"):
        optimizer.step()
    with pytest.raises(TypeError, match="optimizer: expected one of torch.optim, got"):
        adopt_values_(model)
    assert algorithm.apply(optimizer) is optimizer
    held = {p for group in optimizer.param_groups for p in group["params"]}
    assert held == set(model.parameters()) and set(optimizer.state) == held
    layer, (weight, momentum) = model.up, dense["up.weight"]
    assert weight not in held
    got = optimizer.state[layer.values]["exp_avg"]
    assert torch.equal(got, momentum.flatten()[places_of(layer)])
    before = layer.values.detach().clone()
    fit(model, optimizer, 1)
    assert not torch.equal(layer.values, before)


# Configs as published


PUBLISHED = """
sparsity:
  algorithm: rigl
  sparsity: 0.75
  init_method: random
  drop_fraction:
    type: cosine
    init: 0.3
    half_period: 3584
  update:
    freq: 100
    stop: 3584
  param_filter:
  - '*proj_[qkv]_dense_layer.weight'
  - '*proj_output_dense_layer.weight'
  - '*linear_layer.weight'
"""


def test_published_blocks_read_as_they_are(tmp_path):
    pytest.importorskip("yaml")
    from sparsekern.sparsity import load_config

    (tmp_path / "rigl75.yaml").write_text(PUBLISHED)
    algorithm = configure(load_config(tmp_path / "rigl75.yaml"), seed=3)
    assert isinstance(algorithm, RigL) and algorithm.seed == 3
    assert algorithm._drop_fraction(1792) == pytest.approx(0.15)
    assert algorithm._updates(3500) and not algorithm._updates(3600)

    class Published(nn.Module):
        def __init__(self):
            super().__init__()
            for name in ("proj_q_dense_layer", "proj_output_dense_layer", "linear_layer", "other"):
                setattr(self, name, nn.Linear(8, 8))

    model = algorithm.apply(nn.ModuleDict({"layer": Published()}))
    assert nnz(model).keys() == {
        f"layer.{name}"
        for name in ("proj_q_dense_layer", "proj_output_dense_layer", "linear_layer")
    }
    set75 = PUBLISHED.replace("rigl", "set")
    (tmp_path / "set75.yaml").write_text(set75)
    assert type(configure(load_config(tmp_path / "set75.yaml"))) is SET


def test_other_forms_of_a_config():
    assert configure(0.75, seed=1) == Static(0.75, seed=1)
    assert configure({"sparsity": 0.9, "init_method": "random"}) == Static(0.9)
    old = configure({"type": "gmp", "schedule": {"type": "exp", "init": 0, "gamma": -0.1}})
    assert isinstance(old, GMP) and old.target(10) == pytest.approx(1 - math.exp(-1))
    kept = [
        configure({"sparsity": 0.5, "init_method": name}).mask("w", net().up.weight)
        for name in ("topk", "magnitude")
    ]
    assert torch.equal(*kept)
    group = configure([{"sparsity": 0.5, "param_filter": "up*"}, {"sparsity": 0.9}])
    model = group.apply(net())
    assert model.up.weight.sparsity == 0.5 and model.down.weight.sparsity == pytest.approx(
        0.9, 0.01
    )


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"sparsity": 0.5, "drop": 1}, "static: expected the keys sparsity, .*, got 'drop'"),
        ({"sparsity": 0.5, "algorithm": "rigg"}, "algorithm: expected one of .*rigl.*, got 'rigg'"),
        ({"algorithm": "rigl"}, "a block needs the key 'sparsity'"),
        ({"sparsity": 0.5, "schedule": 0.5}, "'schedule' and 'sparsity' are the same setting"),
        ({"sparsity": 1.5}, r"sparsity: expected a number in \[0, 1\], got 1.5"),
        ({"sparsity": {"type": "sine"}}, "sparsity: expected a type of .*, got 'sine'"),
        ({"sparsity": {"type": "cosine", "init": 1}}, "of type cosine: half_period missing"),
        ({"sparsity": {"type": "exp", "slope": 1}}, "of type exp: expected the keys .* 'slope'"),
        ({"sparsity": 0.5, "algorithm": "set", "update": {"each": 3}}, "update: .* got 'each'"),
        ({"sparsity": 0.5, "algorithm": "set", "update": {"freq": 0}}, "freq: expected at least 1"),
        ({"sparsity": 0.5, "algorithm": "set", "drop_fraction": 2}, "drop_fraction: .* got 2"),
        ({"sparsity": 0.5, "distribution": "global"}, "global needs init_method magnitude"),
        ({"sparsity": 0.5, "distribution": "even"}, "distribution: expected one of uniform"),
        ({"sparsity": 0.5, "algorithm": "wanda"}, "use `sparsekern prune --method wanda`"),
        ({"sparsity": 0.5, "algorithm": "iterative", "rounds": 0}, "rounds: expected at least 1"),
        ("a lot", "sparsity: expected a number, a block or a list"),
    ],
)
def test_config_errors(settings, message):
    with pytest.raises(ValueError, match=message):
        configure(settings)


def test_a_schedule_that_leaves_the_range_is_held_to_it():
    """As in cstorch.sparse: 0.5, 0.7, 0.9, 1.0, 1.0."""
    model, optimizer = start(GMP({"type": "linear", "init": 0.5, "slope": 0.2}))
    for sparsity in (0.7, 0.9, 1.0, 1.0):
        fit(model, optimizer, 1)
        want = {name: round((1 - sparsity) * n * k) for name, (n, k) in SIZES.items()}
        assert nnz(model) == want


def test_no_warnings_in_a_plain_run():
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        model, optimizer = start(RigL(0.75, update={"freq": 2}))
        fit(model, optimizer, 4)


def test_a_copied_run_goes_on_once_its_optimizer_is_applied():
    model = nn.Sequential(nn.Linear(16, 32), nn.ReLU(), nn.Linear(32, 16))
    algorithm = RigL(0.75, update={"freq": 2}, param_filter="*")
    algorithm.apply(model)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    algorithm.apply(optimizer)
    x = torch.randn(8, 16)

    def train(model, optimizer):
        for _ in range(3):
            optimizer.zero_grad()
            (model(x) - x).square().mean().backward()
            optimizer.step()

    train(model, optimizer)
    twin, its_algorithm, its_optimizer = copy.deepcopy((model, algorithm, optimizer))
    its_algorithm.apply(its_optimizer)
    train(model, optimizer)
    train(twin, its_optimizer)
    assert its_algorithm.steps == algorithm.steps == 6
    for a, b in zip(model.state_dict().values(), twin.state_dict().values(), strict=True):
        assert torch.equal(a, b)


def test_a_pattern_that_is_not_what_was_asked_for_is_told():
    model = Static(0.5).apply(nn.Sequential(nn.Linear(16, 16), nn.Linear(16, 16)))
    with pytest.warns(UserWarning, match="90.0% zeros were asked for, but 2 layers with 50.0% are"):
        Static(0.9).apply(model)
    with pytest.warns(UserWarning, match="sparsify_: all layers are sparse already and keep"):
        sparsify_(model, Static(0.9))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for algorithm in (Static(0.5), Static(0.9, init_method="from_zeros"), Magnitude(0.9)):
            algorithm.apply(model)


def test_what_stays_dense_beside_linear_layers_is_told():
    net = nn.Sequential(nn.Conv2d(3, 8, 3), nn.Flatten(), nn.Linear(32, 8))
    with pytest.warns(UserWarning, match="apply: 1 Conv2d with 46% of the weights stay dense"):
        Static(0.5).apply(net)
    with pytest.raises(ValueError, match="apply: no nn.Linear to replace; .* a matrix: 1 LSTM"):
        Static(0.5).apply(nn.LSTM(8, 8))
