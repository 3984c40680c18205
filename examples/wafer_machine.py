"""What the same zeros would do on a wafer-scale machine, whose cores skip every zero, and how that
depends on the machine.

    python examples/wafer_machine.py

prints

    GPT-3 XL, 75% zeros, 2.49x fewer FLOPs than dense
    wse2: 2.37x as fast as its dense step (bound by compute)
    half-sram: 2.41x as fast as its dense step (bound by compute), 0.53 of the speed of wse2
    narrow-links: 1.90x as fast as its dense step (bound by I/O), 0.35 of the speed of wse2

Ratios are what this model is for: its absolute times are not validated.
"""

from dataclasses import replace

from sparsekern.wafer.cost import compare_with_dense
from sparsekern.wafer.machine import Figure, Machine, machine
from sparsekern.wafer.shapes import gpt_shape

MODEL = gpt_shape("gpt3-xl")
DENSITY = 0.25
SEQUENCES = 128  # of a step


def changed(name: str, figure: str, factor: float) -> Machine:
    """The WSE-2 with one figure multiplied. A figure is a value, a unit, a mark (read, second-hand
    or assumed) and a source."""
    old: Figure = getattr(STOCK, figure)
    new = replace(old.scaled(factor), mark="assumed", source=f"what if it were {factor} times")
    return replace(STOCK, name=name, **{figure: new})


STOCK = machine("wse2")
machines = [
    STOCK,
    changed("half-sram", "sram_bytes_per_cycle", 0.5),
    changed("narrow-links", "io_bytes_per_s", 0.02),
]
print(f"GPT-3 XL, 75% zeros, {MODEL.flop_ratio(DENSITY):.2f}x fewer FLOPs than dense")
stock_s = compare_with_dense(STOCK, MODEL, DENSITY, SEQUENCES).sparse.step_s
for wafer in machines:
    found = compare_with_dense(wafer, MODEL, DENSITY, SEQUENCES)
    line = f"{wafer.name}: {found.speedup:.2f}x as fast as its dense step"
    line += f" (bound by {found.sparse.bound})"
    if wafer is not STOCK:
        line += f", {stock_s / found.sparse.step_s:.2f} of the speed of {STOCK.name}"
    print(line)
