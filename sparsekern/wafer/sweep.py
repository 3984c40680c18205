"""Many configurations: every combination of machines, systems, models, sequence lengths, batches,
utilisations and sparsities."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from itertools import product

from ..terminal import table
from .cost import Comparison, compare_with_dense
from .inputs import Inputs
from .machine import machine
from .models import model_shape
from .shapes import GPTShape

SPARSITIES = (0.0, 0.25, 0.5, 0.6, 0.7, 0.75, 0.8, 0.85, 0.9, 0.95)
MODELS = ("gpt2-small", "gpt3-xl", "gpt-6.7b", "gpt3-175b")
FULL_TOKENS = 2**18  # on a system, by default: what published micro-batches come to


@dataclass(frozen=True)
class Row:
    machine: str
    systems: int
    model: str
    sequence: int
    batch: int
    sparsity: float
    comparison: Comparison

    def as_dict(self) -> dict[str, object]:
        found, cost = self.comparison, self.comparison.sparse
        low, high = found.speedup_range
        return {
            "machine": self.machine,
            "systems": self.systems,
            "model": self.model,
            "sequence": self.sequence,
            "batch": self.batch,
            "utilisation": cost.inputs.utilisation,
            "sparsity": self.sparsity,
            "step_s": cost.step_s,
            "tokens_per_s": cost.tokens_per_s,
            "speedup": found.speedup,
            "speedup_low": low,
            "speedup_high": high,
            "flop_ratio": found.flop_ratio,
            "amdahl_cap": found.amdahl_cap,
            "peak_share": cost.peak_share,
            "io_wait_share": cost.io_share,
            "bound": cost.bound,
            "activations": cost.activations.mode,
            "energy_j": cost.energy_j,
            "joule_per_token": cost.energy_j / cost.tokens,
        }


def default_batch(shape: GPTShape, systems: int) -> int:
    """Sequences that fill every system."""
    return max(1, FULL_TOKENS // shape.sequence) * systems


def sweep(
    models: Sequence[str] = MODELS,
    sparsities: Sequence[float] = SPARSITIES,
    machines: Sequence[str] = ("wse2",),
    systems: Sequence[int] = (1,),
    batch: int | Sequence[int] | None = None,
    inputs: Inputs | None = None,
    sequences: Sequence[int] | None = None,
    utilisations: Sequence[float] | None = None,
    advance: Callable[[], None] = lambda: None,
) -> list[Row]:
    """The predictions of all combinations, a row each.

    `models`, `machines`: names or files, as model_shape and machine take them; `batch`: sequences
    of all systems together, by default each system is full; `sequences`: tokens of one, by default
    the model's; `utilisations`: by default that of `inputs`; `advance` is called after each row."""
    inputs = inputs or Inputs()
    batches = [batch] if batch is None or isinstance(batch, int) else batch
    shapes = [model_shape(name, length) for name in models for length in sequences or [None]]
    given = [replace(inputs, utilisation=u) for u in utilisations or [inputs.utilisation]]
    axes = (list(map(machine, machines)), systems, shapes, batches, given, sparsities)
    rows = []
    for wafer, count, shape, asked, chosen, sparsity in product(*axes):
        together = default_batch(shape, count) if asked is None else asked
        found = compare_with_dense(wafer, shape, 1 - sparsity, together, count, chosen)
        rows.append(Row(wafer.name, count, shape.name, shape.sequence, together, sparsity, found))
        advance()
    return rows


def render(rows: list[Row]) -> str:
    """A table, a line for each row. Speed-ups are ranges: see Comparison.speedup_range."""
    header = ["machine", "model", "systems", "length", "batch", "utilisation", "zeros", "step"]
    header += ["tokens/s", "speed-up", "FLOPs", "of peak", "J/token", "bound", "memory"]
    lines = []
    for row in rows:
        found, cost = row.comparison, row.comparison.sparse
        low, high = found.speedup_range
        lines.append(
            [
                row.machine,
                row.model,
                row.systems,
                row.sequence,
                row.batch,
                f"{cost.inputs.utilisation:.3g}",
                f"{row.sparsity:.0%}",
                f"{cost.step_s:.3g} s",
                f"{cost.tokens_per_s:,.0f}",
                f"{low:.2f} to {high:.2f}x",
                f"{found.flop_ratio:.2f}x",
                f"{cost.peak_share:.0%}",
                f"{cost.energy_j / cost.tokens:.3g}",
                cost.bound,
                cost.activations.mode,
            ]
        )
    return table(header, lines, left=2)
