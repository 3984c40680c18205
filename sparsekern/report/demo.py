"""Results of the demo as Markdown and plots: the same sections on the terminal and in report.md."""

from collections.abc import Iterable
from pathlib import Path
from statistics import median

from ..extras import require
from ..files import atomic_write
from ..terminal import table
from ..wafer.cost import compare_with_dense
from ..wafer.machine import machine
from ..wafer.shapes import GPTShape
from ..wafer.sweep import FULL_TOKENS

# Okabe and Ito's palette: told apart by every kind of colour vision; markers differ as well.
COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000")
MARKERS = ("o", "s", "^", "D", "v", "P", "X")


def environment_section(environment: dict[str, str]) -> str:
    return table(["what", "found"], [list(item) for item in environment.items()], left=2)


def check_section(checks: list[dict]) -> str:
    rows = [
        [
            c["dtype"].removeprefix("torch."),
            "x".join(map(str, c["x"])),
            "x".join(map(str, c["w"])),
            f"{c['torch']:.1e}",
            f"{c['sparsekern']:.1e}",
        ]
        for c in checks
    ]
    return (
        "Relative error against float64 at the worst element, on the same numbers: sparsekern may\n"
        "err at most twice as much as torch.\n\n"
        + table(["dtype", "x", "W", "torch.matmul", "sparsekern.matmul"], rows, left=3)
    )


def prune_section(rounds: list[dict]) -> str:
    """The rounds of iterative pruning; the first row is the model as it came."""
    rows = [
        [
            r["round"],
            f"{r['sparsity']:.1%}",
            f"{r['loss_before']:.4f}",
            f"{r['loss']:.4f}",
            f"{r['flop_ratio']:.2f}x",
            f"{r['parameters']:,}",
            f"{1e3 * r['latency_s']:.2f} ms",
            f"{1e3 * r['dense_latency_s']:.2f} ms",
        ]
        for r in rounds
    ]
    header = ["round", "sparsity", "loss pruned", "loss after recovery", "fewer inference FLOPs"]
    return (
        "Validation loss in nats per token. Latency: one forward pass of one sequence, and of the\n"
        "same model densified, in turn.\n\n"
        + table([*header, "parameters", "latency", "densified"], rows)
    )


def kernel_section(timings: list[dict], shape: str, threads: int, missing: dict[str, str]) -> str:
    """`missing`: why a dense library did not take part."""
    sparsities = list(timings[0]["sparse_s"])
    rows = [
        [
            t["pass"],
            t["tokens"],
            f"{1e3 * t['dense_s']:.3f} ms",
            t["best_dense"].partition(", OpenBLAS")[0],
            *(f"{t['dense_s'] / seconds:.2f}x" for seconds in t["sparse_s"].values()),
        ]
        for t in timings
    ]
    header = ["pass", "tokens", "dense", "by", *(f"{s:.0%}" for s in sparsities)]
    left_out = [f"{name} takes no part: {reason}." for name, reason in missing.items()]
    return "\n\n".join(
        [
            f"One linear layer ({shape}, float32, {threads} thread{'s' * (threads > 1)}): how many "
            "times as fast as the best\ndense call of this machine, by share of zeros. Medians of "
            "interleaved rounds; below 1x is a loss.",
            table(header, rows),
            *left_out,
        ]
    )


def dense_section(names: Iterable[str]) -> str:
    return (
        "Dense is held to the fastest of what torch and NumPy bring, each checked against float64:"
        f"\n{'; '.join(names)}."
    )


TOO_SHORT = (
    "So short a run says nothing of quality: a model that has hardly begun to learn can even lose "
    "less\nwith zeros. What zeros cost in longer runs: docs/quality.md."
)


def training_section(dense: dict, sparse: dict, steps: dict) -> str:
    def row(name: str, form: str, value, ratio: str = "") -> list[str]:
        return [name, form.format(value(dense)), form.format(value(sparse)), ratio]

    def times(numerator: float, denominator: float) -> str:
        return f"{numerator / denominator:.2f}x"

    rows = [
        row("parameters", "{:.2f} M", lambda r: r["parameters"] / 1e6),
        row("first validation loss", "{:.3f}", lambda r: r["evaluations"][0]["loss"]),
        row("last validation loss", "{:.3f}", lambda r: r["evaluations"][-1]["loss"]),
        row(
            "FLOPs per token",
            "{:.1f} M",
            lambda r: r["flops_per_token"] / 1e6,
            f"{sparse['flop_ratio']:.2f}x fewer",
        ),
        row(
            "peak memory of the process",
            "{:.0f} MiB",
            lambda r: r["peak_memory_bytes"] / 2**20,
            f"{times(sparse['peak_memory_bytes'], dense['peak_memory_bytes'])} as much",
        ),
        row(
            "tokens per second",
            "{:,.0f}",
            lambda r: r["tokens_per_s"],
            f"{times(sparse['tokens_per_s'], dense['tokens_per_s'])} as many",
        ),
        row(
            "wall-clock of all steps",
            "{:.1f} s",
            lambda r: sum(r["seconds"]),
            f"{times(sum(dense['seconds']), sum(sparse['seconds']))} as fast",
        ),
        row(
            "wall-clock of the whole run",
            "{:.1f} s",
            lambda r: r["wall_s"],
            f"{times(dense['wall_s'], sparse['wall_s'])} as fast",
        ),
    ]
    c = sparse["config"]
    dense_name, sparse_name = f"dense by {steps['best_dense']}", f"{c['sparsity']:.0%} sparse"
    return (
        f"GPT-2 with {c['layers']} layers, width {c['width']}, {c['heads']} heads, context "
        f"{c['context']} on {c['data']}:\n{c['steps']} steps of {c['batch']} x {c['context']} "
        f"tokens, {sparse['threads']} threads, one run after the other. Losses in nats per token."
        f"\n\n{table(['', dense_name, sparse_name, 'ratio'], rows)}\n\n{TOO_SHORT}"
        f"\n\n{wafer_line(sparse, steps['dense_s'] / steps['sparse_s'])}"
    )


def wafer_line(run: dict, measured: float | None = None) -> str:
    """The speed-up of a run, that of its FLOPs, and the one that the same sparsity would have on a
    wafer. `measured`: here, over the dense run, where there was one."""
    c, here = run["config"], f"{measured:.2f}x as fast here, " if measured else ""
    told = f"{run['sparsity']:.0%} sparse: {here}{run['flop_ratio']:.2f}x fewer FLOPs, "
    if run["sparsity"] == 1:
        return f"{told}no weight is left to predict a wafer's speed for."
    shape = GPTShape(
        "run", c["layers"], c["width"], c["heads"], 4 * c["width"], run["vocab_size"], c["context"]
    )
    wafer, batch = machine("wse2"), max(1, FULL_TOKENS // shape.sequence)
    low, high = compare_with_dense(wafer, shape, 1 - run["sparsity"], batch).speedup_range
    return (
        f"{told}{low:.2f} to {high:.2f}x as fast predicted on a wafer "
        f"({wafer.name}, {batch * shape.sequence:,} tokens a step)."
    )


BUSY = 0.2  # spread of the rounds from which on their times are doubtful


def steps_section(steps: dict, sparsity: float) -> str:
    """One training step in turn, and what bounds the sparse one."""
    parts, sparse_s, dense_s = steps["parts_s"], steps["sparse_s"], steps["dense_s"]
    rows = [
        [f"dense by {name}", f"{1e3 * s:.1f} ms", f"{s / sparse_s:.2f}x"]
        for name, s in steps["dense"].items()
    ]
    rows.append([f"{sparsity:.0%} sparse", f"{1e3 * sparse_s:.1f} ms", ""])
    total = sum(parts.values())
    shares = [[name, f"{1e3 * s:.1f} ms", f"{s / total:.0%}"] for name, s in parts.items()]
    linears, speedup = steps["linears_s"], dense_s / sparse_s
    stays = total - sum(s for name, s in parts.items() if name.startswith("linear"))
    text = (
        f"One training step, all in turn in one process, medians of {steps['rounds']} rounds:\n\n"
        + table(["step", "time", "sparse is as fast"], rows)
        + "\n\n"
        + table([f"part of the step by {steps['best_dense']}", "time", "share"], shares)
        + f"\n\nA step cannot be more than {steps['cap']:.2f}x as fast, because "
        f"{1e3 * stays:.1f} ms of it are no linears and stay as they are.\nThe linears, "
        f"timed alone in turn, are {linears['dense'] / linears['sparse']:.2f}x as fast; that "
        f"foretells {total / steps['predicted_s']:.2f}x for the step.\n"
        f"Measured: {speedup:.2f}x."
    )
    if speedup > steps["cap"]:
        text += " That is more than can be: this machine was too busy to tell."
    if steps["spread"] > BUSY:
        text += (
            "\n\nThe machine was busy: the middle half of the rounds is "
            f"{steps['spread']:.0%} apart. Take these times as rough."
        )
    return text


def next_section(commands: dict[str, str]) -> str:
    return "\n\n".join(f"{what}:\n\n    {command}" for command, what in commands.items())


def generation_section(result: dict) -> str:
    """The section about gpt.speed.compare(): a row for each way of each model."""
    rows = [
        [
            name,
            way,
            f"{result['batch'] / median(seconds['step_s']):,.1f}",
            f"{1e3 * median(seconds['step_s']):.3f} ms",
            f"{1e3 * median(seconds['first_token_s']):.1f} ms",
            f"{result[name]['block_bytes'] / 1e6:,.1f} MB",
            f"{result[name]['weight_bytes'] / 1e6:,.1f} MB",
        ]
        for name in ("dense", "sparse")
        for way, seconds in result[name]["ways"].items()
    ]
    header = ["model", "a step is", "tokens/s", "step", "first token", "blocks", "all weights"]
    return (
        f"{result['batch']} x {result['context']} tokens, then {result['steps']} steps, medians of "
        f"{result['rounds']} interleaved rounds:\n\n{table(header, rows, left=2)}\n\n"
        f"The sparse model generates {result['speedup']:.2f}x as fast as the best dense one. Its "
        f"blocks take {result['block_bytes_ratio']:.3f}x\nthe memory, with embeddings and head "
        f"{result['weight_bytes_ratio']:.3f}x."
    )


def write(folder: Path, sections: dict[str, str], timings: list[dict], runs: dict) -> list[Path]:
    """report.md, speedup.png and loss.png in `folder`; `runs` maps a label to training metrics."""
    plots = {
        "Kernels": ("speedup.png", plot_speedup(timings)),
        "Training": ("loss.png", plot_losses(runs)),
    }
    text = "# sparsekern demo\n"
    for title, body in sections.items():
        text += f"\n## {title}\n\n{body}\n"
        if title in plots:
            text += f"\n![{title}]({plots[title][0]})\n"
    for name, figure in plots.values():
        with atomic_write(folder / name) as file:
            figure.savefig(file, format="png", dpi=150)
    with atomic_write(folder / "report.md") as file:
        file.write(text.encode())
    return [folder / name for name in ("report.md", *(name for name, _ in plots.values()))]


def plot_speedup(timings: list[dict]):
    """Speed-up over dense against sparsity: a panel for each pass, a curve for each token count."""
    passes = list(dict.fromkeys(t["pass"] for t in timings))
    figure = _figure(width=4.8 * len(passes))
    panels = figure.subplots(1, len(passes), sharey=True, squeeze=False)[0]
    ratios = [t["dense_s"] / s for t in timings for s in t["sparse_s"].values()]
    limits = min(0.45, 0.9 * min(ratios)), max(17, 1.1 * max(ratios))
    for panel, name in zip(panels, passes, strict=True):
        chosen = [t for t in timings if t["pass"] == name]
        for t, colour, marker in zip(chosen, COLOURS, MARKERS, strict=False):
            sparsities = [100 * s for s in t["sparse_s"]]
            speedups = [t["dense_s"] / s for s in t["sparse_s"].values()]
            label = f"M = {t['tokens']} tokens"
            panel.plot(sparsities, speedups, color=colour, marker=marker, label=label)
        panel.axhspan(limits[0], 1, color="0.94")
        panel.axhline(1, color="black", linewidth=1)
        corner = {"transform": panel.transAxes, "color": "0.4", "ha": "right", "va": "bottom"}
        panel.text(0.99, 0.01, "dense is faster", **corner)
        panel.set(
            title=name,
            xlabel="zeros in the weight (%)",
            xticks=sparsities,
            yscale="log",
            ylim=limits,
        )
        panel.set_yticks([0.5, 1, 2, 4, 8, 16], ["0.5x", "1x", "2x", "4x", "8x", "16x"])
        panel.minorticks_off()
        panel.grid(alpha=0.3)
    panels[0].set_ylabel("times as fast as the best dense call")
    panels[0].legend(frameon=False)
    return figure


def plot_losses(runs: dict[str, dict]):
    """Validation loss (points) and training loss (thin) against the seconds spent in steps."""
    figure = _figure(width=7)
    panel = figure.subplots()
    for (label, run), colour, marker in zip(runs.items(), COLOURS, MARKERS, strict=False):
        elapsed, seconds = [], 0.0
        for step_s in run["seconds"]:
            seconds += step_s
            elapsed.append(seconds)
        panel.plot(elapsed, run["losses"], color=colour, linewidth=0.8, alpha=0.4)
        points = run["evaluations"]
        panel.plot(
            [p["seconds"] for p in points],
            [p["loss"] for p in points],
            color=colour,
            marker=marker,
            label=f"{label}, {len(elapsed)} steps in {seconds:.0f} s",
        )
    panel.set(
        title="Same text, same steps; too few of them to compare quality",
        xlabel="seconds spent in training steps",
        ylabel="loss (nats per token)",
    )
    panel.legend(frameon=False, title="validation (points), training (thin)")
    panel.grid(alpha=0.3)
    return figure


def _figure(width: float):
    # Figure itself, not pyplot: no window system is touched and no figure stays open.
    figure = require("matplotlib.figure", "demo").Figure
    return figure(figsize=(width, 4.2), layout="constrained")
