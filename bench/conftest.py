"""--quick, the grid of workloads, and what the JSON says beside pytest-benchmark's own times."""

import platform
from functools import partial

import measure
import numpy
import pytest
import scipy
import torch

from sparsekern import __version__


def pytest_addoption(parser):
    parser.addoption("--quick", action="store_true", help="benchmarks: small grid, few rounds")


def pytest_generate_tests(metafunc):
    workloads = metafunc.definition.get_closest_marker("runs_on").kwargs["workloads"]
    metafunc.parametrize("workload", workloads(metafunc.config.getoption("--quick")), ids=str)


@pytest.fixture
def race(benchmark, request, workload):
    """measure.race(op, ours, rivals, info, ...) on the cores of this workload."""
    return partial(measure.race, benchmark, request.config.getoption("--quick"), workload)


@pytest.fixture(autouse=True)
def pinned(workload):
    """Before the test: peers start their threads where and as many as it says."""
    measure.pin(workload.threads)


def pytest_benchmark_generate_machine_info():
    import peers

    return {
        "cpu": measure.cpu_name(),
        "cores": len(measure.CORES),
        "isa": measure.isa(),
        "isa_of_torch": torch.backends.cpu.get_cpu_capability(),
        "system": f"{platform.system()} {platform.machine()}",
        "python": platform.python_version(),
        "torch": torch.__version__,
        "numpy": numpy.__version__,
        "scipy": scipy.__version__,
        "sparsekern": __version__,
        "peers": peers.report(),
    }


def pytest_benchmark_update_json(output_json):
    for benchmark in output_json["benchmarks"]:
        measure.derive_ratios(benchmark)
