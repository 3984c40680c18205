"""Training FLOPs of a GPT, by the convention that gives the published sparse training ratios.

Multiply-adds per token of one forward pass of a GPT-2, for L layers, width d, MLP width h (4 d),
vocabulary V, sequence s; LLaMA has other matrices (GPTConfig.linears):

    linear    = L (4 d^2 + 2 d h)    the six matrices: query, key, value, output, MLP up, MLP down
    attention = L 2 s d              Q K^T and P V over the full s x s square, as if not causal
    head      = d V                  dense; the embedding look-up counts nothing

A training step does each product three times (forward, input gradient, weight gradient) and a
multiply-add is two FLOPs: 6 (linear (1 - sparsity) + attention + head) FLOPs per token.
With it GPT-3 XL at 75 % gives 2.494x (SPDF, arXiv 2303.10464, says 2.5x) and at 83.8 % 3.025x
(Cerebras, iterative pruning: 3x).
"""

import math
from dataclasses import dataclass

from torch import nn

from ..nn import SparseLinear
from .model import GPTConfig


@dataclass(frozen=True)
class MultiplyAdds:
    """Multiply-adds of one token, forward."""

    linear: int
    attention: int
    head: int

    @property
    def total(self) -> int:
        return self.linear + self.attention + self.head


def multiply_adds(config: GPTConfig) -> MultiplyAdds:
    L, d = config.n_layer, config.n_embd
    return MultiplyAdds(
        linear=L * sum(n * k for n, k in config.linears),
        attention=L * 2 * config.block_size * d,
        head=d * config.vocab_size,
    )


def train_flops_per_token(config: GPTConfig, sparsity: float = 0.0) -> float:
    macs = multiply_adds(config)
    return 6 * (macs.linear * (1 - sparsity) + macs.attention + macs.head)


def flop_ratio(config: GPTConfig, sparsity: float) -> float:
    """Dense FLOPs over sparse FLOPs."""
    return train_flops_per_token(config) / train_flops_per_token(config, sparsity)


def amdahl_cap(share: float, speedup: float = math.inf) -> float:
    """How much faster all gets when `share` of its time or FLOPs runs `speedup` times faster."""
    rest = 1 - share + share / speedup
    return 1 / rest if rest else math.inf


def dense_gradient_flops_per_token(config: GPTConfig, sparsity: float) -> float:
    """FLOPs that RigL adds when it changes the pattern: the weight gradient of absent weights."""
    return 2 * multiply_adds(config).linear * sparsity


def linear_sparsity(model: nn.Module) -> float:
    """The share of zeros in the linear layers of a GPT's blocks, as they are stored."""
    stored = total = 0
    for name, module in model.named_modules():
        if "blocks." not in name:
            continue
        if isinstance(module, SparseLinear):
            stored += module.col_indices.shape[0]
            total += module.in_features * module.out_features
        elif isinstance(module, nn.Linear):
            stored += module.weight.numel()
            total += module.weight.numel()
    return 1 - stored / max(1, total)
