"""The one timer, on a clock that the work itself moves on."""

import pytest

from sparsekern.bench.turns import in_turns, on_host, way


class FakeTime:
    """Time passes when `work` is done, and at no other moment."""

    def __init__(self):
        self.now, self.log = 0.0, []

    def clock(self) -> float:
        return self.now

    def work(self, name: str, seconds: float):
        def run() -> None:
            self.now += seconds
            self.log.append(name)

        return run


@pytest.fixture
def fake() -> FakeTime:
    return FakeTime()


def test_all_take_turns_and_only_their_own_work_counts(fake):
    turns = {
        name: on_host(fake.work(name, seconds), calls, fake.clock)
        for name, seconds, calls in (("a", 1.0, 1), ("b", 2.0, 2))
    }
    rest = fake.work("rest", 100.0)
    found = in_turns(turns, rounds=2, warm_up=1, before=lambda name: rest())
    assert found == {"a": [1.0, 1.0], "b": [2.0, 2.0]}  # of a call
    assert fake.log == ["rest", "a", "rest", "b", "b"] * 3


def test_a_slow_moment_hits_all_alike(fake):
    """Time passes twice as fast in the second round: the ratio of the two stays."""
    speed = iter([1, 1, 2, 2])

    def slowed(seconds: float):
        def run() -> None:
            fake.now += seconds * next(speed)

        return on_host(run, clock=fake.clock)

    found = in_turns({"a": slowed(1.0), "b": slowed(3.0)}, rounds=2)
    assert [b / a for a, b in zip(found["a"], found["b"], strict=True)] == [3, 3]


def test_who_has_had_enough_is_left_out(fake):
    turns = {name: on_host(fake.work(name, 1.0), clock=fake.clock) for name in "ab"}
    found = in_turns(turns, 3, is_enough=lambda name, taken: name == "b" and len(taken) >= 1)
    assert found == {"a": [1.0] * 3, "b": [1.0]} and fake.log == ["a", "b", "a", "a"]


def test_times_are_read_after_the_last_turn():
    """As those of a GPU, which has not come that far when the next one is queued."""
    done = []

    def turn(name: str):
        place = len(done)
        done.append(name)
        return lambda: float(len(done) - place)

    found = in_turns({name: lambda name=name: turn(name) for name in "ab"}, rounds=2)
    assert found == {"a": [4.0, 2.0], "b": [3.0, 1.0]}


def test_what_is_found_of_a_contender():
    seconds = [1.0, 2.0, 3.0, 4.0, 5.0]
    found = way("ours", seconds, 1e-7, 1e-6)
    assert found["seconds"] == seconds
    assert found["median_s"] == 3 and found["min_s"] == 1 and found["is_right"]
    assert found["spread"] == pytest.approx(2 / 3)
    assert not way("ours", [1.0], float("nan"), 1e-6)["is_right"]
