"""How a prediction depends on its inputs: each 20% up and down, assumed ones over their range."""

from dataclasses import dataclass, replace

from .cost import compare_with_dense
from .inputs import RANGES, Inputs
from .machine import Machine
from .shapes import GPTShape

CHANGE = 0.2
BAR_WIDTH = 20  # characters of the widest bar
# Neither enters the time of a step.
UNUSED_FIGURES = ("cores", "power_w", "fma32_per_cycle")


@dataclass(frozen=True)
class Swing:
    """Changes of step time and speed-up, relative to those of the inputs as they are."""

    name: str
    mark: str
    low: str
    high: str
    step_low: float
    step_high: float
    speedup_low: float
    speedup_high: float

    @property
    def width(self) -> float:
        return max(abs(self.step_low), abs(self.step_high))


def sensitivity(
    machine: Machine, shape: GPTShape, density: float, batch: int, inputs: Inputs | None = None
) -> list[Swing]:
    """Widest first. A share is never scaled above 1."""
    inputs = inputs or Inputs()
    base = compare_with_dense(machine, shape, density, batch, inputs=inputs)

    def changes(changed: Machine, given: Inputs) -> tuple[float, float]:
        found = compare_with_dense(changed, shape, density, batch, inputs=given)
        return (
            found.sparse.step_s / base.sparse.step_s - 1,
            found.speedup / base.speedup - 1,
        )

    swings = []
    factors = (1 - CHANGE, 1 + CHANGE)
    labels = tuple(f"x {factor:g}" for factor in factors)
    for name, figure in machine.figures().items():
        if name in UNUSED_FIGURES:
            continue
        low, high = (
            changes(replace(machine, **{name: figure.scaled(factor)}), inputs) for factor in factors
        )
        swings.append(Swing(name, figure.mark, *labels, low[0], high[0], low[1], high[1]))
    for name, span in RANGES.items():
        low, high = (changes(machine, inputs.scaled(name, factor)) for factor in factors)
        swings.append(Swing(name, "assumed", *labels, low[0], high[0], low[1], high[1]))
        low, high = (
            changes(machine, replace(inputs, **{name: value})) for value in (span.low, span.high)
        )
        ends = (f"= {span.low:g}", f"= {span.high:g}")
        swings.append(Swing(name, "its range", *ends, low[0], high[0], low[1], high[1]))
    return sorted(swings, key=lambda swing: -swing.width)


def render(swings: list[Swing]) -> str:
    widest = max(swing.width for swing in swings) or 1.0
    lines = [f"{'input':<24} {'mark':<12} {'change':<16} {'step time':>16} {'speed-up':>16}"]
    for swing in swings:
        bar = "#" * round(BAR_WIDTH * swing.width / widest)
        lines.append(
            f"{swing.name:<24} {swing.mark:<12} {swing.low + ', ' + swing.high:<16} "
            f"{swing.step_low:>+8.1%} {swing.step_high:>+7.1%} "
            f"{swing.speedup_low:>+8.1%} {swing.speedup_high:>+7.1%}  {bar}".rstrip()
        )
    return "\n".join(lines)
