"""What the page is made of, and which results and records it takes for each of its questions."""

from collections.abc import Sequence
from dataclasses import dataclass

from ..bench.records import groups, select
from . import measured
from .curves import Curve, plain
from .load import Result
from .nearest import Choice

FEW = 64  # tokens of a product, at most, that count as few on a GPU
MANY = 256  # tokens from which on a product counts as one of training
STEP = "train_step"


@dataclass
class Panel:
    """A figure under a title that says what is seen, and the files that it is of."""

    title: str  # empty where the section's says it
    figure: object
    files: Sequence[Result]


@dataclass
class Section:
    """A part of the page: a title that says what is seen, text, figures and perhaps a table."""

    title: str
    text: str
    panels: list[Panel]
    header: Sequence[str] = ()
    rows: Sequence[Sequence[object]] = ()


@dataclass(frozen=True)
class View:
    """The results, and which of them the page takes for each question: of several the newest."""

    results: Sequence[Result]
    cpu: Choice

    def last(self, fits) -> Result | None:
        return next((r for r in reversed(self.results) if fits(r)), None)

    @staticmethod
    def present(*results: Result | None) -> list[Result]:
        return [result for result in results if result]

    @property
    def decode(self) -> Result | None:
        """Products of few tokens on a GPU."""
        return self.last(lambda r: 1 < len(_tokens(r)) and max(_tokens(r)) <= FEW)

    @property
    def map(self) -> Result | None:
        """Products of few and of many tokens on a GPU, by forward alone."""
        return self.last(lambda r: max(_tokens(r), default=0) > FEW and _ops(r) == {"spmm"})

    @property
    def gpu(self) -> Result | None:
        """Gradients of products on a GPU."""
        return self.last(lambda r: _ops(r) - {"spmm", "generate", STEP} and is_of_a_gpu(r))

    @property
    def gpu_steps(self) -> Result | None:
        """Training steps of whole models on a GPU."""
        return self.last(lambda r: STEP in _ops(r))

    def words(self) -> str:
        """What the page says of this machine, and of the one with the GPU."""
        found = self.present(self.decode, self.map, self.gpu, self.gpu_steps)
        gpus = {measured.gpu_of(result) for result in found}
        if not gpus:
            return self.cpu.words()
        return f"{self.cpu.words()} The GPU figures are of an {' and an '.join(sorted(gpus))}."


def is_of_a_gpu(result: Result) -> bool:
    return any(r["device"] == "cuda" for r in result.records)


def _tokens(result: Result) -> set[int]:
    return {r["M"] for r in select(result.records, device="cuda", op="spmm")}


def _ops(result: Result) -> set[str]:
    return {r["op"] for r in select(result.records, device="cuda")}


def threads_of(records: Sequence[dict]) -> int:
    """The number of threads with the most records."""
    alike = groups(records, lambda r: r["threads"])
    return max(((len(found), threads) for (threads,), found in alike.items()), default=(0, 0))[1]


def cpu_products(view: View) -> list[dict]:
    """Of one number of threads."""
    records = plain(view.cpu.result.records) if view.cpu.result else []
    return select(records, threads=threads_of(records))


def model_of(record: dict) -> str:
    """The model of a training step, and its masks where they are not free."""
    return record["model"] + (", two-way masks" if record.get("mask") == "two-way" else "")


def steps(result: Result | None) -> dict[tuple[str, int], Curve]:
    """(model, threads) -> times dense of a whole training step."""
    found = groups(
        select(result.records if result else [], op=STEP),
        model_of,
        lambda r: r["threads"],
    )
    return {key: {r["sparsity"]: r["speedup"] for r in rows} for key, rows in sorted(found.items())}


def main_step(result: Result | None) -> tuple[str, Curve]:
    """The model measured at most shares of zeros, with as many threads as there are."""
    found = steps(result)
    if not found:
        return "", {}
    (model, _), best = max(found.items(), key=lambda item: (len(item[1]), item[0][1]))
    return f"the {model}'s GPT" if model == "demo" else model, best
