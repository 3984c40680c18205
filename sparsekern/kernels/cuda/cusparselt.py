"""2:4 sparse products through the C interface of cuSPARSELt, without its headers.

In bfloat16, in float16, and of E4M3 operands with a bfloat16 result.

The library comes with torch's CUDA builds (or the wheel nvidia-cusparselt-cu12 or -cu13); nothing
of it is part of this package. Names, enumerations and the order of calls are those of cusparseLt.h,
versions 0.8.0 to 0.10.0. A plan holds pointers to its descriptors, so a Plan keeps all of them
where they are as long as it lives.

A handle belongs to one thread and device, and so do its plans. That device has to be the current
one, also of a product.
"""

import ctypes
import threading
from collections.abc import Callable
from functools import cache
from importlib.metadata import PackageNotFoundError, files

import torch
from torch import Tensor

from ..operands import native
from .vendor import Error, Library, Made, int64, integer, pointer, size

SONAME = "libcusparseLt.so.0"
OLDEST = (0, 8, 0)  # before, a selection cannot be destroyed
_TYPES = {torch.bfloat16: 14, torch.float16: 2, torch.float8_e4m3fn: 28}  # cudaDataType
_FLOAT32 = 2  # cusparseComputeType
_ROW, _COLUMN = 2, 1
ALIGNMENT = 16  # bytes
MOST_PLANS = 256  # of a thread
_PLAIN, _TRANSPOSED = 0, 1
_ID = 0  # attribute of a selection
_BIAS = 8  # of a descriptor of a matmul

_uint32 = ctypes.c_uint32
_SIGNATURES = {
    "GetProperty": (integer, pointer),
    "Init": (pointer,),
    "StructuredDescriptorInit": (
        *(pointer, pointer, int64, int64, int64),
        *(_uint32, integer, integer, integer),
    ),
    "DenseDescriptorInit": (*(pointer, pointer, int64, int64, int64), *(_uint32, integer, integer)),
    "MatmulDescriptorInit": (pointer, pointer, integer, integer, *(pointer,) * 4, integer),
    "MatmulDescSetAttribute": (pointer, pointer, integer, pointer, size),
    "MatmulAlgSelectionInit": (pointer, pointer, pointer, integer),
    "MatmulAlgSetAttribute": (pointer, pointer, integer, pointer, size),
    "MatmulAlgSelectionDestroy": (pointer,),
    "MatmulPlanInit": (pointer,) * 4,
    "MatmulPlanDestroy": (pointer,),
    "MatDescriptorDestroy": (pointer,),
    "MatmulGetWorkspace": (pointer,) * 3,
    "Matmul": (*(pointer,) * 10, integer),
    "SpMMACompressedSize2": (pointer,) * 4,
    "SpMMACompress2": (pointer, pointer, integer, integer, *(pointer,) * 4),
}


def result_dtype(dtype: torch.dtype) -> torch.dtype:
    """That of products of operands of `dtype`."""
    return torch.bfloat16 if dtype is torch.float8_e4m3fn else dtype


class _Library(Library):
    def __init__(self, path: str):
        super().__init__(path, "cusparseLt", _SIGNATURES, "GetErrorString")
        self.version = tuple(self._property(i) for i in range(3))

    def _property(self, which: int) -> int:
        value = ctypes.c_int()
        self.call("GetProperty", which, ctypes.byref(value))
        return value.value


@cache
def library() -> "_Library | str":
    """The library, or the reason why there is none, in words for the kernel table."""
    for path in (SONAME, *_in_wheels()):
        try:
            found = _Library(path)
        except (OSError, AttributeError, Error) as error:
            reason = str(error)
            continue
        if found.version < OLDEST:
            reason = f"it is version {'.'.join(map(str, found.version))}, older than 0.8.0"
            continue
        return found
    return f"cuSPARSELt is not usable: {reason}"


def loaded() -> _Library:
    """The library, where the rows have seen that there is one."""
    found = library()
    assert isinstance(found, _Library), found
    return found


def _in_wheels() -> list[str]:
    paths = []
    for wheel in ("nvidia-cusparselt-cu13", "nvidia-cusparselt-cu12"):
        try:
            paths += [str(f.locate()) for f in files(wheel) or () if f.name == SONAME]
        except PackageNotFoundError:
            continue
    return paths


def _opaque() -> ctypes.Array:
    """Memory of one of the library's five structs, 512 bytes on a multiple of 16."""
    memory = ctypes.create_string_buffer(512 + 16)
    return (ctypes.c_char * 512).from_buffer(memory, -ctypes.addressof(memory) % 16)


class _Threads(threading.local):
    def __init__(self) -> None:
        self.handles: dict[int, ctypes.Array] = {}
        self.plans: dict[tuple, Plan] = {}


_threads = _Threads()


def _handle(device: int) -> ctypes.Array:
    """This thread's handle of the GPU, which is the current one."""
    if device not in _threads.handles:
        handle = _opaque()
        loaded().call("Init", handle)
        _threads.handles[device] = handle
    return _threads.handles[device]


def _sparse(
    handle: ctypes.Array, made: Made, rows: int, columns: int, dtype: torch.dtype
) -> ctypes.Array:
    descriptor = _opaque()
    loaded().call(
        "StructuredDescriptorInit",
        *(handle, descriptor, rows, columns, columns, ALIGNMENT, _TYPES[dtype], _ROW, 0),
    )
    made.add(descriptor, "MatDescriptorDestroy")
    return descriptor


def _compressed_bytes(handle: ctypes.Array, descriptor: ctypes.Array) -> tuple[int, int]:
    """Of an operand, and of what compressing needs beside."""
    operand, scratch = ctypes.c_size_t(), ctypes.c_size_t()
    refs = ctypes.byref(operand), ctypes.byref(scratch)
    loaded().call("SpMMACompressedSize2", handle, descriptor, *refs)
    return operand.value, scratch.value


def operand_bytes(n: int, k: int, dtype: torch.dtype, device: int) -> int:
    """Length of what compress() makes of a W [n, k] on this GPU."""
    with torch.cuda.device(device):
        handle, made = _handle(device), Made(loaded())
        return _compressed_bytes(handle, _sparse(handle, made, n, k, dtype))[0]


def compress(w: Tensor) -> Tensor:
    """The operand, bytes, of w [N, K] with at most two of four neighbours that are not 0. What it
    holds is the library's own."""
    lib, device, w = loaded(), w.device.index, aligned(w.contiguous())
    with torch.cuda.device(device):
        handle, made = _handle(device), Made(lib)
        descriptor = _sparse(handle, made, w.shape[0], w.shape[1], w.dtype)
        length, scratch = _compressed_bytes(handle, descriptor)
        out = w.new_zeros(length, dtype=torch.uint8)
        buffer = w.new_empty(max(16, scratch), dtype=torch.uint8)
        stream = torch._C._cuda_getCurrentRawStream(device)
        pointers = w.data_ptr(), out.data_ptr(), buffer.data_ptr(), stream
        lib.call("SpMMACompress2", handle, descriptor, 1, _PLAIN, *pointers)
    return out


class Plan:
    """y [M, N] = alpha x [M, K] W^T + bias [N] by one algorithm, on one GPU, by this thread."""

    def __init__(
        self,
        n: int,
        k: int,
        m: int,
        device: int,
        algorithm: int | None = None,
        bias: Tensor | None = None,
        dtype: torch.dtype = torch.bfloat16,
        strides: tuple[int, int] | None = None,
    ):
        """algorithm: a number, None for the library's own choice. dtype: of x and W. bias: the
        first one, of a plan whose products have one. strides: of the rows of x and y, k and n or
        more."""
        self._lib, self._shape, self._device = loaded(), (m, n), device
        self._dtype, self._bias = result_dtype(dtype), None if bias is None else bias.data_ptr()
        self._made, self._zero = Made(self._lib), ctypes.c_float(0)
        with torch.cuda.device(device):
            self._handle = _handle(device)
            self._made.add(self._handle, None)
            self._describe(dtype, k, *(strides or (k, n)))
            self._begin(algorithm)

    def _describe(self, dtype: torch.dtype, k: int, x_stride: int, y_stride: int) -> None:
        lib, handle, (m, n) = self._lib, self._handle, self._shape
        # x is the transposed of [K, M], y lies column by column as [N, M].
        w, x, y = _sparse(handle, self._made, n, k, dtype), _opaque(), _opaque()
        of_x, of_y = (m, k, x_stride, ALIGNMENT), (n, m, y_stride, ALIGNMENT)
        lib.call("DenseDescriptorInit", handle, x, *of_x, _TYPES[dtype], _ROW)
        self._made.add(x, "MatDescriptorDestroy")
        lib.call("DenseDescriptorInit", handle, y, *of_y, _TYPES[self._dtype], _COLUMN)
        self._made.add(y, "MatDescriptorDestroy")
        self._matmul, operands = _opaque(), (_PLAIN, _TRANSPOSED, w, x, y, y, _FLOAT32)
        self._made.add(self._matmul, None)
        lib.call("MatmulDescriptorInit", handle, self._matmul, *operands)
        if self._bias is not None:
            self._set_bias(self._bias)

    def _begin(self, algorithm: int | None) -> None:
        lib, handle, bytes_needed = self._lib, self._handle, ctypes.c_size_t()
        self._plan, selection = _opaque(), _opaque()
        lib.call("MatmulAlgSelectionInit", handle, selection, self._matmul, 0)
        self._made.add(selection, "MatmulAlgSelectionDestroy")
        if algorithm is not None:
            self._set("MatmulAlgSetAttribute", selection, _ID, ctypes.c_int(algorithm))
        lib.call("MatmulPlanInit", handle, self._plan, self._matmul, selection)
        self._made.add(self._plan, "MatmulPlanDestroy")
        lib.call("MatmulGetWorkspace", handle, self._plan, ctypes.byref(bytes_needed))
        self.workspace_bytes = bytes_needed.value

    def _set(self, function: str, of: ctypes.Array, which: int, value) -> None:
        args = ctypes.byref(value), ctypes.sizeof(value)
        self._lib.call(function, self._handle, of, which, *args)

    def _set_bias(self, address: int) -> None:
        self._set("MatmulDescSetAttribute", self._matmul, _BIAS, ctypes.c_void_p(address))
        self._bias = address

    def multiply(
        self,
        operand: Tensor,
        x: Tensor,
        y: Tensor | None = None,
        bias: Tensor | None = None,
        alpha: float = 1.0,
    ) -> Tensor:
        """The product with x [M, K] on torch's current stream; in y, if it is given. Their rows are
        as far apart as the plan says. With a bias if the plan was made with one."""
        if bias is not None and self._bias != bias.data_ptr():
            self._set_bias(bias.data_ptr())
        y = x.new_empty(self._shape, dtype=self._dtype) if y is None else y
        workspace = x.new_empty(self.workspace_bytes, dtype=torch.uint8)
        stream = ctypes.c_void_p(torch._C._cuda_getCurrentRawStream(self._device))
        factor, out = ctypes.c_float(alpha), y.data_ptr()
        args = (
            *(self._handle, self._plan, ctypes.byref(factor), operand.data_ptr(), x.data_ptr()),
            *(ctypes.byref(self._zero), out, out, workspace.data_ptr(), ctypes.byref(stream), 1),
        )
        with torch.cuda.device(self._device):
            self._lib.call("Matmul", *args)
        return y

    def start(self, other_way: Callable[..., None], workspace_at: int) -> Callable[..., None]:
        """start(_, _, _, _, stream, operand, x, y, bias), multiply() in C++, for a plan that nobody
        else uses. other_way(operand, x, y, bias) multiplies in other threads. The workspace begins
        workspace_at bytes behind the begin of the operand."""
        lib, structs = self._lib, map(ctypes.addressof, (self._handle, self._plan, self._matmul))
        addresses = map(lib.address, ("Matmul", "MatmulDescSetAttribute"))
        assert native
        return native.sparse_product(
            *(self, other_way, *addresses, lib.words_address, *structs, workspace_at, _BIAS)
        )


def multiply(
    operand: Tensor,
    x: Tensor,
    y: Tensor,
    bias: Tensor | None,
    algorithm: int | None,
    alpha: float = 1.0,
) -> None:
    """y [M, N] = alpha x [M, K] W^T + bias [N] of the operand of W. x and y may be columns of wider
    matrices, from a multiple of 8 on."""
    (m, k), n, device = x.shape, y.shape[1], x.device.index
    x, strides = aligned(x), (x.stride(0), y.stride(0))
    bias = readable_bias(bias, y)
    key = n, k, m, x.dtype, device, algorithm, bias is not None, strides
    plans = _threads.plans
    if key not in plans:
        while len(plans) >= MOST_PLANS:
            plans.pop(next(iter(plans)))
        plans[key] = Plan(n, k, m, device, algorithm, bias, x.dtype, strides)
    plans[key].multiply(operand, x, y, bias, alpha)


def readable_bias(bias: Tensor | None, y: Tensor) -> Tensor | None:
    """What kernels add to y [M, N] read as bias [N]. ValueError for one of another size or kind."""
    if bias is None:
        return None
    if (bias.dtype, bias.shape, bias.device) != (y.dtype, y.shape[1:], y.device):
        raise ValueError(
            f"bias: expected {y.dtype} of shape {tuple(y.shape[1:])} on {y.device}, "
            f"got {bias.dtype} of shape {tuple(bias.shape)} on {bias.device}"
        )
    return aligned(bias.contiguous())


def aligned(t: Tensor) -> Tensor:
    """t where it begins on a multiple of 16 bytes."""
    return t.clone() if t.data_ptr() % ALIGNMENT else t
