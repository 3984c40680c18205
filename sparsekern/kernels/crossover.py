"""Up to which density a kernel is the fastest choice: measured data, this machine's own first.

`python -m sparsekern bench --calibrate` measures it here and keeps it in the user's cache folder;
what ships with the package for GPUs is measured by bench/run_gpu.py. The layout of both is written
in sparsekern/bench/crossover.py.
"""

import json
import math
import warnings
from collections.abc import ItemsView
from functools import cache
from pathlib import Path
from typing import Any

import torch

from ..files import cache_folder, read_regular
from .problem import OLD_NAMES

MOST_BYTES = 2**22  # of a file; those of today have some thousands
NOT_DTYPES = ("measured", "tokens")


@cache
def _measured() -> dict:
    return _renamed(json.loads(Path(__file__).with_name("crossover.json").read_text()))


@cache
def _calibrated() -> dict:
    """Crossovers measured on this machine. A damaged file is as good as none, but for a warning."""
    try:
        return read(path := calibrated_file())
    except FileNotFoundError:
        return {}
    except (ValueError, OSError) as error:
        warnings.warn(
            f"crossover: {path} is ignored, kernels are chosen by what ships with sparsekern: "
            f"{error}. Delete it, or make it anew with bench --calibrate",
            stacklevel=2,
        )
        return {}


def calibrated_file() -> Path:
    return cache_folder() / "crossover.json"


def read(path: Path) -> dict:
    """The data in a file. ValueError says what is wrong with it."""
    try:
        data = json.loads(read_regular(path, MOST_BYTES))
    except RecursionError:
        raise ValueError("it is nested too deep") from None
    except UnicodeDecodeError as error:
        raise ValueError(f"expected UTF-8, {error.reason} at byte {error.start}") from None
    except json.JSONDecodeError as error:
        raise ValueError(f"it is not JSON: {error}") from None
    for machine, entry in _items("the file", data):
        _check_tokens(f"{machine}: tokens", dict(_items(machine, entry)).get("tokens"))
        for dtype in _dtypes(entry):
            for kernel, others in _items(f"{machine}: {dtype}", entry[dtype]):
                for other, densities in _items(f"{machine}: {dtype}: {kernel}", others):
                    name = f"{machine}: {dtype}: {kernel}: {other}"
                    _check_densities(name, densities, len(entry["tokens"]))
    return _renamed(data)


def _renamed(data: dict) -> dict:
    for kernels in (entry[dtype] for entry in data.values() for dtype in _dtypes(entry)):
        for old in OLD_NAMES.keys() & kernels.keys():
            kernels.setdefault(OLD_NAMES[old], kernels.pop(old))
    return data


def _dtypes(entry: dict) -> set[str]:
    return entry.keys() - set(NOT_DTYPES)


def _items(name: str, value: Any) -> ItemsView:
    if not isinstance(value, dict):
        raise ValueError(f"{name[:80]}: expected an object, got {type(value).__name__}")
    return value.items()


def _check_tokens(name: str, value: Any) -> None:
    is_list = isinstance(value, list) and value
    if not is_list or not all(type(v) is int and v > 0 for v in value) or value != sorted(value):
        raise ValueError(f"{name[:80]}: expected rising numbers of tokens, got {str(value)[:40]}")


def _check_densities(name: str, value: Any, count: int) -> None:
    def is_density(v: Any) -> bool:
        return type(v) in (int, float) and math.isfinite(v) and 0 <= v <= 1

    is_list = isinstance(value, list) and len(value) == count
    if not is_list or not all(v is None or is_density(v) for v in value):
        raise ValueError(f"{name[:80]}: expected {count} densities or null, got {str(value)[:40]}")


@cache
def _least_sizes() -> dict:
    return json.loads(Path(__file__).with_name("least_sizes.json").read_text())


def least_size(machine: str, dtype: torch.dtype, M: int, kernel: str) -> int | None:
    """How many rows and columns of W it takes at least for `kernel` to be no slower than W written
    out, for M tokens; None where it never is, or where that was not measured.

    machine is a compute capability like "sm_90". Between two measured numbers of tokens the smaller
    counts. What was measured in one dtype says nothing of another.
    sparsekern/bench/least_size_gpu.py measures it.
    """
    entry = _least_sizes().get(kernel, {}).get(machine, {})
    pairs = entry.get(str(dtype).removeprefix("torch."), ())
    return next((size for tokens, size in reversed(pairs) if M >= tokens), None)


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
        if densities is None:
            continue
        at = next((i for i, most in enumerate(entry["tokens"]) if M <= most), -1)
        if densities[at] is not None:
            return densities[at]
    return None
