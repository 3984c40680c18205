"""Packs of ordinary sparse tensors, for table rows: one for each pattern and kind of layout.

The index part is made once, on the first product; values are brought in when they may have
changed. A pack goes when its `col_indices` does.
"""

import weakref
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from .derived import versions
from .layout import Packed


class Pack:
    """The pack of one pattern; `layout` is what its index part was made by."""

    def __init__(self, layout: Any, row_offsets: Tensor, col_indices: Tensor, values: Tensor):
        self.layout = layout
        self.packed: Packed = layout.fill(values)
        self.index_version = versions(row_offsets, col_indices)
        self.values_seen = _seen(values)

    def refresh(self, values: Tensor) -> "Pack":
        seen = _seen(values)
        # A parameter in training changes between calls, and not all writes are counted.
        if values.requires_grad or seen is None or seen != self.values_seen:
            self.layout.refill_(self.packed, values)
            self.values_seen = seen
        return self


def _seen(values: Tensor) -> tuple[int, int] | None:
    try:
        return values.data_ptr(), values._version
    except RuntimeError:  # made in inference mode: writes are not counted
        return None


_packs: dict[tuple, tuple[Pack, weakref.ref]] = {}


def pack_of(
    row: str,
    kind: Any,
    make_layout: Callable[[], Any],
    row_offsets: Tensor,
    col_indices: Tensor,
    values: Tensor,
    n: int,
    k: int,
) -> Pack:
    """The pack of `kind` with these values, for the table row `row`."""
    nnz = col_indices.shape[0]
    key = (row_offsets.data_ptr(), col_indices.data_ptr(), n, k, nnz, values.dtype, row, kind)
    entry = _packs.get(key)
    if entry is not None and entry[0].index_version == versions(row_offsets, col_indices):
        return entry[0].refresh(values)
    if values.is_cuda and torch.cuda.is_current_stream_capturing():
        raise RuntimeError(
            f"{row}: a weight is packed on its first product, which a CUDA graph cannot capture; "
            "call the product once before the capture, as for any warm-up"
        )
    pack = Pack(make_layout(), row_offsets, col_indices, values)
    _packs[key] = (pack, weakref.ref(col_indices, lambda _: _packs.pop(key, None)))
    return pack
