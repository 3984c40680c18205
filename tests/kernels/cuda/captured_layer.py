"""A SparseLinear, forward and backward, in a CUDA graph."""

import torch
from torch import Tensor, nn

from sparsekern import SparseLinear


def check_captured_step(mask: Tensor) -> None:
    """A replay follows values, tokens and bias that have changed since the capture."""
    (n, k), m = mask.shape, 1024
    dense = nn.Linear(k, n, device="cuda", dtype=torch.bfloat16)
    layer = SparseLinear.from_linear(dense, mask)
    x = torch.randn(m, k, device="cuda", dtype=torch.bfloat16, requires_grad=True)
    dy = torch.randn(m, n, device="cuda", dtype=torch.bfloat16)
    stream = torch.cuda.Stream()
    with torch.cuda.stream(stream):
        layer(x).backward(dy)
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    x.grad = layer.values.grad = layer.bias.grad = None
    with torch.cuda.graph(graph):
        y = layer(x)
        y.backward(dy)
    captured = y, x.grad, layer.values.grad  # where a replay writes
    for _ in range(3):
        with torch.no_grad():
            x.normal_()
            layer.values.normal_()
            layer.bias.normal_()
        graph.replay()
        got = [t.clone() for t in captured]
        other = x.detach().clone().requires_grad_()
        layer.values.grad = None
        want = layer(other)
        want.backward(dy)
        # Another algorithm may be captured than runs outside.
        for a, b in zip(got, (want, other.grad, layer.values.grad), strict=True):
            scale = b.float().square().mean().sqrt().item()
            torch.testing.assert_close(a, b, rtol=2**-6, atol=2**-6 * scale)
