"""Published sparsity configs mean here what they mean in cstorch.sparse.

The expected numbers are worked out by hand from the published definitions: FreqSchedule updates at
start, start + freq, ... before stop; step 0 makes the first pattern; a list goes on by one value at
each update; a schedule of the sparsity is held to [0, 1]; before its first update a layer is dense.
"""

import json
import math
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from tiny import training  # noqa: F401
from torch import nn

from sparsekern import SparseLinear
from sparsekern.cli import main
from sparsekern.gpt.model import GPT, GPTConfig
from sparsekern.gpt.train import METRICS
from sparsekern.sparsity import GMP, SET, Group, RigL, Static, configure, load_config
from sparsekern.sparsity.balance import Balance
from sparsekern.sparsity.initial import checkerboard
from sparsekern.sparsity.pattern import places_of
from sparsekern.sparsity.schedules import schedule, update_steps, value_at

yaml = pytest.importorskip("yaml")


class Net(nn.Module):
    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.up, self.down = nn.Linear(10, 20), nn.Linear(20, 10)

    def forward(self, x):
        return self.down(F.relu(self.up(x)))


def start(algorithm):
    model = algorithm.apply(Net())
    optimizer = algorithm.apply(torch.optim.SGD(model.parameters(), lr=0.01))
    return model, optimizer


def densities(algorithm, steps: int) -> list[float]:
    """Of a layer of 200 weights, before the first step and after each."""
    model, optimizer = start(algorithm)
    x, found = torch.randn(8, 10), []
    for _ in range(steps + 1):
        found.append(model.up.values.shape[0] / 200)
        optimizer.zero_grad()
        model(x).square().sum().backward()
        optimizer.step()
    return found


# When


@pytest.mark.parametrize(
    ("update", "steps"),
    [
        ({"freq": 100, "stop": 300}, [0, 100, 200]),
        ({"freq": 100, "stop": 301}, [0, 100, 200, 300]),
        ({"freq": 100, "start": 50, "stop": 350}, [50, 150, 250]),
        ({"freq": 100, "begin": 50, "end": 350}, [50, 150, 250]),
        ({"start": 397}, [397, 398, 399]),
        ({"freq": 150, "start": None, "stop": None}, [0, 150, 300]),
        ({"steps": [7, 3, 390]}, [3, 7, 390]),
        (lambda step: step in (5, 6), [5, 6]),
    ],
)
def test_update_steps(update, steps):
    is_update = update_steps(update)
    assert [step for step in range(400) if is_update(step)] == steps
    assert [is_update.through(step) for step in range(400)] == [
        sum(s <= step for s in steps) for step in range(400)
    ]
    assert list(is_update.of_run(399)) == [step for step in steps if step]


@pytest.mark.parametrize(
    ("freq", "values", "want"),
    [
        # The value of step 0 makes the first pattern, the next one comes at the first update.
        (5, [0.3, 0.4, 0.5, 0.6, 0.7], [0.3, 0.4, 0.5, 0.6, 0.7, 0.3]),
        (5, [0.3, 0.4, 0.5], [0.3, 0.4, 0.5, 0.3, 0.4, 0.5]),
        (2, [0.3, 0.4, 0.5, 0.6], [0.3, 0.4, 0.5, 0.6, 0.3, 0.4]),
        (1, [0.3, 0.4], [0.3, 0.4, 0.3, 0.4, 0.3, 0.4]),
    ],
)
def test_a_list_goes_on_by_one_value_at_each_update(freq, values, want):
    found = densities(GMP(values, update={"freq": freq}), 5 * freq)
    assert found == pytest.approx([1 - want[step // freq] for step in range(5 * freq + 1)])


def test_layers_are_dense_before_their_first_update():
    """Of GMP the first update takes the first value; SET drops 30 % at an update and grows none
    while it is denser than its target: 1, 0.7, 0.49, then 0.35 grown to 0.4."""
    with pytest.warns(UserWarning, match="GMP: dense until the first update"):
        found = densities(GMP([0.3, 0.4], update={"freq": 2, "start": 3}), 7)
    assert found == [1, 1, 1, 0.7, 0.7, 0.6, 0.6, 0.7]
    with pytest.warns(UserWarning, match="SET: dense until the first update"):
        found = densities(SET(0.6, update={"steps": [2, 3, 4]}), 4)
    assert found == [1, 1, 0.7, 0.49, 0.4]


def test_a_list_of_drop_fractions_begins_with_the_first_update():
    algorithm = SET(0.5, drop_fraction=[0.1, 0.2, 0.4], update={"freq": 5})
    assert [algorithm._drop_fraction(step) for step in (5, 10, 15, 20)] == [0.1, 0.2, 0.4, 0.1]
    with pytest.warns(UserWarning):
        late = SET(0.5, drop_fraction=[0.1, 0.2, 0.4], update={"freq": 5, "start": 5})
        start(late)
    assert [late._drop_fraction(step) for step in (5, 10, 15)] == [0.1, 0.2, 0.4]


# How much


@pytest.mark.parametrize(
    ("spec", "at", "want"),
    [
        ({"type": "Linear", "init": 0.5, "slope": 0.2}, (0, 1, 3), (0.5, 0.7, 1.1)),
        (
            {"type": "EXP", "init": 0, "gamma": math.log(0.3) / 1000},
            (0, 1000, 2000),
            (0, 0.7, 0.91),
        ),
        ({"type": "power", "init": 0.8, "beta": 0.5}, (0, 1, 3), (0.8, 0.4, 0.1)),
        ({"type": "Cosine", "init": 0.3, "half_period": 1000}, (0, 500, 1000), (0.3, 0.15, 0)),
        (
            {"type": "cosine", "init": 0.3, "half_period": 4, "minimum": 0.1},
            (2, 4, 8),
            (0.2, 0.1, 0.3),
        ),
        ({"type": "constant", "value": 0.5}, (0, 9), (0.5, 0.5)),
    ],
)
def test_schedules_are_the_published_formulas(spec, at, want):
    made = schedule("sparsity", spec)
    assert [value_at("sparsity", made, step, 0) for step in at] == pytest.approx(want, abs=1e-12)


def test_a_sparsity_is_held_to_its_range():
    algorithm = GMP({"type": "linear", "init": -0.2, "slope": 0.5}, update={"freq": 1})
    assert [algorithm.target(step) for step in range(4)] == pytest.approx([0, 0.3, 0.8, 1])


# The first pattern


def test_from_zeros_keeps_what_is_there_whatever_the_sparsity():
    weight = torch.tensor([[0.0, 1.0, -2.0], [0.0, 0.0, math.nan]])
    mask = configure({"sparsity": 0.9, "init_method": "from_zeros"}).mask("a", weight)
    assert mask.tolist() == [[False, True, True], [False, False, True]]


def test_checkerboard():
    """At density 1/4 every fourth place, moved by 3 a row; at 0.4 the floors of 0.4 j are 0 0 0 1 1
    2 2 2 3, each next row begins 2 places further along the row of 23."""

    def rows(n, k, sparsity):
        mask = Static(sparsity, "Checkerboard").mask("a", torch.zeros(n, k))
        return ["".join(".x"[kept] for kept in row) for row in mask.tolist()]

    assert rows(4, 8, 0.75) == ["...x...x", "x...x...", ".x...x..", "..x...x."]
    assert rows(3, 8, 0.6) == ["..x.x..x", "x.x..x.x", "x..x.x.."]
    assert rows(2, 4, 0.0) == ["xxxx", "xxxx"] and not checkerboard(2, 4, 1.0).any()


def test_topk_is_magnitude():
    weight = torch.tensor([[1.0, -4.0], [3.0, 2.0]])
    assert Static(0.5, "TopK").mask("a", weight).tolist() == [[False, True], [True, False]]


@pytest.mark.parametrize(
    ("setting", "scores"),
    [
        ("balance_out_groups", [[1.0, 2.0], [0.0, -1.0]]),
        ("balance_in_groups", [[1.0, 0.0], [2.0, -1.0]]),
    ],
)
def test_balance_groups_compete_among_themselves(setting, scores):
    """The examples of the published OutputGroupScoreShaper and InputGroupScoreShaper."""
    balance = Balance.of(**{f"balance_{s}": 2 if s in setting else None for s in ("in", "out")})
    kept = balance.largest(torch.tensor(scores).flatten(), torch.arange(4), 2, 2, 2, None)
    assert kept.tolist() == [1, 2]


@pytest.mark.parametrize("init_method", ["random", "topk"])
@pytest.mark.parametrize("setting", ["balance_in_groups", "balance_out_groups"])
def test_rigl_keeps_its_groups_balanced(setting, init_method):
    block = {"sparsity": 0.6, "algorithm": "RigL", "init_method": init_method, setting: 5}
    model, optimizer = start(configure(block | {"update": {"freq": 2}}))
    first = places_of(model.up)
    for step in range(5):
        rows, columns = places_of(model.up) // 10, places_of(model.up) % 10
        groups = columns // 2 if "in" in setting else rows // 4
        assert groups.bincount(minlength=5).tolist() == [16] * 5, step
        optimizer.zero_grad()
        model(torch.randn(8, 10)).square().sum().backward()
        optimizer.step()
    assert not torch.equal(first, places_of(model.up))
    with pytest.raises(
        ValueError, match=f"{setting}: expected a divisor .* of up, .20, 10., got 7"
    ):
        configure({"sparsity": 0.5, "algorithm": "rigl", setting: 7}).apply(Net())


# Forms of a block


def test_names_in_any_case():
    block = {
        "algorithm": "RigL",
        "sparsity": 0.75,
        "init_method": "Random",
        "drop_fraction": {"type": "Cosine", "init": 0.3, "half_period": 100},
    }
    assert configure(block) == RigL(
        0.75, drop_fraction={"type": "Cosine", "init": 0.3, "half_period": 100}
    )


def test_null_is_dense(tmp_path):
    assert configure(None) is None and configure({"sparsity": None, "algorithm": "set"}) is None
    (tmp_path / "a.yaml").write_text("sparsity: null\n")
    assert configure(load_config(tmp_path / "a.yaml")) is None


def test_groups_with_params():
    groups = {
        "groups": [
            {"algorithm": "static", "param_filter": "up*", "params": {"sparsity": 0.5}},
            {"algorithm": "set", "params": {"sparsity": 0.75, "update": {"freq": 9}}},
        ]
    }
    made = configure(groups, seed=2)
    assert [type(part) for part in made.algorithms] == [Static, SET]
    model = made.apply(Net())
    assert model.up.values.shape[0] == 100 and model.down.values.shape[0] == 50
    assert configure({"groups": {"params": {"sparsity": 0.5}}}) == Static(0.5)


def test_blocks_of_older_releases():
    pairs = [[0, 0.1], [6, 0.3], [8, 0.5]]
    old = {"type": "gmp", "sparsity_schedule": pairs, "add_summaries": True}
    algorithm = configure(old | {"param_name_patterns": "^up.*weight"})
    assert densities(algorithm, 9)[::3] == [0.9, 0.9, 0.7, 0.5]
    assert list(algorithm.layers) == ["up"]
    each = configure(old | {"param_name_patterns": {"^up": None, "n.weight$": {"seed": 3}}})
    assert isinstance(each, Group) and [a.seed for a in each.algorithms] == [0, 3]
    updated = configure({"type": "set", "sparsity": 0.5, "schedule": {"freq": 3, "stop": 9}})
    assert updated == SET(0.5, update={"freq": 3, "stop": 9})
    assert configure({"type": "set", "sparsity": 0.5, "schedule": 3}) == SET(
        0.5, update={"freq": 3}
    )


def test_a_config_without_a_filter_leaves_norms_and_embeddings_dense():
    model = nn.ModuleDict({n: nn.Linear(4, 4) for n in ("up", "pe_helper", "norm_in", "Embedding")})
    configure(0.5).apply(model)
    assert [n for n, m in model.items() if isinstance(m, SparseLinear)] == ["up"]


# Whole files

FILTER = [
    "*proj_[qkv]_dense_layer.weight",
    "*proj_output_dense_layer.weight",
    "*linear_layer.weight",
]


def dynamic(algorithm: str, freq: int, stop: int) -> dict:
    drop = {"type": "cosine", "init": 0.3, "half_period": stop}
    update = {"freq": freq, "stop": stop}
    return {"algorithm": algorithm, "drop_fraction": drop, "update": update}


# name: (settings of its block or None, max_steps)
FILES = {
    "125m_static75": ({"sparsity": 0.75}, 4778),
    "125m_set75": ({"sparsity": 0.75} | dynamic("set", 100, 3584), 4778),
    "125m_rigl75": ({"sparsity": 0.75} | dynamic("rigl", 100, 3584), 4778),
    "125m_sparsewide-ift_dense": (None, 21511),
    "125m_sparsewide-ift_static50": ({"sparsity": 0.5}, 21511),
    "125m_sparsewide-ift_rigl75": ({"sparsity": 0.75} | dynamic("rigl", 500, 17209), 21511),
    "6p7b_vspdf_phase1": ({"sparsity": 0.9}, 62523),
    "6p7b_vspdf_phase2": (None, 9379),
}


def write(path: Path, name: str) -> Path:
    """A file with the layout of the published one, cut to what matters."""
    block, max_steps = FILES[name]
    init = {
        "backend": {"backend_type": "CSX"},
        "model": {"name": "gpt3", "hidden_size": 768, "embedding_initializer": {"std": 0.02}},
        "optimizer": {"AdamW": {"betas": [0.9, 0.95], "weight_decay": 0.1}},
        "schedulers": [{"SequentialLR": {"schedulers": [{"LinearLR": {"total_iters": 716}}]}}],
        "precision": {"enabled": True, "fp16_type": "cbfloat16"},
        "loop": {"max_steps": max_steps},
    }
    if block:
        init["sparsity"] = block | {"init_method": "random", "param_filter": FILTER}
    loader = {"data_processor": "GptHDF5MapDataProcessor", "batch_size": 256}
    fit = {"train_dataloader": loader, "val_dataloader": loader}
    path = path / f"params_gpt3_{name}.yaml"
    path.write_text(yaml.safe_dump({"trainer": {"init": init, "fit": fit}}, sort_keys=False))
    return path


@pytest.mark.parametrize("name", FILES)
def test_the_published_files_run_unchanged(training, tmp_path, name):  # noqa: F811
    path = write(tmp_path, name)
    assert main([*training, f"--sparsity-config={path}"]) == 0
    block, _ = FILES[name]
    metrics = json.loads((tmp_path / "run" / METRICS).read_text())
    assert metrics["sparsity"] == pytest.approx(block["sparsity"] if block else 0, abs=1e-3)
    algorithm = configure(load_config(path))
    if block and "update" in block:
        freq, stop = block["update"]["freq"], block["update"]["stop"]
        assert type(algorithm) is {"rigl": RigL, "set": SET}[block["algorithm"]]
        updates = [step for step in range(1, 22000) if algorithm._updates(step)]
        assert updates == list(range(freq, stop, freq))
        assert algorithm._drop_fraction(stop // 2) == pytest.approx(0.15, abs=1e-3)


@pytest.mark.parametrize(
    "where", [("sparsity",), ("model", "sparsity"), ("optimizer", "sparsity"), ()]
)
def test_the_block_is_found_where_old_files_have_it(tmp_path, where):
    document = {"train_input": {"batch_size": 3}, "runconfig": {"max_steps": 9}, "model": {"a": 1}}
    inner = document
    for key in where[:-1]:
        inner = inner.setdefault(key, {})
    if where:
        inner[where[-1]] = {"sparsity": 0.5, "algorithm": "set"}
    (tmp_path / "a.yaml").write_text(yaml.safe_dump(document))
    assert configure(load_config(tmp_path / "a.yaml")) == (SET(0.5) if where else None)
    document["model"]["capacity"] = 3  # no misspelt sparsity
    if where:
        inner[where[-1]] = 0.5
        (tmp_path / "a.yaml").write_text(yaml.safe_dump(document))
        assert configure(load_config(tmp_path / "a.yaml")) == Static(0.5)


def gpt() -> GPT:
    return GPT(GPTConfig(2, 2, 16, 8, 50))


@pytest.mark.parametrize(
    ("param_filter", "layers"),
    [
        (FILTER, {"attention.qkv", "attention.proj", "mlp.up", "mlp.down"}),
        ("*proj_[qkv]_dense_layer*", {"attention.qkv"}),
        (["*proj_q_*", "*proj_k_*", "*proj_v_*"], {"attention.qkv"}),
        ("*self_attn*", {"attention.qkv", "attention.proj"}),
        ("*dense_layer.weight", {"attention.qkv", "attention.proj"}),
        ("*ffn.ffn.0.linear_layer*", {"mlp.up"}),
        ("transformer_decoder.layers.*.ffn.*", {"mlp.up", "mlp.down"}),
        ("model.transformer_decoder.layers.*.ffn.*", {"mlp.up", "mlp.down"}),
        ("*mlp*", {"mlp.up", "mlp.down"}),
    ],
)
def test_published_names_of_layers(param_filter, layers):
    algorithm = Static(0.5, param_filter=param_filter)
    algorithm.apply(gpt())
    assert set(algorithm.layers) == {f"blocks.{i}.{name}" for i in (0, 1) for name in layers}


@pytest.mark.parametrize(
    ("param_filter", "message"),
    [
        (["*linear_layer*", "*cross_attn*"], r"'\*cross_attn\*' matches no layer; there are: bl"),
        ("*proj_q_dense_layer*", "blocks.0.attention.qkv is 3 published layers in one; .*proj_k_"),
        (["*proj_q_*", "*proj_v_*"], "none that matches .*layers.0.self_attn.proj_k_dense_layer"),
        ("*decoder.layers.5.*", "matches no layer"),
    ],
)
def test_a_filter_that_does_not_fit(param_filter, message):
    model = gpt()
    with pytest.raises(ValueError, match=f"param_filter: .*{message}"):
        Static(0.5, param_filter=param_filter).apply(model)
    assert not any(isinstance(m, SparseLinear) for m in model.modules())
