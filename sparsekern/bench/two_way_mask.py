"""Two-way masks, drawn fast."""

import itertools
import math
from dataclasses import dataclass
from functools import lru_cache

import torch
from torch import Tensor

from ..sparsity import Static

TWO_WAY = "two-way"
MOST_SIDE = 4096  # of a tile, which a CPU draws


@dataclass(frozen=True)
class TwoWayMask:
    """Two-way masks of tiles: one, drawn once for each size, turned around by multiples of 4, which
    leaves it two-way. To draw all of a large GPT takes half a minute. Each tile [G, G], G the
    greatest common divisor of N and K, or an even part of it up to MOST_SIDE, keeps
    round((1 - sparsity) * G * G)."""

    sparsity: float

    def mask(self, name: str, weight: Tensor) -> Tensor:
        (n, k), side = weight.shape, math.gcd(*weight.shape)
        while side > MOST_SIDE and side % 8 == 0:
            side //= 2
        if side % 4:
            raise ValueError(f"{name}: expected N and K with a common multiple of 4, got {n}, {k}")
        tile = _tile(side, self.sparsity, weight.device)
        mask = torch.empty(n, k, dtype=torch.bool, device=weight.device)
        for rows, columns in itertools.product(range(0, n, side), range(0, k, side)):
            shifts = (4 * torch.randint(side // 4, (2,), device="cpu")).tolist()
            mask[rows : rows + side, columns : columns + side] = tile.roll(shifts, (0, 1))
        return mask


@lru_cache(maxsize=4)
def _tile(side: int, sparsity: float, device: torch.device) -> Tensor:
    return Static(sparsity, family=TWO_WAY).mask("tile", torch.empty(side, side)).to(device)
