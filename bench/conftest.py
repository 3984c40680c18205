"""--quick, the grid of workloads, and --table, where the cases of a green run go."""

from pathlib import Path

import grids
import peers
import pytest

from sparsekern.bench import ceilings, machine, records
from sparsekern.bench import race as racing

CASES = pytest.StashKey[list[dict]]()


def pytest_addoption(parser):
    parser.addoption("--quick", action="store_true", help="benchmarks: small grid, few rounds")
    parser.addoption("--table", type=Path, help="benchmarks: the .csv file to write")


def pytest_configure(config):
    config.stash[CASES] = []


def pytest_generate_tests(metafunc):
    workloads = metafunc.definition.get_closest_marker("runs_on").kwargs["workloads"]
    metafunc.parametrize("workload", workloads(metafunc.config.getoption("--quick")), ids=str)


@pytest.fixture
def is_quick(request) -> bool:
    return request.config.getoption("--quick")


@pytest.fixture
def keep(request):
    """Takes a case of the table."""
    return request.config.stash[CASES].append


@pytest.fixture
def race(keep, is_quick):
    """A product against its rivals and these peers."""

    def run(product, peers=()):
        keep(product.race(peers, most_rounds=grids.most_rounds(is_quick)))

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
    about["peers"] = peers.report()
    records.write(path, machine.about_run("products", about), records.flat(cases))
