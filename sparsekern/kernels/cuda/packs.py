"""Packs of ordinary sparse tensors, for table rows: one for each pattern and kind of layout.

The index part is made once, on the first product (derived.py keeps it); values are brought in when
they may have changed: on each call if they require grad, else when they are another tensor or torch
has counted a write to them. A CUDA graph does the same in each replay as in the call that was
captured: values that require grad are packed anew, others are what they were at the capture, until
a call outside of the graph brings new ones in.
"""

import weakref
from collections.abc import Callable
from typing import Any

from torch import Tensor

from ...tensor import SparseTensor
from ..derived import derived, share
from .layout import Packed


class Pack:
    """The pack of one pattern; `layout` is what its index part was made by."""

    def __init__(self, layout: Any, values: Tensor):
        self.layout = layout
        self.packed: Packed = layout.fill(values)
        self.saw(values)

    def saw(self, values: Tensor) -> None:
        """The pack has these values."""
        self._values = weakref.ref(values)
        self._version = None if values.is_inference() else values._version

    def refresh(self, values: Tensor) -> "Pack":
        # A parameter in training changes between calls, and not all writes are counted. The tensor
        # itself is compared: the address of one that is gone may be that of other values.
        is_seen = self._values() is values and not values.is_inference()
        if values.requires_grad or not is_seen or self._version != values._version:
            self.layout.refill_(self.packed, values)
            self.saw(values)
        return self


def pack_of(
    row: str,
    kind: Any,
    make_layout: Callable[[Tensor, Tensor], Any],
    row_offsets: Tensor,
    col_indices: Tensor,
    values: Tensor,
    n: int,
    k: int,
) -> Pack:
    """The pack of `kind` with these values, for the table row `row`. make_layout(row_offsets,
    col_indices) gets checked copies."""

    def make(*indices: Tensor) -> Pack:
        return Pack(make_layout(*indices), values)

    pack = derived((row, kind, values.dtype), row_offsets, col_indices, n, k, make)
    return pack.refresh(values)


def share_packs(origin: SparseTensor, twin: SparseTensor) -> None:
    """Give `twin`, a clone of `origin`, a copy of each pack that it lacks: the same one would be
    made, but slowly."""
    indices = ((W.row_offsets, W.col_indices) for W in (origin, twin))
    for thing in share(*indices):
        if isinstance(thing, Pack):
            thing.saw(twin.values)
