"""Builds csrc/ with CMake and puts the libraries beside the package. Imports no torch.

Environment: SPARSEKERN_CUDA=AUTO (default: build the CUDA library when nvcc is found), ON or OFF;
MAX_JOBS=number of compilers at a time; CMAKE_ARGS=more arguments for CMake.
"""

import os
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

import pybind11
from setuptools import Extension, setup
from setuptools.command.build_ext import build_ext
from setuptools.command.build_py import build_py

ROOT = Path(__file__).parent.resolve()


class CMakeBuild(build_ext):
    """One CMake run makes both libraries: `_C` and, where it can be built, `_sk_cuda`."""

    def build_extension(self, ext: Extension) -> None:
        # An editable install gets its libraries straight from CMake: setuptools would copy back
        # only `_C`, the one it knows of.
        output = ROOT / "sparsekern"
        if not self.editable_mode:
            output = Path(self.get_ext_fullpath(ext.name)).resolve().parent
        # One folder for each Python, kept between builds so that they are incremental.
        build = ROOT / "build" / sys.implementation.cache_tag
        # cmake and ninja may be those of an environment that was not activated.
        path = os.environ["PATH"] + os.pathsep + str(Path(sys.executable).parent)
        env = {**os.environ, "PATH": path}
        cuda = os.environ.get("SPARSEKERN_CUDA", "AUTO")
        configure = [
            *("cmake", "-G", "Ninja", "-S", str(ROOT), "-B", str(build)),
            # ninja's path is cached, and pip's build environments do not last.
            f"-DCMAKE_MAKE_PROGRAM={shutil.which('ninja', path=path) or 'ninja'}",
            f"-DCMAKE_LIBRARY_OUTPUT_DIRECTORY={output}",
            f"-DPython_EXECUTABLE={sys.executable}",
            f"-Dpybind11_DIR={pybind11.get_cmake_dir()}",
            f"-DSPARSEKERN_CUDA={cuda}",
            *shlex.split(os.environ.get("CMAKE_ARGS", "")),
        ]
        jobs = os.environ.get("MAX_JOBS") or str(os.cpu_count())
        subprocess.run(configure, env=env, check=True)
        subprocess.run(["cmake", "--build", str(build), "-j", jobs], env=env, check=True)

    def copy_extensions_to_source(self) -> None:
        """Nothing to copy: see build_extension."""


class WithCudaSources(build_py):
    """A wheel holds csrc/cuda, to be compiled at run time where the CUDA library is missing."""

    def run(self) -> None:
        if not self.editable_mode:  # an editable install finds them in the checkout
            shutil.rmtree(self.build_lib, ignore_errors=True)  # no file of an earlier build
            target = Path(self.build_lib) / "sparsekern" / "csrc" / "cuda"
            shutil.copytree(ROOT / "csrc" / "cuda", target)
        super().run()


setup(
    ext_modules=[Extension("sparsekern._C", sources=[])],
    cmdclass={"build_ext": CMakeBuild, "build_py": WithCudaSources},
)
