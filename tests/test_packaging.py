"""The sdist holds all sources, a wheel builds from it without torch, and its `_C` imports."""

import os
import subprocess
import sys
import tarfile
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
# The build must find everything itself: no search path and no options of the calling shell.
ENV = {k: v for k, v in os.environ.items() if k not in ("PYTHONPATH", "CMAKE_ARGS")}
ENV["SPARSEKERN_CUDA"] = "OFF"


def run(*args: object, cwd: Path) -> str:
    done = subprocess.run(
        [sys.executable, *map(str, args)],
        cwd=cwd,
        env=ENV,
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


@pytest.fixture(scope="module")
def wheel(sdist, tmp_path_factory) -> Path:
    """Built from the sdist, so that a source file that MANIFEST.in forgets fails here."""
    out = tmp_path_factory.mktemp("wheel")
    run("-m", "pip", "wheel", "--no-build-isolation", "--no-deps", "-w", out, sdist, cwd=out)
    (path,) = out.glob("sparsekern-*.whl")
    return path


def test_sdist_holds_every_source(sdist):
    with tarfile.open(sdist) as tar:
        names = {name.partition("/")[2] for name in tar.getnames()}
    folders = ("sparsekern", "csrc", "tests", "bench", "docs")
    suffixes = {".py", ".cpp", ".h", ".cu", ".cuh", ".md", ".json"}
    sources = {
        path.relative_to(ROOT).as_posix()
        for folder in folders
        for path in (ROOT / folder).rglob("*")
        if path.suffix in suffixes
    }
    files = {"CMakeLists.txt", "setup.py", "pyproject.toml", "Makefile", "LICENSE", "README.md"}
    assert not (sources | files) - names
    assert not [name for name in names if name.endswith((".so", ".o", ".pyc"))]


@pytest.mark.slow
def test_wheel_holds_the_package_and_its_library_only(wheel):
    with zipfile.ZipFile(wheel) as archive:
        names = archive.namelist()
    paths = [*(ROOT / "sparsekern").rglob("*.py"), *(ROOT / "sparsekern").rglob("*.json")]
    package = {path.relative_to(ROOT).as_posix() for path in paths}
    # What CuPy compiles where there is no CUDA library.
    kernels = {f"sparsekern/csrc/cuda/{path.name}" for path in (ROOT / "csrc/cuda").iterdir()}
    assert not (package | kernels) - set(names)
    assert {name.split("/")[0] for name in names if ".dist-info" not in name} == {"sparsekern"}
    (library,) = [name for name in names if name.endswith(".so")]
    assert library.startswith("sparsekern/_C.")


@pytest.mark.slow
def test_the_installed_wheel_imports(wheel, tmp_path):
    run("-m", "pip", "install", "--no-deps", "--target", tmp_path / "site", wheel, cwd=tmp_path)
    # First in sys.path, so that it wins over an editable install.
    code = f"import sys; sys.path.insert(0, {str(tmp_path / 'site')!r}); "
    code += "from sparsekern import _C; print(_C.__file__)"
    assert run("-c", code, cwd=tmp_path).startswith(str(tmp_path))
