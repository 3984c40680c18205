"""Families of masks: which places of a weight [N, K] may be stored together.

    unstructured  any
    two-way       at most 2 of each 4 neighbours along both axes (two_way.py): half of all, or less

Algorithms choose through a family: at random, by scores, or both beside what stays.
"""

from collections.abc import Iterable, Mapping

import numpy as np
import torch
from torch import Tensor

from ..two_way import is_two_way
from . import two_way
from .select import (
    even_shares,
    largest,
    largest_of_each,
    largest_of_rows,
    merged,
    random_outside,
    random_places,
)

Scores = tuple[Tensor, Tensor | None, int, int]  # of places [nnz], or of all; the places; N; K


class Unstructured:
    """Any places."""

    densest = 1.0

    def most(self, n: int, k: int) -> int:
        """How many places a mask can keep."""
        return n * k

    def check(self, layer: str, n: int, k: int) -> None:
        """ValueError if the layer has no such masks."""

    def holds(self, places: Tensor, n: int, k: int) -> bool:
        """Whether these places (ascending) are such a mask."""
        return True

    def room(self, stored: Tensor) -> int:
        """The most places that a mask within bool `stored` [N, K] can keep."""
        return int(stored.sum())

    def leads_there(self, places: Tensor, n: int, k: int) -> bool:
        """Whether a mask within these places can keep as many as any."""
        stored = torch.zeros(n * k, dtype=torch.bool, device=places.device)
        stored[places] = True
        return self.room(stored.view(n, k)) == self.most(n, k)

    def random(self, n: int, k: int, count: int, rng: np.random.PCG64) -> Tensor:
        """`count` places, ascending, uniform over all such masks."""
        return random_places(n * k, count, rng)

    def largest(
        self,
        scores: Tensor,
        places: Tensor | None,
        n: int,
        k: int,
        count: int,
        before: Tensor | None = None,
    ) -> Tensor:
        """Where the `count` best of these scores [nnz] are, ascending. They are of these places
        (ascending), or of all: then one of -inf is not stored. `before` are places that stay."""
        return largest(scores, count)

    def largest_of_each(self, layers: Mapping[str, Scores], count: int) -> dict[str, Tensor]:
        """The same for several layers that share the count."""
        return largest_of_each({name: scores for name, (scores, *_) in layers.items()}, count)

    def evenly(self, scores: Tensor, count: int) -> Tensor:
        """The `count` best of the scores [N, K], shared among the rows as evenly as the scores that
        each has beside -inf allow: bool [N, K]."""
        rooms = (scores > -torch.inf).sum(1)
        return largest_of_rows(scores, even_shares(rooms, count))

    def grown(
        self, kept: Tensor, rows: Iterable[tuple[int, Tensor]], n: int, k: int, count: int
    ) -> Tensor | None:
        """The places kept and the `count` best others, ascending; None if no score is above zero.

        rows: the index of a row, and the scores [rows, K] from there on, all finite.
        """
        where, best = kept[:0], torch.empty(0, device=kept.device)
        for first, block in rows:
            score = block.flatten()
            last = first + block.shape[0]
            bounds = torch.tensor([first * k, last * k], device=kept.device)
            low, high = torch.searchsorted(kept, bounds).tolist()
            score[kept[low:high] - first * k] = -1.0  # below every other
            places = torch.arange(first * k, last * k, device=kept.device)
            top = self.largest(score, places, n, k, count, kept)
            best = torch.cat([best.to(score.dtype), score[top]])
            where = torch.cat([where, places[top]])
            # Ascending in `where`, so ties still go to the first.
            keep = self.largest(best, where, n, k, count, kept)
            best, where = best[keep], where[keep]
        return merged(kept, where) if count == 0 or best.max() > 0 else None

    def grown_at_random(
        self, kept: Tensor, n: int, k: int, count: int, rng: np.random.PCG64
    ) -> Tensor:
        """The places kept and `count` others, ascending, at random."""
        return merged(kept, random_outside(kept, n * k, count, rng))


class TwoWay(Unstructured):
    """Blocks of 4 x 4 with at most 2 places in each row and column.

    A mask that keeps more than `most` is on its way there: within it is a two-way mask of half of
    all places, so that pruning goes on to any count, and what was removed stays removed.
    """

    densest = 0.5

    def most(self, n: int, k: int) -> int:
        return two_way.most(n, k)

    def holds(self, places: Tensor, n: int, k: int) -> bool:
        ends = torch.arange(n + 1, device=places.device) * k
        return is_two_way(torch.searchsorted(places, ends), places % max(1, k), k)

    def room(self, stored: Tensor) -> int:
        if stored.all():
            return self.most(*stored.shape)
        return two_way.Best(stored.float().masked_fill_(~stored, -torch.inf)).room

    def random(self, n: int, k: int, count: int, rng: np.random.PCG64) -> Tensor:
        places = two_way.random_mask(n, k, min(count, self.most(n, k)), rng)
        return super().grown_at_random(places, n, k, count - places.shape[0], rng)

    def largest(self, scores, places, n, k, count, before=None) -> Tensor:
        """The same, with the largest sum of squares."""
        return self.largest_of_each({"": (scores, places, n, k)}, count)[""]

    def largest_of_each(self, layers: Mapping[str, Scores], count: int) -> dict[str, Tensor]:
        is_all = count >= sum(scores.shape[0] for scores, *_ in layers.values())
        if is_all or all(p is not None and self.holds(p, n, k) for _, p, n, k in layers.values()):
            return super().largest_of_each(layers, count)  # any part of such a mask is one
        masks = two_way.largest({name: _dense(*parts) for name, parts in layers.items()}, count)
        chosen = {}
        for name, (_, places, _, _) in layers.items():
            mask = masks[name].flatten()
            chosen[name] = (mask if places is None else mask[places]).nonzero().flatten()
        return chosen

    def evenly(self, scores: Tensor, count: int) -> Tensor:
        """The same, shared among rows of blocks as far as each has room."""
        n = scores.shape[0]
        rows = torch.arange(0, n + 4, 4, device=scores.device).clamp_(max=n)
        return two_way.largest_of_bands(scores, ((rows * count + n // 2) // max(1, n)).diff())

    def grown(self, kept, rows, n, k, count) -> Tensor | None:
        """The same: the best that a mask can have beside all that is kept.

        It needs the scores of all N x K places at once. Where the masks of some blocks are such
        that fewer than `count` fit (never, if as many were dropped from a two-way mask), as few of
        the kept places as possible go instead.
        """
        scores = torch.cat([block for _, block in rows]).view(n, k)
        return self._beside(kept, scores, count) if count == 0 or scores.max() > 0 else None

    def grown_at_random(self, kept, n, k, count, rng) -> Tensor:
        """The same, by random scores, each place's uniform: see `grown`."""
        scores = torch.from_numpy(two_way.uniform(n * k, rng)).view(n, k).to(kept.device)
        return self._beside(kept, scores, count)

    def _beside(self, kept: Tensor, scores: Tensor, count: int) -> Tensor:
        if count == 0:
            return kept
        scores.view(-1)[kept] = torch.inf
        mask = two_way.largest({"": scores}, kept.shape[0] + count)[""]
        return mask.flatten().nonzero().flatten()


def _dense(scores: Tensor, places: Tensor | None, n: int, k: int) -> Tensor:
    """The scores of all places [N, K], -inf where nothing is stored."""
    if places is None:
        return scores.view(n, k)
    dense = scores.new_full((n * k,), -torch.inf)
    dense[places] = scores
    return dense.view(n, k)


UNSTRUCTURED = Unstructured()
FAMILIES = {"unstructured": Unstructured, "two-way": TwoWay}
