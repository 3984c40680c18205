"""The layout `dense`: W as it is, zeros too, kept beside a packed layout or instead of one.

For the numbers of tokens with which the packed kernels lose. Its products are torch's: a zero that
meets an infinity or NaN in x makes NaN there, as in nn.Linear. Stored as [K, N], which the dense
libraries read faster than [N, K] in most cases of the decode benchmark.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from ...tensor import SparseTensor
from ..reference import mm
from .layout import Gpu, Launch, Packed


@dataclass(frozen=True)
class Dense(Packed):
    """weight: 16-bit floats [K, N]."""

    weight: Tensor

    name = "dense"

    @classmethod
    def of(cls, W: SparseTensor) -> "Dense":
        return cls(W.n, W.k, W.nnz, W.to_dense().t().contiguous())

    @property
    def arrived(self) -> Tensor:
        return self.weight  # no launch counts anything; it says where W lies

    def launch(self, m: int, gpu: Gpu) -> Launch | None:
        return None

    def expand(self) -> Tensor:
        return self.weight.t()

    def multiply(self, x: Tensor, bias: Tensor | None) -> Tensor:
        """y [M, N] = x [M, K] @ W.T + bias [N]."""
        return mm(x, self.weight, bias)

    def parts(self) -> dict[str, tuple[torch.dtype | None, tuple[int, ...]]]:
        return {"weight": (None, (self.k, self.n))}
