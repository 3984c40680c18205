"""A package without its C++ library, as Python finds it in a checkout where pip built elsewhere."""

import os
import shutil
import subprocess
import sys
from pathlib import Path

import sparsekern


def test_it_says_that_it_was_not_built_and_where_it_lies(tmp_path):
    package = tmp_path / "sparsekern"
    leave_out = shutil.ignore_patterns("*.so", "__pycache__")
    shutil.copytree(Path(sparsekern.__file__).parent, package, ignore=leave_out)
    (package / "_C.py").write_text("raise ImportError('left out')")  # an installed one would do
    info = [sys.executable, "-m", "sparsekern", "info"]
    env = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    done = subprocess.run(info, cwd=tmp_path, env=env, capture_output=True, text=True, check=True)
    missing = f"the C++ library is not built in {package}: "
    assert f"C++ kernels    {missing}dense products run" in done.stdout
    assert f"sparsekern: {missing}on a CPU all products run dense" in done.stderr
