"""The one store of what kernels derive from a pattern: schedules, bitmaps, packs.

A thing is kept by its kind and by the addresses and sizes of the index tensors, for as long as the
`col_indices` tensor lives. Two rules hold for everything that is derived:

- It is made from a private copy of the indices that was checked, so no write at any time, by
  whomever and however, lets a kernel leave its bounds.
- It is stale when torch's version counters of the index tensors have moved. A write that no counter
  sees (through .data, NumPy, another process) may leave a result stale, never out of bounds;
  SparseTensor.indices_changed_() moves the counters by hand.
"""

import weakref
from collections.abc import Callable, Hashable
from typing import TypeVar

import torch
from torch import Tensor

from ..tensor import check_pattern

T = TypeVar("T")

_store: dict[tuple, tuple[object, weakref.ref]] = {}
_captured: dict[int, weakref.ref] = {}  # by the id of col_indices


def versions(row_offsets: Tensor, col_indices: Tensor) -> tuple[int, int]:
    """Version counters of both: each moves with every write that torch counts; -1 where it counts
    none (tensors made in inference mode)."""
    try:
        return row_offsets._version, col_indices._version
    except RuntimeError:
        return tuple(-1 if t.is_inference() else t._version for t in (row_offsets, col_indices))


def kept(
    kind: Hashable, row_offsets: Tensor, col_indices: Tensor, n: int, k: int, make: Callable[[], T]
) -> T:
    """make() of the first call with these tensors, which sees to its own staleness."""
    key = kind, row_offsets.data_ptr(), col_indices.data_ptr(), n, k, col_indices.numel()
    try:
        return _store[key][0]
    except KeyError:
        thing = make()
        _store[key] = thing, weakref.ref(col_indices, lambda _: _store.pop(key, None))
        return thing


class _Slot:
    """A derived thing and the versions that it was made from."""

    thing: object = None
    versions: tuple[int, int] | None = None


def derived(
    kind: Hashable,
    row_offsets: Tensor,
    col_indices: Tensor,
    n: int,
    k: int,
    make: Callable[[Tensor, Tensor], T],
) -> T:
    """make(row_offsets, col_indices) of a checked copy of the indices; made anew when they change.

    ValueError if they are not a valid pattern of [n, k]; RuntimeError while a CUDA graph is
    captured and nothing is there yet: making waits for the GPU, which a capture cannot.
    """
    slot = kept(kind, row_offsets, col_indices, n, k, _Slot)
    now = versions(row_offsets, col_indices)
    if slot.versions != now:
        if col_indices.is_cuda and torch.cuda.is_current_stream_capturing():
            raise RuntimeError(
                "this pattern was not used since it changed, and a CUDA graph cannot capture its "
                "preparation: call the product once before the capture, as for any warm-up"
            )
        copies = row_offsets.clone(), col_indices.clone()
        check_pattern(*copies, n, k)
        slot.thing, slot.versions = make(*copies), now
    return slot.thing


def note_capture(col_indices: Tensor) -> None:
    """Remember that a CUDA graph holds this pattern: to be called by what launches kernels."""
    if col_indices.is_cuda and torch.cuda.is_current_stream_capturing():
        key = id(col_indices)
        _captured[key] = weakref.ref(col_indices, lambda _: _captured.pop(key, None))


def is_captured(col_indices: Tensor) -> bool:
    """Whether a CUDA graph was captured that reads this pattern: a change would go unseen there."""
    return id(col_indices) in _captured
