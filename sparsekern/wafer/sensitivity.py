"""How a prediction depends on its inputs: every figure of the machine and every input 20% up and
down, inputs over their range too."""

from dataclasses import dataclass, replace

from .cost import compare_with_dense
from .inputs import RANGES, Inputs
from .machine import Machine
from .shapes import GPTShape

CHANGE = 0.2
BAR_WIDTH = 20  # characters of the widest bar


@dataclass(frozen=True)
class Swing:
    """Changes of a sparse step's time and energy and of its speed-up, relative to those of the
    inputs as they are, at a low and at a high value of one input."""

    name: str
    mark: str
    low: str
    high: str
    step_low: float
    step_high: float
    speedup_low: float
    speedup_high: float
    energy_low: float
    energy_high: float

    @property
    def width(self) -> float:
        """The largest change of time, or where that does not change, of energy: it ranks lower."""
        step = max(abs(self.step_low), abs(self.step_high))
        return step or 1e-6 * max(abs(self.energy_low), abs(self.energy_high))


def sensitivity(
    machine: Machine, shape: GPTShape, density: float, batch: int, inputs: Inputs | None = None
) -> list[Swing]:
    """Swings of every figure and input, widest first. A share is never scaled above 1."""
    inputs = inputs or Inputs()
    base = compare_with_dense(machine, shape, density, batch, inputs=inputs)

    def change(changed: Machine, given: Inputs) -> tuple[float, float, float]:
        found = compare_with_dense(changed, shape, density, batch, inputs=given)
        return (
            found.sparse.step_s / base.sparse.step_s - 1,
            found.speedup / base.speedup - 1,
            found.sparse.energy_j / base.sparse.energy_j - 1,
        )

    def swing(name: str, mark: str, labels: tuple[str, str], ends: list) -> Swing:
        pairs = zip(*(change(*end) for end in ends), strict=True)
        return Swing(name, mark, *labels, *(value for pair in pairs for value in pair))

    swings = []
    factors = (1 - CHANGE, 1 + CHANGE)
    labels = (f"x {factors[0]:g}", f"x {factors[1]:g}")
    for name, figure in machine.figures().items():
        ends = [(replace(machine, **{name: figure.scaled(x)}), inputs) for x in factors]
        swings.append(swing(name, figure.mark, labels, ends))
    for name, span in RANGES.items():
        ends = [(machine, inputs.scaled(name, x)) for x in factors]
        swings.append(swing(name, span.mark, labels, ends))
        ends = [(machine, replace(inputs, **{name: value})) for value in (span.low, span.high)]
        swings.append(swing(name, "its range", (f"= {span.low:g}", f"= {span.high:g}"), ends))
    return sorted(swings, key=lambda swing: -swing.width)


def render(swings: list[Swing]) -> str:
    """A line for each swing, with a bar of its width."""
    widest = max(swing.width for swing in swings) or 1.0
    head = f"{'step time':>16} {'speed-up':>16} {'energy':>16}"
    lines = [f"{'input':<24} {'mark':<12} {'change':<16} {head}"]
    for swing in swings:
        bar = "#" * round(BAR_WIDTH * swing.width / widest)
        lines.append(
            f"{swing.name:<24} {swing.mark:<12} {swing.low + ', ' + swing.high:<16} "
            f"{swing.step_low:>+8.1%} {swing.step_high:>+7.1%} "
            f"{swing.speedup_low:>+8.1%} {swing.speedup_high:>+7.1%} "
            f"{swing.energy_low:>+8.1%} {swing.energy_high:>+7.1%}  {bar}".rstrip()
        )
    return "\n".join(lines)
