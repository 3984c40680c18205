"""torch.mm and addmm as the kernels call them."""

import torch
from torch import Tensor


def mm(a: Tensor, b: Tensor, bias: Tensor | None = None) -> Tensor:
    """a @ b + bias in the dtype of the operands: an op runs under the caller's autocast, which
    would round them."""
    with torch.autocast(a.device.type, enabled=False):
        return torch.mm(a, b) if bias is None else torch.addmm(bias, a, b)
