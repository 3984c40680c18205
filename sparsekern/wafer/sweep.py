"""Many configurations: every combination of models, sparsities, machines and systems."""

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import product

from ..terminal import table
from .cost import Comparison, compare_with_dense
from .inputs import Inputs
from .machine import machine
from .shapes import gpt_shape

SPARSITIES = (0.0, 0.25, 0.5, 0.6, 0.7, 0.75, 0.8, 0.85, 0.9, 0.95)
MODELS = ("gpt2-small", "gpt3-xl", "gpt-6.7b", "gpt3-175b")
FULL_TOKENS = 2**18  # on a system, by default: what published micro-batches come to


@dataclass(frozen=True)
class Row:
    machine: str
    systems: int
    model: str
    batch: int
    sparsity: float
    comparison: Comparison

    def as_dict(self) -> dict[str, object]:
        found, cost = self.comparison, self.comparison.sparse
        return {
            "machine": self.machine,
            "systems": self.systems,
            "model": self.model,
            "batch": self.batch,
            "sparsity": self.sparsity,
            "step_s": cost.step_s,
            "tokens_per_s": cost.tokens_per_s,
            "speedup": found.speedup,
            "flop_ratio": found.flop_ratio,
            "amdahl_cap": found.amdahl_cap,
            "peak_share": cost.peak_share,
            "io_wait_share": cost.io_share,
            "bound": cost.bound,
            "activations": cost.activations.mode,
            "energy_j": cost.energy_j,
        }


def default_batch(model: str, systems: int) -> int:
    """Sequences that fill every system."""
    return max(1, FULL_TOKENS // gpt_shape(model).sequence) * systems


def sweep(
    models: Sequence[str] = MODELS,
    sparsities: Sequence[float] = SPARSITIES,
    machines: Sequence[str] = ("wse2",),
    systems: Sequence[int] = (1,),
    batch: int | None = None,
    inputs: Inputs | None = None,
) -> list[Row]:
    """`batch`: sequences of all systems together; by default each system is full.
    `machines`: names or TOML files, as `machine` takes them."""
    wafers = [machine(name) for name in machines]
    rows = []
    for wafer, count, model, sparsity in product(wafers, systems, models, sparsities):
        sequences = default_batch(model, count) if batch is None else batch
        found = compare_with_dense(wafer, gpt_shape(model), 1 - sparsity, sequences, count, inputs)
        rows.append(Row(wafer.name, count, model, sequences, sparsity, found))
    return rows


def render(rows: list[Row]) -> str:
    header = ["machine", "model", "systems", "batch", "zeros", "step", "tokens/s", "speed-up"]
    header += ["FLOPs", "cap", "of peak", "bound", "activations"]
    lines = []
    for row in rows:
        found, cost = row.comparison, row.comparison.sparse
        lines.append(
            [
                row.machine,
                row.model,
                row.systems,
                row.batch,
                f"{row.sparsity:.0%}",
                f"{cost.step_s:.3g} s",
                f"{cost.tokens_per_s:,.0f}",
                f"{found.speedup:.2f}x",
                f"{found.flop_ratio:.2f}x",
                f"{found.amdahl_cap:.2f}x",
                f"{cost.peak_share:.0%}",
                cost.bound,
                cost.activations.mode,
            ]
        )
    return table(header, lines, left=2)
