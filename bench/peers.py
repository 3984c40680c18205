"""The other libraries that multiply by a sparse W, each behind one function.

    multiply(W [N, K], x [M, K]) -> a Rival that computes y [M, N] = x W^T

The input gradient dy W is the same product with W^T stored explicitly. Peers get their operands in
the layout that they want, most of them feature-major [K, M]: neither that copy nor any conversion
of W is timed, so the times are kind to them. A peer that cannot run here says why in `missing`.
"""

import atexit
import importlib
import importlib.metadata
import json
import os
import subprocess
import tempfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import engines
import numpy as np
import torch
import vendor_peers
from torch import Tensor

from sparsekern import SparseTensor
from sparsekern.bench.products import cold_copies, feature_major, torch_csr
from sparsekern.bench.race import Rival, rotate
from sparsekern.bench.records import PACKED, SPARSE

BENCH = Path(__file__).parent
BSR_BLOCK = (4, 4)
DEEPSPARSE_PYTHON = BENCH.parent / "build" / "deepsparse" / "bin" / "python"  # make deepsparse


@dataclass(frozen=True)
class Peer:
    name: str
    kind: str
    layout: str  # of x and y, and what is prepared before the clock starts
    multiply: Callable[[SparseTensor, Tensor], Rival]
    missing: str | None = None
    is_light: bool = True  # can hold hundreds of copies of W
    is_inference_only: bool = False


def _from_fm(y: np.ndarray) -> Tensor:
    return torch.from_numpy(y.T)


def _torch_bsr(W: SparseTensor, x: Tensor) -> Rival:
    """Blocks with a single value in them are stored whole: at random nearly all of W is."""
    matrix, x_fm = W.to_dense().to_sparse_bsr(BSR_BLOCK), feature_major(x)
    if x_fm.ndim == 1:
        return Rival("torch BSR", SPARSE, lambda: torch.mv(matrix, x_fm), lambda y: y[None])
    return Rival("torch BSR", SPARSE, lambda: torch.mm(matrix, x_fm), torch.t)


# SciPy, one thread always, and MKL through sparse_dot_mkl. Both take NumPy's arrays.


def _scipy_csr(W: SparseTensor, x: Tensor) -> Rival:
    matrix, x_fm = W.to_scipy(), feature_major(x).numpy()
    return Rival(
        "scipy CSR", SPARSE, lambda: matrix @ x_fm, lambda y: _from_fm(np.atleast_2d(y.T).T)
    )


def _mkl_csr(W: SparseTensor, x: Tensor) -> Rival:
    matrix, x_fm = W.to_scipy(), feature_major(x).numpy()
    multiply = importlib.import_module("sparse_dot_mkl").dot_product_mkl
    return Rival(
        "sparse_dot_mkl",
        SPARSE,
        lambda: multiply(matrix, x_fm),
        lambda y: _from_fm(np.atleast_2d(y.T).T),
    )


def _mkl_missing() -> str | None:
    try:
        # pip puts the library where sparse_dot_mkl does not look. Loaded after torch, it takes
        # torch's OpenMP runtime and starts no pool of its own.
        files = importlib.metadata.files("mkl") or ()
        runtime = next(str(f.locate().resolve()) for f in files if f.name.startswith("libmkl_rt"))
        os.environ.setdefault("MKL_RT", runtime)
        importlib.import_module("sparse_dot_mkl")
    except (ImportError, StopIteration) as error:
        return str(error) or "mkl's package holds no libmkl_rt"
    return None


# Engines that load an ONNX model.


def _onnx_matmul(W: SparseTensor, x: Tensor) -> bytes:
    """x [M, K] @ constant [K, N] as a serialized model, old enough for all engines."""
    from onnx import TensorProto, helper, numpy_helper

    constant = numpy_helper.from_array(W.to_dense().t().contiguous().numpy(), "w")
    m, n = x.shape[0], W.shape[0]
    sides = [
        helper.make_tensor_value_info(name, TensorProto.FLOAT, shape)
        for name, shape in (("x", x.shape), ("y", (m, n)))
    ]
    node = helper.make_node("MatMul", ["x", "w"], ["y"])
    graph = helper.make_graph([node], "linear", sides[:1], sides[1:], [constant])
    opset = helper.make_opsetid("", 13)
    return helper.make_model(graph, opset_imports=[opset], ir_version=8).SerializeToString()


def _onnxruntime(W: SparseTensor, x: Tensor) -> Rival:
    run = engines.onnxruntime_call(_onnx_matmul(W, x), x)
    return Rival("onnxruntime dense", PACKED, run, torch.from_numpy)


def _onnxruntime_missing() -> str | None:
    try:
        importlib.import_module("onnx")
        importlib.import_module("onnxruntime")
    except ImportError as error:
        return str(error)
    return None


class _DeepSparse:
    """DeepSparse in a process of its own: it wants numpy 1 and an old onnx.

    It takes the clock there, on our cores, while this process waits for it. One worker for a number
    of threads; loading a model drops the one before.
    """

    def __init__(self) -> None:
        self._worker: subprocess.Popen | None = None
        self._threads = 0

    def ask(self, **request: object) -> dict:
        if self._worker is None or self._threads != torch.get_num_threads():
            self._start()
        self._worker.stdin.write(json.dumps(request) + "\n")
        self._worker.stdin.flush()
        answer = self._worker.stdout.readline()
        if not answer:
            raise ChildProcessError(f"DeepSparse ended with code {self._worker.wait()}")
        return json.loads(answer)

    def _start(self) -> None:
        self.stop()
        self._threads = torch.get_num_threads()
        self._worker = subprocess.Popen(
            [DEEPSPARSE_PYTHON, BENCH / "deepsparse_worker.py"],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            text=True,
        )

    def stop(self) -> None:
        if self._worker:
            self._worker.stdin.close()  # it ends
            self._worker.wait()
            self._worker.stdout.close()

    def missing(self) -> str | None:
        if not DEEPSPARSE_PYTHON.exists():
            return "not installed: `make deepsparse` (x86-64, Python 3.11 or older)"
        try:
            return self.ask(verb="hello")["error"]
        except (OSError, ValueError) as error:
            return str(error)

    def multiply(self, W: SparseTensor, x: Tensor) -> Rival:
        with tempfile.TemporaryDirectory() as folder:
            model, operand = Path(folder) / "model.onnx", Path(folder) / "x.npy"
            model.write_bytes(_onnx_matmul(W, x))
            np.save(operand, x.numpy())
            self.ask(verb="load", model=str(model), x=str(operand), threads=torch.get_num_threads())
        return Rival(
            "DeepSparse", SPARSE, self._result, torch.from_numpy, lambda: self.ask(verb="run")["s"]
        )

    def _result(self) -> np.ndarray:
        with tempfile.NamedTemporaryFile(suffix=".npy") as file:
            self.ask(verb="result", y=file.name)
            return np.load(file.name)


def _find() -> tuple[Peer, ...]:
    deepsparse = _DeepSparse()
    atexit.register(deepsparse.stop)
    fm = "feature-major"
    no_onnx = _onnxruntime_missing()
    return (
        Peer("torch CSR", SPARSE, fm, torch_csr),
        Peer("torch BSR", SPARSE, f"{fm}; blocks of 4 x 4", _torch_bsr, is_light=False),
        Peer("scipy CSR", SPARSE, f"{fm}; one thread always", _scipy_csr),
        Peer("sparse_dot_mkl", SPARSE, fm, _mkl_csr, _mkl_missing()),
        Peer(
            "DeepSparse",
            SPARSE,
            "token-major; ONNX model compiled beforehand; own process",
            deepsparse.multiply,
            no_onnx or deepsparse.missing(),
            is_light=False,
            is_inference_only=True,
        ),
        Peer(
            "onnxruntime dense",
            PACKED,
            "token-major; dense W packed beforehand",
            _onnxruntime,
            no_onnx,
            is_light=False,
            is_inference_only=True,
        ),
        Peer(
            vendor_peers.AOCL,
            SPARSE,
            f"{fm}; W laid out beforehand for many products",
            vendor_peers.aocl_csr,
            vendor_peers.aocl_missing(),
            is_light=False,
        ),
        Peer(
            vendor_peers.OPENVINO,
            PACKED,
            "token-major; dense W packed beforehand",
            vendor_peers.openvino_dense,
            vendor_peers.openvino_missing(),
            is_light=False,
            is_inference_only=True,
        ),
    )


PEERS = _find()


def race_entries(W: SparseTensor, x: Tensor, *, is_forward: bool) -> list[Rival]:
    """Every peer that runs here, ready to compute x W^T."""
    return [
        peer.multiply(W, x)
        for peer in PEERS
        if not peer.missing and (is_forward or not peer.is_inference_only)
    ]


def cold_entries(W: SparseTensor, x: Tensor) -> list[Rival]:
    """Every peer that runs here and can hold hundreds of copies of W, through which it goes."""
    light = [peer for peer in PEERS if peer.is_light and not peer.missing]
    return [rotate(peer.multiply(each, x) for each in cold_copies(W)) for peer in light]


def report() -> list[dict]:
    """Who runs in this process, in which layout, and why the others do not."""
    return [
        {"name": p.name, "kind": p.kind, "layout": p.layout, "missing": p.missing} for p in PEERS
    ]
