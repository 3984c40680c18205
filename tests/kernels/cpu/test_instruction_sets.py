"""The products of the C++ kernels on each instruction set but that of this process: the choice is
made once a process, and one process runs the tests of all files."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

from sparsekern.kernels.cpu import panel

pytestmark = pytest.mark.skipif(panel._C is None, reason="the C++ library is not built")

# How a product is split between threads is the same for all.
CHOSEN = {
    "test_cpu_kernels": "(products and 2-threads) or every_number",
    "test_expand": "parts and not oneDNN",
    "test_few_tokens": "products or number or zeros",
    "test_lanes": "products or part",
}

# The library alone: the package would bring torch.
ISA = """
import importlib.util, sys
spec = importlib.util.spec_from_file_location("_C", sys.argv[1])
library = importlib.util.module_from_spec(spec)
spec.loader.exec_module(library)
print(library.isa())
"""


@pytest.fixture(params=["portable", "avx2", "avx512", "neon"])
def isa_env(request):
    """The environment of a process whose kernels use this instruction set, and not that of ours."""
    if request.param == panel._C.isa():
        pytest.skip(f"{request.param} is that of this process")
    env = {**os.environ, "SPARSEKERN_ISA": request.param}
    command = [sys.executable, "-c", ISA, panel._C.__file__]
    run = subprocess.run(command, env=env, capture_output=True, text=True)
    if run.returncode:
        assert "SPARSEKERN_ISA: expected one of" in run.stderr
        pytest.skip(f"{request.param} was not built or does not run here")
    assert run.stdout.strip() == request.param
    return env


@pytest.mark.slow
def test_every_instruction_set(isa_env):
    files = [str(Path(__file__).with_name(f"{name}.py")) for name in CHOSEN]
    chosen = " or ".join(f"({name} and ({tests}))" for name, tests in CHOSEN.items())
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", *files, "-k", chosen]
    subprocess.run(command, env=isa_env, check=True)
