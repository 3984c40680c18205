"""The rows `two_of_four` on a CPU: the emulator and, for cuSPARSELt, tests/cuda/cusparselt.cpp.

from emulated_cusparselt import cusparselt_library, emulated_cuda, emulator, stand_in

@pytest.mark.usefixtures("stand_in")
"""

import ctypes
from contextlib import nullcontext
from functools import partial

import pytest
import torch
from emulated_cuda import EMULATOR, build_once, emulated_cuda, emulator, run  # noqa: F401

from sparsekern.kernels.cuda import (
    algorithms,
    compressed,
    cusparselt,
    expand,
    few_tokens,
    float8,
    ordered,
    two_of_four,
)
from sparsekern.kernels.cuda.layout import Gpu
from sparsekern.testing import relative_error

REFUSED, WRONG, CHANGING = 1, 2, 3
TOLERANCE = 2**-8  # one rounding of the result, in bfloat16


def check(y, x, w, bias=None):
    """y is x w^T + bias, but for one rounding."""
    exact, scale = x.double() @ w.double().T, x.double().abs() @ w.double().abs().T
    if bias is not None:
        exact, scale = exact + bias.double(), scale + bias.double().abs()
    assert relative_error(y, exact, scale) <= TOLERANCE


class StandIn:
    """What goes wrong in the library, and what it was asked for."""

    def __init__(self, path: str):
        self._library = ctypes.CDLL(path)
        self._library.standin_fail.argtypes = (ctypes.c_char_p, ctypes.c_int)
        self.is_capturing = False

    def fail(self, function: str, status: int) -> None:
        """The function, without cusparseLt, returns this status until reset()."""
        self._library.standin_fail(function.encode(), status)

    def algorithm(self, number: int, behaviour: int = 0, cost: int = 100) -> None:
        self._library.standin_algorithm(number, behaviour, cost)

    def __getattr__(self, name: str):
        return getattr(self._library, f"standin_{name}")


class Event:
    """Of a GPU whose time the stand-in keeps."""

    def __init__(self, stand_in: StandIn, enable_timing: bool):
        assert enable_timing
        self._elapsed = stand_in.elapsed

    def record(self) -> None:
        self.at = self._elapsed()

    def synchronize(self) -> None:
        pass

    def elapsed_time(self, end: "Event") -> float:
        return end.at - self.at


@pytest.fixture(scope="session")
def cusparselt_library(tmp_path_factory) -> str:
    def build(compiler, path):
        options = ["-std=c++17", "-O2", "-fPIC", "-shared", str(EMULATOR / "cusparselt.cpp")]
        run([*compiler, *options, "-o", str(path)])

    return str(build_once(tmp_path_factory, "libcusparseLt.so.0", build))


@pytest.fixture
def stand_in(cusparselt_library, emulated_cuda, monkeypatch, tmp_path):  # noqa: F811
    """The library found under its name, a GPU of capability 9.0, an empty cache folder, and sizes
    that the emulator can run. In the end nothing of the library is left."""
    library = StandIn(cusparselt_library)
    monkeypatch.setattr(cusparselt, "SONAME", cusparselt_library)
    monkeypatch.setattr(cusparselt, "_threads", cusparselt._Threads())
    monkeypatch.setattr(expand.cuda_library, "refusal", lambda: None)
    monkeypatch.setattr(few_tokens, "gpu_of", lambda device: Gpu(3, 227 * 1024))
    monkeypatch.setattr(torch._C, "_cuda_getCurrentRawStream", lambda device: 7, raising=False)
    monkeypatch.setattr(torch.cuda, "device", lambda device: nullcontext())
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr("sparsekern.nn.packed.is_for_cpu", lambda weight: False)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda: (9, 0))
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "Stand-in GPU")
    capturing = "is_current_stream_capturing"
    monkeypatch.setattr(torch.cuda, capturing, lambda: library.is_capturing)
    monkeypatch.setattr(torch.cuda, "_sleep", lambda cycles: None, raising=False)
    for name in ("ROUNDS", "FINAL_ROUNDS", "LAUNCHES"):
        monkeypatch.setattr(algorithms, name, 1)
    monkeypatch.setattr(algorithms, "REPEATED", 8)
    monkeypatch.setattr(torch.cuda, "Event", partial(Event, library))
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    # Fewer tokens than 72 are those of few_tokens.
    for rows in (two_of_four, ordered):
        monkeypatch.setattr(rows, "_least_size", lambda m, dtype: 16 if m >= 72 else None)
    has_slots_in_rows = two_of_four._has_slots_in_rows
    monkeypatch.setattr(two_of_four, "_has_slots_in_rows", lambda t: has_slots_in_rows(t, "cpu"))
    caches = (
        *(cusparselt.library, algorithms._known),
        *(compressed.refuse_gpu, two_of_four._refuse_layout, ordered.refuse_size),
        compressed._adds_bias_in_e4m3,
    )
    library.reset()
    for cache in caches:
        cache.cache_clear()
    yield library
    library.reset()
    for cache in caches:
        cache.cache_clear()
    cusparselt._threads.plans.clear()
    assert library.live() == 0


@pytest.fixture
def float8_on_cpu(stand_in, monkeypatch):
    """Layers on a CPU train in E4M3, too."""
    has_slots_in_rows = float8._has_slots_in_rows
    monkeypatch.setattr(float8, "_has_slots_in_rows", lambda: has_slots_in_rows("cpu"))
    monkeypatch.setattr(float8, "refuse_dense", lambda device: None)
    monkeypatch.setitem(algorithms.CANDIDATES, float8.DTYPE, (0, 1))
    float8._refuse_layout.cache_clear()
    yield stand_in
    float8._refuse_layout.cache_clear()
