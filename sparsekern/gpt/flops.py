"""Training FLOPs of a GPT, by the convention that gives the published sparse training ratios.

Multiply-adds per token of one forward pass, for L layers, width d, MLP width h (4 d in GPT-2),
vocabulary V, sequence s:

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

from .model import GPTConfig


@dataclass(frozen=True)
class MultiplyAdds:
    """Of one token, forward."""

    linear: int
    attention: int
    head: int

    @property
    def total(self) -> int:
        return self.linear + self.attention + self.head


def multiply_adds(config: GPTConfig) -> MultiplyAdds:
    L, d, h = config.n_layer, config.n_embd, config.mlp_width
    return MultiplyAdds(
        linear=L * (4 * d * d + 2 * d * h),
        attention=L * 2 * config.block_size * d,
        head=d * config.vocab_size,
    )


def train_flops_per_token(config: GPTConfig, sparsity: float = 0.0) -> float:
    macs = multiply_adds(config)
    return 6 * (macs.linear * (1 - sparsity) + macs.attention + macs.head)


def flop_ratio(config: GPTConfig, sparsity: float) -> float:
    """Dense FLOPs over sparse FLOPs."""
    return train_flops_per_token(config) / train_flops_per_token(config, sparsity)


def parameter_ratio(config: GPTConfig, sparsity: float) -> float:
    """Dense over sparse parameters, of matrices and embeddings (no biases, no norms)."""
    linear = multiply_adds(config).linear
    embeddings = (config.vocab_size + config.block_size) * config.n_embd
    return (linear + embeddings) / (linear * (1 - sparsity) + embeddings)


def amdahl_cap(share: float, speedup: float = math.inf) -> float:
    """How much faster all gets when `share` of its time or FLOPs runs `speedup` times faster."""
    rest = 1 - share + share / speedup
    return 1 / rest if rest else math.inf
