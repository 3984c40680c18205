"""Dense products of prepared calls on a CPU: for cuBLASLt, tests/cuda/cublaslt.cpp.

from emulated_cublaslt import cublaslt_library, dense

@pytest.mark.usefixtures("dense")
"""

import ctypes
from contextlib import nullcontext

import pytest
import torch
from emulated_cuda import EMULATOR, build_once, run

from sparsekern.kernels.cuda import cublaslt


@pytest.fixture(scope="session")
def cublaslt_library(tmp_path_factory) -> str:
    def build(compiler, path):
        options = ["-std=c++17", "-O2", "-fPIC", "-shared", str(EMULATOR / "cublaslt.cpp")]
        run([*compiler, *options, "-o", str(path)])

    return str(build_once(tmp_path_factory, "libcublasLt.so", build))


class Dense:
    """What the library is asked for, and what goes wrong in it."""

    def __init__(self, path: str):
        self._library = ctypes.CDLL(path)

    def __getattr__(self, name: str):
        return getattr(self._library, f"standin_{name}")


@pytest.fixture
def dense(cublaslt_library, monkeypatch):
    """The library found under its name. In the end nothing of it is left."""
    library, caches = Dense(cublaslt_library), (cublaslt._library, cublaslt._product)
    monkeypatch.setattr(cublaslt, "soname", lambda: cublaslt_library)
    monkeypatch.setattr(torch.cuda, "device", lambda device: nullcontext())
    monkeypatch.setattr(torch.cuda, "current_blas_handle", lambda: 0)
    for cache in caches:
        cache.cache_clear()
    yield library
    for name in ("algorithms", "memory", "sums", "workspace"):
        getattr(library, f"without_{name}")(False)
    for cache in caches:
        cache.cache_clear()
    cublaslt.native.forget_calls()
    assert library.live() == 0
