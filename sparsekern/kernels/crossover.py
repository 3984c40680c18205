"""Up to which density a kernel is the fastest choice: measured data, this machine's own first.

`python -m sparsekern bench --calibrate` measures it here and keeps it in the user's cache folder;
what ships with the package for GPUs is measured by bench/run_gpu.py. The layout of both is written
in sparsekern/bench/crossover.py.
"""

import json
from functools import cache
from pathlib import Path

import torch

from .cache_files import cache_folder


@cache
def _measured() -> dict:
    return json.loads(Path(__file__).with_name("crossover.json").read_text())


@cache
def _calibrated() -> dict:
    path = calibrated_file()
    try:
        return json.loads(path.read_text())
    except FileNotFoundError:
        return {}
    except json.JSONDecodeError as error:
        raise ValueError(
            f"{path} is not JSON: delete it, or make it anew with bench --calibrate"
        ) from error


def calibrated_file() -> Path:
    return cache_folder() / "crossover.json"


def density_limit(
    machine: str, dtype: torch.dtype, M: int, kernel: str, other: str
) -> float | None:
    """The density of W up to which `kernel` is no slower than `other` for M tokens, or None where
    that was not measured.

    machine is a compute capability like "sm_90", or a name of plan.machine_name(). `other` is a
    row of the kernel table, or "dense": the best dense call on a W that is dense already. Between
    two measured numbers of tokens the larger counts.
    """
    for data in (_calibrated(), _measured()):
        entry = data.get(machine, {})
        densities = entry.get(str(dtype).removeprefix("torch."), {}).get(kernel, {}).get(other)
        if densities is not None:
            tokens = entry["tokens"]
            return densities[next((i for i, most in enumerate(tokens) if M <= most), -1)]
    return None
