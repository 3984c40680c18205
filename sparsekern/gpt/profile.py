"""Where the time of a dense training step goes, and so what sparse linears can save at most."""

import statistics
import time
from collections import defaultdict
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .dense import Linear, linear
from .flops import amdahl_cap
from .model import GPT
from .step import compute_gradients

ROUNDS = 7
WARMUP_ROUNDS = 2
LINEAR_PARTS = ("linear forward", "linear backward", "linear AdamW")


class Clock:
    """Seconds by name, added up until `take`."""

    def __init__(self) -> None:
        self._seconds: dict[str, float] = defaultdict(float)

    @contextmanager
    def __call__(self, name: str) -> Iterator[None]:
        began = time.perf_counter()
        yield
        self._seconds[name] += time.perf_counter() - began

    def take(self) -> dict[str, float]:
        seconds, self._seconds = self._seconds, defaultdict(float)
        return seconds


def profile_step(
    model: GPT,
    optimizer: torch.optim.Optimizer,
    batch: tuple[Tensor, Tensor],
    linears: list[str],
    library: Linear = F.linear,
    rounds: int = ROUNDS,
) -> dict[str, float]:
    """Median seconds of the parts of a training step of a dense model; their sum is the step.

    `linears` names the nn.Linear modules that would be sparse; `library` does their products. AdamW
    works on each element alike, so their part of it is their share of the parameters. The model
    trains on `batch` meanwhile."""
    clock = Clock()
    layers = [model.get_submodule(name) for name in linears]
    for layer in layers:
        layer.forward = partial(_forward, layer, library, clock)
    try:
        taken = [_step_parts(model, optimizer, batch, clock) for _ in range(WARMUP_ROUNDS + rounds)]
    finally:
        for layer in layers:
            del layer.forward
    parts = {name: statistics.median(r[name] for r in taken[WARMUP_ROUNDS:]) for name in taken[0]}
    update = parts.pop("AdamW")
    share = sum(layer.weight.numel() for layer in layers) / sum(
        p.numel() for p in model.parameters()
    )
    return parts | {"linear AdamW": share * update, "rest of AdamW": (1 - share) * update}


def _forward(layer: nn.Linear, library: Linear, clock: Clock, x: Tensor) -> Tensor:
    return linear(x, layer.weight, layer.bias, library, clock)


def _step_parts(
    model: GPT, optimizer: torch.optim.Optimizer, batch: tuple[Tensor, Tensor], clock: Clock
) -> dict[str, float]:
    with clock("rest of forward and backward"):
        compute_gradients(model, *batch)
    with clock("AdamW"):
        optimizer.step()
    parts = clock.take()
    parts["rest of forward and backward"] -= parts["linear forward"] + parts["linear backward"]
    return parts


def linear_share(parts: dict[str, float]) -> float:
    """The share of the step that would run on sparse weights."""
    return sum(parts[name] for name in LINEAR_PARTS) / sum(parts.values())


def measured_cap(parts: dict[str, float], speedup: float) -> float:
    """How much faster the step gets at most, with its linear part `speedup` times faster."""
    return amdahl_cap(linear_share(parts), speedup)
