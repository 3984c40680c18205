"""The end of a process whose group has lost another one.

A GPU waits for ever for the gradient of a process that was killed, and a captured all-reduce has no
timeout. So every process counts in the group's store, and watches the next one's count. Who finds
it standing still says so there, and all look: each reads two numbers, however many there are.
"""

import os
import sys
import threading
import time
from collections.abc import Callable
from typing import Protocol

BEAT_S = 2.0
SILENT_S = 40.0  # a process that has not counted for so long has gone
DONE = 2**40  # of a count: this process has left, and is to be missed no more
GONE = "gone"  # key of the process that is missed, plus 1


class Store(Protocol):
    """As torch.distributed.Store. RuntimeError where it cannot be reached."""

    def add(self, key: str, amount: int) -> int: ...

    def set(self, key: str, value: str) -> None: ...


def stop(text: str) -> None:
    """End this process at once, whatever its other threads wait for."""
    sys.stdout.flush()
    print(f"sparsekern: error: {text}", file=sys.stderr, flush=True)
    os._exit(1)


class Heartbeat(threading.Thread):
    """Of process `rank` of `size`. Call leave() when the group has done its work."""

    def __init__(
        self,
        store: Store,
        rank: int,
        size: int,
        beat_s: float = BEAT_S,
        silent_s: float = SILENT_S,
        stop: Callable[[str], None] = stop,
    ) -> None:
        super().__init__(name="sparsekern heartbeat", daemon=True)
        self._store, self._rank, self._next = store, rank, (rank + 1) % size
        self._beat_s, self._silent_s, self._end = beat_s, silent_s, stop
        self._has_left = threading.Event()
        self._count, self._moved = -1, time.monotonic()  # of the next one, and when it was seen

    def leave(self) -> None:
        self._has_left.set()
        self.join()

    def run(self) -> None:
        while not self._has_left.wait(self._beat_s):
            if gone := self._missed():
                self._end(
                    f"process {gone - 1} has not been heard of for {self._silent_s:.0f} s, so "
                    f"process {self._rank} stops; --resume goes on from the last checkpoint, with "
                    "any number of processes"
                )
                return
        self._ask(lambda store: store.add(f"beats/{self._rank}", DONE))

    def _missed(self) -> int:
        """The process that has gone, plus 1; 0: none."""
        self._ask(lambda store: store.add(f"beats/{self._rank}", 1))
        if gone := self._ask(lambda store: store.add(GONE, 0)):
            return gone
        count = self._ask(lambda store: store.add(f"beats/{self._next}", 0))
        if count is not None and count != self._count:
            self._count, self._moved = count, time.monotonic()
        if self._count >= DONE or time.monotonic() - self._moved < self._silent_s:
            return 0
        self._ask(lambda store: store.set(GONE, str(self._next + 1)))
        return self._next + 1

    def _ask(self, question: Callable[[Store], int | None]) -> int | None:
        """None where the store itself has gone with a process."""
        try:
            return question(self._store)
        except RuntimeError:
            return None
