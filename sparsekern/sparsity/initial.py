"""The first pattern of a layer."""

import math

import torch
from torch import Tensor

from .families import Unstructured
from .select import generator

INITS = ("random", "magnitude", "topk", "from_zeros", "checkerboard")


def first_places(
    method: str, name: str, weight: Tensor, count: int, seed: int, family: Unstructured
) -> Tensor:
    """The places of the weight [N, K] that are kept, ascending: `count` of them where the method is
    random or magnitude (also called topk)."""
    n, k = weight.shape
    if method == "random":
        return family.random(n, k, count, generator(seed, name)).to(weight.device)
    if method == "from_zeros":
        return weight.flatten().nonzero().flatten()
    return family.largest(weight.detach().abs().flatten(), None, n, k, count)


def checkerboard(n: int, k: int, sparsity: float) -> Tensor:
    """A bool mask [n, k] with its places spread evenly.

    Along the first row a place is kept whenever j * density passes a whole number. Each next row is
    the one above moved left by the places before the first of these. The row is longer than k, so
    that what comes in from the right is spread evenly too.
    """
    density = 1 - torch.tensor(sparsity, dtype=torch.float32, device="cpu").item()
    if not density or not n * k:
        return torch.zeros(n, k, dtype=torch.bool, device="cpu")
    length = k + math.ceil(k / density + 1e-5)
    passed = torch.floor(torch.arange(length, device="cpu") * density + 1e-5)
    row = passed[1:] != passed[:-1]
    shift = math.floor(1 / density - 1e-5)
    twice = torch.cat([row, row])
    starts = [i * shift % row.shape[0] for i in range(n)]
    return torch.stack([twice[start : start + k] for start in starts])
