"""Equal shares for equal parts of a weight, such as the heads of an attention layer."""

from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from .checks import whole
from .families import Unstructured
from .select import largest, random_places


@dataclass(frozen=True)
class Balance(Unstructured):
    """`groups` runs of rows ("out") or of columns ("in") of a weight [N, K] keep the same number of
    weights each; where it does not divide, the first keep one more."""

    setting: str
    groups: int

    @classmethod
    def of(cls, balance_in: object, balance_out: object) -> "Balance | None":
        """The balance of the settings balance_in_groups and balance_out_groups."""
        given = {"balance_in_groups": balance_in, "balance_out_groups": balance_out}
        counts = {name: whole(name, n, 1) for name, n in given.items() if n is not None}
        if len(counts) > 1:
            raise ValueError(f"balance_in_groups, balance_out_groups: expected one, got {counts}")
        return next((cls(setting, groups) for setting, groups in counts.items()), None)

    def check(self, layer: str, n: int, k: int) -> None:
        if n % self.groups and k % self.groups:
            raise ValueError(
                f"{self.setting}: expected a divisor of a dimension of {layer}, ({n}, {k}), "
                f"got {self.groups}"
            )

    def shares(self, count: int) -> list[int]:
        """The weights that each group keeps of `count`."""
        return [(count + self.groups - 1 - i) // self.groups for i in range(self.groups)]

    def position(self, places: Tensor, n: int, k: int) -> Tensor:
        """Places in the order in which each group is one run."""
        if self.setting == "balance_out_groups":
            return places
        return places % k * n + places // k

    def place(self, positions: Tensor, n: int, k: int) -> Tensor:
        """The inverse of `position`."""
        if self.setting == "balance_out_groups":
            return positions
        return positions % n * k + positions // n

    def group_of(self, places: Tensor, n: int, k: int) -> Tensor:
        return self.position(places, n, k) // (n * k // self.groups)

    def random(self, n: int, k: int, count: int, rng: np.random.PCG64) -> Tensor:
        size = n * k // self.groups
        shares = enumerate(self.shares(count))
        parts = [random_places(size, share, rng) + i * size for i, share in shares]
        return self.place(torch.cat(parts), n, k).sort().values

    def largest(self, scores, places, n, k, count, before=None) -> Tensor:
        """Where the largest of `scores` are, ascending: in each group as many as make its share of
        `count` together with the places `before`."""
        if places is None:
            places = torch.arange(n * k, device=scores.device)
        wanted = self.shares(count + (0 if before is None else before.shape[0]))
        if before is not None:
            held = self.group_of(before, n, k).bincount(minlength=self.groups).tolist()
            wanted = [max(0, w - h) for w, h in zip(wanted, held, strict=True)]
        group_of = self.group_of(places, n, k)
        chosen = []
        for group, most in enumerate(wanted):
            members = (group_of == group).nonzero().flatten()
            chosen.append(members[largest(scores[members], most)])
        return torch.cat(chosen).sort().values
