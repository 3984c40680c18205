"""Sample text from a GPT."""

import torch
from torch import Tensor

from .model import GPT


@torch.no_grad()
def generate(
    model: GPT, idx: Tensor, count: int, temperature: float = 0.8, top_k: int = 40, seed: int = 0
) -> Tensor:
    """Append `count` sampled tokens to idx int64 [B, T] -> [B, T + count].

    The model sees the last block_size tokens. temperature 0 takes the most likely token;
    `top_k` keeps the k most likely ones.
    """
    if temperature < 0 or top_k < 1 or idx.shape[1] < 1:
        raise ValueError(
            "generate: expected temperature >= 0, top_k >= 1 and at least one token to start from, "
            f"got temperature {temperature}, top_k {top_k}, idx {list(idx.shape)}"
        )
    model.eval()
    generator = torch.Generator(idx.device).manual_seed(seed)
    for _ in range(count):
        logits = model(idx[:, -model.config.block_size :])[0][:, -1]  # [B, V]
        best, choices = logits.topk(min(top_k, logits.shape[-1]) if temperature else 1)
        probabilities = torch.softmax(best / (temperature or 1.0), dim=-1)
        picked = torch.multinomial(probabilities, 1, generator=generator)
        idx = torch.cat([idx, choices.gather(1, picked)], dim=1)
    return idx
