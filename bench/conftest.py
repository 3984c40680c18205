"""--quick, the grid of workloads, --table, where the cases of a green run go, and pytest-benchmark.

The race is the one timer: pytest-benchmark reports what the race measured, with an entry for each
contender, grouped by case.
"""

import copy
from dataclasses import replace
from pathlib import Path

import grids
import peers
import pytest
import targets

from sparsekern.bench import ceilings, machine, records
from sparsekern.bench import race as racing

CASES = pytest.StashKey[list[dict]]()


def pytest_addoption(parser):
    parser.addoption("--quick", action="store_true", help="benchmarks: small grid, few rounds")
    parser.addoption("--table", type=Path, help="benchmarks: the .csv file to write")
    parser.addoption("--asked", action="store_true", help="benchmarks: cases of targets.py alone")


def pytest_configure(config):
    config.stash[CASES] = []


def pytest_generate_tests(metafunc):
    workloads = metafunc.definition.get_closest_marker("runs_on").kwargs["workloads"]
    metafunc.parametrize("workload", workloads(metafunc.config.getoption("--quick")), ids=str)


def pytest_collection_modifyitems(config, items):
    if not config.getoption("--asked"):
        return
    op = {f"test_{op}": op for op in targets.NAMES}
    asked = [
        item
        for item in items
        if item.originalname in op
        and targets.is_asked(op[item.originalname], item.callspec.params["workload"])
    ]
    config.hook.pytest_deselected(items=[item for item in items if item not in asked])
    items[:] = asked


@pytest.fixture
def is_quick(request) -> bool:
    return request.config.getoption("--quick")


@pytest.fixture
def keep(request):
    """Takes a case of the table."""
    return request.config.stash[CASES].append


class Clock:
    """Time that passes by the seconds that the race measured, and at no other moment."""

    now = 0.0

    def read(self) -> float:
        return self.now

    def replay(self, benchmark, seconds: list[float]) -> None:
        rounds = iter(seconds)

        def begin() -> None:
            self.now = 0.0  # each difference is then exact

        def end() -> None:
            self.now = next(rounds)

        benchmark.pedantic(end, setup=begin, rounds=len(seconds))


@pytest.fixture
def clock(request) -> Clock:
    """The timer of a `benchmark` that is made after it."""
    clock = Clock()
    request.node.add_marker(pytest.mark.benchmark(timer=clock.read))
    return clock


@pytest.fixture
def keep_race(keep, clock, benchmark):
    """Takes a case of the table whose contenders have times, and shows them."""

    def run(case):
        keep(case)
        name, fullname = benchmark.name, benchmark.fullname
        found = records.flat([case])
        # One fixture is one entry, so all but the first contender have copies of it.
        entries = [benchmark, *(copy.copy(benchmark) for _ in found[1:])]
        for entry, record in zip(entries, found, strict=True):
            contender = record["contender"]
            entry.group, entry.fullname = name, f"{fullname} {contender}"
            entry.name = contender if record["is_right"] else f"{contender} (wrong)"
            entry.extra_info = record
            clock.replay(entry, case["ways"][contender]["seconds"])

    return run


@pytest.fixture
def race(keep_race, is_quick, request):
    """A product against its rivals and these peers; with --asked against dense calls alone."""

    def run(product, peers=()):
        if request.config.getoption("--asked"):
            dense = [rival for rival in product.rivals if rival.kind == records.DENSE]
            product, peers = replace(product, rivals=dense), ()
        keep_race(product.race(peers, most_rounds=grids.most_rounds(is_quick)))

    return run


@pytest.fixture(autouse=True)
def pinned(workload):
    """Before the test: peers start their threads where and as many as it says."""
    racing.pin(workload.threads)


def pytest_sessionfinish(session, exitstatus):
    path, cases = session.config.getoption("--table"), session.config.stash[CASES]
    if not path or exitstatus:  # no numbers from a red run
        return
    about = machine.about_cpu() | {"cores": len(racing.CORES), "ceilings": {}}
    for threads in sorted({case["threads"] for case in cases}):
        racing.pin(threads)
        about["ceilings"][str(threads)] = ceilings.of_cpu(threads)
    about["peers"] = [] if session.config.getoption("--asked") else peers.report()
    records.write(path, machine.about_run("products", about), records.flat(cases))
