"""How much memory a forward and backward of SparseLinear take beside their results.

At 98 % of 8192 x 8192 a single dense N x K matrix would be 256 MiB: none must appear, neither when
the first call derives its schedules from the pattern nor, much less, in the calls after it.
"""

import ctypes
import json
import re
import subprocess
import sys
from dataclasses import asdict, dataclass
from pathlib import Path

import pytest
import torch

from sparsekern import SparseLinear

PANEL_TOKENS = 128
SLACK_BYTES = 8 * 2**20  # of allocators and of the autograd engine's threads


@dataclass(frozen=True)
class Layer:
    """N x K, one stored value in `every` columns, on M tokens."""

    M: int = 256
    N: int = 8192
    K: int = 8192
    every: int = 50
    threads: int = 1

    def __str__(self) -> str:
        return f"{self.N}x{self.K}-M{self.M}-{1 - 1 / self.every:.0%}-{self.threads}T"

    @property
    def nnz(self) -> int:
        return self.N * (self.K // self.every)

    @property
    def dense_bytes(self) -> int:
        return 4 * self.N * self.K

    @property
    def result_bytes(self) -> int:
        """Bytes of y, dx and the values' gradient: what the caller asks for."""
        return 4 * (self.M * (self.N + self.K) + self.nnz)

    @property
    def bound_bytes(self) -> int:
        """Bytes of a later call: its results, each thread's panels, and the values in the order
        in which they are walked."""
        panels = 4 * PANEL_TOKENS * (self.N + self.K) * self.threads
        return self.result_bytes + panels + 4 * self.nnz + SLACK_BYTES


def grow(layer: Layer) -> dict[str, int]:
    """By how many bytes a first and a later forward and backward raise the peak of this process."""
    torch.set_num_threads(layer.threads)
    _step(_linear(8, 64, 64, 8), 8)  # code, threads and the autograd engine
    linear = _linear(layer.M, layer.N, layer.K, layer.every)
    return {
        "first_bytes": _step(linear, layer.M),
        "later_bytes": _step(linear, layer.M),
    }


def _linear(M: int, N: int, K: int, every: int) -> SparseLinear:
    """Without a dense matrix or a mask: columns drawn one from each stretch of `every`."""
    per_row = K // every
    shifts = torch.randint(every, (N, per_row), generator=torch.Generator().manual_seed(0))
    columns = (every * torch.arange(per_row) + shifts).flatten().int()
    row_offsets = torch.arange(0, N * per_row + 1, per_row, dtype=torch.int32)
    return SparseLinear(K, N, row_offsets, columns, torch.randn(N * per_row))


def _step(linear: SparseLinear, M: int) -> int:
    x = torch.randn(M, linear.in_features, requires_grad=True)
    dy = torch.randn(M, linear.out_features)
    linear.zero_grad()
    ctypes.CDLL(None).malloc_trim(0)  # freed memory must not hide a new allocation
    Path("/proc/self/clear_refs").write_text("5")  # the peak starts anew
    before = _status_bytes("VmRSS")
    linear(x).backward(dy)
    return _status_bytes("VmHWM") - before


def _status_bytes(field: str) -> int:
    text = Path("/proc/self/status").read_text()
    return 1024 * int(re.search(rf"{field}:\s+(\d+) kB", text)[1])


def measure_in_subprocess(layer: Layer) -> dict[str, int]:
    arguments = json.dumps(asdict(layer))
    done = subprocess.run(
        [sys.executable, __file__, arguments], check=True, text=True, stdout=subprocess.PIPE
    )
    return json.loads(done.stdout)


def check(layer: Layer) -> dict[str, int]:
    """The measured bytes and their bounds. AssertionError where one is passed."""
    got = measure_in_subprocess(layer)
    assert got["later_bytes"] <= layer.bound_bytes, f"{got}: more than {layer.bound_bytes}"
    assert got["first_bytes"] < layer.dense_bytes / 2, f"{got}: dense is {layer.dense_bytes}"
    return {
        "first call": got["first_bytes"],
        "later call": got["later_bytes"],
        "its results": layer.result_bytes,
        "bound": layer.bound_bytes,
        "dense N x K": layer.dense_bytes,
    }


@pytest.mark.runs_on(workloads=lambda quick: [Layer()])
def test_memory(keep, workload):
    fields = {name: getattr(workload, name) for name in ("M", "N", "K", "threads")}
    ways = {name: {"bytes": size} for name, size in check(workload).items()}
    fields |= {"device": "cpu", "sparsity": 1 - 1 / workload.every}
    keep({"op": "memory", **fields, "ways": ways})


if __name__ == "__main__":
    print(json.dumps(grow(Layer(**json.loads(sys.argv[1])))))
