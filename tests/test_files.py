"""Files are whole or not there, and the same after a kill as without one."""

import json
import os
import stat
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from tiny import besides_progress, same, tiny_config

from sparsekern import files
from sparsekern.gpt import prune as pruning
from sparsekern.gpt import train
from sparsekern.gpt.build import load_model
from sparsekern.gpt.checkpoint import CHECKPOINT, WEIGHTS, load_checkpoint
from sparsekern.gpt.config import TrainConfig, resumed_config
from sparsekern.gpt.data import load_tokens, prepare
from sparsekern.gpt.prune import PruneConfig, prune
from sparsekern.gpt.train import METRICS


@pytest.fixture
def tiny(tmp_path: Path) -> TrainConfig:
    return tiny_config(tmp_path)


@pytest.mark.parametrize("mask", [0o022, 0o077, 0o002])
def test_modes_follow_the_umask(tiny, mask):
    pytest.importorskip("safetensors")
    before = os.umask(mask)
    try:
        train.train(replace(tiny, steps=1))
    finally:
        os.umask(before)
    for name in (CHECKPOINT, WEIGHTS, METRICS):
        mode = stat.S_IMODE((Path(tiny.out) / name).stat().st_mode)
        assert mode == 0o666 & ~mask, name


def test_what_a_kill_left_is_replaced(tmp_path):
    path = tmp_path / "file"
    (tmp_path / "file.tmp").write_text("half")
    with files.atomic_write(path) as file:
        file.write(b"whole")
    (tmp_path / "file.tmp").mkdir()
    (tmp_path / "file.tmp" / ".tmpX").write_text("of a library")
    with files.atomic_path(path) as part:
        part.write_bytes(b"again")
    assert path.read_bytes() == b"again" and list(tmp_path.iterdir()) == [path]


def test_a_link_in_the_place_of_the_temporary_file_is_not_followed(tmp_path):
    (tmp_path / "other").write_text("mine")
    (tmp_path / "file.tmp").symlink_to(tmp_path / "other")
    with files.atomic_write(tmp_path / "file") as file:
        file.write(b"x")
    assert (tmp_path / "other").read_text() == "mine"


def test_of_two_that_write_a_file_at_once_the_last_one_wins(tmp_path):
    path = tmp_path / "file"
    with files.atomic_path(path) as part, files.atomic_path(path) as other:
        part.write_bytes(b"longer")
        other.write_bytes(b"x")
        assert not path.exists()
    assert path.read_bytes() == b"longer" and list(tmp_path.iterdir()) == [path]
    with files.atomic_write(path) as file:
        with files.atomic_write(path) as other:
            other.write(b"first")
        assert path.read_bytes() == b"first"
        file.write(b"last")
    assert path.read_bytes() == b"last" and list(tmp_path.iterdir()) == [path]


def test_the_name_of_a_renamed_file_is_another_ones(tmp_path, monkeypatch):
    """The first one ends, and does not remove what the second one has under that name."""
    path, rename = tmp_path / "file", os.replace
    seconds = []

    def renamed(*paths):
        rename(*paths)
        monkeypatch.setattr(os, "replace", rename)
        seconds.append(files.atomic_write(path))
        seconds[0].__enter__().write(b"second")

    monkeypatch.setattr(os, "replace", renamed)
    with files.atomic_write(path) as file:
        file.write(b"first")
    assert path.read_bytes() == b"first"
    seconds[0].__exit__(None, None, None)
    assert path.read_bytes() == b"second" and list(tmp_path.iterdir()) == [path]


def test_what_is_no_file_is_not_replaced(tmp_path):
    pipe, folder, link = tmp_path / "pipe", tmp_path / "folder", tmp_path / "link"
    os.mkfifo(pipe)
    folder.mkdir()
    link.symlink_to(pipe)
    before = sorted(tmp_path.iterdir())
    for path in (pipe, folder, link):
        for write in (files.atomic_write, files.atomic_path):
            with pytest.raises(OSError, match=f"expected a file or nothing there: '{path}'"):
                write(path).__enter__()
    assert sorted(tmp_path.iterdir()) == before and stat.S_ISFIFO(pipe.stat().st_mode)


FULL_DISK = """
import resource, sys, tempfile
from pathlib import Path
from sparsekern.cli import main
tempfile.gettempdir()  # which torch looks for on its way: not on the disk that is full
folder = Path(sys.argv[1])
hard = resource.getrlimit(resource.RLIMIT_FSIZE)[1]
for limit in map(int, sys.argv[3:]):
    resource.setrlimit(resource.RLIMIT_FSIZE, (limit, hard))
    code = main([*sys.argv[2].split(), f"--out={folder / str(limit)}"])
    resource.setrlimit(resource.RLIMIT_FSIZE, (hard, hard))
    print(f"LIMIT {limit} {code}", file=sys.stderr)
"""


def test_a_full_disk_is_one_line_that_names_the_file(tiny, tmp_path):
    """checkpoint.pt has about 700 kB and is larger than model.safetensors."""
    flags = f"train --data={tiny.data} --layers=1 --heads=2 --width=32 --context=16 --batch=2"
    flags += " --steps=2 --threads=1"
    limits = ["0", "100", "5000", "50000", "120000", "100000000"]
    command = [sys.executable, "-c", FULL_DISK, str(tmp_path / "out"), flags, *limits]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    lines = iter(besides_progress(done.stderr))
    for limit in limits[:-1]:
        path = tmp_path / "out" / limit / CHECKPOINT
        assert next(lines) == f"sparsekern: error: [Errno 27] File too large: '{path}'"
        assert next(lines) == f"LIMIT {limit} 2"
        assert not path.parent.exists()  # nor a part of a file
    assert list(lines) == [f"LIMIT {limits[-1]} 0"]


def test_a_full_disk_while_weights_are_written(tmp_path):
    pytest.importorskip("safetensors")
    code = (
        "import resource, sys, torch; from pathlib import Path\n"
        "from sparsekern.weights import save_weights\n"
        "resource.setrlimit(resource.RLIMIT_FSIZE, (5000, -1))\n"
        "try: save_weights({'w': torch.zeros(10000)}, sys.argv[1])\n"
        "except OSError as error: print(error)"
    )
    path = tmp_path / "w.safetensors"
    done = subprocess.run([sys.executable, "-c", code, path], capture_output=True, text=True)
    assert done.stdout == f"[Errno 27] File too large: '{path}'\n" and not list(tmp_path.iterdir())


# A run that is killed ends like one that is not


class Killed(BaseException):
    pass


def kill_at_rename(monkeypatch, count: int) -> None:
    rename, done = os.replace, []

    def killed(*paths):
        done.append(paths)
        if len(done) == count:
            raise Killed
        rename(*paths)

    monkeypatch.setattr(os, "replace", killed)


def contents(folder: Path, same_in_all: tuple[str, ...]) -> dict:
    names = sorted(path.name for path in folder.iterdir())
    return {name: (folder / name).read_bytes() if name in same_in_all else None for name in names}


@pytest.mark.parametrize("settings", [{}, {"sparsity": 0.75, "algorithm": "rigl"}])
def test_a_run_killed_at_any_rename_ends_with_the_same_files(tiny, tmp_path, monkeypatch, settings):
    pytest.importorskip("safetensors")
    tiny = replace(tiny, out="run", **settings)
    (tmp_path / "whole").mkdir()
    monkeypatch.chdir(tmp_path / "whole")
    train.train(tiny)
    want = contents(Path("run"), (WEIGHTS,))
    assert want.keys() == {CHECKPOINT, WEIGHTS, METRICS}
    losses = load_checkpoint("run")["losses"]
    for count in range(2, 6):  # checkpoints of 4 and 6, weights, metrics
        (tmp_path / str(count)).mkdir()
        monkeypatch.chdir(tmp_path / str(count))
        with monkeypatch.context() as patch, pytest.raises(Killed):
            kill_at_rename(patch, count)
            train.train(tiny)
        train.train(resumed_config({"out": "run"}))
        assert contents(Path("run"), (WEIGHTS,)) == want
        assert load_checkpoint("run")["losses"] == losses
        assert json.loads((Path("run") / METRICS).read_text())["losses"] == losses


def test_a_pruning_killed_at_any_rename_ends_with_the_same_files(tiny, tmp_path, monkeypatch):
    pytest.importorskip("safetensors")
    train.train(tiny)
    config = PruneConfig(tiny.out, steps=2, rounds=2, target=0.8, out="pruned")
    monkeypatch.setattr(pruning, "latencies", lambda run: (1.0, 1.0))
    (tmp_path / "whole").mkdir()
    monkeypatch.chdir(tmp_path / "whole")
    prune(config)
    want = contents(Path("pruned"), (WEIGHTS,))
    assert want.keys() == {CHECKPOINT, WEIGHTS, "prune.json"}
    state = load_checkpoint("pruned")
    model, _ = load_model(Path("pruned"))
    exported, _ = load_model(Path("pruned") / WEIGHTS)
    assert same(dict(model.state_dict()), dict(exported.state_dict()))
    for count in range(2, 9):  # a checkpoint and the table a round, the table, the weights
        (tmp_path / str(count)).mkdir()
        monkeypatch.chdir(tmp_path / str(count))
        with monkeypatch.context() as patch, pytest.raises(Killed):
            kill_at_rename(patch, count)
            prune(config)
        prune(config)
        assert contents(Path("pruned"), (WEIGHTS,)) == want
        got = load_checkpoint("pruned")
        for name in ("model", "losses", "config", "flops"):
            assert same(state[name], got[name])
        for source in (got["source"], state["source"]):  # the round before; before it the run
            assert (source["steps"], source["before"]["steps"]) == (1, tiny.steps)


def test_what_prune_wrote_is_not_resumed_by_train(tiny, tmp_path):
    train.train(tiny)
    out = str(tmp_path / "pruned")
    prune(PruneConfig(tiny.out, steps=0, targets="0.5", out=out))
    with pytest.raises(ValueError, match="was written by prune.*--init-from"):
        resumed_config({"out": out})
    with pytest.raises(ValueError, match="was not written by prune; choose another"):
        prune(PruneConfig(tiny.out, steps=0, targets="0.5", out=tiny.out))


def test_prepared_tokens_that_are_damaged_are_named(tiny, tmp_path):
    folder = tmp_path / "tokens"
    for name, content, message in (
        ("tokens.json", b"{", "tokens.json is damaged"),
        ("tokens.json", b"[]", "tokens.json is damaged"),
        ("training.npy", b"", "training.npy is damaged"),
        ("training.npy", b"text", "training.npy is damaged"),
    ):
        prepare(tiny.data, "bytes", folder)
        (folder / name).write_bytes(content)
        with pytest.raises(ValueError, match=message):
            load_tokens(str(folder), None, "bytes", 0)
    prepare(tiny.data, "bytes", folder)
    np.save(folder / "validation.npy", np.array([1, 300]))
    with pytest.raises(ValueError, match=r"validation.npy: expected tokens in \[0, 256\)"):
        load_tokens(str(folder), None, "bytes", 0)
