"""Exact, reproducible choices of k among n: ties go to the first, on every machine."""

import hashlib

import torch
from torch import Tensor


def largest(scores: Tensor, count: int) -> Tensor:
    """The places of the `count` largest of scores [n], ascending: int64 [count].

    NaN counts as infinite. Of equal scores the first are taken.
    """
    if count >= scores.shape[0]:
        return torch.arange(scores.shape[0], device=scores.device)
    if count <= 0:
        return torch.arange(0, device=scores.device)
    scores = scores.masked_fill(scores.isnan(), torch.inf)
    threshold = scores.topk(count, sorted=False).values.min()
    above = (scores > threshold).nonzero().flatten()
    equal = (scores == threshold).nonzero().flatten()[: count - above.shape[0]]
    return torch.cat([above, equal]).sort().values


def largest_of_each(scores: dict[str, Tensor], count: int) -> dict[str, Tensor]:
    """The places of the `count` largest of all scores together, by name."""
    chosen = largest(torch.cat([score.flatten() for score in scores.values()]), count)
    result, start = {}, 0
    for name, score in scores.items():
        first, last = torch.searchsorted(
            chosen, torch.tensor([start, start + score.numel()], device=chosen.device)
        ).tolist()
        result[name] = chosen[first:last] - start
        start += score.numel()
    return result


def generator(*key: object) -> torch.Generator:
    """A CPU generator whose stream depends on the key alone."""
    digest = hashlib.blake2b("/".join(map(str, key)).encode(), digest_size=8).digest()
    return torch.Generator().manual_seed(int.from_bytes(digest, "little", signed=True))


def random_outside(kept: Tensor, size: int, count: int, rng: torch.Generator) -> Tensor:
    """`count` different places of range(size), uniformly among those not in `kept` (ascending)."""
    free = size - kept.shape[0]
    ranks = torch.randperm(free, generator=rng)[:count].to(kept.device)
    # The r-th free place lies behind as many kept ones as have at most r free places before them.
    before = kept - torch.arange(kept.shape[0], device=kept.device)
    return ranks + torch.searchsorted(before, ranks, right=True)
