"""The pool of workers: they share GPUs, may crash, and stop in time."""

import importlib
import sys
import time
from pathlib import Path

import pytest

BENCH = Path(__file__).parents[2] / "bench"


@pytest.fixture(scope="module")
def workers():
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(BENCH)
        yield importlib.import_module("workers")
    del sys.modules["workers"]


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


def make(workers, folder: Path, jobs: list, deadline: float = float("inf")) -> tuple:
    """Have a stub make the jobs on two GPUs -> results and failures by key, and what is left."""
    (folder / "stub.py").write_text(STUB)
    command = [sys.executable, str(folder / "stub.py")]
    pool = workers.Pool(command, ["0", "1"], 2, folder / "logs", deadline)
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


def test_workers_share_gpus_but_for_runs_that_want_one_alone(workers, tmp_path):
    job = workers.Job
    others = [job(f"run {i}", "sleep", {"seconds": 0.2}) for i in range(6)]
    alone = job("alone", "sleep", {"seconds": 0.5}, is_alone=True)
    made, failed, left = make(workers, tmp_path, [alone, *others])
    assert len(made) == 7 and not failed and left is None
    assert {result["gpu"] for result in made.values()} == {"0", "1"}
    began, ended = made["alone"]["span"]
    beside = [r for k, r in made.items() if k != "alone" and r["gpu"] == made["alone"]["gpu"]]
    assert all(r["span"][1] <= began or r["span"][0] >= ended for r in beside)


def test_a_worker_that_crashes_is_replaced(workers, tmp_path):
    job = workers.Job
    others = [job(f"run {i}", "sleep", {"seconds": 0.0}) for i in range(4)]
    made, failed, left = make(workers, tmp_path, [job("bad", "crash", {}), *others])
    assert len(made) == 4 and left is None
    assert failed["bad"]["failed"] == "ended with code 7" and failed["bad"]["log"][-1] == "a crash"


def test_workers_stop_in_time(workers, tmp_path, monkeypatch):
    monkeypatch.setattr(workers, "GRACE_S", 0.2)
    job = workers.Job
    jobs = [job(f"run {i}", "sleep", {"seconds": 60}) for i in range(5)]
    made, failed, left = make(workers, tmp_path, jobs, time.monotonic() + 1)
    assert not made and not failed and left == "run 4"
