"""Libraries of processor vendors as peers: AMD's AOCL-Sparse and Intel's OpenVINO.

Neither is needed: `pip install --no-deps aoclda` and `pip install openvino`, best in an environment
beside this one.
"""

import ctypes
import importlib.metadata
from ctypes import byref, c_float, c_int, c_void_p
from functools import lru_cache

import torch
from torch import Tensor

from sparsekern import SparseTensor
from sparsekern.bench.products import feature_major
from sparsekern.bench.race import Rival
from sparsekern.bench.records import PACKED, SPARSE

AOCL, OPENVINO = "AOCL-Sparse", "OpenVINO dense"
NO_TRANSPOSE, ROW_MAJOR, ZERO_BASED, MANY_CALLS = 111, 0, 0, 1000


@lru_cache(maxsize=1)
def _aocl() -> ctypes.CDLL:
    """The library in AMD's wheel, after those that it is linked to, which the system does not find:
    it says which one it misses."""
    paths = {f.name: str(f.locate()) for f in importlib.metadata.files("aoclda") or ()}

    def load(name: str) -> ctypes.CDLL:
        for _ in paths:
            try:
                return ctypes.CDLL(paths[name])
            except OSError as error:
                missing = str(error).partition(":")[0]
                if missing not in paths:
                    raise
                load(missing)
        raise OSError(f"{name} is linked to itself")

    return load(next(name for name in paths if name.startswith("libaoclsparse")))


def aocl_missing() -> str | None:
    try:
        _aocl()
    except (ImportError, StopIteration, OSError) as error:
        return str(error) or "its wheel holds no libaoclsparse"
    return None


class _AoclMatrix:
    """W in AOCL-Sparse, laid out for many products as it likes."""

    def __init__(self, W: SparseTensor, hint: str):
        self.library = library = _aocl()
        # It keeps pointers to them.
        self._parts = [t.clone() for t in (W.row_offsets, W.col_indices, W.values.detach())]
        self.handle, self.description = c_void_p(), c_void_p()
        pointers = (c_void_p(t.data_ptr()) for t in self._parts)
        sizes = (c_int(size) for size in (W.n, W.k, W.nnz))
        self._check(
            library.aoclsparse_create_scsr(byref(self.handle), ZERO_BASED, *sizes, *pointers)
        )
        self._check(library.aoclsparse_create_mat_descr(byref(self.description)))
        set_hint = getattr(library, f"aoclsparse_set_{hint}_hint")
        self._check(set_hint(self.handle, NO_TRANSPOSE, self.description, MANY_CALLS))
        self._check(library.aoclsparse_optimize(self.handle))

    def _check(self, status: int) -> None:
        if status:
            raise RuntimeError(f"{AOCL}: status {status}")

    def times_vector(self, x: Tensor, y: Tensor) -> Tensor:
        one, zero, pointers = c_float(1), c_float(0), [c_void_p(t.data_ptr()) for t in (x, y)]
        status = self.library.aoclsparse_smv(
            NO_TRANSPOSE, byref(one), self.handle, self.description, pointers[0], byref(zero),
            pointers[1],
        )  # fmt: skip
        self._check(status)
        return y

    def times(self, x: Tensor, y: Tensor) -> Tensor:
        m, pointers = c_int(x.shape[1]), [c_void_p(t.data_ptr()) for t in (x, y)]
        status = self.library.aoclsparse_scsrmm(
            NO_TRANSPOSE, c_float(1), self.handle, self.description, ROW_MAJOR, pointers[0], m, m,
            c_float(0), pointers[1], m,
        )  # fmt: skip
        self._check(status)
        return y


def aocl_csr(W: SparseTensor, x: Tensor) -> Rival:
    x_fm, n = feature_major(x), W.shape[0]  # a NaN in y would stay one, times 0
    if x_fm.ndim == 1:
        matrix, y = _AoclMatrix(W, "mv"), torch.zeros(n)
        return Rival(AOCL, SPARSE, lambda: matrix.times_vector(x_fm, y), lambda y: y[None])
    matrix, y = _AoclMatrix(W, "mm"), torch.zeros(n, x.shape[0])
    return Rival(AOCL, SPARSE, lambda: matrix.times(x_fm, y), torch.t)


def openvino_missing() -> str | None:
    try:
        import openvino  # noqa: F401
    except ImportError as error:
        return str(error)
    return None


def openvino_dense(W: SparseTensor, x: Tensor) -> Rival:
    """A matrix product with W as a constant, compiled for this machine, in float32."""
    import numpy as np
    import openvino
    from openvino import opset13 as op

    sides = op.parameter(list(x.shape), np.float32)
    product = op.matmul(sides, op.constant(W.to_dense().numpy()), False, True)
    options = {
        "INFERENCE_NUM_THREADS": torch.get_num_threads(),
        "NUM_STREAMS": 1,
        "INFERENCE_PRECISION_HINT": "f32",
    }
    compiled = openvino.Core().compile_model(openvino.Model([product], [sides]), "CPU", options)
    request, feed = compiled.create_infer_request(), [x.numpy()]

    def run() -> object:
        request.infer(feed, share_inputs=True)
        return request.get_output_tensor().data

    return Rival(OPENVINO, PACKED, run, lambda y: torch.from_numpy(y.copy()))
