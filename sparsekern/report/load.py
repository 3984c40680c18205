"""The result files of all benchmarks, by what they hold."""

import json
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

PRODUCTS = "products"  # bench/run.py, python -m sparsekern bench
CELLS = "cells"  # bench/run_gpu.py
GENERATION = "generation"  # bench/bench_generate.py
EXPERIMENTS = "experiments"  # bench/experiments.py
OURS = "ours"


@dataclass(frozen=True)
class Result:
    path: Path
    kind: str
    data: dict

    @property
    def title(self) -> str:
        """The machine, and what sets the file apart from others of the same machine."""
        return self.path.stem if self.path.stem != EXPERIMENTS else self.path.parent.name

    @cached_property
    def about(self) -> str:
        """Machine, version of torch, day and commit, in words."""
        data = self.data
        match self.kind:
            case "products":
                machine, commit = data["machine_info"], data["commit_info"]["id"]
                name = machine.get("gpu", f"{machine['cpu']}, {machine['cores']} cores")
                parts = name, machine["isa"], machine["torch"], data["datetime"][:10], commit
            case "cells":
                machine = data["machine"]
                cells = data["cells"]
                dtype = cells[0]["dtype"].removeprefix("torch.") if cells else ""
                commit = machine["commit"]
                parts = machine["gpu"], dtype, machine["torch"], data["date"], commit
            case "generation":
                parts = data["gpu"], data["preset"], data["torch"], "", data["commit"]["id"]
            case _:
                machine = data["machine"]
                commit = machine["commit"]
                parts = machine["device"], "", machine["torch"], machine["date"], commit
        name, detail, torch, day, commit = parts
        found = [name, detail, f"torch {torch}", day, f"commit {commit[:10]}"]
        return ", ".join(part for part in found if part)

    @cached_property
    def records(self) -> list[dict]:
        """One record for each product, with `speedup` over the best dense call."""
        if self.kind == PRODUCTS:
            infos = (benchmark["extra_info"] for benchmark in self.data["benchmarks"])
            return [{"device": "cpu"} | info for info in infos if "speedup" in info]
        if self.kind == CELLS:
            return [record for cell in self.data["cells"] for record in _fastest(cell)]
        return []


def _fastest(cell: dict) -> list[dict]:
    """The record of the fastest of our kernels that is right, if one is."""
    ways = {n: w for n, w in cell["ways"].items() if w["kind"] == OURS and w["is_right"]}
    if not ways:
        return []
    name = min(ways, key=lambda n: ways[n]["median_s"])
    own = {
        "device": "cuda",
        "threads": 0,
        "is_cold": True,
        "kernel": name,
        "ours_s": ways[name]["median_s"],
        "speedup": cell["speedups"][name],
        "useful_flop": 2 * cell["M"] * cell["nnz"],
        "moved_bytes": ways[name]["bytes"] + 2 * cell["M"] * (cell["N"] + cell["K"]),
    }
    return [{key: value for key, value in cell.items() if key != "ways"} | own]


def load(folder: Path) -> list[Result]:
    """All results in a folder and in those in it, by name; other JSON files are left out."""
    if not folder.is_dir():
        raise FileNotFoundError(f"results: folder {folder} does not exist")
    found = []
    for path in sorted(folder.rglob("*.json")):
        try:
            data = json.loads(path.read_bytes())
        except (ValueError, RecursionError) as error:
            raise ValueError(f"results: {path} is not JSON: {error}") from error
        if kind := kind_of(data):
            found.append(Result(path, kind, data))
            _check(found[-1])
    return found


def _check(result: Result) -> None:
    """Reads what the page will read of it."""
    try:
        _ = result.about, result.records
    except (AttributeError, LookupError, TypeError, ValueError) as error:
        kind = type(error).__name__
        raise ValueError(f"results: {result.path} is damaged ({kind}: {error})") from error


def kind_of(data: object) -> str | None:
    if not isinstance(data, dict):
        return None
    if "benchmarks" in data:
        return PRODUCTS
    if "cells" in data:
        return CELLS
    if "runs" in data and "preset" in data:
        return GENERATION
    if "machine" in data and any(key.startswith("pretrain ") for key in data):
        return EXPERIMENTS
    return None
