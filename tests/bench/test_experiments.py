"""The experiments' driver, on its smallest preset: it stops, continues, and does nothing twice; and
its workers, which may crash."""

import importlib
import shutil
import sys
import time
from pathlib import Path

import pytest
import torch

from sparsekern.bench.records import read
from sparsekern.bench.runs import nested

BENCH = Path(__file__).parents[2] / "bench"
MODULES = ("experiments", "experiments_page", "experiments_presets")
MODULES += ("experiments_worker", "workers")


@pytest.fixture(scope="module")
def bench():
    """The modules of bench/ by name."""
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(BENCH)
        yield {name: importlib.import_module(name) for name in MODULES}
    for name in MODULES:
        del sys.modules[name]


@pytest.fixture
def call(bench, monkeypatch, tmp_path):
    """One call of the driver, with all runs made in this process: `most` of them at the most."""
    torch.set_num_threads(1)
    (tmp_path / "text.txt").write_text("Some bottles of beer on the wall. " * 200)
    texts = [f"--{name}-data={tmp_path / 'text.txt'}" for name in ("pretrain", "finetune")]
    places = [f"--out={tmp_path / 'out'}", f"--work={tmp_path / 'work'}"]

    def run(*flags: str, most: int = 1000) -> int:
        class InProcess:
            device, gpu, began = "this processor", "", 0.0

            def __init__(self, command, gpus, per_gpu, logs, deadline):
                pass

            def run(self, plan, finish):
                for _ in range(most):
                    job = next(iter(plan()), None)
                    if job is None:
                        return None
                    message = {"kind": job.kind, "settings": job.settings, "deadline": float("inf")}
                    finish(job, self, bench["experiments_worker"].answer(message))
                return next(iter(plan())).key

            def close(self):
                pass

        monkeypatch.setattr(bench["experiments"], "Pool", InProcess)
        arguments = ["experiments", *places, *texts, "--preset=smoke", "--device=cpu", *flags]
        monkeypatch.setattr(sys, "argv", arguments)
        return bench["experiments"].main()

    return run


def results(folder: Path) -> dict:
    return nested(read(folder / "out" / "experiments.csv"))


def test_it_stops_continues_and_finishes(call, tmp_path, capsys):
    assert call("--minutes=0") == 3
    assert "out of time: before times" in capsys.readouterr().out

    # The scratch folder is lost after pre-training.
    assert call(most=7) == 3
    first = results(tmp_path)
    assert "pretrain 0.75 seed 0" in first and "finetune 0.0 seed 0 lr 0.001" not in first
    shutil.rmtree(tmp_path / "work")
    capsys.readouterr()

    assert call() == 0
    out = capsys.readouterr().out
    assert out.count("pretrain 0.0 seed 0: loss") == 1 and "all done" in out
    last = results(tmp_path)
    assert all(last[key] == value for key, value in first.items())
    assert {"prune rounds", "prune once 0.9", "prune sparsegpt 0.5"} <= last.keys()
    assert {"pretrain 0.75 seed 1", "finetune 0.75 seed 1 lr 0.001"} <= last.keys()
    page = (tmp_path / "out" / "experiments.md").read_text()
    for title in ("Pre-training", "Dense fine-tuning", "Seeds", "Pruning the dense model", "Times"):
        assert f"## {title}" in page
    assert "## Runs that failed" not in page
    is_plotted = (tmp_path / "out" / "experiments-flops.png").exists()  # with matplotlib
    assert ("](experiments-flops.png)" in page) == is_plotted
    # Equal tokens, so FLOPs differ by sparsity alone.
    dense, sparse = (last[f"pretrain {sparsity} seed 0"] for sparsity in (0.0, 0.75))
    assert sparse["config"]["steps"] == dense["config"]["steps"]
    assert sparse["flops"] < dense["flops"]
    # Runs may have shared a GPU: their times are those of steps alone.
    assert sparse["step_s"] == last["times"]["times"]["0.75"]["step_s"]
    assert sparse["evaluations"][-1]["seconds"] == sparse["steps_s"] == 8 * sparse["step_s"]
    assert "latency_s" not in last["prune rounds"]["rows"][0]
    # The models that rounds and single prunings start from are one.
    starts = {
        r["rows"][0]["loss"] for k, r in last.items() if k.startswith("prune ") and "rows" in r
    }
    assert len(starts) == 1
    assert last["prune control"]["evaluations"][0]["loss"] == pytest.approx(*starts, abs=1e-5)

    assert call() == 0
    assert capsys.readouterr().out == "all done\n" and results(tmp_path) == last


def test_other_text_is_refused(call, tmp_path):
    assert call(most=1) == 3
    shutil.rmtree(tmp_path / "work")
    (tmp_path / "text.txt").write_text("Some bottles of wine on the wall. " * 200)
    with pytest.raises(ValueError, match="data: not the text of"):
        call()


def test_a_run_that_fails_costs_only_what_needs_it(call, bench, monkeypatch, tmp_path):
    train = bench["experiments_worker"].train

    def fragile(config, deadline):
        if config.sparsity and config.steps > 4:
            raise RuntimeError("for the test")
        if config.lr == 0.003 and not config.sparsity:
            raise FloatingPointError("loss is nan at step 3")
        return train(config, deadline)

    monkeypatch.setattr(bench["experiments_worker"], "train", fragile)
    finish = bench["experiments"].Experiments.finish

    def at_once(self, job, worker, answer):
        finish(self, job, worker, answer | {"is_final": True})

    monkeypatch.setattr(bench["experiments"].Experiments, "finish", at_once)
    assert call() == 3
    found = results(tmp_path)
    assert found["failed"] == {
        f"pretrain 0.75 seed {seed}": "RuntimeError: for the test" for seed in (0, 1)
    }
    assert found["sweep 0.0 lr 0.003"]["loss"] is None
    assert found["pretrain 0.0 seed 0"]["config"]["lr"] == 0.001
    assert {"finetune 0.0 seed 1 lr 0.001", "prune rounds"} <= found.keys()
    page = (tmp_path / "out" / "experiments.md").read_text()
    assert "diverged" in page and "pretrain 0.75 seed 1: RuntimeError" in page


@pytest.mark.parametrize(
    ("losses", "cells"),
    [
        ({1.0: 3.0, 2.0: 2.0, 3.0: 4.0}, ["3.0000", "**2.0000**", "4.0000", "no"]),
        ({1.0: 3.0, 2.0: 4.0, 3.0: None}, ["**3.0000**", "4.0000", "diverged", "lowest"]),
        ({2.0: 4.0, 3.0: 3.0}, ["-", "4.0000", "**3.0000**", "highest"]),
    ],
)
def test_a_best_rate_at_an_end_of_the_sweep_is_marked(bench, losses, cells):
    row = bench["experiments_page"].sweep_row(0.5, losses, [1.0, 2.0, 3.0])
    assert row == ["50% sparse", *cells]


STUB = """
import json, os, sys, time
print(json.dumps({"device": "stub"}), flush=True)
for line in sys.stdin:
    message = json.loads(line)
    if message["kind"] == "crash":
        print("a crash", file=sys.stderr)
        os._exit(7)
    began = time.monotonic()
    time.sleep(message["settings"]["seconds"])
    found = {"gpu": os.environ["CUDA_VISIBLE_DEVICES"], "span": [began, time.monotonic()]}
    print(json.dumps({"result": found}), flush=True)
"""


def make(bench, folder: Path, jobs: list, deadline: float = float("inf")) -> tuple:
    """Have a stub make the jobs on two GPUs -> results and failures by key, and what is left."""
    (folder / "stub.py").write_text(STUB)
    command = [sys.executable, str(folder / "stub.py")]
    pool = bench["workers"].Pool(command, ["0", "1"], 2, folder / "logs", deadline)
    made, failed = {}, {}

    def finish(job, worker, answer):
        if "result" in answer:
            made[job.key] = answer["result"]
        elif answer["is_final"]:
            failed[job.key] = answer

    def plan():
        return (job for job in jobs if job.key not in made and job.key not in failed)

    try:
        left = pool.run(plan, finish)
    finally:
        pool.close()
    return made, failed, left


def test_workers_share_gpus_but_for_runs_that_want_one_alone(bench, tmp_path):
    job = bench["workers"].Job
    others = [job(f"run {i}", "sleep", {"seconds": 0.2}) for i in range(6)]
    alone = job("alone", "sleep", {"seconds": 0.5}, is_alone=True)
    made, failed, left = make(bench, tmp_path, [alone, *others])
    assert len(made) == 7 and not failed and left is None
    assert {result["gpu"] for result in made.values()} == {"0", "1"}
    began, ended = made["alone"]["span"]
    beside = [r for k, r in made.items() if k != "alone" and r["gpu"] == made["alone"]["gpu"]]
    assert all(r["span"][1] <= began or r["span"][0] >= ended for r in beside)


def test_a_worker_that_crashes_is_replaced(bench, tmp_path):
    job = bench["workers"].Job
    others = [job(f"run {i}", "sleep", {"seconds": 0.0}) for i in range(4)]
    made, failed, left = make(bench, tmp_path, [job("bad", "crash", {}), *others])
    assert len(made) == 4 and left is None
    assert failed["bad"]["failed"] == "ended with code 7" and failed["bad"]["log"][-1] == "a crash"


def test_workers_stop_in_time(bench, tmp_path, monkeypatch):
    monkeypatch.setattr(bench["workers"], "GRACE_S", 0.2)
    job = bench["workers"].Job
    jobs = [job(f"run {i}", "sleep", {"seconds": 60}) for i in range(5)]
    made, failed, left = make(bench, tmp_path, jobs, time.monotonic() + 1)
    assert not made and not failed and left == "run 4"


def test_the_worker_itself(bench, tmp_path):
    """One real process: a run, one that diverges, and one that fails."""
    (tmp_path / "text.txt").write_text("Some bottles of beer on the wall. " * 200)
    shape = {"layers": 1, "width": 32, "heads": 2, "context": 16, "batch": 2, "steps": 2}
    settings = shape | {"data": str(tmp_path / "text.txt"), "device": "cpu"}
    job = bench["workers"].Job
    jobs = [
        job("good", "train", settings | {"out": str(tmp_path / "good")}),
        job("high", "train", settings | {"out": str(tmp_path / "high"), "lr": 1e30}),
        job("bad", "train", settings | {"out": str(tmp_path / "bad"), "data": "nowhere"}),
    ]
    command = [sys.executable, bench["experiments"].WORKER, "cpu"]
    pool = bench["workers"].Pool(command, [""], 1, tmp_path / "logs", float("inf"))
    answers = {}
    try:
        assert not pool.run(
            lambda: (job for job in jobs if job.key not in answers),
            lambda job, worker, answer: answers.update({job.key: answer}),
        )
    finally:
        pool.close()
    assert answers["good"]["result"]["loss"] == pytest.approx(5.5, abs=0.2)
    assert answers["high"]["result"]["loss"] is None
    assert "at step" in answers["high"]["result"]["diverged"]
    assert answers["bad"]["failed"].startswith("FileNotFoundError: data: expected")


def test_a_run_stops_at_its_deadline_and_resumes(monkeypatch, tmp_path):
    (tmp_path / "text.txt").write_text("Some bottles of beer on the wall. " * 200)
    from dataclasses import replace

    from sparsekern.gpt import train
    from sparsekern.gpt.config import TrainConfig, resumed_config

    config = TrainConfig(
        data=str(tmp_path / "text.txt"), layers=1, width=32, heads=2, context=16, batch=2, steps=6
    )
    config = replace(config, out=str(tmp_path / "run"), threads=1)
    with pytest.raises(train.OutOfTime, match="stopped at step 0 of 6"):
        train.train(config, deadline=0)
    assert not (tmp_path / "run").exists()
    clock = iter([1, 1, 1, 9, 9])
    with monkeypatch.context() as patch, pytest.raises(train.OutOfTime, match="at step 3 of 6"):
        patch.setattr(train.time, "monotonic", lambda: next(clock))
        train.train(config, deadline=5)
    resumed = train.train(resumed_config({"out": config.out}))
    whole = train.train(replace(config, out=str(tmp_path / "whole")))
    assert resumed["losses"] == whole["losses"]
