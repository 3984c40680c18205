"""Training in two processes on a CPU: the run of one process, patterns the same on both ranks."""

import json
import os
import signal
import socket
import subprocess
import sys
import weakref
from dataclasses import asdict, replace
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from tiny import flags, tiny_config

from sparsekern.gpt import train
from sparsekern.gpt.buckets import Buckets
from sparsekern.gpt.checkpoint import CHECKPOINT, load_checkpoint
from sparsekern.gpt.config import TrainConfig, resumed_config
from sparsekern.gpt.distributed import Ranks, connect, finish, is_first_rank
from sparsekern.gpt.start import begin

pytestmark = pytest.mark.skipif(not dist.is_available(), reason="torch without distributed")

WORKER = Path(__file__).with_name("distributed_worker.py")
STEPS = 8
SETTINGS = {
    "static": {"sparsity": 0.75, "family": "two-way"},
    "rigl": {"algorithm": "rigl", "sparsity": 0.75, "update": {"freq": 2}},
    "set": {"algorithm": "set", "sparsity": 0.75, "update": {"freq": 2}},
    "gmp": {
        "algorithm": "gmp",
        "sparsity": {"type": "cubic", "init": 0.0, "final": 0.8, "steps": 6},
        "update": {"freq": 3, "stop": 7},
    },
}
# set is rigl with other places.
RUNS = [(a, p) for a in SETTINGS for p in ("ddp", "fsdp") if (a, p) != ("set", "fsdp")]


# On a CPU a stand-in for CUDA graphs takes the captured steps.
CAPTURED = {
    f"captured {name} {parallel}": algorithm
    for name, algorithm, parallel in (
        ("static", "static", "ddp"),
        ("static", "static", "fsdp"),
        ("gmp", "gmp", "ddp"),
        ("gmp", "gmp", "fsdp"),
        ("failing", "static", "fsdp"),
    )
}
FAILED_ELSEWHERE = "not captured by process 1: OutOfMemoryError: no memory on 1"
WIDE = {"wide dense": 0.0, "wide sparse": 0.75}


def config(folder: Path, algorithm: str, parallel: str = "none") -> TrainConfig:
    return tiny_config(
        folder,
        sparsity_config=str(folder / f"{algorithm}.json"),
        batch=4,
        micro_batch=0 if parallel == "none" else 1,  # of two sequences for each process
        steps=STEPS,
        parallel=parallel,
        out=str(folder / f"{algorithm}-{parallel}"),
        eval_every=100,
        checkpoint_every=4,
    )


def torchrun(folder: Path, ranks: int = 2, timeout_s: float = 500) -> list[dict]:
    command = [sys.executable, "-m", "torch.distributed.run", f"--nproc-per-node={ranks}"]
    command += ["--master-port=0", "--rdzv-backend=c10d", "--rdzv-endpoint=localhost:0"]
    env = os.environ | {
        "OMP_NUM_THREADS": "1",
        "PYTHONPATH": os.pathsep.join(filter(None, sys.path)),
    }
    how = dict(env=env, capture_output=True, text=True, timeout=timeout_s)
    done = subprocess.run([*command, str(WORKER), str(folder)], **how)
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-6000:]
    return [json.loads((folder / f"results-{rank}.json").read_text()) for rank in range(ranks)]


KILLED = """
import os, signal, sys
from sparsekern import cli
from sparsekern.gpt.data import Batches

def get(self, i, get=Batches.get):
    if i == 6 and os.environ["RANK"] == "1":
        os.kill(os.getpid(), signal.SIGKILL)
    return get(self, i)

Batches.get = get
sys.exit(cli.main(sys.argv[1:]))
"""


@pytest.fixture(scope="module")
def alone(tmp_path_factory) -> Path:
    """The runs of one process."""
    folder = tmp_path_factory.mktemp("distributed")
    for name, settings in SETTINGS.items():
        (folder / f"{name}.json").write_text(json.dumps(settings))
        train.train(config(folder, name))
    return folder


@pytest.fixture(scope="module")
def runs(alone) -> tuple[Path, list[dict]]:
    """All two-process runs, in one torchrun; and those that resume a run of one process."""
    folder = alone
    configs = {f"{a}-{p}": _changed(config(folder, a, p)) for a, p in RUNS}
    for name, algorithm in CAPTURED.items():
        one = config(folder, algorithm, name.split()[-1])
        configs[name] = _changed(replace(one, out=str(folder / name)))
    for name, sparsity in WIDE.items():
        wide = tiny_config(folder, layers=4, width=128, steps=2, parallel="ddp", sparsity=sparsity)
        configs[name] = _changed(replace(wide, out=str(folder / name)))
    for parallel in ("ddp", "fsdp"):
        alone = replace(config(folder, "rigl"), out=str(folder / f"resumed-{parallel}"))
        _stop_half_way(alone)
        configs[f"resumed-{parallel}"] = {"out": alone.out, "parallel": parallel, "resume": True}
    (folder / "configs.json").write_text(json.dumps(configs))
    return folder, torchrun(folder)


def _changed(config: TrainConfig) -> dict:
    return {name: value for name, value in asdict(config).items() if name != "resume"}


def _stop_half_way(config: TrainConfig) -> None:
    """The checkpoint of step 4, as a run that is killed afterwards leaves it."""
    run = begin(config)
    for step in range(5):
        run.compute_gradients()
        if step == 4:
            run.save()
            return
        run.update()


def saved(folder: Path, name: str) -> dict:
    return load_checkpoint(folder / name / CHECKPOINT)


@pytest.mark.parametrize(("algorithm", "parallel"), RUNS)
def test_two_processes_compute_what_one_does(runs, algorithm, parallel):
    folder, _ = runs
    one, two = saved(folder, f"{algorithm}-none"), saved(folder, f"{algorithm}-{parallel}")
    assert two["losses"] == pytest.approx(one["losses"], abs=1e-4)
    evaluated, again = ([e["loss"] for e in run["evaluations"]] for run in (one, two))
    assert again == pytest.approx(evaluated, abs=1e-4)
    assert one["model"].keys() == two["model"].keys()
    for name, t in one["model"].items():
        if t.dtype == torch.int32:
            assert torch.equal(t, two["model"][name]), name
        else:
            torch.testing.assert_close(t, two["model"][name], atol=1e-4, rtol=1e-3)
    for a, b in zip(
        one["optimizer"]["state"].values(), two["optimizer"]["state"].values(), strict=True
    ):
        assert a.keys() == b.keys() and all(a[key].shape == b[key].shape for key in a)


@pytest.mark.parametrize(("algorithm", "parallel"), RUNS)
def test_patterns_are_checked_after_every_update_before_every_checkpoint_and_the_same(
    runs, algorithm, parallel
):
    _, (first, second) = runs
    name = f"{algorithm}-{parallel}"
    updates = {"static": 0, "rigl": 4, "set": 4, "gmp": 2}[algorithm]
    assert len(first[name]["checks"]) == 1 + updates + 2
    assert first[name] == second[name]
    if updates:
        assert first[name]["checks"][0] != first[name]["checks"][-1]


@pytest.mark.parametrize("name", CAPTURED)
def test_captured_steps_of_two_processes_compute_what_one_does(runs, name):
    folder, results = runs
    one, two = saved(folder, f"{CAPTURED[name]}-none"), saved(folder, name)
    assert two["losses"] == pytest.approx(one["losses"], abs=1e-4)
    for key, t in one["model"].items():
        if t.dtype == torch.int32:
            assert torch.equal(t, two["model"][key]), key
    for result in results:
        assert (result[name]["replays"] > 0) == ("failing" not in name)


def test_a_capture_that_fails_on_one_rank_is_given_up_on_both(runs):
    first, second = (result["captured failing fsdp"]["eager"] for result in runs[1])
    assert first == [FAILED_ELSEWHERE]
    assert second == ["no memory on 1"]


def test_gradients_of_sparse_weights_are_sent_at_nnz(runs):
    for results in runs[1]:
        dense, sparse = (results[name]["sent"] for name in WIDE)
        assert sparse < 0.3 * dense
        assert results["wide dense"]["sent_bytes"] == dense / 2  # each of two steps once


@pytest.mark.parametrize("name", ["static-fsdp", "captured static fsdp"])
def test_weights_are_gathered_once_a_step_and_a_process_has_half_of_the_state(runs, name):
    folder, results = runs
    weights = saved(folder, "static-none")["model"].values()
    sizes = [t.nbytes for t in {t.data_ptr(): t for t in weights}.values() if t.is_floating_point()]
    in_shares = sum(nbytes // 256 * 256 for nbytes in sizes)  # 32 weights for each of two
    for result in results:
        moments = 2 * 2 * in_shares  # in two checkpoints
        assert result[name]["gathered"] == STEPS * in_shares + moments
        assert result[name]["held"] == [2 * (sum(sizes) - in_shares // 2)]


@pytest.mark.parametrize("parallel", ["ddp", "fsdp"])
def test_micro_batches_are_sent_once(runs, parallel):
    folder, results = runs
    weights = saved(folder, f"static-{parallel}")["model"]
    parameters = {n: t for n, t in weights.items() if t.dtype == torch.float32}
    del parameters["lm_head.weight"]  # that of wte
    for result in results:
        assert result[f"static-{parallel}"]["sent"] == STEPS * sum(
            t.nbytes for t in parameters.values()
        )


def test_the_benchmark_of_several_gpus(runs):
    (links,), steps = runs[1][0]["links"], runs[1][0]["scale"]
    assert links["ways"]["all_reduce"]["bytes"] == 2**16 and links["gpus"] == 2
    assert [case["mask"] for case in steps] == ["two-way", "none", "random"]
    for case in steps:
        for together in (case["ways"][parallel] for parallel in ("together", "fsdp")):
            assert together["is_right"] and together["error"] < 1e-5 and together["loss"] > 3
    assert list(steps[0]["ways"]) == ["alone", "together", "fsdp", "accumulated"]
    assert list(steps[1]["ways"]) == list(steps[2]["ways"]) == ["together", "fsdp"]
    sent = [case["ways"]["together"]["sent_bytes"] for case in steps]
    assert sent[0] == sent[2] < sent[1]
    steps = runs[1][0]["not begun"]
    assert {case["ways"]["together"]["failed"] for case in steps} == {"not begun within -1 s"}


def test_a_difference_between_ranks_is_an_error_on_both(runs):
    for results in runs[1]:
        assert results["error"] == "sparsity: the ranks have different patterns in a"


def test_a_run_whose_ranks_differ_is_an_error_on_both_and_writes_nothing(runs):
    same = "expected the same in all processes, got"
    for results in runs[1]:
        assert results["other seed"] == f"seed: {same} 0 in the first and 1 in process 1"
        assert results["other parallel"].endswith(f"{same} ddp in the first and fsdp in process 1")
        assert results["other data"].startswith(f"data (CRC-32): {same}")
        assert results["other at last"].startswith("sparsity: the ranks have different patterns")
        assert not results["other was written"]


def test_fsdp2_refuses_other_patterns_before_the_first_step(runs):
    """It shards and averages values by their number, wherever they belong."""
    text = "sparsity: the ranks have different patterns in 0, 2"
    for results in runs[1]:
        assert results["fsdp same"] is results["fsdp same, no algorithm"] is None
        assert results["fsdp other"] == results["fsdp other, no algorithm"] == text


def test_what_fsdp2_has_cut_up_is_not_written_to_where_it_looks_whole(runs):
    for results in runs[1]:
        assert results["whole"].startswith("sparsity: the values of 0, 2 are whole, as FSDP2")
        callers = [text.partition(": the weights of ")[0] for text in results["cut up"]]
        assert callers == [*("apply",) * 2, *"densify_ pack_ weights sparsify_ densify_".split()]
        assert results["whole stayed"]


def test_what_fsdp2_has_not_cut_up_is_taken(runs):
    """Layers beside those, and sparse ones that keep their pattern."""
    for results in runs[1]:
        assert results["beside"] == [None] * 4 and results["kept"] is None


def test_rigl_takes_no_layers_that_some_ranks_alone_have(runs):
    for results in runs[1]:
        assert "the same layers on each, got 0.0, 0.2, 1.0, 1.2 on some of" in results["stages"]


def test_ddp_gives_all_ranks_the_patterns_of_the_first_and_averages_follow(runs):
    one, two = runs[1]
    assert one["first"] != two["first"]
    assert one["ddp"] == two["ddp"] == one["average"] == two["average"]
    assert one["ddp"][0] != one["first"]


@pytest.mark.parametrize("parallel", ["ddp", "fsdp"])
def test_one_process_resumes_as_two(runs, parallel):
    folder, _ = runs
    whole, resumed = saved(folder, "rigl-none"), saved(folder, f"resumed-{parallel}")
    assert resumed["losses"] == pytest.approx(whole["losses"], abs=1e-4)
    assert resumed["losses"][:4] == whole["losses"][:4]


@pytest.mark.parametrize("name", ["rigl-ddp", "gmp-fsdp"])
def test_two_processes_resume_as_one(runs, name):
    folder, _ = runs
    run = begin(resumed_config({"out": str(folder / name), "parallel": "none"}))
    assert run.step == STEPS and run.parts.algorithm.steps == STEPS
    state = run.state()
    for key, t in saved(folder, name)["model"].items():
        assert torch.equal(t, state["model"][key])
    run.compute_gradients()
    run.update()


@pytest.mark.gpu
@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="fewer than two NVIDIA GPUs")
def test_two_gpus_compute_what_a_cpu_does(alone, tmp_path):
    """Through NCCL. A rounding may decide what grows, so losses are held less tightly."""
    folder, given = alone, {"device": "cuda"}
    configs = {
        f"{a}-{p}": _changed(config(folder, a, p)) | given | {"out": str(tmp_path / f"{a}-{p}")}
        for a, p in RUNS
    }
    stopped = replace(config(folder, "rigl"), out=str(tmp_path / "resumed"))
    _stop_half_way(stopped)
    resumed = {"out": stopped.out, "parallel": "fsdp", "resume": True}
    failing = configs["static-fsdp"] | {"out": str(tmp_path / "failing")}
    others = {"failing": failing, "resumed": resumed | given}
    (tmp_path / "configs.json").write_text(json.dumps(configs | others))
    first, second = torchrun(tmp_path, timeout_s=120)
    for name in configs:  # numbers of places and of bytes
        assert first[name] == second[name] and not first[name]["eager"]
    assert first["error"].endswith("the ranks have different patterns in a")
    assert all(result["beside"] == [None] * 4 for result in (first, second))
    failed = [result["failing"]["eager"] for result in (first, second)]
    assert failed == [[FAILED_ELSEWHERE], ["no memory on 1"]]
    of_others = {"failing": "static", "resumed": "rigl"}
    for name in (*configs, *others):
        one = saved(folder, f"{of_others.get(name) or name.partition('-')[0]}-none")
        assert first[name]["losses"] == pytest.approx(one["losses"], abs=1e-2), name


@pytest.mark.skipif(sys.platform != "linux", reason="threads are counted in /proc")
def test_the_threads_of_a_group_end_with_it(monkeypatch):
    def threads() -> set[str]:
        return {(task / "comm").read_text() for task in Path("/proc/self/task").iterdir()}

    for name, value in dict(RANK=0, WORLD_SIZE=1, MASTER_ADDR="localhost", MASTER_PORT=0).items():
        monkeypatch.setenv(name, str(value))
    before = threads()
    model = torch.nn.Linear(4, 4)
    buckets = Buckets(model, Ranks("ddp", "cpu"))
    with buckets.sending():
        model(torch.randn(2, 4)).sum().backward()
    assert any("gloo" in name for name in threads())
    model.itself = [model, buckets]
    weight = weakref.ref(model.weight)
    del model, buckets
    finish()
    assert weight() is None
    assert threads() <= before and not dist.is_initialized()


def test_processes_that_are_started_anew_see_nothing_of_those_before(monkeypatch):
    store = dist.TCPStore("localhost", 0, is_master=True, wait_for_workers=False)
    there = dict(RANK=0, WORLD_SIZE=1, MASTER_ADDR="localhost", MASTER_PORT=store.port)
    there["TORCHELASTIC_USE_AGENT_STORE"] = True
    for name, value in there.items():
        monkeypatch.setenv(name, str(value))
    for attempt in "01":
        monkeypatch.setenv("TORCHELASTIC_RESTART_COUNT", attempt)
        told, rank, size = connect()
        assert (rank, size) == (0, 1) and not told.check(["gone"])
        told.set("gone", "1")


def test_a_killed_process_stops_the_other_and_one_goes_on(alone, tmp_path):
    """Without torchrun, which would stop it too. fsdp sends what ddp does, and more."""
    killed = replace(config(alone, "static", "fsdp"), out=str(tmp_path / "run"))
    env = os.environ | {"WORLD_SIZE": "2", "MASTER_ADDR": "localhost", "MASTER_PORT": free_port()}
    env |= {"OMP_NUM_THREADS": "1", "PYTHONPATH": os.pathsep.join(filter(None, sys.path))}
    command = [sys.executable, "-c", KILLED, *flags(killed)]
    first, second = (
        subprocess.Popen(command, env=env | {"RANK": rank}, stderr=subprocess.PIPE, text=True)
        for rank in "01"
    )
    _, told = first.communicate(timeout=300)
    assert (first.returncode, second.wait(timeout=300)) == (1, -signal.SIGKILL), told
    text = "sparsekern: error: parallel: another process has gone, or does not answer; --resume"
    assert text in told
    train.train(resumed_config({"out": killed.out, "parallel": "none"}))
    whole = saved(alone, "static-none")
    losses = load_checkpoint(Path(killed.out) / CHECKPOINT)["losses"]
    assert losses == pytest.approx(whole["losses"], abs=1e-4)


def free_port() -> str:
    with socket.socket() as one:
        one.bind(("localhost", 0))
        return str(one.getsockname()[1])


def test_mistakes(monkeypatch, tmp_path):
    with pytest.raises(ValueError, match="parallel: ddp needs torchrun"):
        Ranks("ddp", "cpu")
    with pytest.raises(ValueError, match="parallel: expected one of none, ddp, fsdp, got 'tp'"):
        Ranks("tp", "cpu")
    monkeypatch.setenv("WORLD_SIZE", "2")
    monkeypatch.setenv("RANK", "0")
    monkeypatch.setenv("LOCAL_RANK", "2")
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    with pytest.raises(ValueError, match="device: expected cpu or cuda:0 to cuda:1, got cuda:2"):
        Ranks("fsdp", "cuda")
    with pytest.raises(ValueError, match="device: expected cuda under torchrun, .*, got cuda:1"):
        Ranks("fsdp", "cuda:1")
    with pytest.raises(ValueError, match="parallel: expected ddp or fsdp in 2 processes, got none"):
        Ranks("none", "cpu")
    monkeypatch.delenv("WORLD_SIZE")
    monkeypatch.setenv("RANK", "1")  # of something else: nobody else would write
    assert is_first_rank() and Ranks("none", "cpu").size == 1
