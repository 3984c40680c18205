"""The results of experiments.py as tables and pictures."""

import math
import statistics
from collections.abc import Iterable
from pathlib import Path
from typing import TYPE_CHECKING

from sparsekern.bench.runs import costs, path, trained
from sparsekern.files import write_picture
from sparsekern.report import plots
from sparsekern.terminal import table

if TYPE_CHECKING:
    from matplotlib.figure import Figure

ONE_SHOT = {"magnitude": "magnitude", "wanda": "Wanda", "sparsegpt": "SparseGPT"}


def page(results: dict, cap: float, pictures: Iterable[str] = ()) -> str:
    """All that is there so far, as Markdown. `cap`: the FLOP ratio with the linear layers free;
    `pictures`: the files that `plot` wrote beside it."""
    parts = [
        "# Sparse pre-training, dense fine-tuning and iterative pruning",
        ", ".join(f"{name} {value}" for name, value in results.get("machine", {}).items()),
        about(results),
        f"Losses are nats per token on held-out text. With the linear layers free, training FLOPs "
        f"would fall {cap:.2f}x (Amdahl).",
        *(f"![{Path(picture).stem}]({picture})" for picture in pictures),
        "## Pre-training\n\n"
        "The same tokens for each arm; the learning rate is the best of its sweep.\n\n"
        + pretraining_table(results),
        "## Dense fine-tuning\n\nBest of the same learning rates for each arm.\n\n"
        + finetuning_table(results),
        "## Seeds\n\n" + seeds_table(results),
        "## Pruning the dense model\n\n" + pruning_table(results),
        "## Times\n\n" + times_table(results),
        "## Learning-rate sweeps\n\n" + sweep_tables(results),
    ]
    if failed := results.get("failed"):
        rows = "\n".join(f"- {key}: {why}" for key, why in failed.items())
        parts.append(f"## Runs that failed\n\n{rows}")
    return "\n\n".join(parts) + "\n"


def about(results: dict) -> str:
    """The model, the text, and how much of it was read."""
    lines = []
    if runs := of_first_seed(results, "pretrain"):
        sparsity, run = min(runs.items(), key=lambda item: item[0])
        c = run["config"]
        lines.append(
            f"A GPT of {c['layers']} layers, width {c['width']} and context {c['context']}, "
            f"{run['parameters']:,} parameters at {sparsity:.0%} sparsity. "
            f"Pre-training: {tokens_read(c)}."
        )
    for tuned in [*of_first_seed(results, "finetune").values()][:1]:
        lines.append(f"Fine-tuning: {tokens_read(tuned['config'])}.")
    for name, facts in results.get("data", {}).items():
        training, held_out = facts["tokens"]
        text = f"{training:,} tokens for training, {held_out:,} held out"
        lines.append(f"Text for {name}: {facts['source']}, {text}.")
    return " ".join(lines)


def tokens_read(config: dict) -> str:
    batch = config["batch"] * config["context"]
    return f"{config['steps']} steps of {batch:,} tokens, {config['steps'] * batch / 1e6:.3g} M"


def of_first_seed(results: dict, kind: str) -> dict[float, dict]:
    return {s: seeds[0] for s, seeds in trained(results, kind).items() if 0 in seeds}


def name_of(sparsity: float) -> str:
    return f"{sparsity:.0%} sparse" if sparsity else "dense"


def times(results: dict) -> dict:
    return results.get("times", {}).get("times", {})


def ratio(numerator: float | None, denominator: float | None) -> str:
    return f"{numerator / denominator:.2f}x" if numerator and denominator else "-"


def pretraining_table(results: dict) -> str:
    runs = of_first_seed(results, "pretrain")
    dense = runs.get(0.0, {})
    rows = [
        [
            f"{s:.0%}",
            f"{r['config']['lr']:g}",
            f"{r['loss']:.4f}",
            f"{r['loss'] - dense['loss']:+.4f}" if dense else "-",
            f"{r['flops']:.3g}",
            ratio(dense.get("flops"), r["flops"]),
            f"{1e3 * r['step_s']:.1f} ms" if "step_s" in r else "-",
            ratio(dense.get("step_s"), r.get("step_s")),
            f"{r['steps_s']:.0f} s" if "steps_s" in r else "-",
            f"{r['parameters']:,}",
            f"{r['peak_gpu_bytes'] / 2**30:.2f} GiB",
        ]
        for s, r in runs.items()
    ]
    header = ["sparsity", "lr", "loss", "to dense", "FLOPs", "fewer", "step", "faster", "all steps"]
    return table([*header, "parameters", "GPU memory"], rows)


def finetuning_table(results: dict) -> str:
    runs, before = of_first_seed(results, "finetune"), of_first_seed(results, "pretrain")
    dense = runs.get(0.0)
    flops = {s: before[s]["flops"] + r["flops"] for s, r in runs.items()}
    seconds = {
        s: before[s]["steps_s"] + r["steps_s"] for s, r in runs.items() if "steps_s" in before[s]
    }
    rows = [
        [
            f"{s:.0%}",
            f"{r['config']['lr']:g}",
            f"{before[s]['loss']:.4f}",
            f"{r['evaluations'][0]['loss']:.4f}",
            f"{r['loss']:.4f}",
            f"{r['loss'] - dense['loss']:+.4f}" if dense else "-",
            ratio(flops.get(0.0), flops[s]),
            ratio(seconds.get(0.0), seconds.get(s)),
        ]
        for s, r in runs.items()
    ]
    header = ["pre-trained at", "lr", "pre-training loss", "before", "after", "to dense-dense"]
    return table([*header, "FLOPs of both, fewer", "time of both, faster"], rows)


def seeds_table(results: dict) -> str:
    rows = []
    for kind in ("pretrain", "finetune"):
        runs = trained(results, kind)
        above = costs(runs)
        for sparsity, seeds in runs.items():
            if len(seeds) > 1:
                losses = [run["loss"] for run in seeds.values()]
                rows.append([kind, name_of(sparsity), *spread(losses)])
                if above.get(sparsity):
                    cells = spread(above[sparsity], "+.4f")
                    rows.append([kind, f"{name_of(sparsity)} - dense", *cells])
    return table(["run", "arm", "mean loss", "max - min", "each seed"], rows, left=2)


def spread(values: list[float], form: str = ".4f") -> list[str]:
    each = ", ".join(f"{value:{form}}" for value in values)
    return [f"{statistics.mean(values):{form}}", f"{max(values) - min(values):.4f}", each]


def pruning_table(results: dict) -> str:
    rows, steps, control = [], 0, not_pruned(results)
    for i, r in enumerate(results.get("prune rounds", {}).get("rows", [])):
        cells = [f"{r['sparsity']:.1%}", f"{r['flop_ratio']:.2f}x", f"{r['parameters']:,}"]
        for key in (*ONE_SHOT, "once"):
            match = [
                row["loss"]
                for row in pruned(results, key)
                if math.isclose(row["sparsity"], r["sparsity"], abs_tol=1e-3)
            ]
            cells.append(f"{match[0]:.4f}" if match else "-")
        cells.append(f"{r['loss']:.4f}")
        cells.append(f"{control[i]['loss']:.4f}" if i < len(control) else "-")
        steps += r["steps"]
        rows.append([*cells, steps])
    header = ["sparsity", "FLOPs, fewer", "parameters", *ONE_SHOT.values()]
    header += ["at once + steps", "in rounds + steps", "not pruned + steps", "steps"]
    return (
        "Loss of the dense model pruned: at once without recovery by three methods; by magnitude\n"
        "at once, then in rounds, with the same steps of recovery in all; and of the dense model\n"
        "after these steps. The learning rate starts anew in each round, and once elsewhere: the\n"
        "model that is not pruned ends its schedule in the last row alone. Its highest value is\n"
        "the same everywhere and was not swept.\n\n" + table(header, rows)
    )


def pruned(results: dict, key: str) -> list[dict]:
    """The last row of each pruning at once of a kind, by sparsity."""
    found = [r["rows"][-1] for k, r in results.items() if k.rpartition(" ")[0] == f"prune {key}"]
    return sorted(found, key=lambda row: row["sparsity"])


def not_pruned(results: dict) -> list[dict]:
    """The dense model after as many steps as each round had come to, at that round's sparsity."""
    rounds = results.get("prune rounds", {}).get("rows", [])
    control = results.get("prune control", {}).get("evaluations", [])
    return [r | {"loss": e["loss"]} for r, e in zip(rounds, control, strict=False)]


def times_table(results: dict) -> str:
    found = times(results)
    dense = found.get("0.0", {})
    rows = [
        [
            "fine-tuning" if name == "finetune" else name_of(float(name)),
            f"{1e3 * t['step_s']:.1f} ms",
            f"{1e3 * t['least_s']:.1f} - {1e3 * t['most_s']:.1f} ms",
            ratio(dense.get("step_s"), t["step_s"]) if name != "finetune" else "-",
            f"{1e3 * t['latency_s']:.2f} ms",
            f"{1e3 * t['dense_latency_s']:.2f} ms",
        ]
        for name, t in found.items()
    ]
    header = ["run", "step", "least - most", "faster", "latency", "densified"]
    return (
        "Of a GPU that did nothing else, steps of all runs in turn, medians. All times on this\n"
        "page come from these, since the runs themselves shared GPUs. Latency: a forward pass of\n"
        "one sequence, zeros at random.\n\n" + table(header, rows)
    )


def sweep_tables(results: dict) -> str:
    parts = []
    for kind, title in (("sweep", "pre-training"), ("finetune", "fine-tuning")):
        runs = [(key.split(), r) for key, r in results.items() if key.split()[0] == kind]
        if kind == "finetune":
            runs = [(words, r) for words, r in runs if words[3] == "0"]
        arms: dict[float, dict[float, float | None]] = {}
        for words, result in runs:
            arms.setdefault(float(words[1]), {})[float(words[-1])] = result["loss"]
        rates = sorted({rate for losses in arms.values() for rate in losses})
        rows = [sweep_row(arm, losses, rates) for arm, losses in sorted(arms.items())]
        steps = {r["config"]["steps"] for _, r in runs if "config" in r}
        name = " or ".join(f"{count} steps of {title}" for count in sorted(steps)) or title
        parts.append(table([name, *(f"{rate:g}" for rate in rates), "best at an end"], rows))
    return "Losses by learning rate.\n\n" + "\n\n".join(parts)


def sweep_row(arm: float, losses: dict[float, float | None], rates: list[float]) -> list[str]:
    ended = {rate: loss for rate, loss in losses.items() if loss is not None}
    best = min(ended, key=ended.get, default=None)
    cells = [name_of(arm)]
    for rate in rates:
        if rate not in losses:
            cells.append("-")
        elif rate not in ended:
            cells.append("diverged")
        else:
            cells.append(f"**{losses[rate]:.4f}**" if rate == best else f"{losses[rate]:.4f}")
    if best is None or best not in (rates[0], rates[-1]):
        return [*cells, "no"]
    return [*cells, "lowest" if best == rates[0] else "highest"]


def plot(results: dict, folder: Path) -> list[str]:
    """Pictures of loss over FLOPs and over time, of what sparsity costs, and of pruning -> their
    names. What has no runs yet has no picture."""
    runs = of_first_seed(results, "pretrain")
    stages = {
        label: {s: found for s, found in costs(trained(results, kind)).items() if found}
        for kind, label in (("pretrain", "pre-trained"), ("finetune", "then fine-tuned dense"))
    }
    stages = {label: found for label, found in stages.items() if found}
    timed = {name_of(s): path(run, "seconds") for s, run in runs.items() if "step_s" in run}
    figures = {}
    if runs:
        curves = {name_of(s): path(run, "flops") for s, run in runs.items()}
        figures["flops"] = plots.losses(curves, "training FLOPs of stored weights (1e15)")
    if timed:
        figures["time"] = plots.losses(timed, "seconds in training steps, alone on a GPU")
    if stages:
        figures["cost"] = plots.costs(stages)
    if "prune rounds" in results:
        figures["pruning"] = pruning(results)
    for name, figure in figures.items():
        write_picture(figure, folder / f"experiments-{name}.png")
    return [f"experiments-{name}.png" for name in figures]


def pruning(results: dict) -> "Figure":
    recovered = {
        "in rounds": results["prune rounds"]["rows"],
        "at once, as many steps": pruned(results, "once"),
        "not pruned, as many steps": not_pruned(results),
    }
    at_once = {f"{name}, no steps": pruned(results, method) for method, name in ONE_SHOT.items()}
    curves = {
        label: ([100 * r["sparsity"] for r in rows], [r["loss"] for r in rows])
        for label, rows in (recovered | at_once).items()
        if rows
    }
    figure = plots.losses(curves, "zeros in W (%)")
    # What is not recovered soon leaves the panel.
    shown = [loss for label in recovered if label in curves for loss in curves[label][1]]
    room = max(max(shown) - min(shown), 0.02)
    figure.axes[0].set(xlim=(40, 95), ylim=(min(shown) - 0.1 * room, min(shown) + 4 * room))
    return figure
