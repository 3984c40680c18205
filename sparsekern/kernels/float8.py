"""Training in E4M3: the recipe, in torch's own operations.

It is the delayed scaling of Transformer Engine (docs.nvidia.com/deeplearning/transformer-engine;
Micikevicius et al., arXiv 2209.05433) with `fp8_format=Format.E4M3`: x, W and dY of each layer have
one scale each, by the largest value of the last HISTORY steps, and what is 0 or not finite counts
for nothing there. Five things are our own. Scales are powers of two, so that dividing by them is
exact. A step has one scale for all its micro-batches. The first steps take their scales from their
own tensors instead of 1, since gradients would be 0 otherwise. The gradient of a bias is the sum of
dY as it was rounded. And an infinity becomes NaN, not 448, so that the loss shows it.

dY is in E4M3, not in E5M2, since sparse tensor cores take two operands of one type; W in E5M2 would
have a mantissa of two bits.
"""

import torch
from torch import Tensor

DTYPE = torch.float8_e4m3fn
MOST = 448.0
HISTORY = 1024  # steps, Transformer Engine's default
LEAST = 2.0**-50  # of scales, and one over their most: products of two stay within float32


def scale_of(largest: Tensor) -> Tensor:
    """The power of two, float32, by which values up to `largest` are stored: within 448."""
    scale = MOST / largest.clamp(LEAST, 1 / LEAST)
    return (scale.view(torch.int32) & 0x7F800000).view(torch.float32)


def next_scale(scale: Tensor, history: Tensor) -> Tensor:
    """The scales [tensors] after what was largest in the last steps, history [steps, tensors]."""
    largest = history.amax(0)
    return torch.where(largest > 0, scale_of(largest), scale)


def cast(x: Tensor, scale: Tensor) -> Tensor:
    """x times scale [1], in E4M3: what is finite within 448, an infinity or a NaN is NaN."""
    wide = x.float()
    # An infinity times 0 is NaN; torch.compile would make a product with the integer 0 be 0.
    scaled = wide * scale + wide * 0.0
    # Compiled for a GPU a cast saturates by itself; eager that of torch 2.11 makes NaN.
    within = scaled if torch.compiler.is_compiling() else scaled.clamp(-MOST, MOST)
    return within.to(DTYPE)


def largest_of_rows(x: Tensor) -> Tensor:
    """float32 [M] of x [M, K]: torch.compile puts it into the kernel that makes x. NaN where x has
    one. As integers, bits of floats that are not negative have the same order, a NaN is the largest
    and a maximum is one instruction."""
    bits = x.float().view(torch.int32) & 0x7FFFFFFF
    return bits.amax(-1).view(torch.float32)


def largest_of(x: Tensor) -> Tensor:
    """float32 [1]; where x is not finite it does not count."""
    wide = x.detach().float().abs()
    return torch.where(wide.isfinite(), wide, 0.0).amax().view(1)
