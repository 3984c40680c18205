"""torch.mm and addmm as the kernels call them, and what a W that is written out must not do."""

from collections.abc import Callable

import torch
from torch import Tensor


def mm(a: Tensor, b: Tensor, bias: Tensor | None = None) -> Tensor:
    """a @ b + bias in the dtype of the operands: an op runs under the caller's autocast, which
    would round them."""
    with torch.autocast(a.device.type, enabled=False):
        return torch.mm(a, b) if bias is None else torch.addmm(bias, a, b)


def skip_missing(y: Tensor, x: Tensor, product: Callable[[Tensor], Tensor]) -> Tensor:
    """y [M, out] of a product of x [M, in] with a W that was written out, as if nothing had been
    multiplied where W stores nothing: product(x of some tokens) computes those tokens anew.

    A written-out zero makes NaN of an infinity or a NaN in x (0 * inf), in every output of its
    token. So a token whose first output is finite is right, and of the others those whose x is
    finite. For a CPU: the branch depends on data.
    """
    if y.numel() == 0:
        return y
    suspects = (~y[:, 0].isfinite()).nonzero().flatten()
    if suspects.numel():
        tokens = suspects[~x[suspects].isfinite().all(dim=1)]
        if tokens.numel():
            y[tokens] = product(x[tokens])
    return y
