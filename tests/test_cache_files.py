"""The user's cache: ignored where it is damaged, made anew where others may have written it."""

import json
import os
import stat
import subprocess
import sys
from pathlib import Path

import pytest

from sparsekern import files
from sparsekern.kernels import crossover
from sparsekern.kernels.cuda.library import NvrtcRoute

GOOD = '{"m": {"tokens": [1, 8], "float32": {"panel spmm": {"expand": [0.5, null]}}}}'
DAMAGED_CROSSOVERS = {
    "not JSON": b"{",
    "a list": b"[]",
    "a number": b"3",
    "null": b"null",
    "empty": b"",
    "not UTF-8": b'{"\xff": 1}',
    "deep": b"[" * 100_000,
    "no tokens": GOOD.replace("tokens", "token").encode(),
    "no entry": b'{"m": null}',
    "strings": GOOD.replace("0.5", '"0.5"').encode(),
    "NaN": GOOD.replace("0.5", "NaN").encode(),
    "above 1": GOOD.replace("0.5", "7").encode(),
    "short": GOOD.replace("0.5, null", "0.5").encode(),
    "tokens fall": GOOD.replace("1, 8", "8, 1").encode(),
    "huge": b" " * (crossover.MOST_BYTES + 1),
}


@pytest.mark.parametrize("name", DAMAGED_CROSSOVERS)
def test_a_damaged_crossover_says_what_is_wrong(tmp_path, name):
    path = tmp_path / "crossover.json"
    path.write_bytes(DAMAGED_CROSSOVERS[name])
    with pytest.raises(ValueError):
        crossover.read(path)
    path.write_text(GOOD)
    assert crossover.read(path)["m"]["tokens"] == [1, 8]


PRODUCTS = """
import json, os, sys, warnings
from pathlib import Path
import torch
from sparsekern import SparseTensor
from sparsekern.kernels import crossover, table
path = crossover.calibrated_file()
damages = [bytes.fromhex(text) for text in json.loads(sys.stdin.read())]
W = SparseTensor.from_dense(torch.eye(8))
x = torch.ones(3, 8)
for kind in [*damages, "folder", "device", "pipe", "loop", None]:
    path.parent.mkdir(parents=True, exist_ok=True)
    if isinstance(kind, bytes): path.write_bytes(kind)
    elif kind == "folder": path.mkdir()
    elif kind == "device": path.symlink_to("/dev/zero")
    elif kind == "pipe": os.mkfifo(path)
    elif kind == "loop": path.symlink_to(path)
    crossover._calibrated.cache_clear(); table.forget_choices()
    with warnings.catch_warnings(record=True) as told:
        warnings.simplefilter("always")
        assert torch.equal(x @ W.T, x) and torch.equal(x @ W.T, x)
    print(json.dumps([str(w.message) for w in told if "crossover" in str(w.message)]))
    path.rmdir() if kind == "folder" else path.unlink(missing_ok=True)
"""


@pytest.mark.skipif(not Path("/dev/zero").exists(), reason="needs /dev/zero")
def test_a_damaged_crossover_never_stops_a_product(tmp_path):
    """In a process of its own: in this one no such file is read."""
    given = json.dumps([content.hex() for content in DAMAGED_CROSSOVERS.values()])
    env = {**os.environ, "XDG_CACHE_HOME": str(tmp_path)}
    command = [sys.executable, "-c", PRODUCTS]
    done = subprocess.run(command, input=given, env=env, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    told = [json.loads(line) for line in done.stdout.splitlines()]
    path = tmp_path / "sparsekern" / "crossover.json"
    if any(told):  # without the C++ library nothing asks for it
        assert len(told) == len(DAMAGED_CROSSOVERS) + 5 and told.pop() == []
        for (one,) in told:
            assert one.startswith(f"crossover: {path} is ignored, kernels are chosen by what ships")


class Compiler(NvrtcRoute):
    """The route with a compiler that needs no CuPy; its cubins are its sources."""

    version = "13.0"

    def __init__(self, folder: Path):
        self.folder, self.compiled = folder, 0

    def _compile(self, source: Path, arch: str) -> bytes:
        self.compiled += 1
        return f"cubin of {source.read_text()} for {arch}".encode()


@pytest.fixture
def compiler(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    (tmp_path / "src").mkdir()
    (tmp_path / "src" / "toy.cu").write_text("toy")
    return Compiler(tmp_path / "src")


def take(compiler: Compiler) -> Path:
    """Compile or read it, and check that it is right -> where it is cached."""
    assert compiler.cubin(compiler.folder / "toy.cu", "sm_90") == b"cubin of toy for sm_90"
    return next(iter(files.cache_folder().iterdir()), None)


def test_machine_code_is_cached_for_its_owner_alone(compiler):
    path = take(compiler)
    assert stat.S_IMODE(path.stat().st_mode) == 0o600
    assert stat.S_IMODE(path.parent.stat().st_mode) == 0o700
    take(compiler)
    assert compiler.compiled == 1


def other_code(path: Path) -> None:
    path.write_bytes(bytes(32) + b"evil")


def of_another_name(path: Path) -> None:
    files.write_cached("other", b"evil")
    os.replace(path.with_name("other"), path)


def a_link(path: Path) -> None:
    path.rename(path.with_name("moved"))
    path.symlink_to("moved")


def a_folder(path: Path) -> None:
    path.unlink()
    path.mkdir()


@pytest.mark.parametrize(
    "damage",
    [
        lambda path: path.write_bytes(b""),
        lambda path: path.write_bytes(path.read_bytes()[:-1]),
        lambda path: path.write_bytes(path.read_bytes()[32:]),  # as versions before wrote it
        other_code,
        of_another_name,
        a_link,
        a_folder,
        lambda path: path.chmod(0o620),
        lambda path: path.chmod(0o602),
    ],
    ids=["empty", "short", "no digest", "replaced", "renamed", "link", "folder", "group", "others"],
)
def test_machine_code_that_may_be_others_is_made_anew(compiler, damage):
    path = take(compiler)
    damage(path)
    take(compiler)
    assert compiler.compiled == 2
    take(compiler)
    assert compiler.compiled == 2  # it was replaced


@pytest.mark.skipif(os.geteuid() != 0, reason="only root gives files away")
def test_machine_code_of_another_user_is_made_anew(compiler):
    path = take(compiler)
    os.chown(path, 12345, -1)
    take(compiler)
    assert compiler.compiled == 2
    os.chown(path.parent, 12345, -1)
    with pytest.warns(UserWarning, match="not cached: .*belongs to user 12345, not to us"):
        take(compiler)
    os.chown(path.parent, 0, -1)
    path.parent.chmod(0o777)
    take(compiler)  # ours, and open to all: it is closed
    assert stat.S_IMODE(path.parent.stat().st_mode) == 0o700


def test_a_cache_that_is_a_link_is_not_used(compiler, tmp_path):
    (tmp_path / "elsewhere").mkdir()
    files.cache_folder().parent.mkdir()
    files.cache_folder().symlink_to(tmp_path / "elsewhere")
    with pytest.warns(UserWarning, match="CUDA kernels were compiled and not cached"):
        take(compiler)
