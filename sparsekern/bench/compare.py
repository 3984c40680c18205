"""Two results of the same benchmarks: what has become slower?"""

from pathlib import Path
from statistics import geometric_mean
from typing import NamedTuple

from ..terminal import table
from . import noise, records
from .rates import case_name, derived
from .records import OURS


class Times(NamedTuple):
    """Least seconds of a call: ours, and of the best dense call of the same run. Of what is noise
    (noise.py) nothing is concluded."""

    ours_s: float
    dense_s: float
    is_noisy: bool = False


class Change(NamedTuple):
    group: str
    old: Times
    new: Times

    @property
    def ratio(self) -> float:
        """New over old: above 1 is slower."""
        return self.new.ours_s / self.old.ours_s

    @property
    def is_noisy(self) -> bool:
        return self.old.is_noisy or self.new.is_noisy

    def is_slower(self, threshold: float) -> bool:
        return self.ratio > 1 + threshold and not self.is_noisy

    @property
    def dense_ratio(self) -> float:
        """The same of dense: what the machine has become."""
        return self.new.dense_s / self.old.dense_s


def load(path: Path) -> dict[str, Times]:
    """Name -> times of each of our kernels that is right, in a table of measurements."""
    try:
        run = records.read(path)
        return _times(derived(run))
    except (FileNotFoundError, ValueError) as error:
        raise type(error)(f"compare: {error}") from error
    except (AttributeError, LookupError, TypeError) as error:
        told = f"expected a table of products, training steps or generation, got {path}"
        raise ValueError(f"compare: {told} ({type(error).__name__}: {error})") from error


def _times(cases: list[dict]) -> dict[str, Times]:
    found: dict[str, Times] = {}
    for case in cases:
        for who, way in case["ways"].items():
            if "dense_s" in case and way["kind"] == OURS and way["is_right"]:
                dense = case["ways"][case["best_dense"]]
                spread = max(each.get("spread", 0.0) for each in (way, dense))
                is_noisy = case.get("is_noisy", spread > noise.LIMIT)
                name = f"{case_name(case)} {who}"
                if name in found:
                    raise ValueError(f"two cases of a table are {name}")
                found[name] = Times(way["min_s"], dense["min_s"], is_noisy)
    return found


def compare(old: Path, new: Path) -> tuple[list[Change], list[str]]:
    """Changes of what both have measured, the worst first; and what `old` alone has."""
    before, after = load(old), load(new)
    changes = [Change(g, before[g], after[g]) for g in before if g in after]
    if not changes:
        raise ValueError(f"compare: {old} and {new} have no group in common")
    changes.sort(key=lambda change: -change.ratio)
    return changes, [group for group in before if group not in after]


def render(changes: list[Change], gone: list[str], threshold: float) -> str:
    rows = [
        [
            change.group,
            f"{1e6 * change.old.ours_s:.1f}",
            f"{1e6 * change.new.ours_s:.1f}",
            f"{change.ratio:.2f}",
            f"{change.dense_ratio:.2f}",
            "noisy" if change.is_noisy else "slower" * change.is_slower(threshold),
        ]
        for change in changes
    ]
    header = ["group", "old us", "new us", "new / old", "dense, new / old", ""]
    slower = sum(change.is_slower(threshold) for change in changes)
    noisy = sum(change.is_noisy for change in changes)
    mean = geometric_mean([change.ratio for change in changes])
    return (
        f"{table(header, rows)}\n\n{len(changes)} groups, geometric mean {mean:.2f}, least times; "
        f"{slower} slower by more than {threshold:.0%}."
        + f" {noisy} noisy: nothing is concluded from them." * bool(noisy)
        + f"\nNot in NEW, or wrong there: {', '.join(gone)}." * bool(gone)
    )
