"""The pool of workers: they share GPUs, may crash, and stop in time."""

import importlib
import itertools
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
    """Have a stub make the jobs on two GPUs -> results and failures by key."""
    (folder / "stub.py").write_text(STUB)
    command = [sys.executable, str(folder / "stub.py")]
    pool = workers.Pool(command, ["0", "1"], folder / "logs", deadline)
    made, failed = {}, {}

    def finish(job, worker, answer):
        if "result" in answer:
            made[job.key] = answer["result"]
        elif answer["is_final"]:
            failed[job.key] = answer

    def choose(gpu, under_way):
        left = (job for job in jobs if job.key not in made | failed and job not in under_way)
        return next(left, None)

    try:
        pool.run(choose, finish)
    finally:
        pool.close()
    return made, failed


def test_each_worker_has_a_gpu(workers, tmp_path):
    jobs = [workers.Job(f"run {i}", "sleep", {"seconds": 0.2}) for i in range(4)]
    made, failed = make(workers, tmp_path, jobs)
    assert len(made) == 4 and not failed
    assert {result["gpu"] for result in made.values()} == {"0", "1"}
    for gpu in "01":
        spans = sorted(result["span"] for result in made.values() if result["gpu"] == gpu)
        assert all(a[1] <= b[0] for a, b in itertools.pairwise(spans))


def test_a_worker_that_crashes_is_replaced(workers, tmp_path):
    job = workers.Job
    others = [job(f"run {i}", "sleep", {"seconds": 0.0}) for i in range(4)]
    made, failed = make(workers, tmp_path, [job("bad", "crash", {}), *others])
    assert len(made) == 4
    assert failed["bad"]["failed"] == "ended with code 7" and failed["bad"]["log"][-1] == "a crash"


def test_workers_stop_in_time(workers, tmp_path, monkeypatch):
    monkeypatch.setattr(workers, "GRACE_S", 0.2)
    jobs = [workers.Job(f"run {i}", "sleep", {"seconds": 60}) for i in range(5)]
    began = time.monotonic()
    made, failed = make(workers, tmp_path, jobs, began + 1)
    assert not made and not failed and time.monotonic() - began < 30
