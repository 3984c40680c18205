"""The dense product behind `expand`: by torch.mm, or by torch's own oneDNN where that is faster.

For float32 torch.mm calls MKL, which reaches less than half of what an AMD processor can do. Which
of the two is faster is measured once in a process, in some milliseconds; torch.mm stays unless the
other is clearly faster. Both use torch's threads, but are measured on one: beside other work two
of them wait for each other, and equal processes would choose differently, with other bits.

oneDNN adds up hundreds of terms one by one, and errs by up to five times as much as torch.mm. So it
gets LONGEST_SUM of them at a time, which costs a fifth of its rate.
"""

import time
from functools import lru_cache
from typing import NamedTuple

import torch
from torch import Tensor

from ..reference import mm

SIZES = 256, 512, 512  # M, N, K of the products that are timed
LONGEST_SUM = 192  # terms: its errors are then those of torch.mm
ROUNDS = 11  # the best counts
LEAST_GAIN = 1.25  # times as fast: MKL on AMD's Zen 5 has 1.5 to 1.9


class Rates(NamedTuple):
    """FLOP/s of torch.mm and of oneDNN; None where this torch has none."""

    torch: float
    onednn: float | None


@lru_cache(maxsize=1)
def rates() -> Rates:
    """On one thread, by the time that it had a core."""
    M, N, K = SIZES
    a, b = (torch.ones(n, K, dtype=torch.float32, device="cpu") for n in (M, N))
    calls = {"torch": lambda: mm(a, b.t())}
    if torch.backends.mkldnn.is_available():
        calls["onednn"] = lambda: _onednn(a, b.t(), None)
    best = dict.fromkeys(calls, 0.0)
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        with torch.inference_mode():
            for _ in range(1 + ROUNDS):  # the first pays for memory
                for name, call in calls.items():
                    began = time.thread_time()
                    try:
                        call()
                    except (AttributeError, RuntimeError, NotImplementedError):  # another torch
                        continue
                    took = max(1e-9, time.thread_time() - began)  # a coarse clock has no opinion
                    best[name] = max(best[name], 2 * M * N * K / took)
    finally:
        torch.set_num_threads(threads)
    return Rates(best["torch"], best.get("onednn") or None)


def library(dtype: torch.dtype) -> str:
    """Name of the call that multiplies: torch.mm takes oneDNN for bfloat16 by itself."""
    if dtype != torch.float32 or not torch.backends.mkldnn.enabled:
        return "torch.mm"
    found = rates()
    is_faster = found.onednn is not None and found.onednn > LEAST_GAIN * found.torch
    return "oneDNN" if is_faster else "torch.mm"


def product(a: Tensor, b: Tensor, bias: Tensor | None = None) -> Tensor:
    """a @ b + bias in the dtype of the operands, whatever autocast is around it."""
    if a.numel() == 0 or b.numel() == 0 or library(a.dtype) == "torch.mm":
        return mm(a, b, bias)
    return _onednn(a, b, bias)


def write_product(y: Tensor, a: Tensor, b: Tensor, bias: Tensor | None) -> None:
    """y = a @ b + bias by torch.mm, which autocast leaves alone if it is told where to write."""
    torch.mm(a, b, out=y) if bias is None else torch.addmm(bias, a, b, out=y)


def add_product(y: Tensor, a: Tensor, b: Tensor, bias: Tensor | None, is_first: bool) -> None:
    """y = a @ b + bias, or without is_first y += a @ b, by oneDNN, of LONGEST_SUM terms at most."""
    x, weight = _in_a_row(a), _in_a_row(b.t())
    bias = bias if is_first else None
    part = torch.ops.mkldnn._linear_pointwise(x, weight, bias, "none", [], "")
    y.copy_(part) if is_first else y.add_(part)


def _onednn(a: Tensor, b: Tensor, bias: Tensor | None) -> Tensor:
    y = a.new_empty(a.shape[0], b.shape[1])
    for at in range(0, a.shape[1], LONGEST_SUM):
        part = slice(at, at + LONGEST_SUM)
        add_product(y, a[:, part], b[part], bias, is_first=at == 0)
    return y


def _in_a_row(t: Tensor) -> Tensor:
    """t, or a copy: of a matrix with gaps in both directions oneDNN's product is very slow."""
    return t if t.is_contiguous() or t.t().is_contiguous() else t.contiguous()


def rates_in_words(found: Rates) -> str:
    """One line for `info`."""
    text = f"{library(torch.float32)}: torch.mm {1e-9 * found.torch:.0f} GFLOP/s"
    return text if found.onednn is None else f"{text}, oneDNN {1e-9 * found.onednn:.0f}, a core"
