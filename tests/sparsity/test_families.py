"""Every algorithm with every family of masks: budgets, legality, repeatability, settings."""

import copy
import json
import math
import warnings

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from sparsekern import SparseLinear
from sparsekern.cli import main
from sparsekern.gpt.train import METRICS
from sparsekern.sparsity import (
    ALGORITHMS,
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
    load_config,
)
from sparsekern.sparsity.budget import budgets
from sparsekern.sparsity.families import FAMILIES
from sparsekern.sparsity.pattern import places_of, set_pattern
from sparsekern.sparsity.select import largest
from sparsekern.sparsity.sparsegpt import sparsegpt
from sparsekern.two_way import is_two_way

# Whole blocks of 4 x 4, and rests in both directions.
SIZES = {"up": (48, 18), "down": (18, 48), "out": (7, 18)}
CUBIC = {"type": "cubic", "init": 0.0, "final": 0.75, "steps": 8}
EVERY = {"freq": 2, "stop": 9}
COSINE = {"type": "cosine", "init": 0.5, "half_period": 9}


class Net(nn.Module):
    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        for name, (n, k) in SIZES.items():
            setattr(self, name, nn.Linear(k, n))

    def forward(self, x):
        return self.out(x + self.down(F.relu(self.up(x))))


def batch(step: int) -> torch.Tensor:
    return torch.randn(32, 18, generator=torch.Generator().manual_seed(step))


MAKERS = {
    "static": lambda **how: Static(0.75, **how),
    "gmp": lambda **how: GMP(CUBIC, update=EVERY, **how),
    "set": lambda **how: SET(0.75, update=EVERY, drop_fraction=COSINE, **how),
    "rigl": lambda **how: RigL(0.75, update=EVERY, drop_fraction=COSINE, block_elems=100, **how),
    "iterative": lambda **how: IterativePruning(0.75, rounds=4, freq=2, **how),
    "magnitude": lambda **how: Magnitude(0.75, **how),
    "wanda": lambda **how: Wanda(0.75, calibration=[batch(99)], **how),
    "sparsegpt": lambda **how: SparseGPT(0.75, calibration=[batch(99)], **how),
}
both = pytest.mark.parametrize("family", FAMILIES)


def patterns(model) -> dict[str, set[int]]:
    modules = model.named_modules()
    return {n: set(places_of(m).tolist()) for n, m in modules if isinstance(m, SparseLinear)}


def are_two_way(model) -> bool:
    layers = [m for m in model.modules() if isinstance(m, SparseLinear)]
    return all(is_two_way(m.row_offsets, m.col_indices, m.in_features) for m in layers)


def steps(model, optimizer, numbers: range) -> list[dict[str, set[int]]]:
    """The patterns after each of these steps."""
    seen = []
    for step in numbers:
        optimizer.zero_grad()
        (model(batch(step)) - batch(step)[:, :7].sin()).square().mean().backward()
        optimizer.step()
        seen.append(patterns(model))
    return seen


def run(algorithm, number: int = 9) -> tuple[nn.Module, list[dict[str, set[int]]]]:
    """A model after some steps, and the patterns before them and after each."""
    model = algorithm.apply(Net())
    optimizer = algorithm.apply(torch.optim.AdamW(model.parameters(), lr=1e-2))
    return model, [patterns(model), *steps(model, optimizer, range(number))]


def test_every_algorithm_is_here():
    assert MAKERS.keys() == ALGORITHMS.keys()


@both
@pytest.mark.parametrize("name", MAKERS)
def test_budgets_masks_and_repeatability(name, family):
    model, seen = run(MAKERS[name](family=family))
    for counts, step in ((seen[-1], 9), (seen[5], 5)):
        target = MAKERS[name]().target(step - step % 2)
        want = budgets(SIZES, target, "uniform")
        assert {n: len(places) for n, places in counts.items()} == want
    assert are_two_way(model) == (family == "two-way")
    assert run(MAKERS[name](family=family))[1] == seen


@pytest.mark.parametrize("name", ["static", "gmp", "set", "rigl", "iterative", "magnitude"])
def test_erk_with_two_way_masks(name):
    """Small layers are denser, up to half; the total is exact."""
    model, seen = run(MAKERS[name](family="two-way", distribution="erk"))
    counts = {n: len(places) for n, places in seen[-1].items()}
    assert counts["out"] == 7 * 18 // 2 + 1 and are_two_way(model)
    assert sum(counts.values()) == round(sum(n * k for n, k in SIZES.values()) / 4)


@pytest.mark.parametrize("name", ["static", "gmp", "magnitude"])
def test_one_threshold_with_two_way_masks(name):
    how = {} if name == "magnitude" else {"init_method": "magnitude"}
    model, seen = run(MAKERS[name](family="two-way", distribution="global", **how))
    counts = {n: len(places) for n, places in seen[-1].items()}
    assert sum(counts.values()) == round(sum(n * k for n, k in SIZES.values()) / 4)
    assert len({c / math.prod(SIZES[n]) for n, c in counts.items()}) == 3 and are_two_way(model)


@both
@pytest.mark.parametrize("distribution", ["uniform", "erk", "global"])
@pytest.mark.parametrize("init_method", ["random", "magnitude"])
def test_what_gmp_removes_stays_removed(family, distribution, init_method):
    """From dense through more than half, where no mask is two-way, to less."""
    if (distribution, init_method) == ("global", "random"):
        return
    schedule = {"type": "linear", "init": 0.1, "slope": 0.09}
    how = {"distribution": distribution, "family": family}
    algorithm = GMP(schedule, init_method, update={}, **how)
    algorithm.check(8)
    model, seen = run(algorithm, 8)
    total = sum(n * k for n, k in SIZES.values())
    for step, (before, after) in enumerate(zip([seen[0], *seen], seen, strict=False)):
        assert all(after[name] <= before[name] for name in SIZES)
        kept = sum(map(len, after.values()))
        assert abs(kept - (0.9 - 0.09 * step) * total) <= 2
    assert are_two_way(model) == (family == "two-way")


def test_the_best_half_is_kept_on_the_way():
    """A place that the best two-way mask of half needs is not removed before."""
    dense = Net()
    best = Magnitude(0.5, family="two-way").apply(copy.deepcopy(dense))
    on_the_way = GMP([0.2, 0.3], "magnitude", family="two-way").apply(copy.deepcopy(dense))
    for name, places in patterns(best).items():
        assert places <= patterns(on_the_way)[name]


@both
@pytest.mark.parametrize("make", [Magnitude, Wanda, SparseGPT])
def test_pruning_again_only_removes(make, family):
    how = {} if make is Magnitude else {"calibration": [batch(3)]}
    model = make(0.5, family=family, **how).apply(Net())
    first = patterns(model)
    make(0.8, family=family, **how).apply(model)
    last = patterns(model)
    assert all(last[name] <= first[name] for name in SIZES)
    want = {name: round(0.2 * n * k) for name, (n, k) in SIZES.items()}
    if not (make is Wanda and family == "unstructured"):
        assert {name: len(places) for name, places in last.items()} == want
    assert family == "unstructured" or are_two_way(model)


@both
def test_sparsegpt_takes_whole_blocks_of_columns(family, monkeypatch):
    monkeypatch.setattr("sparsekern.sparsity.sparsegpt.COLUMNS", 16)
    torch.manual_seed(0)
    x, w = torch.randn(300, 42) @ torch.randn(42, 42) / 6, torch.randn(22, 42)
    everywhere = torch.ones(22, 42, dtype=torch.bool)
    [(new, places)] = sparsegpt([w], [everywhere], x.t() @ x, [231], FAMILIES[family]())
    mask = torch.zeros(22 * 42, dtype=torch.bool).index_fill_(0, places, True)
    assert places.shape == (231,) and torch.equal(new.flatten() != 0, mask)
    kept = Static(0.75, "magnitude", family=family).mask("w", w)
    assert (x @ (w - new).t()).norm() < 0.95 * (x @ (w - w * kept).t()).norm()
    assert FAMILIES[family]().holds(places, 22, 42)


@both
def test_a_schedule_that_falls_lets_weights_grow(family):
    algorithm = GMP([0.9, 0.7, 0.5, 0.75], update={"freq": 1}, family=family)
    model, seen = run(algorithm, 3)
    assert [len(of["up"]) for of in seen] == [86, 259, 432, 216]
    assert seen[0]["up"] <= seen[1]["up"] and seen[3]["up"] <= seen[2]["up"]
    dynamic = SET([0.9, 0.7, 0.5], update={"freq": 1}, drop_fraction=0.1, family=family)
    model, seen = run(dynamic, 2)
    assert [len(of["up"]) for of in seen] == [86, 259, 432]
    assert family == "unstructured" or are_two_way(model)


def test_a_dynamic_pattern_that_begins_dense():
    for make in (SET, RigL):
        with pytest.warns(UserWarning, match="dense until the first update"):
            algorithm = make(0.75, update={"freq": 1, "start": 1}, family="two-way")
            model, seen = run(algorithm, 6)
        assert [len(of["up"]) for of in seen] == [864, 605, 423, 296, 216, 216, 216]
        assert are_two_way(model)


def test_rigl_drops_the_smallest_and_no_more():
    """Of the weights before, 70 % stay: the largest."""
    algorithm = RigL(0.75, update={"freq": 1}, drop_fraction=0.3, family="two-way")
    model = algorithm.apply(Net())
    optimizer = algorithm.apply(torch.optim.SGD(model.parameters(), lr=0.0))
    old = {n: places_of(model.get_submodule(n)) for n in SIZES}
    values = {n: model.get_submodule(n).values.detach().abs() for n in SIZES}
    model(batch(0)).square().sum().backward()
    optimizer.step()
    for name, places in patterns(model).items():
        stay = values[name].shape[0] - round(0.3 * values[name].shape[0])
        survivors = set(old[name][largest(values[name], stay)].tolist())
        assert survivors <= places and len(places) == len(values[name])


# Patterns that come from elsewhere


def test_patterns_that_are_none_are_refused():
    model = Static(0.75).apply(Net())
    before = copy.deepcopy(model.state_dict())
    for make in (Static, SET, RigL):
        with pytest.raises(ValueError, match="family: expected a two-way pattern of up"):
            make(0.75, family="two-way").apply(model)
    with pytest.raises(ValueError, match="family: a two-way mask within the 216 weights that up "):
        Magnitude(0.75, family="two-way").apply(model)
    assert all(torch.equal(t, before[name]) for name, t in model.state_dict().items())
    Magnitude(0.9, family="two-way").apply(model)  # there is room for so few
    assert are_two_way(model)
    Static(0.9, family="two-way").apply(model)


def test_any_pattern_that_happens_to_be_two_way_is_one():
    model = Static(0.5, "checkerboard").apply(Net())
    assert are_two_way(model)
    SET(0.5, family="two-way").apply(model)
    set_pattern(model.up, torch.tensor([0, 1, 2]))
    assert not are_two_way(model)


def test_first_patterns():
    weight = torch.randn(8, 8)
    for init in ("random", "magnitude", "checkerboard"):
        mask = Static(0.75, init, family="two-way").mask("w", weight)
        assert mask.sum() == 16 and FAMILIES["two-way"]().holds(
            mask.flatten().nonzero().flatten(), 8, 8
        )
    held = Static(0.5, "from_zeros", family="two-way").mask("w", weight * mask)
    assert torch.equal(held, mask)
    with pytest.raises(ValueError, match="family: expected a two-way pattern of w, .* its 64 st"):
        Static(0.5, "from_zeros", family="two-way").mask("w", weight)


# Settings


def test_a_block_with_a_family(tmp_path):
    pytest.importorskip("yaml")
    text = "sparsity: {algorithm: rigl, sparsity: 0.75, family: Two-Way, update: {freq: 2}}\n"
    (tmp_path / "a.yaml").write_text(text)
    assert configure(load_config(tmp_path / "a.yaml")) == RigL(
        0.75, update={"freq": 2}, family="two-way"
    )
    assert configure({"sparsity": 0.5}).family == "unstructured"
    published = {"params": {"sparsity": 0.75, "algorithm": "set", "family": "two-way"}}
    assert configure({"groups": [published]}).algorithms == [SET(0.75, family="two-way")]
    assert Static(0.5) != Static(0.5, family="two-way")


def test_an_algorithms_state_has_its_family():
    algorithm = MAKERS["gmp"](family="two-way")
    run(algorithm, 3)
    state = algorithm.state_dict()
    assert state["steps"] == 3 and state["family"] == "two-way"
    assert Static(0.5).state_dict() == {"algorithm": "Static", "steps": 0, "sparsity": 0.5}
    again = MAKERS["gmp"](family="two-way")
    again.apply(Net())
    again.load_state_dict(state)
    assert again.steps == 3
    with pytest.raises(ValueError, match="family: expected unstructured, got .* two-way"):
        MAKERS["gmp"]().load_state_dict(state)
    with pytest.raises(ValueError, match="family: expected two-way, got .* unstructured"):
        again.load_state_dict({"steps": 3})


def test_the_state_of_another_sparsity_is_refused():
    late = {"update": {"steps": [9]}}
    state = RigL(0.5, **late).state_dict() | {"steps": 3}
    algorithm = RigL(0.75, **late)
    with pytest.raises(ValueError, match="sparsity: expected 0.75 after 3 steps, .* with 0.5;"):
        algorithm.load_state_dict(state)
    group = Group([RigL(sparsity, param_filter="a", **late) for sparsity in (0.5, 0.75)])
    with pytest.raises(ValueError, match="sparsity: expected 0.75"):
        group.load_state_dict({"algorithms": [state, state]})
    assert algorithm.steps == group.algorithms[0].steps == 0
    algorithm.load_state_dict({"steps": 3})  # as it was written before
    held = Static(0.9, "from_zeros")
    held.load_state_dict(Static(0.5, "from_zeros").state_dict())


@both
@pytest.mark.parametrize("name", ["gmp", "set", "rigl", "iterative"])
@pytest.mark.parametrize("stop", [3, 6])
def test_a_run_goes_on_where_it_was_stopped(name, family, stop):
    """Also on its way to a two-way mask, with more than half of the weights."""
    whole = run(MAKERS[name](family=family))[1]
    algorithm = MAKERS[name](family=family)
    model = algorithm.apply(Net())
    optimizer = algorithm.apply(torch.optim.AdamW(model.parameters(), lr=1e-2))
    steps(model, optimizer, range(stop))
    again = MAKERS[name](family=family)
    loaded = again.apply(copy.deepcopy(model))
    follower = torch.optim.AdamW(loaded.parameters(), lr=1e-2)
    follower.load_state_dict(optimizer.state_dict())
    again.apply(follower)
    again.load_state_dict(algorithm.state_dict())
    steps(loaded, follower, range(stop, 9))
    assert patterns(loaded) == whole[-1]


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"family": "twoway"}, "family: expected one of unstructured, two-way, got 'twoway'; did"),
        ({"family": 3}, "family: expected one of unstructured, two-way, got 3"),
        ({"famly": "two-way"}, "'famly'; did you mean 'family'?"),
        ({"sparsity": 0.4}, "two-way masks keep at most half .* expected 0.5 or more, got 0.4"),
        ({"sparsity": 0.3, "algorithm": "set"}, "sparsity: two-way masks .* got 0.3"),
        ({"sparsity": 0.3, "algorithm": "iterative"}, "sparsity: two-way masks .* got 0.3"),
        ({"algorithm": "rigl", "balance_in_groups": 2}, "family: two-way .* balance_in_groups"),
    ],
)
def test_mistakes(settings, message):
    with pytest.raises(ValueError, match=message):
        configure({"sparsity": 0.75, "family": "two-way"} | settings)


def test_a_run_that_never_comes_to_half():
    falling = {"type": "linear", "init": 0.9, "slope": -0.1}
    with pytest.raises(ValueError, match="sparsity: two-way masks .* or more, got 0.4"):
        SET(falling, family="two-way").check(5)
    rising = {"type": "linear", "init": 0.0, "slope": 0.1}
    with pytest.raises(ValueError, match="sparsity: two-way masks .* or more, got 0.4"):
        GMP(rising, family="two-way").check(4)
    GMP(rising, family="two-way").check(5)


def test_training_from_a_file_and_on(tmp_path, capsys):
    """Stopped and resumed, a run has the patterns of one that was not."""
    (tmp_path / "text.txt").write_text("".join(f"{i} bottles of beer.\n" for i in range(300)))
    block = {"algorithm": "rigl", "sparsity": 0.75, "family": "two-way", "update": {"freq": 2}}
    (tmp_path / "two_way.json").write_text(json.dumps({"sparsity": block}))
    shape = "--layers=1 --heads=2 --width=24 --context=16 --batch=2 --threads=1 --eval-every=9"
    how = [*shape.split(), f"--data={tmp_path / 'text.txt'}"]
    how.append(f"--sparsity-config={tmp_path / 'two_way.json'}")
    outs = [tmp_path / "whole", tmp_path / "parts"]
    assert main(["train", *how, "--steps=6", f"--out={outs[0]}"]) == 0
    assert main(["train", *how, "--steps=3", f"--out={outs[1]}"]) == 0
    assert main(["train", "--resume", "--steps=6", f"--out={outs[1]}"]) == 0
    files = [torch.load(out / "checkpoint.pt", weights_only=True) for out in outs]
    for file in files:
        state = {"algorithm": "RigL", "steps": 6, "sparsity": 0.75, "family": "two-way"}
        assert file["algorithm"] == state
        model = file["model"]
        for name in [n for n in model if n.endswith("col_indices")]:
            offsets = model[name.replace("col_indices", "row_offsets")]
            assert is_two_way(offsets, model[name], 10**6)
    assert json.loads((outs[1] / METRICS).read_text())["sparsity"] == pytest.approx(0.75, abs=1e-3)


def test_no_warnings_in_a_plain_run():
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        run(MAKERS["rigl"](family="two-way"))
