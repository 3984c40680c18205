"""--quick, the grid of workloads, and what the JSON says beside pytest-benchmark's own times."""

import measure
import pytest

from sparsekern.bench import ceilings, machine
from sparsekern.bench import race as racing
from sparsekern.bench.rates import add_rates


def pytest_addoption(parser):
    parser.addoption("--quick", action="store_true", help="benchmarks: small grid, few rounds")


def pytest_generate_tests(metafunc):
    workloads = metafunc.definition.get_closest_marker("runs_on").kwargs["workloads"]
    metafunc.parametrize("workload", workloads(metafunc.config.getoption("--quick")), ids=str)


@pytest.fixture
def is_quick(request) -> bool:
    return request.config.getoption("--quick")


@pytest.fixture
def race(benchmark, is_quick):
    """A product against its rivals and these peers."""

    def run(product, peers=()):
        contest = product.race(peers, most_rounds=measure.most_rounds(is_quick))
        measure.run(benchmark, product.group, contest, product.info())

    return run


@pytest.fixture(autouse=True)
def pinned(workload):
    """Before the test: peers start their threads where and as many as it says."""
    racing.pin(workload.threads)


def pytest_benchmark_generate_machine_info():
    import peers

    return machine.about_cpu() | {
        "ceilings": {str(n): ceilings.of_cpu(n) for n in range(1, 1 + min(2, len(racing.CORES)))},
        "peers": peers.report(),
    }


def pytest_benchmark_update_json(output_json):
    ceilings_of = output_json["machine_info"]["ceilings"]
    for benchmark in output_json["benchmarks"]:
        racing.derive(benchmark)
        info = benchmark["extra_info"]
        add_rates(info, ceilings_of.get(str(info["threads"]), {}))
