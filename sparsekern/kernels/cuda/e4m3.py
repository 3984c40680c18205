"""x and W in E4M3, floats of 8 bits: 3 of mantissa, from 2^-9 to 448, no infinities.

Each is stored times a power of two. That is as exact as any other scale, since it is the mantissa
that is short: E4M3 has 17 binades. For x the power is known beforehand, from examples, or found in
x itself (csrc/cuda/e4m3.cu has the kernels), so that nothing is beyond 448.
"""

import math

import torch
from torch import Tensor

from .cusparselt import aligned, readable_bias
from .library import start

DTYPE = torch.float8_e4m3fn
MOST, ROUNDS_TO_MOST = 448.0, 464.0
LEAST = 2.0**-50  # of the largest: below, products of scales would leave float32's range
THREADS, SMEM_BYTES = 256, 32
VALUES = 16  # of a thread's step, which a row of x holds whole
MOST_PARTS, MOST_BLOCKS = 1056, 2112  # 8 and 16 on each of 132 multiprocessors
MULTIPLE_OF_TOKENS = 16  # which a product in E4M3 takes
HEADROOM = 3  # binades between the largest of the examples and what becomes NaN


def exponent_of(largest: float, headroom: int = 0) -> int:
    """Of the power of two by which values up to `largest` are stored, so many binades below 448."""
    return math.floor(math.log2(MOST / max(largest, LEAST))) - headroom


def quantise_weight(w: Tensor) -> tuple[Tensor, int]:
    """w [N, K], finite, in E4M3, and the exponent of its scale. A zero is +0, and so is what rounds
    to one: the library takes -0 for a stored place."""
    exponent = exponent_of(w.abs().max().item())
    rounded = (w.float() * 2.0**exponent).to(DTYPE)
    return rounded.view(torch.uint8).masked_fill_(rounded.float() == 0, 0).view(DTYPE), exponent


def quantise(x: Tensor, exponent: int | None) -> tuple[Tensor, Tensor | None]:
    """x [M, K], bfloat16, times 2^exponent in E4M3; None: the exponent is found, and 2^-exponent
    [1], bfloat16, comes back too. Rows of 0 fill M up to a multiple of 16; K is one. An infinity, a
    NaN and what is beyond 448 become NaN."""
    (m, k), x = x.shape, aligned(x.contiguous())
    filled = -(-m // MULTIPLE_OF_TOKENS) * MULTIPLE_OF_TOKENS
    steps, filled_steps = m * k // VALUES, filled * k // VALUES
    blocks = max(1, -(-filled_steps // THREADS))
    x8 = x.new_empty(filled, k, dtype=DTYPE)
    largest = inverse = None
    parts = 0
    if exponent is None:
        parts = min(MOST_PARTS, blocks)
        largest, inverse = x.new_empty(parts, dtype=torch.float32), x.new_empty(1)
        start("sk_e4m3_largest", parts, THREADS, SMEM_BYTES, (x, largest), 2 * steps)
    sizes = parts, exponent or 0, steps, filled_steps
    operands = x, largest, x8, inverse
    start("sk_e4m3_cast", min(MOST_BLOCKS, blocks), THREADS, SMEM_BYTES, operands, *sizes)
    return x8, inverse


def finish(y: Tensor, inverse: Tensor | None, bias: Tensor | None) -> Tensor:
    """y [M, N] times inverse [1], + bias [N], in place; N is a multiple of 8."""
    eights, of_row = y.numel() // 8, y.shape[1] // 8
    blocks, bias = min(MOST_BLOCKS, max(1, -(-eights // THREADS))), readable_bias(bias, y)
    start("sk_e4m3_finish", blocks, THREADS, 0, (y, inverse, bias), eights, of_row)
    return y


def traced(x: Tensor, exponent: int | None) -> tuple[Tensor, Tensor | None]:
    """quantise() in torch's own operations, without rows that fill M up. torch.compile puts it into
    the kernel that made x."""
    wide = x.float()
    inverse = None
    if exponent is None:
        largest = torch.where(wide.isfinite(), wide.abs(), 0.0).amax().clamp(min=LEAST)
        scale = ((MOST / largest).view(torch.int32) & 0x7F800000).view(torch.float32)
        inverse = (1 / scale).to(x.dtype).view(1)
        wide = wide * scale
    else:
        wide = wide * 2.0**exponent
    within = wide.abs() <= ROUNDS_TO_MOST
    return torch.where(within, wide.clamp(-MOST, MOST), torch.nan).to(DTYPE), inverse
