"""A package without its C++ library, as Python finds it in a checkout where pip built elsewhere, or
with one that does not load."""

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

import sparsekern

NOT_BUILT = "ImportError('left out', name='sparsekern')", "is not built in {}"
NOT_LOADED = (
    "ImportError('libgomp.so.1: not found', name='sparsekern._C')",
    "does not load (libgomp.so.1: not found)",
)


@pytest.mark.parametrize(("error", "told"), [NOT_BUILT, NOT_LOADED])
def test_it_says_what_is_wrong_with_it(tmp_path, error, told):
    package = tmp_path / "sparsekern"
    leave_out = shutil.ignore_patterns("*.so", "__pycache__")
    shutil.copytree(Path(sparsekern.__file__).parent, package, ignore=leave_out)
    (package / "_C.py").write_text(f"raise {error}")  # an installed one would do
    info = [sys.executable, "-m", "sparsekern", "info"]
    env = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    done = subprocess.run(info, cwd=tmp_path, env=env, capture_output=True, text=True, check=True)
    missing = f"the C++ library {told.format(package)}: "
    assert f"C++ kernels    {missing}dense products run" in done.stdout
    assert f"sparsekern: {missing}on a CPU all products run dense" in done.stderr
