"""Two results of the same benchmarks: what has become slower?"""

import json
from pathlib import Path
from statistics import geometric_mean
from typing import NamedTuple

from ..terminal import table
from . import noise
from .race import DENSE, OURS


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
    """Group -> times of a result of `bench`, bench/run.py or bench/run_gpu.py."""
    if not path.exists():
        raise FileNotFoundError(f"compare: {path} does not exist")
    try:
        result = json.loads(path.read_bytes())
        entries = _cells(result["cells"]) if "cells" in result else _all_groups(result)
    except (AttributeError, LookupError, RecursionError, TypeError, ValueError) as error:
        raise ValueError(f"compare: {path} is not a result of a benchmark") from error
    found: dict[str, Times] = {}
    for group, times in entries:
        before = found.get(group, times)
        least = map(min, zip(before[:2], times[:2], strict=True))
        found[group] = Times(*least, before.is_noisy or times.is_noisy)
    return found


def _all_groups(result: dict) -> list[tuple[str, Times]]:
    noisy = _groups(result.get("noisy", []))
    quiet = _groups(result["benchmarks"])
    return quiet + [(group, times._replace(is_noisy=True)) for group, times in noisy]


def _groups(benchmarks: list[dict]) -> list[tuple[str, Times]]:
    return [
        (
            benchmark["group"],
            Times(benchmark["stats"]["min"] / info["calls"], _best_dense(info["rivals"])),
        )
        for benchmark in benchmarks
        if "rivals" in (info := benchmark["extra_info"])
    ]


def _cells(cells: list[dict]) -> list[tuple[str, Times]]:
    return [
        (
            f"{name} {cell['N']}x{cell['K']}-M{cell['M']}-{cell['sparsity']:.0%}-{cell['mask']}-"
            f"{cell['dtype'].removeprefix('torch.')}",
            Times(way["min_s"], _best_dense(cell["ways"]), way.get("spread", 0.0) > noise.LIMIT),
        )
        for cell in cells
        for name, way in cell["ways"].items()
        if way["kind"] == OURS and way["is_right"]
    ]


def _best_dense(rivals: dict[str, dict]) -> float:
    return min(r["min_s"] for r in rivals.values() if r["kind"] == DENSE and r["is_right"])


def compare(old: Path, new: Path) -> list[Change]:
    """Changes of what both have measured, the worst first."""
    before, after = load(old), load(new)
    changes = [Change(g, before[g], after[g]) for g in before if g in after]
    if not changes:
        raise ValueError(f"compare: {old} and {new} have no group in common")
    return sorted(changes, key=lambda change: -change.ratio)


def render(changes: list[Change], threshold: float) -> str:
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
        + f" {noisy} noisy: nothing is concluded from them."
        * bool(noisy)
    )
