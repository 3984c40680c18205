"""What the same zeros would do on a wafer-scale machine, whose cores skip every zero, and how that
depends on the machine.

    python examples/wafer_machine.py

prints

    gpt3-xl, 75% zeros, 2.49x fewer FLOPs than dense
    wse2: step 0.63 to 0.95 s, 1.94 to 2.36x as fast as dense, bound by attention
    wse3: step 0.35 to 0.53 s, 1.72 to 2.29x as fast as dense, bound by attention
    narrow.toml: step 1.35 to 1.35 s, 1.90 to 1.90x as fast as dense, bound by I/O
    dense steps of a CS-2: 4.0% off in the mean of held-out runs, 12.6% at worst

Times are ranges over the utilisation, which is calibrated on a published run; speed-ups over what
a score of attention may cost. No sparse step of such a machine was measured in public.
"""

from pathlib import Path
from tempfile import TemporaryDirectory

from sparsekern.wafer import machine, model_shape, predict

DENSITY = 0.25
NARROW = """
base = "wse2"

[io_bytes_per_s]
value = 3e9
unit = "bytes/s"
mark = "assumed"
source = "what if the links were fifty times narrower"
"""

model = model_shape("gpt3-xl")  # or the config.json of a Hugging Face model
with TemporaryDirectory() as folder:
    own = Path(folder, "narrow.toml")
    own.write_text(NARROW)
    machines = [machine("wse2"), machine("wse3"), machine(own)]
fewer = model.flop_ratio(DENSITY)
print(f"{model.name}, {1 - DENSITY:.0%} zeros, {fewer:.2f}x fewer FLOPs than dense")
for wafer in machines:
    found = predict(wafer, model, DENSITY)
    fast, slow = found.step_s
    low, high = found.step.speedup_range
    print(
        f"{wafer.name}: step {fast:.2f} to {slow:.2f} s, {low:.2f} to {high:.2f}x as fast as "
        f"dense, bound by {found.step.sparse.bound}"
    )
mean, worst = found.held_out
print(f"dense steps of a CS-2: {mean:.1%} off in the mean of held-out runs, {worst:.1%} at worst")
