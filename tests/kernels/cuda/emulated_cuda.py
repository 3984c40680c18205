"""The CUDA kernels on a CPU: tests/cuda/emulated.h says how, and which faults it finds.

A test with the fixture `emulated_cuda` calls the functions of sparsekern.kernels.cuda with
tensors on the CPU:

    from emulated_cuda import emulated_cuda, emulator  # noqa: F401

    @pytest.mark.usefixtures("emulated_cuda")
"""

import ctypes
import hashlib
import os
import platform
import shlex
import shutil
import subprocess
import sys
import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from functools import cache
from pathlib import Path

import pytest
import torch
from filelock import FileLock

from sparsekern.kernels.cuda import library as cuda_library
from sparsekern.kernels.cuda.library import Collected, Launcher

EMULATOR = Path(__file__).parents[2] / "cuda"
SOURCES = Path(__file__).parents[3] / "csrc" / "cuda"
FLAGS = "-std=c++17 -O1 -fPIC -fno-strict-aliasing -ffp-contract=off".split()
AS_CUDA = "-Wno-unknown-pragmas -include emulated.h -x c++".split()


@pytest.fixture(scope="session")
def emulator(tmp_path_factory) -> Path:
    """All kernels, and those of faults.cu, compiled for the CPU."""
    return build_once(tmp_path_factory, "emulated.so", compile_emulator)


def build_once(tmp_path_factory, name: str, build: Callable[[list[str], Path], None]) -> Path:
    """What build(compiler, path) makes, in the first of pytest's processes that comes here; in the
    folder EMULATED, which `make` names, of all runs with the same sources."""
    compiler = shlex.split(os.environ.get("CXX", "g++"))
    if sys.platform != "linux" or shutil.which(compiler[0]) is None:
        pytest.skip(f"the emulator needs Linux and a C++ compiler, here {compiler[0]}")
    if "EMULATED" in os.environ:
        folder = Path(os.environ["EMULATED"], digest(*compiler))
        folder.mkdir(parents=True, exist_ok=True)
    else:
        folder = tmp_path_factory.getbasetemp()
        if "PYTEST_XDIST_WORKER" in os.environ:
            folder = folder.parent
    path = folder / name
    with FileLock(f"{path}.lock"):
        if not path.exists():
            # The name says that it is whole.
            build(compiler, part := path.with_name(f"{name}.part"))
            part.rename(path)
    return path


def digest(*compiler: str) -> str:
    """A name of all that is compiled, and how."""
    told = hashlib.sha256(repr((compiler, FLAGS, AS_CUDA, platform.machine())).encode())
    for source in sorted([*EMULATOR.glob("*.*"), *SOURCES.glob("*.*")]):
        told.update(source.name.encode() + source.read_bytes())
    return told.hexdigest()[:16]


def compile_emulator(compiler: list[str], path: Path) -> None:
    kernels = [path for path in SOURCES.glob("*.cu") if "__global__" in path.read_text()]

    def build(source: Path) -> str:
        options = [*FLAGS, f"-I{EMULATOR}", f"-I{SOURCES}"]
        if source.suffix == ".cu":
            options += AS_CUDA
        else:
            options += ["-O2"]
        target = str(path.with_name(f"{source.stem}.o"))
        run([*compiler, *options, "-c", str(source), "-o", target])
        return target

    with ThreadPoolExecutor() as pool:
        sources = [*kernels, EMULATOR / "faults.cu", EMULATOR / "emulated.cpp"]
        objects = list(pool.map(build, sources))
    run([*compiler, "-shared", *objects, "-o", str(path)])


def run(command: list[str]) -> None:
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode:
        raise RuntimeError(f"{shlex.join(command)}\n{done.stderr}")


class EmulatedRoute:
    """What LibraryRoute is for a GPU; an error of a kernel is a RuntimeError."""

    def __init__(self, path: Path):
        self._library = ctypes.CDLL(str(path))
        self._library.emu_launch.argtypes = (
            ctypes.c_char_p,
            *(ctypes.c_uint,) * 4,
            ctypes.c_void_p,
        )
        for function in ("emu_kernel", "emu_signature", "emu_launch"):
            getattr(self._library, function).restype = ctypes.c_char_p
        self._turn = threading.Lock()  # one launch at a time, as in a stream

    def kernels(self) -> list[str]:
        names = iter(range(2**32))
        return [name.decode() for name in iter(lambda: self._library.emu_kernel(next(names)), None)]

    def backward(self, yes: bool) -> None:
        """Threads, warps and blocks run from the last to the first. Results are the same, unless a
        kernel lacks a barrier."""
        self._library.emu_backward(yes)

    def warpgroups(self, yes: bool) -> None:
        """Whether the GPU has them, as sm_90a does."""
        self._library.emu_warpgroups(yes)

    def launcher(self, name: str, device: int | None = None) -> Launcher:
        encoded, launch = name.encode(), self._library.emu_launch
        signature = self._library.emu_signature(encoded)
        if signature is None:
            raise ValueError(f"kernel: expected one of {', '.join(self.kernels())}, got {name}")

        def start(grid_x, grid_y, block, smem_bytes, stream, args):
            with self._turn:
                error = launch(encoded, grid_x, grid_y, block, smem_bytes, args)
            if error:
                raise RuntimeError(f"{name}: {error.decode()}")

        return Launcher(device, Collected(name, start, signature.decode()))


@pytest.fixture
def emulated_cuda(emulator, monkeypatch):
    """Launches for CPU tensors, whose device has no index, are emulated."""
    route = EmulatedRoute(emulator)
    monkeypatch.setattr(cuda_library, "function", cache(route.launcher))
    monkeypatch.setattr(cuda_library, "current_stream", lambda device: 0)
    monkeypatch.setattr(torch.cuda, "current_device", lambda: None)
    here = lambda: None, lambda device: 7, lambda: torch.cuda.is_current_stream_capturing()  # noqa: E731
    monkeypatch.setattr(cuda_library, "surroundings", lambda: here)
    yield route
    route.backward(False)
    route.warpgroups(True)
