"""Plots of the model; matplotlib is imported when one is drawn.

Each says that utilisation is calibrated, and shows its range where the range changes what is drawn:
it divides out of ratios. Ratios show the range of what a score costs instead.
"""

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

from ..extras import require
from ..files import write_picture
from .balance import binomial_imbalance
from .cost import StepCost, compare_with_dense, step_cost
from .inference import inference_cost
from .inputs import RANGES, Inputs
from .machine import FLOP_PER_FMA, Machine
from .mesh import MeshCycles
from .models import model_shape
from .product import product_cycles, stream_bytes
from .sensitivity import Swing
from .shapes import GPTShape, gpt_shape
from .sweep import FULL_TOKENS, MODELS, default_batch

# Okabe and Ito's palette: told apart by every kind of colour vision.
COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000")
SPARSITIES = tuple(percent / 100 for percent in range(0, 96, 5))
SQUARE = 12_288
CONTEXTS = tuple(2**e for e in range(9, 18))
# Of pre-training's steps. 15%: the two phases of the variable SPDF configuration; 5%: for example.
FINE_TUNING_SHARES = (0.0, 0.05, 0.15)


def speedup(machine: Machine, inputs: Inputs):
    """Against sparsity: 12k x 12k and each GPT, whose band is what a score may cost."""
    figure, panels = _figure(2, width=11)
    percents = [100 * s for s in SPARSITIES]

    def square(density: float) -> MeshCycles:
        return product_cycles(machine, inputs, FULL_TOKENS, SQUARE, SQUARE, density)

    dense = square(1.0).total
    ideal = [1 / (1 - s) for s in SPARSITIES]
    ratios = [dense / square(1 - s).total for s in SPARSITIES]
    panels[0].plot(percents, ratios, color=COLOURS[0], label="predicted")
    title = f"One product, {SQUARE} x {SQUARE}: {ratios[-2]:.1f} times dense at {percents[-2]:.0f}%"
    panels[0].set(title=title, ylabel="times faster than dense")
    for name, colour in zip(MODELS, COLOURS, strict=False):
        shape = gpt_shape(name)
        found = [
            compare_with_dense(machine, shape, 1 - s, default_batch(shape, 1), 1, inputs)
            for s in SPARSITIES
        ]
        low, high = zip(*(f.speedup_range for f in found), strict=True)
        panels[1].fill_between(percents, low, high, color=colour, alpha=0.3, label=name)
        panels[1].plot(percents, [f.speedup for f in found], color=colour)
    panels[1].set(title="A training step (bands: a score at its highest and at no cost)")
    for panel in panels:
        panel.plot(percents, ideal, color="black", linestyle="--", label="1 / density")
        panel.set(xlabel="zeros in the linear layers (%)", yscale="log")
        panel.set_yticks([1, 2, 4, 8, 16], ["1x", "2x", "4x", "8x", "16x"])
    return _told(figure, inputs, "divides out of ratios")


def stacked_time(machine: Machine, inputs: Inputs, shape: GPTShape):
    """Where the wafer's time goes, against sparsity."""
    figure, (panel,) = _figure(1, width=7)

    def steps(given: Inputs) -> list[StepCost]:
        batch = default_batch(shape, 1)
        return [step_cost(machine, shape, 1 - s, batch, inputs=given) for s in SPARSITIES]

    found = steps(inputs)
    parts = {name: [cost.time_parts[name] for cost in found] for name in found[0].time_parts}
    percents = [100 * s for s in SPARSITIES]
    panel.stackplot(percents, *parts.values(), labels=parts, colors=COLOURS)
    low, high = (
        [cost.step_s for cost in steps(replace(inputs, utilisation=u))] for u in _ends(inputs)
    )
    panel.plot(percents, low, color="black", linestyle=":", label="range of utilisation")
    panel.plot(percents, high, color="black", linestyle=":")
    share = parts["linear layers"][-1] / found[-1].step_s
    title = f"{shape.name}: at 95% zeros the linear layers take {share:.0%} of a step"
    panel.set(title=title, xlabel="zeros in the linear layers (%)", ylabel="s", ylim=0)
    return _told(figure, inputs)


def roofline(machine: Machine, inputs: Inputs):
    """Useful rate of a 12k x 12k product against the tokens on a system."""
    figure, (panel,) = _figure(1, width=7)
    tokens = [2**e for e in range(8, 21)]

    def rate(given: Inputs, count: int, density: float) -> float:
        cycles = product_cycles(machine, given, count, SQUARE, SQUARE, density)
        io_s = stream_bytes(given, SQUARE, SQUARE, density) / machine["io_bytes_per_s"]
        useful = FLOP_PER_FMA * count * SQUARE**2 * density
        return useful / max(cycles.total / machine["clock_hz"], io_s)

    for density, colour in zip((1.0, 0.5, 0.25, 0.1, 0.05), COLOURS, strict=False):
        rates = [rate(inputs, count, density) for count in tokens]
        panel.plot(tokens, rates, color=colour, marker=".", label=f"density {density:.0%}")
        if density in (1.0, 0.05):
            low, high = (
                [rate(replace(inputs, utilisation=u), count, density) for count in tokens]
                for u in reversed(_ends(inputs))
            )
            panel.fill_between(tokens, low, high, color=colour, alpha=0.2)
    panel.axhline(machine.peak_flop_per_s(inputs.precision), color="black", linestyle="--")
    panel.set(
        title=f"{machine.name}: few tokens wait for the weights (dashed: dense peak)",
        xlabel="tokens on a system",
        ylabel="useful FLOP/s",
        xscale="log",
        yscale="log",
    )
    return _told(figure, inputs, "shown as bands")


def decode(machine: Machine, inputs: Inputs, name: str = "llama3-8b"):
    """Tokens a second of all requests against the context of each, as far as their cache fits."""
    figure, (panel,) = _figure(1, width=7)
    shape = model_shape(name)
    for requests, colour in zip((1, 4, 16, 64), COLOURS, strict=False):

        def rates(given: Inputs, requests: int = requests) -> dict[int, float]:
            found = (inference_cost(machine, shape, 1.0, given, n, requests) for n in CONTEXTS)
            return {cost.context: cost.throughput_tokens_per_s for cost in found if cost.fits}

        shown = rates(inputs)
        low, high = (rates(replace(inputs, utilisation=u)).values() for u in _ends(inputs)[::-1])
        label = f"{requests} request{'s' * (requests > 1)}"
        panel.plot(shown.keys(), shown.values(), color=colour, marker=".", label=label)
        panel.fill_between(list(shown), list(low), list(high), color=colour, alpha=0.2)
    panel.set(
        title=f"{shape.name} on {machine.name}: the SRAM ends a context, not the time",
        xlabel="context (tokens)",
        ylabel="tokens/s, all requests",
        xscale="log",
        yscale="log",
    )
    return _told(figure, inputs, "shown as bands")


def imbalance(inputs: Inputs, measured: Sequence[tuple[float, float]] = ()):
    """Against nonzeros a PE; `measured` (nonzeros, imbalance) if a data set was given."""
    figure, (panel,) = _figure(1, width=7)
    nonzeros = [2**e for e in range(3, 15)]
    for pes, colour in zip((512, 16_384, 745_500), COLOURS, strict=False):
        values = [binomial_imbalance(pes, 4 * n, 0.25) for n in nonzeros]
        panel.plot(nonzeros, values, color=colour, label=f"{pes:,} parts, density 25%")
    if measured:
        panel.scatter(
            *zip(*measured, strict=True), color="black", s=14, label="WSE-2 kernels, CSC, CSR"
        )
    panel.set(
        title="Uneven parts: few nonzeros in each cost most",
        xlabel="nonzeros of a part",
        ylabel="max / mean",
        xscale="log",
    )
    return _told(figure, inputs, "it does not enter")


def total_cost(machine: Machine, inputs: Inputs, shape: GPTShape):
    """Sparse pre-training and dense fine-tuning together, over dense pre-training alone."""
    figure, (panel,) = _figure(1, width=7)
    batch = default_batch(shape, 1)
    percents = [100 * s for s in SPARSITIES]
    found = [compare_with_dense(machine, shape, 1 - s, batch, inputs=inputs) for s in SPARSITIES]
    low, high = zip(*(f.speedup_range for f in found), strict=True)
    for share, colour in zip(FINE_TUNING_SHARES, COLOURS, strict=False):
        ends = [[1 / x + share for x in side] for side in (high, low)]
        panel.fill_between(percents, *ends, color=colour, alpha=0.3)
        middle = [1 / f.speedup + share for f in found]
        panel.plot(percents, middle, color=colour, label=f"{share:.0%} fine-tuning")
    panel.set(
        title=f"{shape.name}: sparse pre-training, then dense fine-tuning",
        xlabel="zeros while pre-training (%)",
        ylabel="time, dense pre-training = 1",
        ylim=(0, 1.2),
    )
    return _told(figure, inputs, "divides out; bands: what a score costs")


def sensitivity_bars(swings: list[Swing], inputs: Inputs):
    """Changes of a step's time, of what changes it at all."""
    figure, (panel,) = _figure(1, width=8)
    moved = [swing for swing in swings if max(abs(swing.step_low), abs(swing.step_high)) > 5e-4]
    shown = [swing for swing in moved if swing.low.startswith("x")][::-1]
    names = [f"{swing.name} ({swing.mark})" for swing in shown]
    for side, colour in (("step_low", COLOURS[0]), ("step_high", COLOURS[1])):
        values = [100 * getattr(swing, side) for swing in shown]
        panel.barh(names, values, color=colour, label=getattr(shown[0], side.removeprefix("step_")))
    title = f"{shown[-1].name} matters most (each input 20% down and up)"
    panel.set(title=title, xlabel="change of the step's time (%)")
    return _told(figure, inputs, "over that range: the table")


def write(folder: Path, name: str, figure) -> Path:
    """Write a figure as a PNG."""
    for panel in figure.axes:
        panel.grid(alpha=0.3)
        panel.legend(frameon=False, fontsize=8)
    path = folder / f"{name}.png"
    write_picture(figure, path)
    return path


def _ends(inputs: Inputs) -> tuple[float, float]:
    """Utilisations of the fastest and of the slowest step in the range."""
    span = RANGES["utilisation"]
    return max(span.high, inputs.utilisation), min(span.low, inputs.utilisation)


def note(inputs: Inputs) -> str:
    """What every absolute time hangs on."""
    span, used = RANGES["utilisation"], inputs.utilisation
    known = "is" if used == Inputs.utilisation else f"was asked for, {Inputs.utilisation:.3g} is"
    return (
        f"utilisation {used:.3g} {known} calibrated on one run of a CS-2, its range is "
        f"{span.low:g} to {span.high:g}"
    )


def _told(figure, inputs: Inputs, more: str = "shown as dotted lines"):
    figure.supxlabel(f"{note(inputs)}: {more}", fontsize=8, color="#555555")
    return figure


def _figure(panels: int, width: float):
    # Figure itself, not pyplot: no window system is touched and no figure stays open.
    figure = require("matplotlib.figure", "demo").Figure(figsize=(width, 4.2), layout="constrained")
    return figure, figure.subplots(1, panels, squeeze=False)[0]
