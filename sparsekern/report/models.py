"""Sections about whole models: writing, training, and the prediction for a wafer."""

from statistics import median

from ..bench.records import groups, select
from ..wafer import compare as wafer
from ..wafer.machine import machine
from ..wafer.sweep import FULL_TOKENS
from . import measured, plots
from .curves import Curve, span
from .load import GENERATION
from .view import STEP, Panel, Section, View, is_of_a_gpu, main_step, model_of, steps

MODELS = {"demo": "demo's GPT"}


def writing(view: View) -> Section | None:
    """Text from whole models: tokens a second, and beside it the wait for the first token."""
    runs, files = [], []
    for result in view.results:
        if result is view.cpu.result or result.kind == GENERATION:
            found = measured.generations(result)
            runs += found
            files += [result] * bool(found)
    if not runs:
        return None
    bars = {
        run.name: {"tokens a second": run.speedup}
        | ({"first token": run.first_speedup} if run.first_speedup else {})
        for run in runs
    }
    rows = [
        [
            run.name,
            *(f"{speed:,.0f}" for speed in run.tokens_per_s),
            f"{run.speedup:.2f}",
            *([f"{1e3 * s:.1f}" for s in run.first_token_s] if run.first_token_s else ["-", "-"]),
            f"{run.memory_ratio:.2f}" if run.memory_ratio else "-",
        ]
        for run in runs
    ]
    header = ["model", "dense tokens/s", "sparse tokens/s", "times dense"]
    header += ["first token ms, dense", "sparse", "blocks' memory, of dense"]
    speeds = [run.speedup for run in runs]
    title = f"A whole model writes {span(speeds)} times as fast"
    waits = [1 / run.first_speedup for run in runs if run.first_speedup]
    if waits and max(waits) > 1:
        title += f", and waits {span(waits)} times as long for its first token"
    text = (
        "Tokens of all texts of a batch together, after the first one. The first token reads the "
        "whole prompt: many tokens, for which a GPU writes W out. '-': not measured."
    )
    return Section(title, text, [Panel("", plots.bars(bars), files)], header, rows)


def training(view: View) -> Section | None:
    """Whole steps, optimizer included."""
    found: dict[str, Curve] = {}
    dense, files = [], []
    for result in view.present(view.cpu.result, view.gpu_steps):
        for (model, threads), each in steps(result).items():
            where = f"{threads} thread{'s' * (threads > 1)}" if threads else "GPU"
            found[f"{MODELS.get(model, model)}, {where}"] = each
            chosen = select(result.records, op=STEP, threads=threads)
            chosen = [r for r in chosen if model_of(r) == model]
            dense.append(f"{median(r['M'] / r['dense_s'] for r in chosen):,.0f}")
            files.append(result)
    if not found:
        return None
    cpu, gpu = (main_step(r)[1] for r in (view.cpu.result, view.gpu_steps))
    parts = [
        f"{span(each.values())} times dense on a {where}"
        for where, each in (("CPU", cpu), ("GPU", gpu))
        if each
    ]
    sparsities = sorted({s for each in found.values() for s in each})
    rows = [
        [name, tokens_per_s, *(f"{each[s]:.2f}" if s in each else "-" for s in sparsities)]
        for (name, each), tokens_per_s in zip(found.items(), dense, strict=True)
    ]
    return Section(
        f"A whole training step runs {', '.join(parts)}",
        "Forward, backward and optimizer. Attention, norms, head and loss are dense in both, so a "
        "step gains less than its products. The table has dense tokens a second, then times dense.",
        [Panel("", plots.speedups(found), files)],
        ["model", "dense tokens/s", *(f"{s:.0%}" for s in sparsities)],
        rows,
    )


def wafer_prediction(view: View) -> Section | None:
    """Whole training steps, measured here beside the model of a wafer."""
    panels = []
    for result in view.present(view.cpu.result, view.gpu_steps):
        cases = select(result.records, op=wafer.STEP)
        if not cases:
            continue
        pairs = wafer.compare(machine("wse2"), {result.path.stem: cases})
        alike = groups(pairs, lambda p: p.what)
        (what,), chosen = max(alike.items(), key=lambda item: (len(item[1]), item[0]))
        where = "GPU" if is_of_a_gpu(result) else "CPU"
        if len(chosen) < 2:
            continue
        lines = {
            f"measured, {where}": {p.sparsity: p.measured for p in chosen},
            "predicted, wafer": {p.sparsity: p.full for p in chosen},
            "fewer FLOPs": {p.sparsity: p.flop_ratio for p in chosen},
        }
        name, *_ = what.removeprefix(f"{wafer.STEP} ").split(",")
        at = max(chosen, key=lambda p: (p.sparsity == 0.75, p.sparsity))
        low, high = at.full_range
        title = (
            f"{MODELS.get(name, name)} at {at.sparsity:.0%} zeros: {low:.2f} to {high:.2f} times "
            f"dense predicted, {at.measured:.2f} measured on a {where}"
        )
        panels.append(Panel(title, plots.speedups(lines), [result]))
    if not panels:
        return None
    return Section(
        "No wafer was measured: what a model of one predicts for the same training steps",
        f"The model of the WSE-2, with {FULL_TOKENS:,} tokens a step, which fill it. Where a "
        "measured and a predicted line run alike, that proves nothing: they are of different "
        "machines. `python -m sparsekern wafer validate` says what the model was checked against.",
        panels,
    )
