"""Attention whose logits keep their size: a norm for queries and keys.

At high rates the weights that make queries and keys grow until attention looks at single places,
through which little can be learned. Source: Dehghani et al. 2023, "Scaling Vision Transformers to
22 Billion Parameters"; at high rates in small models, Wortsman et al. 2023, "Small-scale proxies
for large-scale Transformer training instabilities".
"""

import torch
from torch import Tensor, nn

from sparsekern.gpt.model import GPT


class NormedQKV(nn.Linear):
    """The layer that makes queries, keys and values, and an RMS norm with a learned scale for the
    queries of each head, and one for its keys."""

    def __init__(self, layer: nn.Linear, heads: int) -> None:
        super().__init__(layer.in_features, layer.out_features, device="meta")
        self.weight, self.bias, self.heads = layer.weight, layer.bias, heads
        wide = layer.out_features // 3 // heads
        self.norms = nn.ModuleList(nn.RMSNorm(wide, device=layer.weight.device) for _ in range(2))

    def forward(self, x: Tensor) -> Tensor:  # [B, T, C] -> [B, T, 3 C]
        y = super().forward(x)
        *queries_and_keys, values = y.unflatten(-1, (3, self.heads, -1)).unbind(-3)
        with torch.autocast(y.device.type, enabled=False):
            pairs = zip(self.norms, queries_and_keys, strict=True)
            normed = [norm(t.float()).to(y.dtype) for norm, t in pairs]
        return torch.stack([*normed, values], -3).flatten(-3)


def norm_attention(model: GPT) -> GPT:
    """Put such a layer into each block, in place; the weights stay."""
    for block in model.blocks:
        block.attention.qkv = NormedQKV(block.attention.qkv, block.attention.n_head)
    return model
