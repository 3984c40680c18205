"""Up to which density a GPU kernel is the fastest choice: data measured by bench/run_gpu.py."""

import json
from functools import cache
from pathlib import Path

import torch


@cache
def _measured() -> dict:
    return json.loads(Path(__file__).with_name("crossover.json").read_text())


def density_limit(
    capability: str, dtype: torch.dtype, M: int, kernel: str, other: str
) -> float | None:
    """The density of W up to which `kernel` is no slower than `other` for M tokens, or None where
    that was not measured.

    capability is like "sm_90". `other` is a row of the kernel table, or "dense": the best dense
    call on a W that is dense already. Between two measured numbers of tokens the larger counts.
    """
    entry = _measured().get(capability, {})
    densities = entry.get(str(dtype).removeprefix("torch."), {}).get(kernel, {}).get(other)
    if densities is None:
        return None
    tokens = entry["tokens"]
    return densities[next((i for i, most in enumerate(tokens) if M <= most), -1)]
