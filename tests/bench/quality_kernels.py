"""The Triton kernels of bench/evidence against torch: quality_kernels.py BENCH DEVICE. A process of
its own, since TRITON_INTERPRET must be set before triton is imported."""

import sys

import torch
import torch.nn.functional as F

sys.path.insert(0, sys.argv[1])
from evidence.engine import IGNORED, loss_and_gradient  # noqa: E402
from evidence.kernels import bias_gelu, cross_entropy_  # noqa: E402

torch.set_default_device(sys.argv[2])
close = torch.testing.assert_close
for dtype, apart in ((torch.float32, 1e-5), (torch.bfloat16, 2**-7)):
    logits, y = (4 * torch.randn(7, 97)).to(dtype), torch.randint(0, 97, (7,))
    y[::5] = IGNORED
    loss, gradient = loss_and_gradient(logits, y)
    found, place = cross_entropy_(logits, y)
    assert place is logits
    close(found, loss)
    close(place, gradient, rtol=apart, atol=1e-7)

    x, dy = ((3 * torch.randn(270, 130)).to(dtype) for _ in range(2))
    bias = torch.randn(130, requires_grad=True)
    x.requires_grad_()
    exact = F.gelu(x.float() + bias)
    wanted = torch.autograd.grad(exact, (x, bias), dy.float())
    y = bias_gelu(x, bias)
    close(y.float(), exact, rtol=apart, atol=2e-6)
    for one, other in zip(torch.autograd.grad(y, (x, bias), dy), wanted, strict=True):
        close(one, other, rtol=apart, atol=3e-5)
