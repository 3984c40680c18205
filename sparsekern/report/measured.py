"""What the page takes out of the results beside their records: machines, ceilings, whole runs."""

from dataclasses import dataclass

from ..bench.records import select
from .load import GENERATION, Result


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
    context: int | None = None  # tokens of a prompt

    @property
    def speedup(self) -> float:
        return self.tokens_per_s[1] / self.tokens_per_s[0]

    @property
    def first_speedup(self) -> float | None:
        return self.first_token_s and self.first_token_s[0] / self.first_token_s[1]

    @property
    def name(self) -> str:
        prompt = f", prompt {self.context}" if self.context else ""
        return f"{self.model}, {self.where}, {self.sparsity:.0%}, batch {self.batch}{prompt}"


def generations(result: Result) -> list[Generation]:
    if result.kind == GENERATION:
        return [
            Generation(
                result.run.records[0]["model"],
                gpu_of(result).removeprefix("NVIDIA "),
                run["sparsity"],
                run["batch"],
                (run["dense"]["tokens_per_s"], run["sparse"]["tokens_per_s"]),
                _first_tokens(run),
                run["block_bytes_ratio"],
                run["context"],
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


def _first_tokens(run: dict) -> tuple[float, float] | None:
    """Seconds, dense and sparse, where the prompt was read."""
    dense_s, sparse_s = (run[side]["first_token_s"] for side in ("dense", "sparse"))
    return dense_s and (dense_s, sparse_s)
