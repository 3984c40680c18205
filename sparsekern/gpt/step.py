"""One training step and an evaluation, as functions of tensors.

The host reads no number of `compute_gradients`, nor of its parts, which captured.py captures in
CUDA graphs. Run alone reads the results.
"""

from contextlib import nullcontext

import torch
from torch import Tensor, nn

from ..nn.float8 import float8_step
from .buckets import Buckets
from .data import Batches
from .model import GPT

GRADIENT_CLIP = 1.0
EVAL_BATCHES = 4


def compute_gradients(
    model: nn.Module,
    x: Tensor,
    y: Tensor,
    dtype: torch.dtype = torch.float32,
    micro_batch: int = 0,
    buckets: Buckets | None = None,
) -> tuple[Tensor, Tensor]:
    """Forward, backward and clipping of one batch -> loss and gradient norm before clipping.

    `micro_batch` sequences at a time, 0 for all at once: their gradients are added up in place.
    `buckets` send those of the last one."""
    model.zero_grad()
    *parts, last = micro_batches(x, y, micro_batch)
    share = 1 / (len(parts) + 1)
    losses = [add_gradients(model, *part, share, dtype) for part in parts]
    with buckets.sending() if buckets else nullcontext():
        losses.append(add_gradients(model, *last, share, dtype))
    return sum(losses[1:], losses[0]), clip(model, buckets)


def micro_batches(x: Tensor, y: Tensor, size: int) -> list[tuple[Tensor, Tensor]]:
    """x and y, `size` sequences at a time; 0: all."""
    size = size or len(x)
    return list(zip(x.split(size), y.split(size), strict=True))


def add_gradients(
    model: nn.Module, x: Tensor, y: Tensor, share: float, dtype: torch.dtype
) -> Tensor:
    """Forward and backward of one micro-batch, `share` of its batch -> its part of the loss."""
    with float8_step(model):
        with torch.autocast(x.device.type, dtype, enabled=dtype != torch.float32):
            loss = model(x, y)[1] * share
        loss.backward()
    return loss.detach()


def clip(model: nn.Module, buckets: Buckets | None = None) -> Tensor:
    """Clip the gradients in place -> their norm before."""
    if buckets:
        return buckets.clip(GRADIENT_CLIP)
    return nn.utils.clip_grad_norm_(model.parameters(), GRADIENT_CLIP)


@torch.no_grad()
def evaluate(
    model: GPT,
    batches: Batches,
    count: int = EVAL_BATCHES,
    dtype: torch.dtype = torch.float32,
    device: torch.device | str = "cpu",
    micro_batch: int = 0,
) -> float:
    """Mean loss in nats per token over the same `count` batches at each call."""
    model.eval()
    losses = []
    with torch.autocast(torch.device(device).type, dtype, enabled=dtype != torch.float32):
        for i in range(count):
            x, y = (t.to(device) for t in batches.get(i))
            losses += [model(*part)[1].item() for part in micro_batches(x, y, micro_batch)]
    model.train()
    return sum(losses) / len(losses)
