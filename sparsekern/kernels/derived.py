"""The one store of what kernels derive from a pattern: schedules, bitmaps, packs.

A thing is kept by its kind and by the addresses and sizes of the index tensors, for as long as both
tensors live. Three rules hold for everything that is derived:

- It is made from a private copy of the indices that was checked, so no write at any time, by
  whomever and however, lets a kernel leave its bounds.
- It is stale when torch's version counters of the index tensors have moved. A write that no counter
  sees (through .data, NumPy, another process) may leave a result stale, never out of bounds;
  SparseTensor.indices_changed_() moves the counters by hand.
- What a CUDA graph has captured is kept when it is replaced, until what another graph has captured
  is replaced too: a replay after a change of the pattern is that of the old pattern, and reads no
  memory of others. Nobody tells when a graph is gone, so more than one would be a leak.
"""

import copy
import threading
import weakref
from collections.abc import Callable, Hashable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from typing import Any, TypeVar

import torch
from torch import Tensor

from ..indices import check_pattern
from .operands import check_pattern_arrays, native

T = TypeVar("T")

_store: dict[tuple, tuple] = {}  # the thing, and a reference to each index tensor
_captured: dict[int, weakref.ref] = {}  # by the id of col_indices
_passing: dict[int, weakref.ref] = {}  # by the address of row_offsets, which all patterns have


def versions(row_offsets: Tensor, col_indices: Tensor) -> tuple[int, int]:
    """Version counters of both: each moves with every write that torch counts; -1 where it counts
    none (tensors made in inference mode)."""
    try:
        return row_offsets._version, col_indices._version
    except RuntimeError:
        rows, cols = (-1 if t.is_inference() else t._version for t in (row_offsets, col_indices))
        return rows, cols


def kept(
    kind: Hashable, row_offsets: Tensor, col_indices: Tensor, n: int, k: int, make: Callable[[], T]
) -> T:
    """make() of the first call with these tensors, which sees to its own staleness."""
    key = kind, row_offsets.data_ptr(), col_indices.data_ptr(), n, k, col_indices.numel()
    try:
        return _store[key][0]
    except KeyError:
        thing = make()

    def forget(_: weakref.ref) -> None:
        _store.pop(key, None)

    _store[key] = thing, weakref.ref(row_offsets, forget), weakref.ref(col_indices, forget)
    return thing


class _Slot:
    """A derived thing and the versions that it was made from."""

    thing: Any = None
    versions: tuple[int, int] | None = None
    is_captured = False  # a CUDA graph reads the thing
    replaced: object = None  # the last one that a graph may still read


def derived(
    kind: Hashable,
    row_offsets: Tensor,
    col_indices: Tensor,
    n: int,
    k: int,
    make: Callable[[Tensor, Tensor], T],
) -> T:
    """make(row_offsets, col_indices) of a checked copy of the indices; made anew when they change.

    TypeError or ValueError if they are not a valid pattern of [n, k]; RuntimeError while a CUDA
    graph is captured and nothing is there yet: making waits for the GPU, which a capture cannot.
    """
    slot = kept(kind, row_offsets, col_indices, n, k, _Slot)
    now = versions(row_offsets, col_indices)
    is_capturing = col_indices.is_cuda and torch.cuda.is_current_stream_capturing()
    is_counted = -1 not in now or col_indices.is_cuda  # on a CPU making costs no wait for anybody
    if slot.versions != now or not is_counted:
        if is_capturing:
            raise RuntimeError(
                "this pattern was not used since it changed, and a CUDA graph cannot capture its "
                "preparation: call the product once before the capture, as for any warm-up"
            )
        check_pattern_arrays(row_offsets, col_indices, n, col_indices.device)

        def make_checked() -> T:
            with torch.inference_mode(False):  # whose tensors nobody may write to later on
                copies = row_offsets.clone(), col_indices.clone()
                check_pattern(*copies, n, k)
                return make(*copies)

        thing = to_keep(col_indices.device, make_checked)
        if slot.is_captured:
            slot.replaced = slot.thing
        slot.thing, slot.versions, slot.is_captured = thing, now, False
    if is_capturing:
        slot.is_captured = True
        note_capture(col_indices)
    return slot.thing


_keeper = ThreadPoolExecutor(1, "sparsekern-keeper")
_here = threading.local()


def to_keep(device: torch.device, make: Callable[[], T]) -> T:
    """make(), whose tensors outlive the call. On a GPU in a thread for that: while torch.compile
    warms a CUDA graph up (mode="reduce-overhead"), what its thread allocates belongs to the graph,
    which takes it back. And waited for: the next product may run on another stream."""
    if device.type != "cuda" or getattr(_here, "is_keeper", False):
        return make()
    stream = torch.cuda.current_stream(device)

    def make_there() -> T:
        _here.is_keeper = True
        with torch.cuda.stream(stream), torch.no_grad():
            thing = make()
            stream.synchronize()
            return thing

    return _keeper.submit(make_there).result()


def share(origin: tuple[Tensor, Tensor], twin: tuple[Tensor, Tensor]) -> list[object]:
    """Give the indices `twin`, clones of `origin`, deep copies of what was derived from these and
    they lack: the copies that were made."""
    made = []
    addresses = tuple(t.data_ptr() for t in origin)
    for (kind, *rest), (slot, *_) in list(_store.items()):
        if tuple(rest[:2]) != addresses or not isinstance(slot, _Slot):
            continue
        n, k, _ = rest[2:]
        mine = kept(kind, *twin, n, k, _Slot)
        if mine.versions is None and slot.versions == versions(*origin):
            mine.thing, mine.versions = copy.deepcopy(slot.thing), versions(*twin)
            made.append(mine.thing)
    return made


def derived_bytes(row_offsets: Tensor, col_indices: Tensor) -> int:
    """Bytes of what CPU kernels keep of this pattern beside it."""
    addresses = row_offsets.data_ptr(), col_indices.data_ptr()
    things = [thing for (_, *rest), (thing, *_) in _store.items() if tuple(rest[:2]) == addresses]
    return sum(thing.kept_bytes() for thing in things if hasattr(thing, "kept_bytes"))


def note_capture(col_indices: Tensor) -> None:
    """Remember that a CUDA graph holds this pattern: to be called by what launches kernels."""
    if col_indices.is_cuda and torch.cuda.is_current_stream_capturing():
        key = id(col_indices)
        _captured[key] = weakref.ref(col_indices, lambda _: _captured.pop(key, None))


def forget_captures(col_indices: Tensor) -> None:
    """The graphs that were captured with this pattern are gone."""
    _captured.pop(id(col_indices), None)


@contextmanager
def passing_captures() -> Iterator[None]:
    """The graphs that are captured inside are gone when it ends."""
    before = set(_captured)
    try:
        yield
    finally:
        for key in _captured.keys() - before:
            _captured.pop(key, None)


def is_captured(col_indices: Tensor) -> bool:
    """Whether a CUDA graph was captured that reads this pattern: a change would go unseen there."""
    return id(col_indices) in _captured


def note_passing(row_offsets: Tensor, is_passing: bool) -> None:
    """Say whether this pattern will be replaced soon: then nothing is derived from it that takes
    long."""
    key = row_offsets.data_ptr()
    _passing.pop(key, None)
    if is_passing:
        _passing[key] = weakref.ref(row_offsets, lambda _: _passing.pop(key, None))
    if native:
        native.forget_calls()  # which were prepared without what takes long, or with it


def is_passing(row_offsets: Tensor) -> bool:
    return bool(_passing) and row_offsets.data_ptr() in _passing
