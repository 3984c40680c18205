"""The tables of all benchmarks (bench/records.py), by what they hold."""

from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

from ..bench import records
from ..bench.rates import derived

PRODUCTS = "products"  # bench/run.py, python -m sparsekern bench
CELLS = "cells"  # bench/run_gpu.py
GENERATION = "generation"  # bench/generate_gpu.py
TRAINING = "training"  # bench/run_gpu.py: the three products of a layer alone
PASSES = {"spmm": "forward", "spmm_t": "input gradient", "sddmm": "gradient of W"}
KINDS = {
    "products": PRODUCTS,
    "decode": CELLS,
    "crossover": CELLS,
    "train": PRODUCTS,
    "train-products": TRAINING,
    "generate": GENERATION,
}


@dataclass(frozen=True)
class Result:
    path: Path
    kind: str
    run: records.Run

    @cached_property
    def about(self) -> str:
        """Machine, version of torch, day and commit, in words."""
        about, machine = self.run.about, self.run.about["machine"]
        first = self.run.records[0] if self.run.records else {}
        name = machine.get("gpu") or f"{machine['cpu']}, {machine['cores']} cores"
        detail = {CELLS: first.get("dtype"), GENERATION: first.get("model")}
        found = [name, detail.get(self.kind, machine.get("isa")), f"torch {machine['torch']}"]
        found += [about["date"], f"commit {about['commit']['id'][:10]}"]
        return ", ".join(part for part in found if part)

    @cached_property
    def records(self) -> list[dict]:
        """The products and steps, each with `speedup` over the best dense call (bench/rates.py)."""
        if self.kind not in (PRODUCTS, CELLS):
            return []
        found = derived(self.run)
        return [case for case in found if "speedup" in case and not case.get("is_noisy")]

    def ceilings(self, threads: int) -> dict:
        """Measured in the same run; 0 threads: a GPU's."""
        found = self.run.about["machine"].get("ceilings", {})
        return found.get(str(threads) if threads else "cuda", {})

    @cached_property
    def data(self) -> dict:
        """The products of training, or the runs of generation, of each side the best."""
        if self.kind == TRAINING:
            return {"products": [case for case in derived(self.run) if case["op"] in PASSES]}
        cases = derived(self.run) if self.kind == GENERATION else ()
        return {"runs": [_generation(case) for case in cases]}


def _generation(case: dict) -> dict:
    best = {"dense": case["best_dense"], "sparse": case["ours"]}
    sides = {side: case["ways"][name] for side, name in best.items()}
    dense, sparse = sides.values()
    return {
        "sparsity": case["sparsity"],
        "batch": case["batch"],
        "context": case.get("context"),
        "speedup": case["speedup"],
        "block_bytes_ratio": sparse["bytes"] / dense["bytes"],
        **{
            side: {
                "tokens_per_s": case["batch"] * case["tokens"] / way["median_s"],
                "first_token_s": way.get("first_token_s"),
            }
            for side, way in sides.items()
        },
    }


def load(folder: Path) -> list[Result]:
    """All tables in a folder and in those in it, by name; calls and the like have no section."""
    if not folder.is_dir():
        if folder.exists():
            raise ValueError(f"results: expected a folder, {folder} is none")
        raise FileNotFoundError(
            f"results: expected a folder of tables that bench --out wrote, {folder} does not exist"
        )
    found = [read(path) for path in sorted(folder.rglob(f"*{records.SUFFIX}"))]
    return [result for result in found if result]


def read(path: Path) -> Result | None:
    """One table; None where it has no section."""
    try:
        run = records.read(path)
        if kind := KINDS.get(run.about["benchmark"]):
            result = Result(path, kind, run)
            _ = result.about, result.records, result.data  # what the page will read
            return result
    except (AttributeError, LookupError, TypeError, ValueError) as error:
        raise records.damaged(path, error) from error
    return None
