"""Who is missed, in a store of this process."""

import time
from collections import Counter

from sparsekern.gpt.heartbeat import Heartbeat


class Store(Counter):
    """As that of a group, until it is gone."""

    is_there = True

    def add(self, key: str, amount: int) -> int:
        if not self.is_there:
            raise RuntimeError("connection reset by peer")
        self[key] += amount
        return self[key]

    def set(self, key: str, value: str) -> None:
        self.add(key, int(value) - self[key])


def started(store: Store, ranks: range, told: dict[int, str], silent_s: float) -> list[Heartbeat]:
    found = [
        Heartbeat(store, rank, 3, 0.01, silent_s, lambda text, rank=rank: told.update({rank: text}))
        for rank in ranks
    ]
    for each in found:
        each.start()
    return found


def test_all_stop_when_one_has_gone():
    told: dict[int, str] = {}
    for each in started(Store(), range(2), told, silent_s=0.1):  # the third never comes
        each.join(timeout=30)
    assert told.keys() == {0, 1}
    assert told[0].startswith("process 2 has not been heard of for 0 s, so process 0 stops; ")


def test_who_leaves_is_not_missed():
    told: dict[int, str] = {}
    first, *others = started(Store(), range(3), told, silent_s=2.0)
    first.leave()
    time.sleep(2.5)
    for each in others:
        each.leave()
    assert not told


def test_all_stop_when_the_store_has_gone():
    told: dict[int, str] = {}
    store = Store()
    found = started(store, range(3), told, silent_s=0.1)
    store.is_there = False
    for each in found:
        each.join(timeout=30)
    assert told.keys() == {0, 1, 2}
