"""Which CUDA graph a stream is being captured into."""

import ctypes
from collections.abc import Callable
from functools import cache

import torch
from torch import Tensor

from . import library


@cache
def _capture_info() -> Callable[..., int]:
    """Of the driver, since torch tells whether, not which."""
    return ctypes.CDLL("libcuda.so.1").cuStreamGetCaptureInfo_v2


def capture_of(x: Tensor) -> int | None:
    """The driver's number of the capture that a product with x would be part of: each capture of a
    process has another. None outside of captures. RuntimeError where the driver does not tell."""
    if not (x.is_cuda and torch.cuda.is_current_stream_capturing()):
        return None
    status, number = ctypes.c_int(), ctypes.c_uint64()
    stream = ctypes.c_void_p(library.current_stream(x.device.index))
    error = _capture_info()(stream, ctypes.byref(status), ctypes.byref(number), None, None, None)
    if error:
        raise RuntimeError(f"cuStreamGetCaptureInfo: the driver answers with error {error}")
    return number.value
