"""Dense products through the C interface of cuBLASLt, without its headers, for calls from C++.

torch asks the library anew in each product which algorithm it should run, a third of what a product
takes the host. Here it is asked once a shape; what a call does is one function in C++
(csrc/dense_product.cpp). Operands are bfloat16 or float16, sums float32, also those of parts of K.

The library is the one that torch has loaded. Names, enumerations and the order of calls are those
of cublasLt.h, CUDA 12 and 13. Where it is missing or names no algorithm, torch multiplies.

A handle is for one thread at a time: products take turns (dense_product.cpp), and so do questions,
which have a handle of their own.
"""

import ctypes
import threading
from functools import cache, lru_cache

import torch

from ..operands import native
from ..problem import Problem
from ..steps import Slot, Steps
from .vendor import Error, Library, Made, int64, integer, pointer, size

_TYPES = {torch.bfloat16: 14, torch.float16: 2}  # cudaDataType
_FLOAT32, _COMPUTE_FLOAT32 = 0, 68
_TRANSPOSED = 1
_TRANS_A, _TRANS_B, _EPILOGUE, _BIAS = 3, 4, 7, 8  # of a descriptor
_ADD_BIAS, _SUM_B = 4, 512  # epilogues
_MOST_BYTES, _REDUCTIONS, _ALIGNMENTS = 1, 3, (5, 6, 7, 8)  # of a preference
_IN_FLOAT32 = 2  # how parts of K may be added up; a single part always may
ALIGNMENT, WORKSPACE_ALIGNMENT = 16, 256  # bytes; of all operands the first
MOST_WORKSPACE_BYTES = 2**25  # as torch on Hopper
MOST_PRODUCTS = 1024

_SIGNATURES = {
    "Create": (pointer,),
    "MatmulDescCreate": (pointer, integer, integer),
    "MatmulDescSetAttribute": (pointer, integer, pointer, size),
    "MatmulDescDestroy": (pointer,),
    "MatrixLayoutCreate": (pointer, integer, ctypes.c_uint64, ctypes.c_uint64, int64),
    "MatrixLayoutDestroy": (pointer,),
    "MatmulPreferenceCreate": (pointer,),
    "MatmulPreferenceSetAttribute": (pointer, integer, pointer, size),
    "MatmulPreferenceDestroy": (pointer,),
    "MatmulAlgoGetHeuristic": (*(pointer,) * 7, integer, pointer, pointer),
    "Matmul": (*(pointer,) * 14, size, pointer),
}


class _Found(ctypes.Structure):
    """What the library says of an algorithm."""

    _fields_ = (
        ("algorithm", ctypes.c_uint64 * 8),
        ("workspace_bytes", size),
        ("status", integer),
        ("waves", ctypes.c_float),
        ("reserved", integer * 4),
    )


def workspace_at(operand_bytes: int) -> int:
    """Where a workspace begins that lies behind an operand."""
    return -(-operand_bytes // WORKSPACE_ALIGNMENT) * WORKSPACE_ALIGNMENT


def soname() -> str:
    """The name of the library that torch was built for."""
    return f"libcublasLt.so.{(torch.version.cuda or 'none').partition('.')[0]}"


@cache
def _library() -> Library | None:
    try:
        return Library(soname(), "cublasLt", _SIGNATURES, "GetStatusString")
    except (OSError, AttributeError):
        return None


def _make(library: Library, what: str, *args) -> ctypes.c_void_p:
    made = ctypes.c_void_p()
    library.call(f"{what}Create", ctypes.byref(made), *args)
    return made


@cache
def _handle(device: int, is_for_questions: bool) -> ctypes.c_void_p:
    """One of the GPU, which is the current one."""
    library = _library()
    assert library is not None
    return _make(library, "")


_asking = threading.Lock()


class _Here(threading.local):
    """The GPUs for which this thread has a handle of torch's."""

    def __init__(self) -> None:
        self.devices: set[int] = set()


_here = _Here()


def make_handle_of_torch(device: int) -> None:
    """What a product by torch does beside. A captured call multiplies by torch, which cannot make
    its handle there: the call before, its warm-up, would leave the thread without one."""
    if device not in _here.devices:
        torch.cuda.current_blas_handle()
        _here.devices.add(device)


class Product:
    """One of the products of a linear layer by a fixed algorithm, on one GPU, for any thread:

    spmm    y  [M, N] = x [M, K] W^T + bias [N]     a, b, out, bias: W, x, y, bias
    spmm_t  dx [M, K] = dy [M, N] W                                  W, dy, dx, None
    sddmm   dW [N, K] = dy [M, N]^T x [M, K]                         x, dy, dW, sums

    sums [N] = dy^T 1, and bias, are None for one that was made without.
    """

    def __init__(self, problem: Problem, device: int, has_bias: bool):
        """Error where the library has no algorithm for it."""
        library = _library()
        assert library is not None
        self._library, self._device, self._made = library, device, Made(library)
        self._descriptor = self._make("MatmulDesc", _COMPUTE_FLOAT32, _FLOAT32)
        m, n, k = problem.M, problem.N, problem.K
        # What lies row by row is the transposed, column by column: the first size is the inner one.
        shapes, transposed = {
            "spmm": (((k, n), (k, m), (n, m)), _TRANS_A),
            "spmm_t": (((k, n), (n, m), (k, m)), None),
            "sddmm": (((k, m), (n, m), (k, n)), _TRANS_B),
        }[problem.op]
        if transposed is not None:
            self._describe(transposed, ctypes.c_int32(_TRANSPOSED))
        if has_bias:
            epilogue = _SUM_B if problem.op == "sddmm" else _ADD_BIAS
            self._describe(_EPILOGUE, ctypes.c_uint32(epilogue))
            self._describe(_BIAS, ctypes.c_void_p(ALIGNMENT))  # as little aligned as any will be
        kind = _TYPES[problem.dtype]
        self._layouts = [
            self._make("MatrixLayout", kind, rows, columns, rows) for rows, columns in shapes
        ]
        self._found = self._ask()
        behind, found = workspace_at(n * k * problem.dtype.itemsize), self._found
        self.scratch_elements = -(-(behind + found.workspace_bytes) // problem.dtype.itemsize)
        addresses = library.address("Matmul"), library.address("MatmulDescSetAttribute")
        handle = _handle(device, is_for_questions=False)
        made = [h.value for h in (handle, self._descriptor, *self._layouts)]
        numbers = *addresses, *made, ctypes.addressof(found), behind, found.workspace_bytes
        self._numbers = (ctypes.c_uint64 * len(numbers))(*numbers)

    def _make(self, what: str, *args) -> ctypes.c_void_p:
        made = _make(self._library, what, *args)
        self._made.add(made, f"{what}Destroy")
        return made

    def _describe(self, which: int, value) -> None:
        args = self._descriptor, which, ctypes.byref(value), ctypes.sizeof(value)
        self._library.call("MatmulDescSetAttribute", *args)

    def _ask(self) -> _Found:
        library, preference = self._library, self._make("MatmulPreference")
        for which, value in (
            (_MOST_BYTES, ctypes.c_uint64(MOST_WORKSPACE_BYTES)),
            (_REDUCTIONS, ctypes.c_uint32(_IN_FLOAT32)),
            *((which, ctypes.c_uint32(ALIGNMENT)) for which in _ALIGNMENTS),
        ):
            args = preference, which, ctypes.byref(value), ctypes.sizeof(value)
            library.call("MatmulPreferenceSetAttribute", *args)
        found, count = _Found(), ctypes.c_int()
        a, b, out = self._layouts
        with _asking:
            library.call(
                "MatmulAlgoGetHeuristic",
                *(_handle(self._device, is_for_questions=True), self._descriptor),
                *(a, b, out, out, preference, 1, ctypes.byref(found), ctypes.byref(count)),
            )
        if not count.value or found.status:
            raise Error("cublasLtMatmulAlgoGetHeuristic: no algorithm")
        return found

    def data_ptr(self) -> int:
        """The address of what C++ reads, as of any argument of a launch."""
        return ctypes.addressof(self._numbers)

    def add_to(self, steps: Steps, a: Slot, b: Slot, out: Slot, bias: Slot | None, scratch: Slot):
        """The product as one step. Scratch, of scratch_elements, begins with W or dW."""
        assert native
        steps.call(make_handle_of_torch, self._device)
        launch = native.dense_product(self._library.words_address)
        steps.add(launch, (1, 1, 1, 0), (self, a, b, out, bias, scratch))


@lru_cache(MOST_PRODUCTS)
def _product(problem: Problem, device: int, has_bias: bool) -> Product:
    with torch.cuda.device(device):
        return Product(problem, device, has_bias)


def product_of(problem: Problem, device: int, has_bias: bool = False) -> Product | None:
    """The product of the problem, of any pattern; None where torch multiplies."""
    if problem.dtype not in _TYPES or _library() is None:
        return None
    of_any = problem._replace(nnz=0, is_two_way=False, is_ordered=False)
    try:
        return _product(of_any, device, has_bias)
    except Error:  # asked again by the next pattern: it may have been for want of memory
        return None
