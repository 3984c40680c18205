"""Static sparsity: a mask drawn once and kept."""

import hashlib
from dataclasses import dataclass

import torch
from torch import Tensor

INITS = ("random", "magnitude")


@dataclass(frozen=True)
class Static:
    """Keeps exactly round((1 - sparsity) * N * K) weights of each layer.

    Args:
        sparsity: fraction of weights removed, in [0, 1].
        init: "random", uniform over the layer, or "magnitude", the largest absolute values.
        seed: of the random masks. A mask depends on the seed, the layer's name and its shape alone,
            so every process and device draws the same.
    """

    sparsity: float
    init: str = "random"
    seed: int = 0

    def __post_init__(self):
        if not 0 <= self.sparsity <= 1:
            raise ValueError(f"sparsity: expected a number in [0, 1], got {self.sparsity}")
        if self.init not in INITS:
            raise ValueError(f"init: expected one of {', '.join(INITS)}, got {self.init!r}")

    def mask(self, name: str, weight: Tensor) -> Tensor:
        """bool [N, K], True where the weight [N, K] of the layer called `name` is kept."""
        nnz = round((1 - self.sparsity) * weight.numel())
        if self.init == "random":
            digest = hashlib.blake2b(f"{self.seed}/{name}".encode(), digest_size=8).digest()
            generator = torch.Generator().manual_seed(int.from_bytes(digest, "little", signed=True))
            order = torch.randperm(weight.numel(), generator=generator)
        else:
            # Stable: of equal magnitudes the first are kept, on every machine.
            order = weight.detach().abs().flatten().argsort(descending=True, stable=True)
        mask = torch.zeros(weight.numel(), dtype=torch.bool, device=weight.device)
        mask[order[:nnz].to(weight.device)] = True
        return mask.view(weight.shape)
