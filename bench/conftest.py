"""--quick, the grid of workloads, and what the JSON says beside pytest-benchmark's own times."""

import platform
from functools import partial

import measure
import pytest
import scipy
import torch

from sparsekern import __version__


def pytest_addoption(parser):
    parser.addoption("--quick", action="store_true", help="benchmarks: small grid, few rounds")


def pytest_generate_tests(metafunc):
    quick = metafunc.config.getoption("--quick")
    metafunc.parametrize("workload", metafunc.module.workloads(quick), ids=str)


@pytest.fixture
def race(benchmark, request, workload):
    """measure.race(op, ours, rivals, info) on the cores of this workload."""
    measure.pin(workload.threads)
    return partial(measure.race, benchmark, request.config.getoption("--quick"), workload)


def pytest_benchmark_generate_machine_info():
    return {
        "cpu": measure.cpu_name(),
        "cores": len(measure.CORES),
        "isa": measure.isa(),
        "isa_of_torch": torch.backends.cpu.get_cpu_capability(),
        "system": f"{platform.system()} {platform.machine()}",
        "python": platform.python_version(),
        "torch": torch.__version__,
        "scipy": scipy.__version__,
        "sparsekern": __version__,
    }


def pytest_benchmark_update_json(output_json):
    for benchmark in output_json["benchmarks"]:
        measure.derive_ratios(benchmark)
