"""The experiments' driver, on its smallest preset: it stops, continues, and does nothing twice."""

import importlib.util
import json
import shutil
import sys
from pathlib import Path

import pytest

SCRIPT = Path(__file__).parents[1] / "bench" / "experiments.py"


@pytest.fixture(scope="module")
def experiments():
    sys.path.insert(0, str(SCRIPT.parent))
    specification = importlib.util.spec_from_file_location("experiments", SCRIPT)
    module = importlib.util.module_from_spec(specification)
    sys.modules["experiments"] = module  # dataclasses look there
    specification.loader.exec_module(module)
    yield module
    sys.path.remove(str(SCRIPT.parent))
    del sys.modules["experiments"]


def call(experiments, monkeypatch, folder: Path, *flags: str) -> int:
    texts = [f"--{name}-data={folder / 'text.txt'}" for name in ("pretrain", "finetune")]
    arguments = [f"--out={folder / 'out'}", f"--work={folder / 'work'}", "--preset=smoke"]
    monkeypatch.setattr(sys, "argv", ["experiments", *arguments, *texts, "--device=cpu", *flags])
    return experiments.main()


def results(folder: Path) -> dict:
    return json.loads((folder / "out" / "experiments.json").read_text())


def test_it_stops_continues_and_finishes(experiments, monkeypatch, tmp_path, capsys):
    (tmp_path / "text.txt").write_text("Some bottles of beer on the wall. " * 200)
    assert call(experiments, monkeypatch, tmp_path, "--minutes=0") == 3
    assert "out of time: before sweep 0.0 lr 0.001" in capsys.readouterr().out

    # The scratch folder is lost after the first arm.
    done = experiments.Experiments.arm

    def stop_after_the_first(self, sparsity, seed):
        if sparsity:
            raise experiments.OutOfTime("for the test")
        done(self, sparsity, seed)

    with monkeypatch.context() as patch:
        patch.setattr(experiments.Experiments, "arm", stop_after_the_first)
        patch.setattr(experiments.Experiments, "pruning", lambda self: None)
        assert call(experiments, monkeypatch, tmp_path) == 3
    first = results(tmp_path)
    assert "finetune 0.0 seed 0 lr 0.001" in first and "prune control" not in first
    shutil.rmtree(tmp_path / "work")
    capsys.readouterr()

    assert call(experiments, monkeypatch, tmp_path) == 0
    out = capsys.readouterr().out
    assert "== pretrain 0.0 seed 0, again: its checkpoint is gone" in out and "all done" in out
    last = results(tmp_path)
    assert all(last[key] == value for key, value in first.items())
    assert {"prune rounds", "prune once 0.9", "prune sparsegpt 0.5"} <= last.keys()
    assert {"pretrain 0.75 seed 1", "finetune 0.75 seed 1 lr 0.001"} <= last.keys()
    page = (tmp_path / "out" / "experiments.md").read_text()
    for title in ("Pre-training", "Dense fine-tuning", "Seeds", "Pruning the dense model"):
        assert f"## {title}" in page
    # Equal tokens, so FLOPs differ by sparsity alone.
    config = last["pretrain 0.75 seed 0"]["config"]
    assert config["steps"] == last["pretrain 0.0 seed 0"]["config"]["steps"]
    assert last["pretrain 0.75 seed 0"]["flops"] < last["pretrain 0.0 seed 0"]["flops"]
    # The models that rounds and single prunings start from are one.
    starts = {
        r["rows"][0]["loss"] for k, r in last.items() if k.startswith("prune ") and "rows" in r
    }
    assert len(starts) == 1
    assert last["prune control"]["evaluations"][0]["loss"] == pytest.approx(*starts, abs=1e-5)

    assert call(experiments, monkeypatch, tmp_path) == 0
    assert "==" not in capsys.readouterr().out and results(tmp_path) == last


def test_a_run_stops_at_its_deadline_and_resumes(experiments, monkeypatch, tmp_path):
    (tmp_path / "text.txt").write_text("Some bottles of beer on the wall. " * 200)
    from sparsekern.gpt import train

    config = train.TrainConfig(
        data=str(tmp_path / "text.txt"), layers=1, width=32, heads=2, context=16, batch=2, steps=6
    )
    config = experiments.replace(config, out=str(tmp_path / "run"), threads=1)
    with pytest.raises(train.OutOfTime, match="stopped at step 0 of 6"):
        train.train(config, deadline=0)
    assert not (tmp_path / "run").exists()
    clock = iter([1, 1, 1, 9, 9])
    with monkeypatch.context() as patch, pytest.raises(train.OutOfTime, match="at step 3 of 6"):
        patch.setattr(train.time, "monotonic", lambda: next(clock))
        train.train(config, deadline=5)
    resumed = train.train(train.resumed_config({"out": config.out}))
    whole = train.train(experiments.replace(config, out=str(tmp_path / "whole")))
    assert resumed["losses"] == whole["losses"]
