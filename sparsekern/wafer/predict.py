"""One prediction in full: step, phases, each layer's terms, inference, and every figure used."""

from dataclasses import asdict

from ..terminal import table
from .cost import Comparison, StepCost
from .inference import InferenceCost
from .inputs import RANGES, Inputs
from .machine import Machine
from .shapes import GPTShape

UNVALIDATED = "Absolute time not validated: no published time of a training step could be read."


def render(shape: GPTShape, found: Comparison, inference: InferenceCost) -> str:
    cost, dense = found.sparse, found.dense
    plan = cost.activations
    summary = [
        ["step", _seconds(dense.step_s), _seconds(cost.step_s)],
        ["tokens/s", f"{dense.tokens_per_s:,.0f}", f"{cost.tokens_per_s:,.0f}"],
        ["useful share of peak", f"{dense.peak_share:.1%}", f"{cost.peak_share:.1%}"],
        ["bound by", dense.bound, cost.bound],
        ["waiting for I/O", f"{dense.io_share:.1%}", f"{cost.io_share:.1%}"],
        ["energy of a step", f"{dense.energy_j:,.0f} J", f"{cost.energy_j:,.0f} J"],
    ]
    ratios = (
        f"speed-up {found.speedup:.2f}x; FLOPs {found.flop_ratio:.2f}x fewer; Amdahl cap "
        f"{found.amdahl_cap:.2f}x at this sparsity,\n"
        f"{found.flop_cap:.2f}x fewer FLOPs with nothing left in the linear layers"
    )
    spilled = (
        f", {plan.spilled_bytes / 1e9:.1f} GB of it over the links" if plan.spilled_bytes else ""
    )
    memory = (
        f"activations: {plan.mode}, {plan.need_bytes / 1e9:.1f} GB of "
        f"{cost.machine.sram_bytes / 1e9:.1f} GB{spilled}"
    )
    decode = (
        f"inference, weights resident: {inference.decode_tokens_per_s:,.0f} tokens/s of a request "
        f"({inference.decode_compute_s / inference.decode_token_s:.1%} arithmetic),\n"
        f"prefill {inference.prefill_tokens_per_s:,.0f} tokens/s, weights "
        f"{inference.weight_bytes / 1e9:.2f} GB"
        f"{'' if inference.fits else ': MORE THAN THE SRAM'}"
    )
    return "\n\n".join(
        [
            f"{shape.name} on {cost.systems} x {cost.machine.name}, {cost.tokens:,} tokens a step",
            table(["", "dense", "sparse"], summary),
            ratios,
            memory,
            _phases(found),
            _layers(cost),
            decode,
            UNVALIDATED,
        ]
    )


def _seconds(value: float) -> str:
    return f"{1e3 * value:.3g} ms" if value < 1 else f"{value:.3g} s"


def _phases(found: Comparison) -> str:
    rows = []
    for name in ("forward", "backward"):
        for label, cost in (("dense", found.dense), ("sparse", found.sparse)):
            phase = getattr(cost, name)
            times = (*asdict(phase).values(), phase.total_s)
            rows.append([f"{name}, {label}", *map(_seconds, times)])
    header = ["of a micro-step", "linear", "attention", "head", "recompute"]
    return table([*header, "I/O in", "I/O out", "max(wafer, I/O)"], rows) + (
        f"\n\nbetween steps: {_seconds(found.sparse.boundary_s)} exposed; "
        f"{found.sparse.micro_steps} micro-steps"
    )


def _layers(cost: StepCost) -> str:
    per_cycle = 1 / cost.machine["clock_hz"]
    rows = []
    for layer in cost.layers:
        terms = layer.cycles
        parts = (terms.compute, terms.waiting, terms.arrival, terms.reduction, terms.latency)
        rows.append(
            [
                layer.matrix,
                layer.product,
                layer.layers,
                f"{layer.density:.3f}",
                *(_seconds(part * per_cycle) for part in parts),
                f"{terms.imbalance:.3f}",
                terms.bound,
            ]
        )
    header = ["of one layer", "product", "layers", "density", "compute", "waiting", "arrival"]
    return table([*header, "reduction", "latency", "imbalance", "bound"], rows, left=2)


def render_sources(machine: Machine, inputs: Inputs) -> str:
    figures = [
        [name, f"{figure.value:g} {figure.unit}", figure.mark, figure.source]
        for name, figure in machine.figures().items()
    ]
    assumed = [
        [name, f"{getattr(inputs, name):g} {span.unit}", f"{span.low:g} to {span.high:g}", span.why]
        for name, span in RANGES.items()
    ]
    return "\n\n".join(
        [
            table([machine.name, "value", "mark", "source"], figures, left=4),
            table(["input", "value", "range", "why"], assumed, left=4),
        ]
    )


def as_dict(shape: GPTShape, found: Comparison, inference: InferenceCost) -> dict[str, object]:
    def step(cost: StepCost) -> dict[str, object]:
        return {
            "step_s": cost.step_s,
            "tokens_per_s": cost.tokens_per_s,
            "peak_share": cost.peak_share,
            "bound": cost.bound,
            "io_wait_share": cost.io_share,
            "energy_j": cost.energy_j,
            "boundary_s": cost.boundary_s,
            "micro_steps": cost.micro_steps,
            "forward": asdict(cost.forward),
            "backward": asdict(cost.backward),
            "activations": asdict(cost.activations),
            "layers": [
                {
                    "matrix": layer.matrix,
                    "product": layer.product,
                    "layers": layer.layers,
                    "density": layer.density,
                    "seconds": layer.seconds,
                    "cycles": asdict(layer.cycles),
                }
                for layer in cost.layers
            ],
        }

    cost = found.sparse
    return {
        "model": asdict(shape),
        "machine": {"name": cost.machine.name}
        | {name: asdict(figure) for name, figure in cost.machine.figures().items()},
        "inputs": cost.inputs.as_dict(),
        "systems": cost.systems,
        "tokens": cost.tokens,
        "speedup": found.speedup,
        "flop_ratio": found.flop_ratio,
        "flop_cap": found.flop_cap,
        "amdahl_cap": found.amdahl_cap,
        "dense": step(found.dense),
        "sparse": step(cost),
        "inference": asdict(inference),
        "absolute_time": "not validated",
    }
