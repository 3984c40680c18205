"""What the page takes out of the results beside their records: machines, ceilings, whole runs."""

from collections.abc import Sequence
from dataclasses import dataclass
from statistics import mean

from ..bench.records import select
from .load import EXPERIMENTS, GENERATION, Result


@dataclass(frozen=True)
class Processor:
    name: str
    cores: int
    isa: str  # of our kernels

    def __str__(self) -> str:
        return f"{self.name}, {self.cores} core{'s' * (self.cores > 1)}, {self.isa}"


def processor_of(result: Result) -> Processor:
    about = result.run.about["machine"]
    return Processor(about["cpu"], about["cores"], about["isa"])


def gpu_of(result: Result) -> str:
    return result.run.about["machine"]["gpu"]


@dataclass(frozen=True)
class Generation:
    """Writing with a GPT, dense and sparse; seconds to the first token where they were taken."""

    model: str
    where: str
    sparsity: float
    batch: int
    tokens_per_s: tuple[float, float]  # dense, sparse
    first_token_s: tuple[float, float] | None
    memory_ratio: float | None  # of the blocks' weights

    @property
    def speedup(self) -> float:
        return self.tokens_per_s[1] / self.tokens_per_s[0]

    @property
    def first_speedup(self) -> float | None:
        return self.first_token_s and self.first_token_s[0] / self.first_token_s[1]

    @property
    def name(self) -> str:
        return f"{self.model}, {self.where}, {self.sparsity:.0%}, batch {self.batch}"


def generations(result: Result) -> list[Generation]:
    if result.kind == GENERATION:
        return [
            Generation(
                result.run.records[0]["model"],
                gpu_of(result).removeprefix("NVIDIA "),
                run["sparsity"],
                run["batch"],
                (run["dense"]["tokens_per_s"], run["sparse"]["tokens_per_s"]),
                (run["dense"]["first_token_s"], run["sparse"]["first_token_s"]),
                run["block_bytes_ratio"],
            )
            for run in result.data["runs"]
        ]
    return [
        Generation(
            r["model"],
            "CPU",
            r["sparsity"],
            r["batch"],
            (r["batch"] * r["tokens"] / r["dense_s"], r["batch"] * r["tokens"] / r["ours_s"]),
            None,
            None,
        )
        for r in select(result.records, op="generate")
    ]


def trained(result: Result, kind: str = "pretrain") -> dict[float, dict[int, dict]]:
    """Sparsity -> seed -> run of the experiments; of fine-tunings at several rates the best. Runs
    that diverged are left out."""
    found: dict[float, dict[int, dict]] = {}
    for key, run in result.data.items() if result.kind == EXPERIMENTS else ():
        words = key.split()
        if words[0] == kind and "step_s" in run:
            seeds = found.setdefault(float(words[1]), {})
            seed = int(words[3])
            seeds[seed] = min(run, seeds.get(seed, run), key=lambda r: r["loss"])
    return dict(sorted(found.items()))


def costs(runs: dict[float, dict[int, dict]]) -> dict[float, list[float]]:
    """Sparsity -> loss above the dense run of the same seed, one for each seed that both have."""
    dense = runs.get(0.0, {})
    return {
        s: [run["loss"] - dense[seed]["loss"] for seed, run in seeds.items() if seed in dense]
        for s, seeds in runs.items()
        if s
    }


def mean_cost(found: Sequence[float]) -> str:
    """'+0.10 (three seeds, 0.05 to 0.13)'"""
    text = f"{mean(found):+.2f}"
    if len(found) > 1:
        text += f" ({len(found)} seeds, {min(found):.2f} to {max(found):.2f})"
    return text
