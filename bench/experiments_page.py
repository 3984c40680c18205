"""The results of experiments.py as tables and a plot."""

import math
import statistics
from pathlib import Path

from sparsekern.report.demo import COLOURS, MARKERS
from sparsekern.terminal import table

ONE_SHOT = {"magnitude": "magnitude", "wanda": "Wanda", "sparsegpt": "SparseGPT"}


def page(results: dict, cap: float, picture: str = "") -> str:
    """All that is there so far, as Markdown. `cap`: the FLOP ratio with the linear layers free;
    `picture`: the file that `plot` wrote beside it."""
    parts = [
        "# Sparse pre-training, dense fine-tuning and iterative pruning",
        ", ".join(f"{name} {value}" for name, value in results.get("machine", {}).items()),
        about(results),
        f"Losses are nats per token on held-out text. With the linear layers free, training FLOPs "
        f"would fall {cap:.2f}x (Amdahl).",
        *([f"![loss by FLOPs, time and sparsity]({picture})"] if picture else []),
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
    if runs := chosen(results, "pretrain"):
        c, dense = runs[0][2]["config"], runs[0][2]["parameters"]
        lines.append(
            f"A GPT of {c['layers']} layers, width {c['width']} and context {c['context']}, "
            f"{dense:,} parameters at {runs[0][0]:.0%} sparsity. Pre-training: {tokens_read(c)}."
        )
    if tuned := chosen(results, "finetune"):
        lines.append(f"Fine-tuning: {tokens_read(tuned[0][2]['config'])}.")
    for name, facts in results.get("data", {}).items():
        training, held_out = facts["tokens"]
        text = f"{training:,} tokens for training, {held_out:,} held out"
        lines.append(f"Text for {name}: {facts['source']}, {text}.")
    return " ".join(lines)


def tokens_read(config: dict) -> str:
    batch = config["batch"] * config["context"]
    return f"{config['steps']} steps of {batch:,} tokens, {config['steps'] * batch / 1e6:.3g} M"


def chosen(results: dict, kind: str) -> list[tuple[float, int, dict]]:
    """(sparsity, seed, result) of the runs of a kind; of fine-tunings the best rate of each."""
    found: dict[tuple[float, int], dict] = {}
    for key, result in results.items():
        words = key.split()
        if words[0] == kind and result["loss"] is not None:
            place = float(words[1]), int(words[3])
            if place not in found or result["loss"] < found[place]["loss"]:
                found[place] = result
    return [(*place, result) for place, result in sorted(found.items())]


def of_first_seed(results: dict, kind: str) -> dict[float, dict]:
    return {sparsity: run for sparsity, seed, run in chosen(results, kind) if seed == 0}


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
        losses: dict[float, dict[int, float]] = {}
        for sparsity, seed, result in chosen(results, kind):
            losses.setdefault(sparsity, {})[seed] = result["loss"]
        dense = losses.get(0.0, {})
        for sparsity, of_seeds in losses.items():
            if len(of_seeds) < 2:
                continue
            rows.append([kind, name_of(sparsity), *spread(list(of_seeds.values()))])
            both = [loss - dense[seed] for seed, loss in of_seeds.items() if seed in dense]
            if sparsity and both:
                cells = spread(both, "+.4f")
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


def plot(results: dict, path: Path) -> None:
    """Validation loss over FLOPs and over time, after fine-tuning, and of pruning over sparsity."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    figure, panels = plt.subplots(2, 2, figsize=(12, 9), layout="constrained")
    for axes in panels.flat:
        axes.set_ylabel("validation loss (nats per token)")
        axes.grid(alpha=0.3)
    pretraining_panels(*panels[0], results)
    finetuning_panel(panels[1, 0], results)
    pruning_panel(panels[1, 1], results)
    for axes in panels.flat:
        if axes.get_legend_handles_labels()[0]:
            axes.legend(frameon=False)
        axes.spines[["top", "right"]].set_visible(False)
    figure.get_layout_engine().set(w_pad=0.1, h_pad=0.1)
    figure.savefig(path, dpi=120)
    plt.close(figure)


def pretraining_panels(left, right, results: dict) -> None:
    runs = of_first_seed(results, "pretrain").items()
    for (sparsity, run), colour, marker in zip(runs, COLOURS, MARKERS, strict=False):
        steps = run["config"]["steps"]
        # The first evaluations would hide what differs.
        points = [e for e in run["evaluations"] if e["step"]]
        style = {"color": colour, "marker": marker, "label": name_of(sparsity)}
        losses = [e["loss"] for e in points]
        left.plot([run["flops"] * e["step"] / steps for e in points], losses, **style)
        if "step_s" in run:
            right.plot([e["seconds"] for e in points], losses, **style)
    left.set(title="Pre-training", xlabel="training FLOPs")
    right.set(title="Pre-training", xlabel="seconds in training steps, alone on a GPU")


def finetuning_panel(axes, results: dict) -> None:
    """The cost of sparsity before and after fine-tuning, each seed a point."""
    for kind, label, colour, marker in (
        ("pretrain", "pre-trained", COLOURS[0], MARKERS[0]),
        ("finetune", "then fine-tuned dense", COLOURS[1], MARKERS[1]),
    ):
        runs = chosen(results, kind)
        dense = {seed: run["loss"] for sparsity, seed, run in runs if not sparsity}
        points = [(100 * s, r["loss"] - dense[seed], seed) for s, seed, r in runs if seed in dense]
        first = [(x, y) for x, y, seed in points if seed == 0]
        others = [(x, y) for x, y, seed in points if seed and x]
        style = {"color": colour, "marker": marker, "fillstyle": "none", "zorder": 3}
        if first:
            axes.plot(*zip(*first, strict=True), **style | {"fillstyle": "full"}, label=label)
        if others:
            axes.plot(*zip(*others, strict=True), linestyle="", **style)
    axes.axhline(0, color="black", linewidth=1)
    axes.set(
        title="What sparsity costs (open: other seeds)",
        xlabel="sparsity of pre-training (%)",
        ylabel="loss above that of the dense arm (nats)",
    )


def pruning_panel(axes, results: dict) -> None:
    rounds = results.get("prune rounds", {}).get("rows", [])
    curves = {
        "in rounds, with recovery": (rounds, "-"),
        "at once, with as many steps": (pruned(results, "once"), "-"),
        "SparseGPT, no recovery": (pruned(results, "sparsegpt"), "--"),
        "Wanda, no recovery": (pruned(results, "wanda"), "--"),
        "magnitude, no recovery": (pruned(results, "magnitude"), "--"),
        "not pruned, as many steps": (not_pruned(results), "-"),
    }
    shown = []
    styles = zip(curves.items(), COLOURS, MARKERS, strict=False)
    for (label, (rows, line)), colour, marker in styles:
        points = [(100 * r["sparsity"], r["loss"]) for r in rows if r["sparsity"]]
        if points:
            axes.plot(*zip(*points, strict=True), line, color=colour, marker=marker, label=label)
            shown += [loss for _, loss in points] if line == "-" else []
    if rounds and shown:
        axes.axhline(rounds[0]["loss"], color="black", linewidth=1, label="before")
        # What is not recovered soon leaves the panel.
        low, high = min(*shown, rounds[0]["loss"]), max(*shown, rounds[0]["loss"])
        room = max(high - low, 0.02)
        axes.set_ylim(low - 0.1 * room, low + 4 * room)
    axes.set(title="Pruning the dense model", xlabel="sparsity (%)")
