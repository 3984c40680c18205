"""Plots of the model; matplotlib is imported when one is drawn."""

from collections.abc import Sequence
from pathlib import Path

from ..extras import require
from ..files import write_picture
from .balance import binomial_imbalance
from .cost import compare_with_dense, step_cost
from .inputs import Inputs
from .machine import Machine
from .mesh import MeshCycles
from .product import product_cycles, stream_bytes
from .sensitivity import Swing
from .shapes import FLOP_PER_FMA, GPTShape, gpt_shape
from .sweep import FULL_TOKENS, MODELS, default_batch

# Okabe and Ito's palette: told apart by every kind of colour vision.
COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000")
SPARSITIES = tuple(percent / 100 for percent in range(0, 96, 5))
SQUARE = 12_288
# Of pre-training's steps. 15%: the two phases of the variable SPDF configuration; 5%: for example.
FINE_TUNING_SHARES = (0.0, 0.05, 0.15)


def speedup(machine: Machine, inputs: Inputs):
    """Against sparsity: 12k x 12k and each GPT; ideal and Amdahl lines."""
    figure, panels = _figure(2, width=11)
    percents = [100 * s for s in SPARSITIES]

    def square(density: float) -> MeshCycles:
        return product_cycles(machine, inputs, FULL_TOKENS, SQUARE, SQUARE, density)

    dense = square(1.0).total
    ideal = [1 / (1 - s) for s in SPARSITIES]
    panels[0].plot(percents, ideal, color="black", linestyle="--", label="ideal 1 / (1 - s)")
    ratios = [dense / square(1 - s).total for s in SPARSITIES]
    panels[0].plot(percents, ratios, color=COLOURS[0], label="predicted")
    panels[0].set(title=f"one product, {SQUARE} x {SQUARE}", ylabel="times faster than dense")
    panels[1].plot(percents, ideal, color="black", linestyle="--", label="ideal 1 / (1 - s)")
    for name, colour in zip(MODELS, COLOURS, strict=False):
        batch = default_batch(name, 1)
        found = [
            compare_with_dense(machine, gpt_shape(name), 1 - s, batch, 1, inputs)
            for s in SPARSITIES
        ]
        panels[1].plot(percents, [f.speedup for f in found], color=colour, label=name)
        panels[1].plot(percents, [f.amdahl_cap for f in found], color=colour, linestyle=":")
    panels[1].set(title="a training step (dotted: Amdahl cap)")
    for panel in panels:
        panel.set(xlabel="zeros in the linear layers (%)", yscale="log")
        panel.set_yticks([1, 2, 4, 8, 16], ["1x", "2x", "4x", "8x", "16x"])
    return figure


def stacked_time(machine: Machine, inputs: Inputs, shape: GPTShape):
    """Where the wafer's time goes, against sparsity."""
    figure, (panel,) = _figure(1, width=7)
    batch = max(1, FULL_TOKENS // shape.sequence)
    parts: dict[str, list[float]] = {}
    for sparsity in SPARSITIES:
        cost = step_cost(machine, shape, 1 - sparsity, batch, inputs=inputs)
        phases = (cost.forward, cost.backward)
        found = {
            "linear layers": sum(p.linear_s for p in phases),
            "attention": sum(p.attention_s for p in phases),
            "head": sum(p.head_s for p in phases),
            "recompute": sum(p.recompute_s for p in phases),
            "waiting for I/O": cost.io_share * cost.step_s,
        }
        for name, seconds in found.items():
            parts.setdefault(name, []).append(seconds)
    percents = [100 * s for s in SPARSITIES]
    panel.stackplot(percents, *parts.values(), labels=parts, colors=COLOURS)
    panel.set(title=f"{shape.name}: one step", xlabel="zeros in the linear layers (%)", ylabel="s")
    return figure


def roofline(machine: Machine, inputs: Inputs):
    """Useful rate of a 12k x 12k product against the tokens on a system."""
    figure, (panel,) = _figure(1, width=7)
    tokens = [2**e for e in range(8, 21)]
    for density, colour in zip((1.0, 0.5, 0.25, 0.1, 0.05), COLOURS, strict=False):
        rates = []
        for count in tokens:
            cycles = product_cycles(machine, inputs, count, SQUARE, SQUARE, density)
            io_s = stream_bytes(inputs, SQUARE, SQUARE, density) / machine["io_bytes_per_s"]
            seconds = max(cycles.total / machine["clock_hz"], io_s)
            rates.append(FLOP_PER_FMA * count * SQUARE**2 * density / seconds)
        panel.plot(tokens, rates, color=colour, marker=".", label=f"density {density:.0%}")
    panel.axhline(machine.peak_flop_per_s(inputs.precision), color="black", linestyle="--")
    panel.set(
        title=f"roofline, {machine.name} (dashed: dense peak)",
        xlabel="tokens on a system",
        ylabel="useful FLOP/s",
        xscale="log",
        yscale="log",
    )
    return figure


def imbalance(measured: Sequence[tuple[float, float]] = ()):
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
        title="load imbalance", xlabel="nonzeros of a part", ylabel="max / mean", xscale="log"
    )
    return figure


def total_cost(machine: Machine, inputs: Inputs, shape: GPTShape):
    """Sparse pre-training and dense fine-tuning together, over dense pre-training alone."""
    figure, (panel,) = _figure(1, width=7)
    batch = max(1, FULL_TOKENS // shape.sequence)
    percents = [100 * s for s in SPARSITIES]
    relative = [
        1 / compare_with_dense(machine, shape, 1 - s, batch, inputs=inputs).speedup
        for s in SPARSITIES
    ]
    for share, colour in zip(FINE_TUNING_SHARES, COLOURS, strict=False):
        panel.plot(
            percents, [r + share for r in relative], color=colour, label=f"{share:.0%} fine-tuning"
        )
    panel.set(
        title=f"{shape.name}: sparse pre-training + dense fine-tuning",
        xlabel="zeros while pre-training (%)",
        ylabel="time, dense pre-training = 1",
        ylim=(0, 1.2),
    )
    return figure


def sensitivity_bars(swings: list[Swing]):
    figure, (panel,) = _figure(1, width=8)
    shown = [swing for swing in swings if swing.low.startswith("x")][::-1]
    names = [f"{swing.name} ({swing.mark})" for swing in shown]
    for side, colour in (("step_low", COLOURS[0]), ("step_high", COLOURS[1])):
        values = [100 * getattr(swing, side) for swing in shown]
        panel.barh(names, values, color=colour, label=getattr(shown[0], side.removeprefix("step_")))
    panel.set(title="each input 20% down and up", xlabel="change of the step's time (%)")
    return figure


def write(folder: Path, figures: dict[str, object]) -> list[Path]:
    paths = []
    for name, figure in figures.items():
        for panel in figure.axes:
            panel.grid(alpha=0.3)
            panel.legend(frameon=False, fontsize=8)
        paths.append(folder / f"{name}.png")
        write_picture(figure, paths[-1])
    return paths


def _figure(panels: int, width: float):
    # Figure itself, not pyplot: no window system is touched and no figure stays open.
    figure = require("matplotlib.figure", "demo").Figure(figsize=(width, 4.2), layout="constrained")
    return figure, figure.subplots(1, panels, squeeze=False)[0]
