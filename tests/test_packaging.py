"""The sdist holds all sources but no measurements, a wheel builds from it without torch, and the
installed wheel needs no compiler."""

import os
import re
import subprocess
import sys
import sysconfig
import tarfile
import zipfile
from pathlib import Path

import pytest

from sparsekern import __version__

ROOT = Path(__file__).parents[1]
# The build must find everything itself: no search path and no options of the calling shell.
ENV = {k: v for k, v in os.environ.items() if k not in ("PYTHONPATH", "CMAKE_ARGS")}
ENV["SPARSEKERN_CUDA"] = "OFF"


def run(*args: object, cwd: Path, **env: str) -> str:
    done = subprocess.run(
        [sys.executable, *map(str, args)],
        cwd=cwd,
        env=ENV | env,
        text=True,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
    )
    assert done.returncode == 0, done.stdout
    return done.stdout


@pytest.fixture(scope="module")
def sdist(tmp_path_factory) -> Path:
    out = tmp_path_factory.mktemp("sdist")
    build = f"import setuptools.build_meta as b; b.build_sdist({str(out)!r})"
    run("-c", build, cwd=ROOT)
    (path,) = out.glob("sparsekern-*.tar.gz")
    return path


def build_wheel(sdist: Path, out: Path, options: str) -> Path:
    """Built from the sdist, so that a source file that MANIFEST.in forgets fails here."""
    pip_wheel = ("-m", "pip", "wheel", "--no-build-isolation", "--no-deps", "-w", out, sdist)
    run(*pip_wheel, cwd=out, CMAKE_ARGS=options)
    (path,) = out.glob("sparsekern-*.whl")
    return path


# Runs `COMPILER OPTIONS -o OBJECT -c SOURCE` as far as all that is included; the object is empty.
PREPROCESS = """#!/bin/sh
set -e
"$@" -E
compiler=$1
while [ "$1" != -o ]; do shift; done
"$compiler" -x c++ -c /dev/null -o "$2"
"""


def test_sdist_holds_every_source(sdist):
    with tarfile.open(sdist) as tar:
        names = {name.partition("/")[2] for name in tar.getnames()}
    folders = ("sparsekern", "csrc", "tests", "bench", "docs", "examples")
    suffixes = {".py", ".cpp", ".h", ".cu", ".cuh", ".md", ".json", ".toml", ".ipynb"}
    sources = {
        path.relative_to(ROOT).as_posix()
        for folder in folders
        for path in (ROOT / folder).rglob("*")
        if path.suffix in suffixes and ROOT / "bench" / "results" not in path.parents
    }
    files = {
        "sparsekern_script.py",
        "CMakeLists.txt",
        "setup.py",
        "pyproject.toml",
        "Makefile",
        "LICENSE",
        "README.md",
    }
    assert not (sources | files) - names
    assert not [name for name in names if name.endswith((".so", ".o", ".pyc"))]
    assert not [name for name in names if name.startswith("bench/results")]


def test_there_is_one_version_number(sdist):
    """pyproject.toml reads it from the package; CITATION.cff cannot."""
    assert sdist.name == f"sparsekern-{__version__}.tar.gz"
    (cited,) = re.findall(r"^version: (.*)$", (ROOT / "CITATION.cff").read_text(), re.MULTILINE)
    assert cited == __version__


@pytest.mark.slow
def test_wheel_holds_the_package_and_its_library_only(sdist, tmp_path):
    """All of csrc is compiled elsewhere."""
    launcher = tmp_path / "preprocess"
    launcher.write_text(PREPROCESS)
    launcher.chmod(0o755)
    wheel = build_wheel(sdist, tmp_path, f"-DCMAKE_CXX_COMPILER_LAUNCHER={launcher}")
    with zipfile.ZipFile(wheel) as archive:
        names = archive.namelist()
    found = (ROOT / "sparsekern").rglob("*")
    paths = [path for path in found if path.suffix in (".py", ".json", ".toml")]
    package = {path.relative_to(ROOT).as_posix() for path in paths}
    # What CuPy compiles where there is no CUDA library.
    kernels = {f"sparsekern/csrc/cuda/{path.name}" for path in (ROOT / "csrc/cuda").iterdir()}
    assert not (package | kernels | {"sparsekern/py.typed"}) - set(names)
    found = {name.split("/")[0] for name in names if ".dist-info" not in name}
    assert found == {"sparsekern", "sparsekern_script.py"}
    (library,) = [name for name in names if name.endswith(".so")]
    assert library.startswith("sparsekern/_C.")


PRODUCT = """
import shutil, sparsekern, torch
assert not [name for name in ("cc", "c++", "gcc", "g++", "cmake", "nvcc") if shutil.which(name)]
W = sparsekern.SparseTensor.from_dense(torch.randn(64, 96) * (torch.rand(64, 96) < 0.1))
x = torch.randn(8, 96)
torch.testing.assert_close(x @ W.T, x @ W.to_dense().T)
print(sparsekern.__file__, sparsekern.explain(x, W), sep="\\n")
"""


@pytest.mark.slow
def test_the_installed_wheel_needs_no_compiler(request, tmp_path):
    """The wheel built here, or the one in SPARSEKERN_DIST: `make check-wheel` says which."""
    dist = os.environ.get("SPARSEKERN_DIST")
    if dist is None:
        sdist = request.getfixturevalue("sdist")  # Debug compiles in a quarter of the time
        dist = build_wheel(sdist, tmp_path, "-DCMAKE_BUILD_TYPE=Debug").parent
    venv = tmp_path / "venv"
    run("-m", "venv", "--without-pip", venv, cwd=tmp_path)
    python = venv / "bin" / "python"
    pip = ("-m", "pip", "--python", python, "install", "--no-deps", "--no-index")
    run(*pip, "--find-links", dist, f"sparsekern=={__version__}", cwd=tmp_path)
    # torch is that of this environment. The .pth file of an editable install there has no effect.
    (site,) = venv.glob("lib/python*/site-packages")
    (site / "torch.pth").write_text(sysconfig.get_path("purelib"))
    env = {"PATH": str(venv / "bin"), "HOME": str(tmp_path)}
    out = subprocess.check_output([python, "-c", PRODUCT], cwd=tmp_path, env=env, text=True)
    file, forward, *_ = out.splitlines()
    assert Path(file).is_relative_to(site)
    assert "forward: " in forward and "-> dense" not in forward
    info = subprocess.check_output([venv / "bin" / "sparsekern", "info"], env=env, text=True)
    assert re.search(r"^C\+\+ kernels +\w+, on threads of ", info, re.MULTILINE)
