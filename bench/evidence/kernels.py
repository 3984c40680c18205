"""Triton kernels of the captured step, where torch.compile reads or writes more than there is to.

Both round as torch does: fp32 inside, the type of the tensors outside. Cross entropy reads a row of
logits once and leaves its gradient in its place. GELU adds its bias, keeps what it got for
backward (torch.compile writes the output a second time), and sums the bias's gradient on the way.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

ROWS = 256  # whose gradients of the bias a program sums


@triton.jit
def _cross_entropy(logits, targets, scale, nats, V: tl.constexpr, BLOCK: tl.constexpr):
    row = logits + tl.program_id(0).to(tl.int64) * V
    columns = tl.arange(0, BLOCK)
    target = tl.load(targets + tl.program_id(0))
    is_target = target >= 0
    right = tl.load(row + target, is_target, 0.0).to(tl.float32)
    found = tl.load(row + columns, columns < V, float("-inf")).to(tl.float32)
    top = tl.max(found, 0)
    powers = tl.exp2((found - top) * 1.4426950409)  # 1 / log(2)
    total = tl.sum(powers, 0)
    tl.store(nats + tl.program_id(0), tl.where(is_target, tl.log(total) + top - right, 0.0))
    share = tl.where(is_target, tl.load(scale), 0.0)
    gradient = powers * (share / total) - tl.where(columns == target, share, 0.0)
    tl.store(row + columns, gradient.to(logits.dtype.element_ty), columns < V)


def cross_entropy_(logits: Tensor, y: Tensor) -> tuple[Tensor, Tensor]:
    """As engine.loss_and_gradient, in place: the gradient has the memory of the logits."""
    M, V = logits.shape
    scale = 1.0 / (y >= 0).sum().clamp(min=1).float()
    nats = torch.empty(M, device=logits.device)
    _cross_entropy[(M,)](logits, y, scale, nats, V, triton.next_power_of_2(V), num_warps=8)
    return nats.sum() * scale, logits


@triton.jit
def _normal(x):
    """The normal distribution up to x, to 1e-7 (Abramowitz and Stegun, 7.1.26), and exp(-x^2 / 2),
    which its slope wants, too."""
    w = 1.0 + 0.2316419 * tl.abs(x)  # 0.3275911 / sqrt(2)
    t = tl.rsqrt(w * w)
    power = tl.exp2(-0.7213475204 * (x * x))
    tail = t * (-1.453152027 + t * 1.061405429)
    tail = t * (0.254829592 + t * (-0.284496736 + t * (1.421413741 + tail)))
    tail = 0.5 * tail * power
    return tl.where(x < 0, tail, 1.0 - tail), power


@triton.jit
def _forward(x, bias, y, M, N, BM: tl.constexpr, BN: tl.constexpr):
    rows = tl.program_id(0).to(tl.int64) * BM + tl.arange(0, BM)
    columns = tl.program_id(1) * BN + tl.arange(0, BN)
    at, is_in = rows[:, None] * N + columns, (rows[:, None] < M) & (columns < N)
    shift = tl.load(bias + columns, columns < N, 0.0)
    found = tl.load(x + at, is_in, 0.0).to(tl.float32) + shift
    share, _ = _normal(found)
    tl.store(y + at, (found * share).to(y.dtype.element_ty), is_in)


@triton.jit
def _backward(dy, x, bias, dx, sums, M, N, ROWS: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr):
    columns = tl.program_id(1) * BN + tl.arange(0, BN)
    shift = tl.load(bias + columns, columns < N, 0.0)
    total = tl.zeros((BM, BN), tl.float32)
    for first in range(0, ROWS, BM):
        rows = tl.program_id(0).to(tl.int64) * ROWS + first + tl.arange(0, BM)
        at, is_in = rows[:, None] * N + columns, (rows[:, None] < M) & (columns < N)
        found = tl.load(x + at, is_in, 0.0).to(tl.float32) + shift
        share, power = _normal(found)
        slope = share + found * power * 0.3989422804  # 1 / sqrt(2 pi)
        gradient = tl.load(dy + at, is_in, 0.0).to(tl.float32) * slope
        tl.store(dx + at, gradient.to(dx.dtype.element_ty), is_in)
        total += gradient
    tl.store(sums + tl.program_id(0) * N + columns, tl.sum(total, 0), columns < N)


@torch.library.custom_op("evidence::bias_gelu", mutates_args=())
def bias_gelu(x: Tensor, bias: Tensor) -> Tensor:
    """GELU of x + bias: x [M, N], bias fp32 [N] -> as x."""
    (M, N), y = x.shape, torch.empty_like(x)
    grid = triton.cdiv(M, 8), triton.cdiv(N, 512)
    _forward[grid](x, bias, y, M, N, 8, 512, num_warps=8)
    return y


@torch.library.custom_op("evidence::bias_gelu_backward", mutates_args=())
def bias_gelu_backward(dy: Tensor, x: Tensor, bias: Tensor) -> tuple[Tensor, Tensor]:
    """The gradients of x and of bias."""
    (M, N), dx = x.shape, torch.empty_like(x)
    grid = triton.cdiv(M, ROWS), triton.cdiv(N, 128)
    sums = torch.empty(grid[0], N, device=x.device)
    _backward[grid](dy.contiguous(), x, bias, dx, sums, M, N, ROWS, 16, 128, num_warps=4)
    return dx, sums.sum(0)


@bias_gelu.register_fake
def _(x: Tensor, bias: Tensor) -> Tensor:
    return torch.empty_like(x)


@bias_gelu_backward.register_fake
def _(dy: Tensor, x: Tensor, bias: Tensor) -> tuple[Tensor, Tensor]:
    return torch.empty_like(x), torch.empty_like(bias)


def _keep(ctx, inputs: tuple[Tensor, Tensor], output: Tensor) -> None:
    ctx.save_for_backward(*inputs)


bias_gelu.register_autograd(
    lambda ctx, dy: bias_gelu_backward(dy, *ctx.saved_tensors), setup_context=_keep
)
