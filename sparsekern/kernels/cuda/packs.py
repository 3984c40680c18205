"""The packed weights of ordinary sparse tensors, for table rows that read one.

A pack holds values and the counters by which blocks find out who is last, so it serves one product
at a time. Each thread has its own, and one that goes on to another stream waits there for what the
stream before has to do. A CUDA graph holds the pack of the thread that captured it.
"""

import copy
import threading
import weakref
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from ...tensor import SparseTensor
from ..derived import derived, share, to_keep
from .layout import Layout
from .library import current_stream


class Pack:
    """The packed weight of a sparse tensor, in one thread.

    Values are brought in when they may have changed: on each call if they require grad, else when
    they are another tensor or torch has counted a write to them. A CUDA graph does the same in each
    replay as in the call that was captured: values that require grad are packed anew, others are
    what they were at the capture, until a call outside of the graph brings new ones in.
    """

    def __init__(self, layout: Layout, values: Tensor):
        self.layout = layout
        self.packed = layout.fill(values)
        self.thread: Callable[[], threading.Thread | None] = lambda: None
        self.stream = _raw_stream(values.device)
        self.seen: dict[str, Any] = {}  # whose values the pack has; empty: nobody knows
        self.saw(values)

    def saw(self, values: Tensor) -> None:
        """The pack has these values."""
        version = None if values.is_inference() else values._version
        self.seen.update(values=weakref.ref(values), version=version)

    def refresh(self, values: Tensor) -> "Pack":
        self._wait_for_the_stream_before(values.device)
        # A parameter in training changes between calls, and not all writes are counted. The tensor
        # itself is compared: the address of one that is gone may be that of other values.
        seen = self.seen
        is_seen = seen and seen["values"]() is values and not values.is_inference()
        if values.requires_grad or not is_seen or seen["version"] != values._version:
            self.layout.refill_(self.packed, values)
            self.saw(values)
        return self

    # Steps of a prepared call (kernels/steps.py), which may be another thread's.

    def refreshed(self, values: Tensor) -> object:
        """The pack with these values; NotImplemented where it is another thread's."""
        return self.refresh(values) if self.is_mine() else NotImplemented

    def emptied(self, values: Tensor) -> object:
        """The pack, whose values are brought in next; NotImplemented as in refreshed()."""
        if not self.is_mine():
            return NotImplemented
        self._wait_for_the_stream_before(values.device)
        self.seen.clear()
        return self

    def is_mine(self) -> bool:
        return self.thread() is threading.current_thread()

    def _wait_for_the_stream_before(self, device: torch.device) -> None:
        now = _raw_stream(device)
        if now == self.stream or torch.cuda.is_current_stream_capturing():
            return  # a graph cannot wait for what lies outside of it
        before = torch.cuda.ExternalStream(self.stream, device)
        torch.cuda.current_stream(device).wait_stream(before)
        self.stream = now


def _raw_stream(device: torch.device) -> int:
    return current_stream(device.index) if device.type == "cuda" else 0


class Packs:
    """The packs of one pattern, one for each thread that needs it at the same time."""

    def __init__(self, layout: Layout, values: Tensor):
        self._layout = layout
        self._packs = [Pack(layout, values)]
        self._lock = threading.Lock()

    def mine(self, values: Tensor) -> Pack:
        """This thread's: that of a thread which is gone, or a new one, if it has none."""
        me = threading.current_thread()
        with self._lock:
            for pack in self._packs:
                if pack.thread() is me:
                    return pack
            for pack in self._packs:
                owner = pack.thread()
                if owner is None or not owner.is_alive():
                    break
            else:
                if values.is_cuda and torch.cuda.is_current_stream_capturing():
                    raise RuntimeError(
                        "this thread has not used the pattern before, and a CUDA graph cannot "
                        "capture its preparation: call the product once before the capture, as for "
                        "any warm-up"
                    )
                pack = to_keep(values.device, lambda: Pack(self._layout, values))
                self._packs.append(pack)
            pack.thread = weakref.ref(me)
            return pack

    def saw(self, values: Tensor) -> None:
        """The first pack has these values."""
        self._packs[0].saw(values)

    def __deepcopy__(self, memo: dict) -> "Packs":
        """Packs with a copy of one, of which nobody knows whose values it has."""
        twin = Packs.__new__(Packs)
        twin._layout, twin._lock = copy.deepcopy(self._layout, memo), threading.Lock()
        pack = copy.copy(next((p for p in self._packs if p.is_mine()), self._packs[0]))
        pack.layout, pack.packed = twin._layout, copy.deepcopy(pack.packed, memo)
        pack.thread, pack.seen = (lambda: None), {}
        twin._packs = [pack]
        return twin


def pack_of(
    row: str,
    kind: str,
    make_layout: Callable[[Tensor, Tensor], Layout],
    row_offsets: Tensor,
    col_indices: Tensor,
    values: Tensor,
    n: int,
    k: int,
) -> Pack:
    """This thread's pack of `kind` with these values, for the table row `row`.
    make_layout(row_offsets, col_indices) gets checked copies."""

    def make(*indices: Tensor) -> Packs:
        return Packs(make_layout(*indices), values)

    packs = derived((row, kind, values.dtype), row_offsets, col_indices, n, k, make)
    return packs.mine(values).refresh(values)


def share_packs(origin: SparseTensor, twin: SparseTensor) -> None:
    """Give `twin`, a clone of `origin`, a copy of a pack of each kind that it lacks: the same one
    would be made, but slowly."""
    indices = ((W.row_offsets, W.col_indices) for W in (origin, twin))
    for thing in share(*indices):
        if isinstance(thing, Packs):
            thing.saw(twin.values)
