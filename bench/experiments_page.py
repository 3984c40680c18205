"""What experiments.py found, as tables and a plot."""

import math
import statistics
from pathlib import Path

from sparsekern.report import table


def page(results: dict, cap: float) -> str:
    """All that is there so far, as Markdown. `cap`: the FLOP ratio with the linear layers free."""
    about = results.get("machine", {})
    parts = [
        "# Sparse pre-training, dense fine-tuning and iterative pruning",
        ", ".join(f"{name} {value}" for name, value in about.items()),
        f"Losses are nats per token on held-out text. With the linear layers free, training FLOPs "
        f"would fall {cap:.2f}x (Amdahl).",
        "## Pre-training\n\nThe same tokens for each arm; the learning rate is the best of its "
        "sweep.\n\n" + pretraining_table(results),
        "## Dense fine-tuning\n\nBest of the same learning rates for each arm.\n\n"
        + finetuning_table(results),
        "## Seeds\n\n" + seeds_table(results),
        "## Pruning the dense model\n\n" + pruning_table(results),
        "## Learning-rate sweeps\n\n" + sweep_table(results),
    ]
    return "\n\n".join(parts) + "\n"


def chosen(results: dict, kind: str) -> list[tuple[float, int, dict]]:
    """(sparsity, seed, result) of the runs of a kind; of fine-tunings the best rate of each."""
    found: dict[tuple[float, int], dict] = {}
    for key, result in results.items():
        words = key.split()
        if words[0] == kind:
            place = float(words[1]), int(words[3])
            if place not in found or result["loss"] < found[place]["loss"]:
                found[place] = result
    return [(*place, result) for place, result in sorted(found.items())]


def pretraining_table(results: dict) -> str:
    runs = [(s, r) for s, seed, r in chosen(results, "pretrain") if seed == 0]
    dense = next((r for s, r in runs if s == 0), None)
    rows = [
        [
            f"{s:.0%}",
            f"{r['config']['lr']:g}",
            f"{r['loss']:.4f}",
            f"{r['loss'] - dense['loss']:+.4f}" if dense else "-",
            f"{r['flops']:.3g}",
            f"{dense['flops'] / r['flops']:.2f}x" if dense else "-",
            f"{1e3 * r['step_s']:.1f} ms",
            f"{dense['step_s'] / r['step_s']:.2f}x" if dense else "-",
            f"{r['steps_s']:.0f} s",
            f"{r['peak_gpu_bytes'] / 2**30:.2f} GiB",
        ]
        for s, r in runs
    ]
    header = ["sparsity", "lr", "loss", "to dense", "FLOPs", "fewer", "step", "faster", "time"]
    return table([*header, "GPU memory"], rows)


def finetuning_table(results: dict) -> str:
    runs = [(s, r) for s, seed, r in chosen(results, "finetune") if seed == 0]
    dense = next((r for s, r in runs if s == 0), None)

    def total(r: dict, name: str) -> float:
        return r["source"][name] + r["flops" if name == "flops" else "steps_s"]

    rows = [
        [
            f"{s:.0%}",
            f"{r['config']['lr']:g}",
            f"{r['evaluations'][0]['loss']:.4f}",
            f"{r['loss']:.4f}",
            f"{r['loss'] - dense['loss']:+.4f}" if dense else "-",
            f"{total(dense, 'flops') / total(r, 'flops'):.2f}x" if dense else "-",
            f"{total(dense, 'seconds') / total(r, 'seconds'):.2f}x" if dense else "-",
        ]
        for s, r in runs
    ]
    header = ["pre-trained at", "lr", "before", "after", "to dense-dense", "FLOPs of both, fewer"]
    return table([*header, "time of both, faster"], rows)


def seeds_table(results: dict) -> str:
    rows = []
    for kind in ("pretrain", "finetune"):
        losses: dict[float, list[float]] = {}
        for sparsity, _, result in chosen(results, kind):
            losses.setdefault(sparsity, []).append(result["loss"])
        for sparsity, values in losses.items():
            if len(values) > 1:
                mean, spread = statistics.mean(values), max(values) - min(values)
                each = ", ".join(f"{value:.4f}" for value in values)
                rows.append([kind, f"{sparsity:.0%}", f"{mean:.4f}", f"{spread:.4f}", each])
    return table(["run", "sparsity", "mean loss", "max - min", "each seed"], rows)


def pruning_table(results: dict) -> str:
    rounds = results.get("prune rounds", {}).get("rows", [])
    rows = []
    for i, r in enumerate(rounds):
        target = f"{r['sparsity']:.1%}"
        cells = [target, f"{r['flop_ratio']:.2f}x", f"{r['parameters']:,}"]
        cells += [f"{1e3 * r['latency_s']:.2f} ms", f"{1e3 * r['dense_latency_s']:.2f} ms"]
        for key in ("prune magnitude", "prune wanda", "prune sparsegpt", "prune once"):
            match = [
                one["rows"][1]["loss"]
                for name, one in results.items()
                if name.rpartition(" ")[0] == key
                and math.isclose(one["rows"][1]["sparsity"], r["sparsity"], abs_tol=1e-3)
            ]
            cells.append(f"{match[0]:.4f}" if match else "-")
        control = results.get("prune control", {}).get("evaluations", [])
        cells.append(f"{r['loss']:.4f}")
        cells.append(f"{control[i]['loss']:.4f}" if i < len(control) else "-")
        rows.append(cells)
    header = ["sparsity", "FLOPs, fewer", "parameters", "latency", "densified", "magnitude"]
    header += ["Wanda", "SparseGPT", "at once + steps", "in rounds + steps", "not pruned + steps"]
    return (
        "Loss of the dense model pruned: at once without recovery by three methods; by magnitude\n"
        "at once, then in rounds, with the same steps of recovery in all; and of the dense model\n"
        "after these steps. The learning rate starts anew in each round, and once elsewhere.\n\n"
        + table(header, rows)
    )


def sweep_table(results: dict) -> str:
    rows = []
    for key, result in results.items():
        words = key.split()
        if words[0] in ("sweep", "finetune"):
            rows.append([words[0], *key.split(" ", 1)[1:], f"{result['loss']:.4f}"])
    return table(["run", "arm", "loss"], rows, left=2)


def plot(results: dict, path: Path) -> None:
    """Validation loss over FLOPs and over time; and of pruning over sparsity."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    figure, (left, middle, right) = plt.subplots(1, 3, figsize=(15, 4.5))
    for sparsity, seed, result in chosen(results, "pretrain"):
        if seed:
            continue
        last, label = result["evaluations"][-1], f"{sparsity:.0%} sparse" if sparsity else "dense"
        points = [e for e in result["evaluations"] if e["step"]]
        losses = [e["loss"] for e in points]
        flops = [result["flops"] * e["step"] / last["step"] for e in points]
        left.plot(flops, losses, marker="o", label=label)
        middle.plot([e["seconds"] for e in points], losses, marker="o", label=label)
    left.set(xlabel="training FLOPs", ylabel="validation loss", xscale="log")
    middle.set(xlabel="seconds in steps", ylabel="validation loss")
    rounds = results.get("prune rounds", {}).get("rows", [])
    right.plot([r["sparsity"] for r in rounds], [r["loss"] for r in rounds], "o-", label="rounds")
    for key, label in (
        ("prune once", "at once, with recovery"),
        ("prune sparsegpt", "SparseGPT, none"),
        ("prune wanda", "Wanda, none"),
        ("prune magnitude", "magnitude, none"),
    ):
        points = [r["rows"][1] for k, r in results.items() if k.rpartition(" ")[0] == key]
        points.sort(key=lambda row: row["sparsity"])
        right.plot([r["sparsity"] for r in points], [r["loss"] for r in points], ".--", label=label)
    right.set(xlabel="sparsity", ylabel="validation loss")
    for axes in (left, middle, right):
        if axes.get_legend_handles_labels()[0]:
            axes.legend()
        axes.grid(alpha=0.3)
    figure.tight_layout()
    figure.savefig(path, dpi=120)
    plt.close(figure)
