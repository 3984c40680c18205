"""One training step and an evaluation, as functions of tensors.

The host reads no number of `compute_gradients`: what captures a step in a CUDA graph, compiles it
or adds up the gradients of several batches has its place here, and Run alone reads the results.
"""

import torch
from torch import Tensor, nn

from .data import Batches
from .distributed import whole_state
from .model import GPT

GRADIENT_CLIP = 1.0
EVAL_BATCHES = 4


def compute_gradients(
    model: nn.Module, x: Tensor, y: Tensor, dtype: torch.dtype = torch.float32
) -> tuple[Tensor, Tensor]:
    """Forward, backward and clipping of one batch -> loss and gradient norm before clipping."""
    model.zero_grad()
    with torch.autocast(x.device.type, dtype, enabled=dtype != torch.float32):
        loss = model(x, y)[1]
    loss.backward()
    norm = nn.utils.clip_grad_norm_(model.parameters(), GRADIENT_CLIP)
    return loss.detach(), whole_state(norm)


@torch.no_grad()
def evaluate(
    model: GPT,
    batches: Batches,
    count: int = EVAL_BATCHES,
    dtype: torch.dtype = torch.float32,
    device: torch.device | str = "cpu",
) -> float:
    """Mean loss in nats per token over the same `count` batches at each call."""
    model.eval()
    losses = []
    with torch.autocast(torch.device(device).type, dtype, enabled=dtype != torch.float32):
        for i in range(count):
            x, y = (t.to(device) for t in batches.get(i))
            losses.append(model(x, y)[1].item())
    model.train()
    return sum(losses) / len(losses)
