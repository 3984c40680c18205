"""Checks of what an op is called with, on every call: whatever the tensors have become since they
were made, no kernel sees an array that is shorter, of another type or elsewhere than it believes.

`fitting_tokens` looks at all operands in one step (csrc/tensors.h). What it does not accept is left
to the functions here, which name what is wrong. Indices inside the arrays are checked where
something is made from them (derived.py, csrc/pattern).
"""

from types import ModuleType

import torch
from torch import Tensor

native: ModuleType | None = None  # the library, where it can read tensors
try:
    from .. import _C

    _C.read_tensors_of(Tensor)
    native, fitting_tokens = _C, _C.fitting_tokens
except (ImportError, AttributeError):  # not built, or a torch without the table that it reads

    def fitting_tokens(*operands) -> None:
        """No number of tokens: whoever asks has to check the operands one by one."""


_int32 = torch.int32


def check_product(
    op: str,
    row_offsets: Tensor,
    col_indices: Tensor,
    values: Tensor,
    n: int,
    k: int,
    x: Tensor,
    bias: Tensor | None,
) -> tuple[int, int]:
    """(M, nnz) of the operands of spmm: x [M, K], bias [N]; of spmm_t: x is dy [M, N], bias [K]."""
    width, out = (k, n) if op == "spmm" else (n, k)
    dtype, device, is_cpu = x.dtype, x.get_device(), x.is_cpu
    nnz, shape = col_indices.numel(), x.shape
    if (
        _is_pattern(row_offsets, col_indices, n, device, is_cpu)
        and values.dtype is dtype
        and values.dim() == 1
        and values.numel() == nnz
        and values.get_device() == device
        and values.is_cpu is is_cpu
        and len(shape) == 2
        and shape[1] == width
        and (bias is None or _is_bias(bias, out, x))
    ):
        return shape[0], nnz
    name = "x" if op == "spmm" else "dy"
    check_pattern_arrays(row_offsets, col_indices, n, x.device, f"{op}: ")
    _check(f"{op}: {name}", x, ("M", width), dtype, x.device)
    _check(f"{op}: values", values, (col_indices.numel(),), dtype, x.device)
    if bias is not None:
        _check(f"{op}: bias", bias, (out,), dtype, x.device)
    raise AssertionError(f"{op}: operands refused without a reason")


def check_sddmm(
    row_offsets: Tensor, col_indices: Tensor, n: int, k: int, dy: Tensor, x: Tensor
) -> tuple[int, int]:
    """(M, nnz) of the operands of sddmm: dy [M, N], x [M, K]."""
    device, is_cpu, shape = x.get_device(), x.is_cpu, x.shape
    if (
        _is_pattern(row_offsets, col_indices, n, device, is_cpu)
        and dy.dtype is x.dtype
        and len(shape) == 2
        and shape[1] == k
        and dy.shape == (shape[0], n)
        and dy.get_device() == device
        and dy.is_cpu is is_cpu
    ):
        return shape[0], col_indices.numel()
    check_pattern_arrays(row_offsets, col_indices, n, x.device, "sddmm: ")
    _check("sddmm: x", x, ("M", k), x.dtype, x.device)
    _check("sddmm: dy", dy, (x.shape[0], n), x.dtype, x.device)
    raise AssertionError("sddmm: operands refused without a reason")


def check_memory(op: str, **operands: Tensor) -> None:
    """ValueError for a tensor whose storage was freed below it (resize_(0)). The address of a view
    with an offset is no null pointer then."""
    for name, t in operands.items():
        is_null = not (t.untyped_storage().nbytes() if t.storage_offset() else t.data_ptr())
        if is_null and t.numel():
            raise ValueError(f"{op}: {name}: expected {t.numel()} elements, their memory was freed")


def check_pattern_arrays(
    row_offsets: Tensor, col_indices: Tensor, n: int, device: torch.device, prefix: str = ""
) -> None:
    """TypeError or ValueError, with what is wrong, unless both are arrays that a kernel can read
    as the CSR of n rows. The message begins with `prefix`."""
    for name, t, size in (("row_offsets", row_offsets, n + 1), ("col_indices", col_indices, "nnz")):
        _check(prefix + name, t, (size,), torch.int32, device)
        if not t.is_contiguous():
            raise ValueError(
                f"{prefix}{name}: expected a contiguous tensor, got strides {t.stride()}"
            )


def _is_pattern(row_offsets, col_indices, n, device, is_cpu) -> bool:
    return (
        row_offsets.dtype is _int32
        and col_indices.dtype is _int32
        and row_offsets.numel() == n + 1
        and row_offsets.dim() == col_indices.dim() == 1  # kernels size results by shape[0]
        and row_offsets.is_contiguous()
        and col_indices.is_contiguous()
        and row_offsets.get_device() == col_indices.get_device() == device
        and row_offsets.is_cpu is col_indices.is_cpu is is_cpu
    )


def _is_bias(bias, size, x) -> bool:
    return (
        bias.dtype is x.dtype
        and bias.dim() == 1
        and bias.numel() == size
        and bias.get_device() == x.get_device()
        and bias.is_cpu == x.is_cpu
    )


def _check(name: str, t: Tensor, shape: tuple[int | str, ...], dtype: torch.dtype, device) -> None:
    """A size that is a word may be any."""
    if t.dtype != dtype:
        raise TypeError(f"{name}: expected {dtype}, got {t.dtype}")
    fits = t.ndim == len(shape) and all(
        isinstance(want, str) or want == got for want, got in zip(shape, t.shape, strict=True)
    )
    if not fits:
        wanted = ", ".join(map(str, shape))
        raise ValueError(f"{name}: expected shape [{wanted}], got {list(t.shape)}")
    if t.device != device:
        raise ValueError(f"{name}: expected device {device}, got {t.device}")
