"""A prediction as text: one screen, and on demand every term of every layer and every source."""

import json
from collections.abc import Sequence
from dataclasses import asdict
from textwrap import fill

from ..terminal import table
from .cost import MicroStep, StepCost
from .figures import Figure
from .gpu import Gpu, Measured
from .inputs import RANGES, Inputs
from .machine import Machine
from .predict import Beside, Prediction

WIDTH = 100  # of the screen
SCALES = ((1.0, "s"), (1e-3, "ms"), (1e-6, "us"))
UNVALIDATED = "sparse speed-ups are not validated: no measured one of such a machine is public"


def render(prediction: Prediction) -> str:
    """One screen: how fast, what bounds it, how sure."""
    shape, found = prediction.shape, prediction.step
    cost = found.sparse
    head = (
        f"{shape.name} on {cost.systems} x {cost.machine.name}: {cost.tokens:,} tokens a step, "
        f"{prediction.sparsity:.0%} zeros in the linear layers"
    )
    blocks = [head, _step(prediction), _facts(prediction)]
    return "\n\n".join(blocks)


def _step(prediction: Prediction) -> str:
    steps = (prediction.step.dense, prediction.step.sparse)
    rows: list[list[object]] = [
        ["step", *(seconds(cost.step_s) for cost in steps)],
        ["tokens/s", *(f"{cost.tokens_per_s:,.0f}" for cost in steps)],
        ["bound by", *(cost.bound for cost in steps)],
    ]
    for name in steps[0].time_parts:
        shares = [cost.time_parts[name] / cost.step_s for cost in steps]
        if max(shares) >= 0.005:
            rows.append([f"  {name}", *(f"{share:.0%}" for share in shares)])
    rows += [
        ["useful share of peak", *(f"{cost.peak_share:.1%}" for cost in steps)],
        ["energy a token", *(f"{cost.energy_j / cost.tokens:.3g} J" for cost in steps)],
        [
            "  idle power alone",
            *(f"{cost.energy_parts_j['idle'] / cost.energy_j:.0%}" for cost in steps),
        ],
    ]
    return table(["", "dense", "sparse"], rows)


def _facts(prediction: Prediction) -> str:
    found, inference = prediction.step, prediction.inference
    cost, plan = found.sparse, found.sparse.activations
    low, high = found.speedup_range
    run, error = prediction.nearest, prediction.nearest_error
    mean, worst = prediction.held_out
    spilled = f", {plan.spilled_bytes / 1e9:.0f} GB over the links" if plan.spilled_bytes else ""
    span, asked = RANGES["utilisation"], cost.inputs.utilisation
    is_calibrated = "is calibrated" if asked == Inputs.utilisation else "was asked for"
    known = prediction.held_against
    whose = "dense steps: "
    if known != cost.machine.name:
        whose = f"no run of {cost.machine.name} is known; dense steps of {known}: "
    arithmetic = inference.decode_compute_s / inference.decode_token_s
    count = inference.requests * inference.pipeline
    rate = inference.throughput_tokens_per_s
    together = f"; {rate:,.0f} of all {count} requests" if count > 1 else ""
    lines = [
        (
            "speed-up",
            f"{low:.2f} to {high:.2f}x (a score of attention at its highest cost, at none); FLOPs "
            f"{found.flop_ratio:.2f}x fewer, at most {found.flop_cap:.2f}x",
        ),
        (
            "how sure",
            f"{whose}mean error {mean:.1%}, worst {worst:.1%} over held-out runs of CS-2; the "
            f"nearest held-out run, {run.name}: {error:+.1%} in speed",
        ),
        (
            "",
            f"dense step {_span(prediction.dense_step_s)}: utilisation from {span.low:g} to "
            f"{span.high:g}; {asked:.3g} {is_calibrated}",
        ),
        ("", f"sparse step {_span(prediction.step_s)}: these over the speed-ups above"),
        ("", UNVALIDATED),
        (
            "memory",
            f"activations: {plan.mode}, {plan.need_bytes / 1e9:.1f} GB, room for "
            f"{plan.room_bytes / 1e9:.1f} of {cost.machine.sram_bytes / 1e9:.1f} GB{spilled}",
        ),
        (
            "decode",
            f"{inference.decode_tokens_per_s:,.0f} tokens/s a request at context "
            f"{inference.context:,}, {arithmetic:.1%} of the time arithmetic{together}",
        ),
        (
            "",
            f"weights {inference.weight_bytes / 1e9:.2f} GB, room for a context of "
            f"{inference.most_context:,}; prefill {inference.prefill_tokens_per_s:,.0f} tokens/s",
        ),
    ]
    if not inference.fits:
        lines.append(("", "WEIGHTS AND CACHE DO NOT FIT THE SRAM"))
    lines += [line for beside in prediction.beside for line in _beside(beside)]
    width = max(len(name) for name, _ in lines) + 2
    blocks = [
        fill(
            text,
            WIDTH,
            initial_indent=f"{name:<{width}}",
            subsequent_indent=" " * width,
            break_on_hyphens=False,
        )
        for name, text in lines
    ]
    return "\n".join(blocks)


def _beside(beside: Beside) -> list[tuple[str, str]]:
    def measured(found: Measured | None) -> str:
        if found is None:
            return "no measurement at this sparsity found"
        return f"sparse measured {found.speedup:.2f}x on {found.model}"

    cost = beside.cost
    fits = "" if cost.fits else " WEIGHTS AND OPTIMIZER DO NOT FIT ONE"
    return [
        (
            beside.gpu.name,
            f"dense, roofline: {cost.tokens_per_s:,.0f} tokens/s, {cost.joule_per_token:.3g} J a "
            f"token (boards alone); {measured(beside.training)}{fits}",
        ),
        (
            "",
            f"dense decode, roofline: {cost.decode_tokens_per_s:,.0f} tokens/s a request; "
            f"{measured(beside.decode)}",
        ),
    ]


def seconds(value: float) -> str:
    """Three digits in a unit that suits."""
    scale, unit = next((pair for pair in SCALES if value >= pair[0]), SCALES[-1])
    return f"{value / scale:.3g} {unit}"


def _span(ends: tuple[float, float]) -> str:
    return " to ".join(map(seconds, ends))


def render_details(prediction: Prediction) -> str:
    """The phases of a micro-step, the parts of energy, and each layer's terms."""
    parts = [_phases(prediction), _energy(prediction), _layers(prediction.step.sparse)]
    return "\n\n".join(parts)


def _energy(prediction: Prediction) -> str:
    steps = (prediction.step.dense, prediction.step.sparse)
    rows = [
        [name, *(f"{cost.energy_parts_j[name] / cost.tokens:.3g} J" for cost in steps)]
        for name in steps[0].energy_parts_j
    ]
    return table(["energy a token", "dense", "sparse"], rows)


def _phases(prediction: Prediction) -> str:
    rows = []
    for name in ("forward", "backward"):
        for label in ("dense", "sparse"):
            phase = getattr(getattr(prediction.step, label), name)
            times = (*asdict(phase).values(), phase.total_s)
            rows.append([f"{name}, {label}", *map(seconds, times)])
    header = ["of a micro-step", "linear", "attention", "elementwise", "head", "recompute"]
    cost = prediction.step.sparse
    count, last = cost.micro_steps, cost.micro[-1]
    steps = f"{count} micro-step{'s' * (count > 1)} of {cost.micro[0].sequences} sequences"
    if len(cost.micro) > 1:
        steps += f", the last of {last.sequences} in {seconds(last.total_s)}"
    return table([*header, "I/O in", "I/O out", "max(wafer, I/O)"], rows) + (
        f"\n\nbetween steps: {seconds(cost.boundary_s)} exposed; {steps}"
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
                *(seconds(part * per_cycle) for part in parts),
                f"{terms.imbalance:.3f}",
                terms.bound,
            ]
        )
    header = ["of one layer", "product", "layers", "density", "compute", "waiting", "arrival"]
    return table([*header, "reduction", "latency", "imbalance", "bound"], rows, left=2)


def render_product(
    machine: Machine,
    sizes: list[int],
    sparsity: float,
    dense: tuple[float, float],
    sparse: tuple[float, float],
) -> str:
    """One product that a host asks for: times of the wafer and of the transfers."""
    tokens, n, k = sizes
    rows = [
        [name, seconds(wafer_s), seconds(moved_s), seconds(wafer_s + moved_s)]
        for name, (wafer_s, moved_s) in (("dense", dense), (f"{sparsity:.0%} zeros", sparse))
    ]
    alone, whole = dense[0] / sparse[0], sum(dense) / sum(sparse)
    return (
        f"y[{tokens}, {n}] = x[{tokens}, {k}] @ W[{n}, {k}].T on {machine.name}\n\n"
        + table(["", "on the wafer", "from and to a host", "both"], rows)
        + f"\n\nspeed-up {alone:.2f}x on the wafer, {whole:.2f}x with the transfers"
    )


def render_sources(machine: Machine, inputs: Inputs, gpus: Sequence[Gpu] = ()) -> str:
    """Every figure with its mark and source: the machine as a TOML file that can be used again, the
    inputs with their ranges."""
    files = [as_toml(found.name, found.figures()) for found in (machine, *gpus)]
    rows = [
        [
            name,
            f"{getattr(inputs, name):g} {span.unit}",
            span.mark,
            f"{span.low:g} to {span.high:g}",
            span.why,
        ]
        for name, span in RANGES.items()
    ]
    return "\n\n".join([*files, table(["input", "value", "mark", "range", "why"], rows, left=5)])


def as_toml(name: str, figures: dict[str, Figure]) -> str:
    """The figures as the file that would give them."""
    lines = [f"# {name}"]
    for key, figure in figures.items():
        lines += [
            f"\n[{key}]",
            f"value = {figure.value!r}",
            f'unit = "{figure.unit}"',
            f'mark = "{figure.mark}"',
            f"source = {json.dumps(figure.source, ensure_ascii=False)}",
        ]
    return "\n".join(lines)


def as_dict(prediction: Prediction) -> dict[str, object]:
    """All numbers of a prediction, as JSON takes them."""
    found, cost = prediction.step, prediction.step.sparse
    low, high = found.speedup_range
    return {
        "model": asdict(prediction.shape),
        "sparsity": prediction.sparsity,
        "machine": {"name": cost.machine.name}
        | {name: asdict(figure) for name, figure in cost.machine.figures().items()},
        "inputs": cost.inputs.as_dict(),
        "systems": cost.systems,
        "tokens": cost.tokens,
        "speedup": found.speedup,
        "speedup_low": low,
        "speedup_high": high,
        "flop_ratio": found.flop_ratio,
        "flop_cap": found.flop_cap,
        "amdahl_cap": found.amdahl_cap,
        "dense": _step_as_dict(found.dense, prediction.dense_step_s),
        "sparse": _step_as_dict(cost, prediction.step_s),
        "inference": asdict(prediction.inference) | {"fits": prediction.inference.fits},
        "held_against": prediction.held_against,
        "held_out_mean": prediction.held_out[0],
        "held_out_worst": prediction.held_out[1],
        "nearest_run": asdict(prediction.nearest) | {"error": prediction.nearest_error},
        "beside": [
            {
                "gpu": beside.gpu.name,
                **asdict(beside.cost),
                "measured_training": beside.training and asdict(beside.training),
                "measured_decode": beside.decode and asdict(beside.decode),
            }
            for beside in prediction.beside
        ],
        "sparse_step": UNVALIDATED,
    }


def _step_as_dict(cost: StepCost, span: tuple[float, float]) -> dict[str, object]:
    return {
        "step_s": cost.step_s,
        "step_s_low": span[0],
        "step_s_high": span[1],
        "tokens_per_s": cost.tokens_per_s,
        "peak_share": cost.peak_share,
        "bound": cost.bound,
        "io_wait_share": cost.io_share,
        "energy_j": cost.energy_j,
        "energy_parts_j": cost.energy_parts_j,
        "time_parts_s": cost.time_parts,
        "boundary_s": cost.boundary_s,
        "micro_steps": cost.micro_steps,
        **_micro_as_dict(cost.micro[0]),
        "last_micro_step": _micro_as_dict(cost.micro[1]) if len(cost.micro) > 1 else None,
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


def _micro_as_dict(micro: MicroStep) -> dict[str, object]:
    return {
        "sequences": micro.sequences,
        "forward": asdict(micro.forward),
        "backward": asdict(micro.backward),
        "activations": asdict(micro.activations),
    }
