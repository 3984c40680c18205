"""Masks of dense weights, as the algorithms of sparsekern choose them: bool [N, K], True = kept.

All arms of one shape train through the same captured step, where a mask is a tensor beside each
weight. So what moves patterns is written for masks here; first patterns come from sparsekern.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from sparsekern.sparsity import Static
from sparsekern.sparsity.schedules import Cosine, Cubic
from sparsekern.sparsity.select import largest

Masks = dict[str, Tensor]
Named = Mapping[str, Tensor]
# (step, weights, dense gradients, masks) -> the masks after that step
Change = Callable[[int, Named, Named, Masks], Masks]

UPDATE_EVERY, STOP_SHARE, DROP_FRACTION = 100, 0.75, 0.3  # RigL and SET
GRADUAL_FROM, GRADUAL_TO, GRADUAL_EVERY = 0.25, 0.75, 100
ROUNDS, ROUNDS_TO = 4, 1 / 3  # of a model that is trained already


@dataclass(frozen=True)
class Sparsity:
    """How the linear layers of the blocks are sparse while a model is pre-trained.

    `kind`: dense, static, two-way, rigl, set; gradual: pruned by magnitude while it trains; of a
    model that is trained already: pruned by magnitude at once, or in rounds with training between.
    `until`: the share of the steps after which all weights train; they begin at zero.
    """

    kind: str = "dense"
    sparsity: float = 0.0
    until: float = 1.0

    def first(self, weights: Named, seed: int) -> Masks:
        """Masks to begin with. The weights themselves count where they are trained already."""
        if self.kind in ("dense", "gradual", "rounds"):
            return dense(weights)
        if self.kind == "pruned":
            return of_largest(weights, self.sparsity)
        family = "two-way" if self.kind == "two-way" else "unstructured"
        algorithm = Static(self.sparsity, seed=seed, family=family)
        on_host = {name: weight.detach().cpu() for name, weight in weights.items()}
        return algorithm.masks(on_host)

    def changes(self, steps: int, seed: int) -> dict[int, Change]:
        """By the step, counted from 1, after which the masks change."""
        found: dict[int, Change] = {}
        if self.kind == "gradual":
            begin, end = int(GRADUAL_FROM * steps), max(1, int(GRADUAL_TO * steps))
            cubic = Cubic(0.0, self.sparsity, max(1, end - begin), begin)
            every = max(1, min(GRADUAL_EVERY, (end - begin) // 2))
            for step in [*range(begin + every, end, every), end]:
                found[step] = lambda s, w, g, m: of_largest(w, cubic(s))
        if self.kind == "rounds":
            end = max(1, int(ROUNDS_TO * steps))
            rounds = Cubic(0.0, self.sparsity, end)
            for i in range(1, ROUNDS + 1):
                found[max(1, end * i // ROUNDS)] = lambda s, w, g, m: of_largest(w, rounds(s))
        if self.kind in ("rigl", "set"):
            stop = int(STOP_SHARE * steps)
            drop = Cosine(DROP_FRACTION, max(1, stop))
            by_gradient = self.kind == "rigl"
            for step in range(UPDATE_EVERY, stop + 1, UPDATE_EVERY):
                found[step] = lambda s, w, g, m: moved(
                    w, g if by_gradient else noise(w, seed, s), m, drop(s)
                )
        if self.until < 1:
            found[round(self.until * steps)] = lambda s, w, g, m: dense(w)
        return found

    def density(self, steps: int) -> float:
        """Its mean over a run: what training FLOPs follow."""
        kept = 1 - self.sparsity
        if self.kind == "gradual":
            begin, end = GRADUAL_FROM, GRADUAL_TO
            # The mean of 1 - cubic over its ramp: kept + sparsity / 4.
            ramp = kept + self.sparsity / 4
            return begin + (end - begin) * ramp + (1 - end) * kept
        if self.kind == "rounds":
            left = sum((1 - i / ROUNDS) ** 3 for i in range(ROUNDS)) / ROUNDS
            return kept + ROUNDS_TO * left * self.sparsity
        return kept * self.until + (1 - self.until)


def dense(weights: Named) -> Masks:
    return {n: torch.ones(w.shape, dtype=torch.bool, device=w.device) for n, w in weights.items()}


def of_largest(weights: Named, sparsity: float) -> Masks:
    """The largest round((1 - sparsity) * N * K) of each layer."""
    found = {}
    for name, weight in weights.items():
        count = round((1 - sparsity) * weight.numel())
        found[name] = at(largest(weight.detach().abs().flatten(), count), weight)
    return found


def moved(weights: Named, scores: Named, masks: Masks, fraction: float) -> Masks:
    """The smallest `fraction` of the kept weights go, and as many come where |scores| is largest,
    among all that is not kept then."""
    found = {}
    for name, weight in weights.items():
        mask = masks[name]
        kept = int(mask.sum())
        count = min(round(fraction * kept), mask.numel() - kept)
        sizes = weight.detach().abs().masked_fill(~mask, -1.0).flatten()
        stays = at(largest(sizes, kept - count), weight)
        free = scores[name].abs().masked_fill(stays, -1.0).flatten()
        found[name] = stays | at(largest(free, count), weight)
    return found


def noise(weights: Named, seed: int, step: int) -> Masks:
    """Scores in (0, 1), the same on every device."""
    generator = torch.Generator().manual_seed(1_000_003 * seed + step)
    return {n: torch.rand(w.shape, generator=generator).to(w.device) for n, w in weights.items()}


def at(places: Tensor, like: Tensor) -> Tensor:
    mask = torch.zeros(like.numel(), dtype=torch.bool, device=like.device)
    mask[places] = True
    return mask.view(like.shape)
