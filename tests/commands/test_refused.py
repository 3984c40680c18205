"""What would do something else than it says is refused, and leaves things as they were."""

import copy
import os
from pathlib import Path

import numpy as np
import pytest
import torch
from tiny import flags, tiny_config
from torch import nn

from sparsekern import SparseTensor, cli, sparsity, weights
from sparsekern.commands import prune
from sparsekern.files import check_writable
from sparsekern.gpt.train import train
from sparsekern.nn import SparseLinear
from sparsekern.nn.convert import refuse_pruned
from sparsekern.sparsity import (
    SET,
    Group,
    IterativePruning,
    RigL,
    SparseGPT,
    Static,
    Wanda,
    dynamic,
)

X = torch.randn(8, 16)


def mlp() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(16, 16), nn.GELU(), nn.Linear(16, 16))


def random_sparse() -> SparseTensor:
    return SparseTensor.from_dense(torch.randn(16, 16), torch.rand(16, 16) < 0.3)


@pytest.mark.parametrize(
    "bad",
    [
        random_sparse().T,
        np.zeros((16, 16), "f4"),
        torch.zeros(16, 16, device="meta"),
        torch.zeros(16, 16, dtype=torch.complex64),
        torch.zeros(16, 16).to_sparse(),
        None,
    ],
    ids=["transpose", "numpy", "meta", "complex", "torch.sparse", "None"],
)
def test_weights_that_cannot_be_copied_leave_the_model(bad):
    model = mlp()
    before = copy.deepcopy(model.state_dict())
    given = {**weights.weights_of(model), "0.weight": random_sparse(), "2.weight": bad}
    with pytest.raises(ValueError, match=r"2\.weight"):
        weights.set_weights_(model, given)
    assert type(model[0]) is nn.Linear
    after = model.state_dict()
    assert before.keys() == after.keys()
    assert all(torch.equal(before[name], t) for name, t in after.items())


ONES = torch.ones(4, 4)


@pytest.mark.parametrize(
    ("given", "error", "text"),
    [
        (
            {"a.bias_orig": ONES[0], "a.bias_mask": ONES[0, :1]},
            ValueError,
            r"a\.bias .*\(4,\), got \(1,\)",
        ),
        ({"W": ONES, "W_mask": ONES}, ValueError, "W_mask is a mask beside W"),
        ({"W_orig": ONES, "W_mask": 3}, TypeError, "expected tensors as W and its mask, got int"),
        ({"W_orig": ONES, "W_mask": ONES / 2}, ValueError, "expected 0 and 1 in the mask of W"),
        (mlp(), ValueError, "source: expected masks, .* got none; from_zeros takes the zeros"),
        (mlp().state_dict(), ValueError, "source: expected masks, .* got none"),
        ({}, ValueError, "source: expected masks, .* got none"),
    ],
)
def test_masks_that_do_not_belong_to_their_weight(given, error, text):
    with pytest.raises(error, match=text):
        weights.from_masks(given)


def test_a_mask_of_something_else_stays():
    given = {"W_orig": ONES, "W_mask": ONES, "attn": ONES, "attn_mask": torch.ones(2, 2)}
    assert weights.from_masks(given).keys() == {"W", "attn", "attn_mask"}


def test_from_zeros_takes_pruned_matrices():
    half = torch.eye(4)
    given = {"pruned": half, "new": torch.zeros(4, 4), "bias": torch.zeros(4)}
    found = weights.from_zeros(given)
    assert [name for name, t in found.items() if isinstance(t, SparseTensor)] == ["pruned"]
    assert isinstance(weights.from_zeros(given, ["new"])["new"], SparseTensor)
    with pytest.raises(ValueError, match="bias is torch.float32 of shape"):
        weights.from_zeros(given, ["bias"])


class Tied(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.wte = nn.Embedding(8, 4)
        self.lm_head = nn.Linear(4, 8, bias=False)
        self.lm_head.weight = self.wte.weight


def test_two_weights_for_one_tied_parameter():
    one = torch.randn(8, 4)
    model = weights.set_weights_(Tied(), {"wte.weight": one, "lm_head.weight": one.clone()})
    assert torch.equal(model.wte.weight, one)
    model = Tied()
    before = model.wte.weight.clone()
    with pytest.raises(ValueError, match=r"one tensor for wte\.weight and lm_head\.weight"):
        weights.set_weights_(model, {"wte.weight": one, "lm_head.weight": one + 1})
    assert torch.equal(model.wte.weight, before)


def test_an_index_names_files_of_others(tmp_path):
    weights.save_weights({"w": random_sparse()}, tmp_path / "m.safetensors")
    index = tmp_path / "model.safetensors.index.json"
    index.write_text('{"weight_map": {"w.values": "m.safetensors"}}')
    with pytest.raises(ValueError, match="m.safetensors is a whole file of sparsekern"):
        weights.load_weights(tmp_path)
    index.write_text('{"weight_map": {"w": ""}}')
    with pytest.raises(ValueError, match="index.json: expected files beside it, got ''"):
        weights.load_weights(tmp_path)


def test_calibrate_wants_a_file_before_it_measures(tmp_path, capsys):
    assert cli.main(["bench", "--calibrate", "--out", str(tmp_path)]) == 2
    assert "out: expected a file" in capsys.readouterr().err


def test_metadata_of_a_folder(tmp_path):
    weights.save_weights({"w": torch.ones(2)}, tmp_path / "model.safetensors", step=3)
    assert weights.load_metadata(tmp_path) == {"step": 3}


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("sparsity: {sparsity: 0.5}\nparam_filter: ['*mlp*']", "'param_filter' stands beside"),
        ("sparsity: {sparsity: 0.5}\nseed: 3", "'seed' stands beside"),
        ("sparsity: {sparsity: 0.5}\nparam_filtr: '*mlp*'", "'param_filtr' stands beside"),
        ("sparsity: {sparsity: 0.5}\ntrainer: {init: {sparsity: {sparsity: 0.9}}}", "one block"),
        ("algorithm: rigl\nsparsity: 0.5\nblock_elems: big", "block_elems"),
        ("algorithm: rigl\nsparsity: 0.5\nblock_elems: 1.5", "block_elems"),
        ("algorithm: gmp\nsparsity_schedule: [[10, 0.5], [0, 0.3]]", "rising steps"),
        ("algorithm: gmp\nsparsity_schedule: [[0, 0.3], [0, 0.5]]", "rising steps"),
        ("groups: [{sparsity: 0.9, params: {sparsity: 0.5}}]", "'sparsity' once"),
    ],
)
def test_settings_that_would_be_lost(tmp_path, text, expected):
    pytest.importorskip("yaml")
    path = tmp_path / "block.yaml"
    path.write_text(text)
    with pytest.raises(ValueError, match=expected):
        sparsity.configure(sparsity.load_config(path))


def test_a_folder_as_config_is_no_missing_file(tmp_path):
    with pytest.raises(FileNotFoundError, match="is not a file"):
        sparsity.load_config(tmp_path)


SMALL = ["--width", "16", "--heads", "2", "--layers", "1", "--context", "8", "--steps", "2"]


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        (["train", *SMALL, "--threads", "100000"], "threads: expected at most 1024"),
        (["train", *SMALL, "--width", "17"], "width: expected a multiple of heads"),
        (["train", *SMALL, "--layers", "0"], "layers: expected at least 1"),
        (["train", *SMALL, "--context", "0"], "context: expected at least 1"),
        (["train", *SMALL, "--seed", str(2**64)], "seed: expected at most"),
        (["train", *SMALL, "--out", "{file}/deeper"], "out: expected a folder"),
        (["prune", "--source", "{file}", "--method", "wanda", "--distribution=global"], "uniform"),
        (["generate", "--checkpoint", "x", "--seed", str(2**64)], "seed: expected"),
    ],
)
def test_flags_that_cannot_work(tmp_path, capsys, arguments, expected):
    file = tmp_path / "text.txt"
    file.write_text("some text of many words " * 50)
    given = [a.format(file=file) for a in arguments]
    if given[0] == "train":
        given += [
            "--data",
            str(file),
            *([] if "--out" in given else ["--out", str(tmp_path / "o")]),
        ]
    assert cli.main(given) == 2
    assert expected in capsys.readouterr().err


WORK = ("gpt.start.Text", "bench.measure.measure", "bench.calibrate.calibrate")
WORK += ("report.page.load", "wafer.validation.validate.validate", "wafer.sensitivity.sensitivity")
UNWRITABLE = {
    "train": (["train", *SMALL, "--data", "{text}"], "--out"),
    "prune": (["prune", "--source", "{run}", "--steps", "2"], "--out"),
    "bench": (["bench", "--quick"], "--out"),
    "calibrate": (["bench", "--calibrate", "--quick"], "--out"),
    "report": (["report"], "--out"),
    "json": (["wafer", "validate"], "--json"),
    "plots": (["wafer", "sensitivity"], "--plots"),
}


@pytest.fixture(scope="module")
def places(tmp_path_factory) -> dict:
    """A text, a run that was trained on it, and a folder that is closed to all but root."""
    folder = tmp_path_factory.mktemp("places")
    config = tiny_config(folder)
    train(config)
    (folder / "closed").mkdir(mode=0o500)
    return {"text": config.data, "run": config.out, "closed": folder / "closed"}


@pytest.mark.parametrize("command", UNWRITABLE)
@pytest.mark.parametrize(
    ("place", "expected"),
    [
        ("/proc/sparsekern/x", "cannot write /proc/sparsekern/x"),
        ("{text}/x", "expected a folder, {text} is none"),
        ("{closed}/x", "cannot write {closed}/x"),
    ],
    ids=["nowhere", "file", "closed"],
)
def test_what_cannot_be_written_is_said_before_any_work(
    places, capsys, monkeypatch, command, place, expected
):
    if place.startswith("/proc") and not Path("/proc").is_dir():
        pytest.skip("there is no /proc")
    if "closed" in place and os.geteuid() == 0:
        pytest.skip("the superuser writes everywhere")
    for work in WORK:
        monkeypatch.setattr(f"sparsekern.{work}", None)
    arguments, flag = UNWRITABLE[command]
    assert cli.main([a.format(**places) for a in (*arguments, flag, place)]) == 2
    printed = capsys.readouterr()
    said = f"sparsekern: error: {flag.removeprefix('--')}: {expected.format(**places)}"
    assert printed.err.startswith(said) and printed.err.count("\n") == 1


def test_the_search_for_a_place_leaves_nothing(tmp_path):
    check_writable("out", tmp_path / "a" / "b" / "file")
    assert not list(tmp_path.iterdir())
    with pytest.raises(ValueError, match="out: expected a file, .* is a folder"):
        check_writable("out", tmp_path)


def trained(tmp_path, *more: str) -> str:
    config = tiny_config(tmp_path)
    assert cli.main([*flags(config), *more]) == 0
    return config.out


def test_prune_names_its_flag(monkeypatch):
    def refuse(config):
        refuse_pruned("apply", [torch.eye(4)])

    monkeypatch.setattr(prune, "prune", refuse)
    with pytest.raises(ValueError, match=r"75% of the weights are zero.*; .* give --prune-again"):
        prune.run_prune(source="a run")


def test_prune_wants_a_type_that_it_knows_and_the_text_of_before(tmp_path, capsys):
    out = trained(tmp_path)
    pruner = ["prune", "--source", out, "--rounds", "2", "--steps", "2", "--target", "0.5"]
    assert cli.main([*pruner, "--dtype", "int32", "--out", str(tmp_path / "a")]) == 2
    assert "dtype: prune expected float32 or bfloat16, got int32" in capsys.readouterr().err
    pruner += ["--out", str(tmp_path / "b")]
    assert cli.main(pruner) == 0
    (tmp_path / "text.txt").write_text("other text, of no such words " * 50)
    capsys.readouterr()
    assert cli.main(pruner) == 2
    assert "changed since" in capsys.readouterr().err


def test_a_temperature_is_a_number(tmp_path, capsys):
    out = trained(tmp_path)
    capsys.readouterr()
    assert cli.main(["generate", "--checkpoint", out, "--temperature", "nan"]) == 2
    assert "temperature: expected 0 or more" in capsys.readouterr().err


def test_a_short_iterative_run_reaches_its_sparsity(tmp_path, capsys):
    trained(tmp_path, "--steps", "6", "--sparsity", "0.75", "--algorithm", "iterative")
    assert "75% sparse" in capsys.readouterr().out


@pytest.mark.parametrize("kind", [Wanda, SparseGPT])
def test_calibration_without_tokens(kind):
    with pytest.raises(ValueError, match="no input reached 0"):
        kind(0.5, calibration=[X[:0]]).apply(mlp())
    assert isinstance(kind(0.5, calibration=[X[0]]).apply(mlp())[0], SparseLinear)


def after_a_step(algorithm) -> tuple[nn.Sequential, torch.optim.Optimizer]:
    model = algorithm.apply(mlp())
    optimizer = algorithm.apply(torch.optim.AdamW(model.parameters()))
    for _ in range(2):
        optimizer.zero_grad()
        model(X).square().mean().backward()
        if not algorithm.steps:
            optimizer.step()
    return model, optimizer


def patterns(model: nn.Module) -> list[torch.Tensor]:
    return [m.col_indices.clone() for m in model if isinstance(m, SparseLinear)]


def test_an_update_that_fails_in_a_later_layer_changes_none(monkeypatch):
    model, optimizer = after_a_step(SET(0.5, update={"freq": 2}))
    before, calls, real = patterns(model), [], dynamic.set_pattern

    def failing(*arguments):
        calls.append(arguments)
        if len(calls) == 2:
            raise MemoryError("the second layer")
        return real(*arguments)

    monkeypatch.setattr(dynamic, "set_pattern", failing)
    with pytest.raises(MemoryError):
        optimizer.step()
    assert all(map(torch.equal, before, patterns(model)))


def test_a_rewind_that_cannot_be_changes_nothing():
    model, optimizer = after_a_step(IterativePruning(0.75, rounds=2, freq=2, rewind=0))
    optimizer.add_param_group({"params": [nn.Parameter(torch.zeros(3))]})
    before = patterns(model)
    with pytest.raises(RuntimeError, match="rewind: expected the other parameters"):
        optimizer.step()
    assert all(map(torch.equal, before, patterns(model)))


def rigl() -> RigL:
    return RigL(0.5, update={"freq": 2})


SOME = SET(0.5, update={"freq": 2}).state_dict()
EARLY = {"steps": 1, "early": {"9": torch.ones(2)}, "early_others": []}


@pytest.mark.parametrize(
    ("make", "state", "expected"),
    [
        (rigl, {}, "its state has no 'steps'"),
        (rigl, {"steps": "x"}, "steps: expected a whole number, got 'x'"),
        (rigl, {"steps": -1}, "steps: expected at least 0, got -1"),
        (rigl, {"steps": 1.5}, "steps: expected a whole number, got 1.5"),
        (rigl, {"steps": 1, "sparsity": "x"}, "sparsity: expected a finite number, got 'x'"),
        (rigl, None, "algorithm: expected a state_dict of RigL, got NoneType"),
        (rigl, SOME, "algorithm: expected the state of RigL, got that of SET; to go on with"),
        (rigl, {"algorithms": [SOME]}, "expected the state of RigL, got that of Group"),
        (lambda: SET(0.5), rigl().state_dict(), "expected the state of SET, got that of RigL"),
        (lambda: Static(0.5), SOME, "expected the state of Static, got that of SET"),
        (lambda: Group([rigl()]), None, "expected a state_dict of Group, got NoneType"),
        (lambda: Group([rigl()]), SOME, "expected the state of Group, got that of SET"),
        (lambda: Group([rigl()]), {}, "algorithms: expected a list of 1 states, got None"),
        (lambda: Group([rigl()]), {"algorithms": []}, r"expected a list of 1 states, got \[\]"),
        (lambda: Group([rigl()]), {"algorithms": [SOME]}, "the state of RigL, got that of SET"),
        (
            lambda: IterativePruning(0.5),
            {"steps": 1},
            "its state has no 'early' and 'early_others'",
        ),
        (lambda: IterativePruning(0.5), EARLY, "early: expected values of 0, 2, got some of 9"),
    ],
)
def test_a_state_that_is_none_of_this_algorithm(make, state, expected):
    algorithm = make()
    algorithm.apply(mlp())
    before = copy.deepcopy(algorithm.state_dict())
    with pytest.raises((TypeError, ValueError), match=expected):
        algorithm.load_state_dict(state)
    assert algorithm.state_dict() == before


def test_rounds_that_the_run_does_not_reach():
    with pytest.raises(ValueError, match="rounds, freq: .* at most the run's 12 steps, got 5 x 3"):
        IterativePruning(0.8, rounds=5, freq=3).check(12)
    IterativePruning(0.8, rounds=4, freq=3).check(12)
