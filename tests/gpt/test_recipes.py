"""Whole runs: sparse pre-training, dense fine-tuning, patterns that change, resumption."""

import json
import math
import shutil
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from tiny import TEXT, final, interrupt, nan_at, states_equal, tiny_config

from sparsekern import SparseLinear, weights
from sparsekern.cli import main
from sparsekern.gpt import flops, train
from sparsekern.gpt.build import build_model, load_model
from sparsekern.gpt.checkpoint import CHECKPOINT, WEIGHTS
from sparsekern.gpt.config import TrainConfig, config_from, resumed_config
from sparsekern.gpt.data import ByteTokenizer, load_split, load_tokens, prepare
from sparsekern.gpt.model import GPT, GPTConfig
from sparsekern.gpt.prune import PruneConfig, prune
from sparsekern.gpt.start import begin
from sparsekern.sparsity.pattern import places_of
from sparsekern.two_way import is_two_way

OTHER = "".join(f"Take {i} down and pass it around, no more of {i}!\n" for i in range(99))


@pytest.fixture
def tiny(tmp_path: Path) -> TrainConfig:
    (tmp_path / "other.txt").write_text(OTHER)
    settings = {"layers": 2, "batch": 4, "steps": 20, "lr": 3e-3}
    evaluations = {"eval_every": 10, "eval_batches": 4, "checkpoint_every": 4}
    return tiny_config(tmp_path, **settings, **evaluations)


def dense_config(tiny: TrainConfig, tmp_path: Path, **settings) -> TrainConfig:
    given = {"data": str(tmp_path / "other.txt"), "batch": 4, "steps": 6, "threads": 1} | settings
    return config_from(
        {"init_from": tiny.out, "dense": True, "out": str(tmp_path / "dense")} | given
    )


# Sparse pre-training, dense fine-tuning


@pytest.mark.parametrize("optimizer_state", ["reset", "keep"])
def test_the_loss_is_continuous_across_the_switch_to_dense(tiny, tmp_path, optimizer_state):
    tiny = replace(tiny, sparsity=0.75)
    sparse = train.train(tiny)
    config = dense_config(tiny, tmp_path, data=tiny.data, optimizer_state=optimizer_state, lr=1e-4)
    dense = train.train(config)
    assert dense["evaluations"][0]["step"] == 0
    before, after = sparse["evaluations"][-1]["loss"], dense["evaluations"][0]["loss"]
    assert after == pytest.approx(before, abs=1e-5)
    assert max(dense["losses"]) < before + 0.5  # and the steps that follow do not jump
    assert dense["sparsity"] == 0 and dense["source"]["steps"] == 20
    assert dense["source"]["flops"] == sparse["flops"]


def test_the_two_commands_of_the_recipe(tiny, tmp_path, capsys):
    common = f"--data={tiny.data} --steps=4 --batch=4 --threads=1"
    shape = "--layers=1 --heads=2 --width=32 --context=16 --sparsity=0.75"
    assert main(["train", *common.split(), *shape.split(), f"--out={tmp_path / 'sparse'}"]) == 0
    dense = ["--dense", f"--init-from={tmp_path / 'sparse'}", f"--out={tmp_path / 'dense'}"]
    assert main(["train", *common.split(), *dense]) == 0
    out = capsys.readouterr().out
    assert "parameters at 75% sparsity" in out and "parameters at 0% sparsity" in out
    metrics = json.loads((tmp_path / "dense" / "metrics.json").read_text())
    assert metrics["source"]["steps"] == 4 and metrics["config"]["width"] == 32


def test_revived_weights_start_at_zero_and_train(tiny, tmp_path):
    tiny = replace(tiny, sparsity=0.75)
    train.train(tiny)
    run = begin(dense_config(tiny, tmp_path))
    source, _ = load_model(Path(tiny.out) / CHECKPOINT)
    layer = source.blocks[1].mlp.up
    absent = layer.weight.to_dense() == 0
    weight = run.model.blocks[1].mlp.up.weight
    assert not any(isinstance(m, SparseLinear) for m in run.model.modules())
    assert torch.equal(weight.detach(), layer.weight.detach().to_dense())
    run.compute_gradients()
    run.update()
    assert (weight[absent] != 0).float().mean() > 0.9


def test_the_optimizer_state_becomes_dense_or_is_reset(tiny, tmp_path):
    tiny = replace(tiny, sparsity=0.75)
    train.train(tiny)
    sparse = final(tiny)
    kept = begin(dense_config(tiny, tmp_path, optimizer_state="keep"))
    moments = {n: kept.parts.optimizer.state[p] for n, p in kept.model.named_parameters()}
    moment = moments["blocks.0.mlp.up.weight"]["exp_avg"]
    assert moment.shape == (128, 32)
    stored = (v["exp_avg"] for v in sparse["optimizer"]["state"].values())
    assert any(torch.equal(values, moment[moment != 0]) for values in stored if values.ndim == 1)
    assert not begin(dense_config(tiny, tmp_path)).parts.optimizer.state


def test_a_fine_tuning_run_resumes_without_its_source(tiny, tmp_path, monkeypatch):
    tiny = replace(tiny, sparsity=0.75)
    train.train(tiny)
    whole = dense_config(tiny, tmp_path, steps=8, checkpoint_every=3)
    train.train(whole)
    broken = replace(whole, out=str(tmp_path / "broken"))
    interrupt(monkeypatch, broken, 5)
    (Path(tiny.out) / CHECKPOINT).unlink()
    train.train(resumed_config({"out": broken.out}))
    assert states_equal(whole, broken)


def test_what_a_run_takes_from_its_source(tiny, tmp_path):
    train.train(replace(tiny, sparsity=0.75))
    config = dense_config(tiny, tmp_path)
    assert (config.width, config.layers, config.context) == (32, 2, 16)
    with pytest.raises(ValueError, match="width is 32 in .*, got 64"):
        dense_config(tiny, tmp_path, width=64)
    with pytest.raises(FileNotFoundError, match="^init_from: .*checkpoint.pt does not exist"):
        config_from({"init_from": str(tmp_path)})
    with pytest.raises(ValueError, match="dense: expected init_from and no sparsity"):
        replace(tiny, dense=True)
    with pytest.raises(ValueError, match="optimizer_state: keep needs the pattern"):
        more = {"dense": False, "sparsity": 0.9, "algorithm": "magnitude"}
        begin(dense_config(tiny, tmp_path, optimizer_state="keep", **more))


def test_sparse_weights_go_on_sparse_or_sparser(tiny, tmp_path):
    tiny = replace(tiny, sparsity=0.5)
    train.train(tiny)
    same = begin(dense_config(tiny, tmp_path, dense=False, optimizer_state="keep"))
    assert same.sparsity == 0.5 and same.parts.optimizer.state
    more = {"dense": False, "sparsity": 0.8, "algorithm": "magnitude"}
    sparser = train.train(dense_config(tiny, tmp_path, **more))
    assert sparser["sparsity"] == pytest.approx(0.8, abs=1e-3)
    # Pruned at once: the loss is not that of before.
    assert sparser["evaluations"][0]["sparsity"] == pytest.approx(0.8, abs=1e-3)


# Patterns that change


@pytest.mark.parametrize("algorithm", ["gmp", "set", "rigl"])
def test_a_killed_run_resumes_bit_for_bit(tiny, tmp_path, monkeypatch, algorithm):
    """Killed at step 14, resumed from 12, with changes of the pattern before and after."""
    settings = {
        "gmp": {"sparsity": {"type": "cubic", "init": 0.0, "final": 0.8, "steps": 18}},
        "set": {"sparsity": 0.75},
        "rigl": {"sparsity": 0.75, "distribution": "erk"},
    }[algorithm]
    path = tmp_path / "sparsity.json"
    path.write_text(json.dumps(settings | {"algorithm": algorithm, "update": {"freq": 3}}))
    whole = replace(tiny, sparsity_config=str(path))
    result = train.train(whole)
    broken = replace(whole, out=str(tmp_path / "broken"))
    interrupt(monkeypatch, broken, 14)
    assert len(final(broken)["losses"]) == 12
    path.unlink()  # the checkpoint knows
    train.train(resumed_config({"out": broken.out}))
    assert states_equal(whole, broken)
    if algorithm == "gmp":
        assert result["sparsity"] == pytest.approx(0.8, abs=1e-3)
        assert [round(e["sparsity"], 2) for e in result["evaluations"]] == [0.0, 0.7, 0.8]


def test_iterative_pruning_with_rewinding_resumes_bit_for_bit(tiny, tmp_path, monkeypatch):
    """Killed at step 14, resumed from 12, with a round and its rewinding to come."""
    path = tmp_path / "sparsity.json"
    settings = {"algorithm": "iterative", "sparsity": 0.8, "rounds": 3, "freq": 5, "rewind": 2}
    path.write_text(json.dumps(settings))
    whole = replace(tiny, sparsity_config=str(path))
    assert train.train(whole)["sparsity"] == pytest.approx(0.8, abs=1e-3)
    broken = replace(whole, out=str(tmp_path / "broken"))
    interrupt(monkeypatch, broken, 14)
    train.train(resumed_config({"out": broken.out}))
    assert final(whole)["algorithm"]["early"] and states_equal(whole, broken)


@pytest.mark.parametrize("algorithm", ["gmp", "set", "rigl", "iterative"])
def test_algorithms_by_flags(tiny, algorithm):
    result = train.train(replace(tiny, sparsity=0.75, algorithm=algorithm))
    assert result["sparsity"] == pytest.approx(0.75, abs=1e-3)
    assert result["losses"][-1] < result["losses"][0]
    c = GPTConfig(2, 2, 32, 16, 256)
    static = 20 * 4 * 16 * flops.train_flops_per_token(c, 0.75)
    if algorithm == "set":
        assert result["flops"] == pytest.approx(static)
    elif algorithm == "rigl":  # 15 updates, each with the weight gradient of what is absent
        extra = 15 * 4 * 16 * flops.dense_gradient_flops_per_token(c, 0.75)
        assert result["flops"] == pytest.approx(static + extra)
    else:
        assert static < result["flops"] < 20 * 4 * 16 * flops.train_flops_per_token(c)


@pytest.mark.parametrize("algorithm", ["static", "gmp", "rigl", "magnitude"])
def test_two_way_masks_by_flags(tiny, algorithm):
    config = replace(tiny, sparsity=0.75, algorithm=algorithm, family="two-way")
    train.train(config)
    model, _ = load_model(Path(config.out) / CHECKPOINT)
    for layer in model.modules():
        if isinstance(layer, SparseLinear):
            assert is_two_way(layer.row_offsets, layer.col_indices, layer.in_features)


def test_a_pattern_survives_its_checkpoint(tiny):
    train.train(replace(tiny, sparsity=0.75, algorithm="rigl"))
    model, _ = load_model(Path(tiny.out) / CHECKPOINT)
    fresh = build_model(replace(tiny, sparsity=0.75), 256)
    layer, first = model.blocks[0].mlp.up, fresh.blocks[0].mlp.up
    assert layer.values.shape == first.values.shape
    assert not torch.equal(places_of(layer), places_of(first))


def test_the_exported_weights_are_the_model(tiny):
    pytest.importorskip("safetensors")
    train.train(replace(tiny, sparsity=0.75))
    path = Path(tiny.out) / WEIGHTS
    model, _ = load_model(Path(tiny.out) / CHECKPOINT)
    other = weights.set_weights_(GPT(model.config), weights.load_weights(path))
    x = torch.arange(16)[None]
    assert torch.equal(model(x)[0], other(x)[0])
    assert weights.load_metadata(path)["config"]["sparsity"] == 0.75


def test_nan_keeps_the_last_good_checkpoint_of_a_changing_pattern(tiny, monkeypatch):
    nan_at(monkeypatch, 11)
    config = replace(tiny, sparsity=0.75, algorithm="set")
    with pytest.raises(FloatingPointError, match="loss is nan at step 10; .*is the last good one"):
        train.train(config)
    assert len(final(config)["losses"]) == 8
    monkeypatch.undo()
    train.train(resumed_config({"out": config.out}))


def test_unknown_keys_of_a_config_file(tiny, tmp_path):
    path = tmp_path / "sparsity.json"
    path.write_text('{"sparsity": 0.5, "drop": 1}')
    with pytest.raises(ValueError, match="static: expected the keys .*, got 'drop'"):
        train.train(replace(tiny, sparsity_config=str(path)))
    with pytest.raises(FileNotFoundError, match="sparsity config: .* does not exist"):
        train.train(replace(tiny, sparsity_config=str(tmp_path / "none.yaml")))
    with pytest.raises(ValueError, match="gives it, got 0.5 as well"):
        replace(tiny, sparsity_config=str(path), sparsity=0.5)
    assert not Path(tiny.out).exists()


# Data


def test_prepared_tokens_are_those_of_the_text(tiny, tmp_path):
    folder = tmp_path / "tokens"
    prepare(tiny.data, "bytes", folder)
    tokenizer, training, validation = load_tokens(str(folder), None, "bytes", 0)
    _, *want = load_tokens(tiny.data, ByteTokenizer(), "", 0)
    assert torch.equal(training, want[0]) and torch.equal(validation, want[1])
    assert tokenizer.name == "bytes"
    assert train.train(replace(tiny, data=str(folder)))["losses"] == pytest.approx(
        train.train(replace(tiny, out=tiny.out + "2"))["losses"], abs=0
    )


def test_prepared_tokens_of_another_tokenizer(tiny, tmp_path):
    pytest.importorskip("tokenizers")
    folder = tmp_path / "tokens"
    prepare(tiny.data, "bpe", folder, vocab_size=300)
    with pytest.raises(ValueError, match="was prepared with another tokenizer"):
        load_tokens(str(folder), ByteTokenizer(), "", 0)


def test_long_text_survives_its_chunks(monkeypatch):
    pytest.importorskip("tokenizers")
    from sparsekern.gpt import data

    monkeypatch.setattr(data, "CHUNK_CHARACTERS", 100)
    text = TEXT + "x" * 350 + "\n\n  naïve ☃"
    tokenizer = data.BPETokenizer.train(text, 300)
    assert tokenizer.decode(tokenizer.encode(text).tolist()) == text
    assert tokenizer.encode("").tolist() == []


def test_packages_are_split_by_name(tmp_path, monkeypatch):
    from sparsekern.gpt import data

    for name in map(str, range(40)):
        (tmp_path / name).mkdir()
        (tmp_path / name / "a.py").write_text(f"name = {name}\n")
    (tmp_path / "single.py").write_text("single\n")
    (tmp_path / "0" / "binary.py").write_bytes(b"\xff\0")
    monkeypatch.setattr(data.sysconfig, "get_path", lambda name: str(tmp_path))
    training, validation = load_split("packages")
    assert training and validation and load_split("packages") == (training, validation)
    names = [set(text.split()) - {"name", "="} for text in (training, validation)]
    assert not names[0] & names[1] and names[0] | names[1] == {*map(str, range(40)), "single"}
    monkeypatch.setattr(data, "PACKAGES_CHARACTERS", 150)
    assert len("".join(load_split("packages"))) < 180
    monkeypatch.setattr(data, "PACKAGES_CHARACTERS", 20)
    with pytest.raises(ValueError, match="packages needs at least 10 of them, found 2"):
        load_split("packages")


# Iterative pruning


@pytest.fixture
def dense_run(tiny) -> TrainConfig:
    train.train(tiny)
    return tiny


@pytest.mark.parametrize(
    ("settings", "is_told"),
    [
        ({"sparsity": 0.5}, True),
        ({"sparsity": 0.5, "init_method": "magnitude"}, False),
        ({"sparsity": 0.5, "algorithm": "gmp"}, False),
        ({"dense": True}, False),
    ],
)
def test_trained_weights_go_at_random_with_a_word(dense_run, tmp_path, capsys, settings, is_told):
    config = dense_config(dense_run, tmp_path, **({"dense": False, "steps": 1} | settings))
    capsys.readouterr()
    train.train(config)
    assert ("zeros  at random places, whatever" in capsys.readouterr().out) == is_told


def test_pruning_reaches_its_target_round_by_round(dense_run, tmp_path, capsys):
    out = tmp_path / "pruned"
    arguments = f"--source={dense_run.out} --out={out} --target=0.838 --steps=10 --rounds=3"
    assert main(["prune", *arguments.split()]) == 0
    printed = capsys.readouterr().out
    rows = json.loads((out / "prune.json").read_text())["rows"]
    assert [row["sparsity"] for row in rows] == pytest.approx(
        [0, *(1 - 0.162 ** (i / 3) for i in (1, 2, 3))], abs=1e-3
    )
    assert [row["steps"] for row in rows] == [0, 3, 3, 4]
    assert rows[0]["loss"] == pytest.approx(final(dense_run)["evaluations"][-1]["loss"], abs=1e-5)
    assert all(row["loss"] < row["loss_before"] for row in rows[1:])
    c = GPTConfig(2, 2, 32, 16, 256)
    assert rows[-1]["flop_ratio"] == pytest.approx(flops.flop_ratio(c, 0.838), rel=1e-2)
    assert rows[-1]["parameters"] < rows[0]["parameters"]
    assert all(row["latency_s"] > 0 for row in rows)
    assert "| 83.8%" in printed.replace("    83.8%", " 83.8%") and "loss after recovery" in printed
    model, _ = load_model(out / CHECKPOINT)
    assert flops.linear_sparsity(model) == pytest.approx(0.838, abs=1e-3)
    # It is a run like any other: its weights can be trained on, dense.
    config = config_from({"init_from": str(out), "dense": True, "data": dense_run.data})
    assert begin(replace(config, out=str(tmp_path / "on"), batch=4)).sparsity == 0


def test_of_two_prunings_in_a_folder_one_stops(dense_run, tmp_path, monkeypatch):
    from sparsekern.gpt import prune as module

    config = PruneConfig(dense_run.out, steps=1, rounds=1, target=0.8, out=str(tmp_path / "a"))
    recover, written = module._recover, {}

    def other_comes_first(*args):  # from another machine: no lock keeps it out
        monkeypatch.setattr(module, "_recover", recover)
        module._all_rounds(replace(config, target=0.6), tmp_path / "a" / CHECKPOINT)
        written.update({path: path.read_bytes() for path in (tmp_path / "a").iterdir()})

    monkeypatch.setattr(module, "_recover", other_comes_first)
    with pytest.raises(ValueError, match=r"out: .* was written by another run while"):
        prune(config)
    assert written == {path: path.read_bytes() for path in (tmp_path / "a").iterdir()}


def test_a_stopped_pruning_continues_with_its_next_round(dense_run, tmp_path, monkeypatch, capsys):
    from sparsekern.gpt import prune as module

    config = PruneConfig(dense_run.out, steps=9, rounds=3, target=0.8, out=str(tmp_path / "a"))
    whole = prune(config)
    broken = replace(config, out=str(tmp_path / "b"))
    recover, calls = module._recover, []

    def interrupted(run, steps, progress):
        calls.append(steps)
        if len(calls) == 4:
            raise KeyboardInterrupt
        recover(run, steps, progress)

    kept = "in round 3; the same command goes on after the last whole round"
    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt, match=kept):
        patch.setattr(module, "_recover", interrupted)
        prune(broken)
    assert len(final(broken)["rows"]) == 3
    rows = prune(broken)
    keys = ("sparsity", "loss_before", "loss", "steps")
    assert [[row[k] for k in keys] for row in rows] == [[row[k] for k in keys] for row in whole]
    capsys.readouterr()
    assert prune(broken) == rows
    assert capsys.readouterr().out.startswith("done   all rounds were made before")
    with pytest.raises(ValueError, match="target is 0.8 in .*, got 0.9"):
        prune(replace(broken, target=0.9))
    # Who trains on is told of all rounds, wherever they were stopped.
    for path in (config.out, broken.out):
        on = config_from({"init_from": path, "out": str(tmp_path / "on"), "threads": 1})
        spent, found = begin(replace(on, data=dense_run.data)).history.source, []
        while spent:
            found.append(spent)
            spent = spent["before"]
        told = [(cost["steps"], cost["flops"]) for cost in found]
        rounds = [(row["steps"], row["train_flops"]) for row in reversed(whole[1:])]
        assert told == [*rounds, (dense_run.steps, final(dense_run)["flops"])]
        assert rounds[0] != rounds[1]


def test_a_source_that_was_trained_anew_is_not_the_one_that_was_pruned(dense_run, tmp_path):
    source = shutil.copytree(dense_run.out, tmp_path / "source")
    config = PruneConfig(str(source), steps=0, targets="0.6", out=str(tmp_path / "a"))
    prune(config)
    train.train(resumed_config({"out": str(source), "steps": dense_run.steps + 1}))
    with pytest.raises(ValueError, match=r"source: .* was trained anew or on since .* was written"):
        prune(config)


@pytest.mark.parametrize(
    "settings",
    [{"method": "wanda"}, {"method": "sparsegpt"}, {"family": "two-way"}],
    ids=lambda settings: "-".join(settings.values()),
)
def test_pruning_round_by_round(dense_run, tmp_path, settings):
    config = PruneConfig(
        dense_run.out, steps=4, targets="0.5,0.75", out=str(tmp_path / "pruned"), **settings
    )
    rows = prune(config)
    assert [row["sparsity"] for row in rows] == pytest.approx([0, 0.5, 0.75], abs=1e-3)
    assert rows[1]["loss_before"] < math.log(256)


def test_rewinding(dense_run, tmp_path):
    early = replace(dense_run, out=str(tmp_path / "early"), steps=1)
    train.train(early)
    config = PruneConfig(
        dense_run.out, steps=0, targets="0.6", rewind=early.out, out=str(tmp_path / "pruned")
    )
    prune(config)
    model, _ = load_model(Path(config.out) / CHECKPOINT)
    start, _ = load_model(Path(early.out) / CHECKPOINT)
    layer = model.blocks[0].mlp.up
    kept = layer.weight.detach().to_dense() != 0
    assert torch.equal(layer.values, start.blocks[0].mlp.up.weight[kept])
    assert torch.equal(model.wte.weight, start.wte.weight)
    train.train(replace(early, out=str(tmp_path / "again"), seed=2))
    shutil.copytree(tmp_path / "again", early.out, dirs_exist_ok=True)
    with pytest.raises(ValueError, match="rewind: .*early was trained anew or on since"):
        prune(config)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"target": 1.2}, "target: expected a sparsity above 0 and below 1, got 1.2"),
        ({"rounds": 0}, "rounds: expected at least 1"),
        ({"targets": "0.5,0.5"}, "targets: expected to rise between 0 and 1"),
        ({"targets": "half"}, "targets: expected numbers as in"),
        ({"targets": "0.3,nan"}, "targets: expected to rise between 0 and 1, got 0.3,nan"),
        ({"method": "luck"}, "method: expected one of magnitude"),
        ({"method": "sparsegpt", "rewind": "x"}, "rewind: sparsegpt corrects"),
        (
            {"family": "two-way"},
            "family: two-way masks have 0.5 zeros or more, got a round to 0.366",
        ),
    ],
)
def test_pruning_mistakes(settings, message):
    with pytest.raises(ValueError, match=message):
        PruneConfig(**settings)


@pytest.mark.parametrize(
    "targets, ways",
    [("0.5", "--targets above it"), ("0.6,0.9", "--targets above it, or --rounds 1")],
)
def test_an_impossible_target(tiny, tmp_path, targets, ways):
    """One round helps only where it leads above what the model has."""
    train.train(replace(tiny, sparsity=0.75))
    config = PruneConfig(tiny.out, targets=targets, out=str(tmp_path / "pruned"))
    first = targets.partition(",")[0]
    with pytest.raises(ValueError) as refused:
        prune(config)
    message = f"wants sparsity {first}, but the model has 0.75 already: give {ways}"
    assert str(refused.value).endswith(message)


@pytest.mark.parametrize("settings", [{}, {"sparsity": 0.75, "algorithm": "rigl"}])
def test_bf16_products_train_float32_weights(tiny, tmp_path, settings):
    config = replace(tiny, dtype="bfloat16", **settings)
    result = train.train(config)
    exact = train.train(replace(config, dtype="float32", out=str(tmp_path / "exact")))
    assert result["losses"] != exact["losses"]
    assert result["losses"][-1] == pytest.approx(exact["losses"][-1], abs=0.05)
    floats = [t for t in final(config)["model"].values() if t.is_floating_point()]
    assert {t.dtype for t in floats} == {torch.float32}
    rows = prune(PruneConfig(config.out, targets="0.9", steps=2, out=str(tmp_path / "pruned")))
    assert rows[-1]["loss"] < rows[-1]["loss_before"] + 0.05
