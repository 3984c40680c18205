"""The machine that the page runs on, and the CPU results that are of it or come nearest to it."""

from collections.abc import Sequence
from dataclasses import dataclass

from ..bench import machine
from .curves import plain
from .load import PRODUCTS, Result
from .measured import Processor, processor_of


@dataclass(frozen=True)
class Choice:
    """The CPU results that the page begins with; `is_here`: measured on this machine."""

    here: Processor
    result: Result | None
    is_here: bool

    def words(self) -> str:
        """What the page says of this machine."""
        measure = "`python -m sparsekern bench` measures it in some minutes"
        if self.result is None:
            return f"This machine: {self.here}. Nothing was measured on any CPU; {measure}."
        if self.is_here:
            return f"This machine: {self.here}. The CPU figures were measured here."
        return (
            f"This machine: {self.here}. It has no results of its own: {measure}, and then this "
            "page begins with them. Until then the CPU figures are those of the nearest machine "
            f"that was measured: {processor_of(self.result)}."
        )


def this() -> Processor:
    about = machine.about_cpu()
    return Processor(about["cpu"], about["cores"], about["isa"])


def choose(results: Sequence[Result], here: Processor, own: Result | None = None) -> Choice:
    """`own` results first, then those of the same processor, then of the same instruction set, then
    of the number of cores most like ours; of equals those with the most kinds of measurement, then
    the newest."""

    def rank(result: Result) -> tuple:
        other = processor_of(result)
        kinds = {(r["op"], r.get("M"), r["threads"]) for r in result.records}
        like = other == here, other.isa == here.isa, -abs(other.cores - here.cores)
        return result is own, *like, len(kinds), result.path.name

    found = max(filter(is_of_a_cpu, results), key=rank, default=None)
    return Choice(here, found, found is not None and processor_of(found) == here)


def is_of_a_cpu(result: Result) -> bool:
    """Products of a CPU, on random masks."""
    return result.kind == PRODUCTS and any(r["device"] == "cpu" for r in plain(result.records))
