"""V29-V46: published speeds, powers and the like of whole systems, against the model."""

from dataclasses import replace

from ..cost import step_cost
from ..inference import inference_cost
from ..inputs import Inputs
from ..machine import WSE2, WSE3
from ..runs import FITTED, RATIO, Calibration, Run, calibrate, read_runs
from ..shapes import CEREBRAS_GPT, FLOR_6B, gpt_shape
from .points import Point, error_point, ratio_point

# Cerebras-GPT, arXiv 2304.03208, Table 6: sequences on a system, and FLOP/s a system over those of
# 111M; then the FLOPs and tokens of its training, as it counts them.
CEREBRAS_TABLE = "arXiv 2304.03208, Sec. 5.3, Table 6, second-hand"
RELATIVE = {
    "cerebras-gpt-111m": (120, 1.0),
    "cerebras-gpt-590m": (264, 0.92),
    "cerebras-gpt-1.3b": (132, 0.96),
    "cerebras-gpt-2.7b": (132, 0.96),
    "cerebras-gpt-6.7b": (65, 1.05),
    "cerebras-gpt-13b": (90, 1.02),
}
TRAINING_FLOP = (2.6e18, 1.3e19, 6.1e19, 2.8e20, 1.1e21, 6.3e21, 2.3e22)
TRAINING_TOKENS = (2.22e9, 5.12e9, 1.18e10, 2.63e10, 5.30e10, 1.33e11, 2.57e11)
DECODE_TOKENS_PER_S = (1800, 1850)
POWER_W = (16_100, 22_900)
FLOR_TOKENS, FLOR_S = 140e9, 2.5 * 86_400


def speed_points() -> tuple[list[Point], list[Point], Calibration]:
    """Held-out points, calibration points, and the fit they come from."""
    runs = read_runs()
    found = calibrate(runs)
    calibration = [_run_point(run, e) for run, e in found.errors.items() if run.use in FITTED]
    held_out = [_run_point(run, error) for run, error in found.held_out.items()]
    points = [*held_out, _batch_ratio(found), _generations(found), _left_out(found)]
    points += [relative_speeds(found.inputs), _scaling(), _power(), _decode()]
    return [*points, _activations(), _flor(), _unread()], calibration, found


def _run_point(run: Run, error: float) -> Point:
    quantity = f"{run.name}: samples/s of {run.systems} x {run.machine}"
    if run.use in FITTED:
        quantity += f", fits {run.use}"
    published = run.samples_per_s
    predicted = (1 + error) * published
    return ratio_point(
        run.id, "B", quantity, predicted, published, run.tolerance, run.source, run.note
    )


def _batch_ratio(found: Calibration) -> Point:
    """What twice the batch brings: the published speed hardly rises."""
    errors = {(run.model, run.batch): error for run, error in found.errors.items()}
    pairs = [run for run in found.errors if run.use == RATIO]
    gaps = [
        abs((1 + errors[run.model, 2 * run.batch]) / (1 + errors[run.model, run.batch]) - 1)
        for run in pairs
    ]
    name = f"{len(pairs)} models, 128 to 256 sequences: ratio of speeds"
    return error_point(
        *("V32", "B", name, (sum(gaps) / len(gaps), max(gaps)), (0.05, 0.05), pairs[0].source)
    )


def _generations(found: Calibration) -> Point:
    old, new = (next(run for run in found.errors if run.id == id) for id in ("V33", "V35"))
    rates = [
        [run.samples_per_s * factor / run.systems for factor in (1 + found.errors[run], 1)]
        for run in (old, new)
    ]
    ratios = [rates[1][i] / rates[0][i] for i in (0, 1)]
    name = "CS-3 over CS-2, GPT-J 6B: samples/s a system"
    note = (
        "two logs, two years apart: releases differ; cache and clock of wse3 were chosen in view "
    )
    note += "of this ratio"
    return ratio_point("V36", "B", name, *ratios, 0.15, new.source, note)


def _left_out(found: Calibration) -> Point:
    errors = [abs(error) for error in found.left_out.values()]
    name = f"{len(errors)} runs of CS-2, each left out of a fit to the others: samples/s"
    return error_point(
        "V29+",
        "B",
        name,
        (sum(errors) / len(errors), max(errors)),
        (0.12, 0.20),
        "published.toml",
        is_held_out=False,
    )


def relative_speeds(inputs: Inputs) -> Point:
    """V37: sizes of Cerebras-GPT over its 111M."""
    flop_per_token = {
        shape.name: flop / tokens
        for shape, flop, tokens in zip(CEREBRAS_GPT, TRAINING_FLOP, TRAINING_TOKENS, strict=True)
    }

    base, *others = RELATIVE

    def errors_at(given: Inputs) -> list[float]:
        rates = {
            name: step_cost(WSE2, gpt_shape(name), 1.0, batch, inputs=given).tokens_per_s
            * flop_per_token[name]
            for name, (batch, _) in RELATIVE.items()
        }
        return [rates[name] / rates[base] / RELATIVE[name][1] - 1 for name in others]

    errors = errors_at(inputs)
    free = [abs(error) for error in errors_at(replace(inputs, score_cycles=0.0))]
    note = ", ".join(
        f"{name.removeprefix('cerebras-gpt-')} {error:+.0%}"
        for name, error in zip(others, errors, strict=True)
    )
    sizes = [abs(error) for error in errors]
    return error_point(
        "V37",
        "B",
        "Cerebras-GPT: FLOP/s a system, five sizes over 111M",
        (sum(sizes) / len(sizes), max(sizes)),
        (0.10, 0.20),
        CEREBRAS_TABLE,
        f"{note}; mean {sum(free) / len(free):.1%}, worst {max(free):.1%} where a score costs "
        "nothing; systems of the 13B run uncertain",
        is_held_out=False,
    )


def _scaling() -> Point:
    shape = gpt_shape("cerebras-gpt-6.7b")
    seconds = [step_cost(WSE2, shape, 1.0, 65 * n, n).step_s for n in (1, 16)]
    efficiency = seconds[0] / seconds[1]
    return Point(
        "V38",
        "C",
        "Cerebras-GPT 6.7B, 65 sequences a system, 1 to 16 systems",
        f"{efficiency:.1%} efficiency",
        "linear within 9%",
        "",
        "at least 91%",
        efficiency >= 0.91,
        CEREBRAS_TABLE,
        "100% by construction: broadcast and reduction are taken to run at the rate of the links",
    )


def _power() -> Point:
    cost = step_cost(WSE2, gpt_shape("gpt-6.7b"), 1.0, 256)
    watts = (WSE2.power_w(0), cost.energy_j / cost.step_s)
    return Point(
        "V42",
        "B",
        "CS-2: power idle, and of a dense 6.7B step, W",
        f"{watts[0]:,.0f}; {watts[1]:,.0f}",
        f"{POWER_W[0]:,}; {POWER_W[1]:,} (a stencil's peak)",
        f"{watts[1] / POWER_W[1] - 1:+.1%}",
        "idle exact, peak 3%",
        watts[0] == POWER_W[0] and abs(watts[1] / POWER_W[1] - 1) <= 0.03,
        "arXiv 2204.03775, Fig. 10",
        "both are figures of the machine file: the point checks that they are used; no power of a "
        "training step is public",
    )


def _decode() -> Point:
    rate = inference_cost(WSE3, gpt_shape("llama3-8b"), 1.0, context=1024).decode_tokens_per_s
    middle = sum(DECODE_TOKENS_PER_S) / 2
    return ratio_point(
        "V43",
        "B",
        "CS-3, Llama 3.1 8B: decode tokens/s of a request",
        rate,
        middle,
        0.25,
        "Artificial Analysis, August 2024, second-hand: 1,800-1,850",
        "model shape from memory; context of 1,024 assumed",
    )


def _activations() -> Point:
    plan = step_cost(WSE2, gpt_shape("llama-7b"), 1.0, 99).activations
    return Point(
        "V44",
        "B",
        "LLaMA-7B, 99 sequences on a CS-2: activations",
        f"{plan.mode}, {plan.need_bytes / 1e9:.0f} GB",
        "runs at once, no accumulation",
        "",
        "no spill",
        plan.mode != "spill",
        "Argonne log of 2024-03-21",
        "length of 2,048 from memory; which activations a block keeps was chosen to agree",
    )


def _flor() -> Point:
    found = step_cost(WSE2, FLOR_6B, 1.0, 65)
    systems = FLOR_TOKENS / (found.tokens_per_s * FLOR_S)
    used = next((2**e for e in range(8) if 2**e >= systems), None)
    return Point(
        "V45",
        "C",
        "FLOR-6.3B in 2.5 days: CS-2 needed",
        f"{systems:.1f}, so {used}",
        "64 installed",
        "",
        "a power of two from 8 to 64",
        used in (8, 16, 32, 64),
        "press, second-hand",
        "its 140e9 tokens are from memory",
    )


def _unread() -> Point:
    return Point(
        "V46",
        "X",
        "a sparse training step on any CS: measured speed-up",
        "see V18",
        "not public",
        "",
        "",
        None,
        "arXiv 2405.03594, its figure; Argonne logs hold no sparse run",
    )
