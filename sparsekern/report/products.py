"""Sections about products of a linear layer: CPUs, GPUs, and the ceilings of both."""

from collections.abc import Iterable
from statistics import geometric_mean

from ..bench.rates import together
from ..bench.records import groups, select, sparsities_of
from . import plots
from .curves import Curve, at_90, common, curve, curves, plain, span, starts, tokens
from .load import PASSES, TRAINING, Result
from .measured import processor_of
from .view import FEW, MANY, Panel, Section, View, cpu_products, is_of_a_gpu, threads_of

WHOLE = "all three"
FP8 = {"fp8": "FP8, cast before", "fp8, with its casts": "FP8, casts included"}
LINES = PASSES | {"linear": "whole linear step"}


def on_a_cpu(view: View) -> Section | None:
    records, result = cpu_products(view), view.cpu.result
    if not records:
        return None
    panels = []
    forward = curves(select(records, op="spmm"), lambda r: r["M"], tokens)
    many = [r for r in records if r["M"] >= MANY and r["op"] != "spmm"]
    passes = {LINES[op]: curve(common(select(many, op=op))) for op in LINES if op != "spmm"}
    passes = {name: each for name, each in passes.items() if len(each) > 1}
    for what, found in (("Forward products", forward), ("The products of training", passes)):
        if found:
            panels.append(Panel(f"{what} {starts(found)}", plots.speedups(found), [result]))
    peers = {
        name: {s: ours[s] / ratio for s, ratio in best.items() if s in ours}
        for name, ours in forward.items()
        if (best := _peers(records, name))
    }
    if peers:
        ratios = [ratio for each in peers.values() for ratio in each.values()]
        panels.append(
            Panel(
                f"{span(ratios)} times as fast as the best other sparse library",
                plots.speedups(peers, "the other library is faster", "times the other library"),
                [result],
            )
        )
    every = forward | passes
    dense = ", ".join(sorted({r["best_dense"] for r in records if "best_dense" in r}))
    threads = threads_of(records)
    return Section(
        f"On a CPU all products {starts(every)}{at_90(every)}",
        f"{processor_of(result)}; {threads} thread{'s' * (threads > 1)}, "
        f"{records[0]['dtype']}, random masks, medians; geometric means "
        f"over the shapes. One token has its weights in memory, more tokens have them in cache. "
        f"The best dense calls were {dense or 'not named'}. The dotted line is the work that is "
        "left: no kernel reaches it, since zeros save arithmetic and not everything else.",
        panels,
    )


def _peers(records: list[dict], name: str) -> Curve:
    alike = groups(select(records, op="spmm"), lambda r: r["M"])
    for (M,), found in alike.items():
        if tokens(M) == name:
            return curve(common(found), lambda r: r.get("best_peer"))
    return {}


def other_cpus(view: View) -> Section | None:
    """Forward of many tokens, a line for each machine and number of threads."""
    found: dict[str, Curve] = {}
    shapes: dict[str, set] = {}
    files, text = [], ""
    for result in view.results:
        products = [r for r in result.records if r["device"] == "cpu" and r["op"] == "spmm"]
        products = [r for r in products if r["M"] >= MANY and r["dtype"] == "float32"]
        products = select(products, mask=("random", "trained"))
        alike = groups(products, lambda r: r["mask"], lambda r: r["threads"])
        for (mask, threads), rows in alike.items():
            rows = common(rows)
            name = _short(result, threads) + ", trained" * (mask == "trained")
            each, kinds = curve(rows), {(r["M"], r["N"], r["K"]) for r in rows}
            if len(each) < 2:
                continue
            if name in found and shapes[name] == kinds:
                other = found[name]
                apart = max(max(each[s] / other[s], other[s] / each[s]) for s in each)
                text += f" Two runs of '{name}' differ by up to {apart - 1:.0%}."
                name += ", again"
            elif name in found:
                name += "*"
            found[name], shapes[name] = each, kinds
            files.append(result)
    if len(found) < 2:
        return None
    at = {name: each[0.75] for name, each in found.items() if 0.75 in each}
    most, least = max(at, key=at.get), min(at, key=at.get)
    return Section(
        f"From CPU to CPU products of many tokens run {span(at.values())} times dense at 75%",
        f"Forward of {MANY} and more tokens. '2 of 16' are 2 threads on 16 cores; 'trained' has "
        "the masks of a trained model and no random ones; '*': other shapes. "
        f"Most at 75%: {most}; least: {least}.{text}",
        [Panel("", plots.speedups(found), files)],
    )


def _short(result: Result, threads: int) -> str:
    """'Xeon avx512, 2 of 16'"""
    about = processor_of(result)
    words = [w for w in about.name.replace("(R)", "").split() if w not in ("Intel", "AMD")]
    name = words[0] if words else about.name
    return f"{name} {about.isa}, {threads} of {about.cores}"


def few_tokens_on_a_gpu(view: View) -> Section | None:
    result = view.decode
    if not result:
        return None
    records = select(plain(result.records), op="spmm")
    found = curves(records, lambda r: r["M"], tokens)
    if not found:
        return None
    panels = [
        Panel("The mean over the shapes, by number of tokens", plots.speedups(found), [result])
    ]
    for M in (min(r["M"] for r in records), max(r["M"] for r in records)):
        shapes = {
            f"{N} x {K}": curve(rows)
            for (N, K), rows in sorted(
                groups(select(records, M=M), lambda r: r["N"], lambda r: r["K"]).items(),
                key=lambda item: item[0][0] * item[0][1],
            )
        }
        last = {name: list(each.values())[-1] for name, each in shapes.items()}
        most = sparsities_of(records)[-1]
        losing = sum(ratio < 1 for ratio in last.values())
        title = f"By shape of W, {tokens(M)}: {span(last.values())} times at {most:.0%}"
        if losing:
            title += f", {losing} of {len(last)} lose"
        panels.append(Panel(title, plots.speedups(shapes), [result]))
    return Section(
        f"Few tokens on a GPU: {_gains(found)}",
        f"{result.about}. Geometric means over {len(shapes)} shapes, weights from memory, replays "
        "of a CUDA graph. The mean hides how far the sizes are apart: each shape stands for itself "
        "beside it.",
        panels,
    )


def _gains(found: dict[str, Curve]) -> str:
    """Who gains at the most zeros, who loses there, in words."""
    last = {name: list(each.values())[-1] for name, each in found.items()}
    best = max(last, key=last.get)
    text = f"{best} {'reaches' if best == '1 token' else 'reach'} {last[best]:.1f} times dense"
    losing = [name for name, each in found.items() if max(each.values()) < 1]
    return f"{text}, {' and '.join(losing)} always lose" if losing else text


def many_tokens_on_a_gpu(view: View) -> Section | None:
    panels, files, wins = [], [], []
    if view.map:
        rows = {
            M: curve(common(found))
            for (M,), found in sorted(groups(plain(view.map.records), lambda r: r["M"]).items())
        }
        wins = [M for M, each in rows.items() if each.get(0.9, 0) >= 1]
        title = f"At 90% zeros dense is slower up to {tokens(max(wins))}" if wins else "Dense wins"
        panels.append(Panel(title, plots.crossover(rows), [view.map]))
        files.append(view.map)
    lines: dict[str, Curve] = {}
    if view.gpu:
        products = [r for r in plain(view.gpu.records) if r["M"] > FEW]
        for (op, M), found in sorted(groups(products, lambda r: r["op"], lambda r: r["M"]).items()):
            each = curve(common(found))
            if len(each) > 1 and op in LINES:
                lines[f"{LINES[op]}, {M:,}"] = each
    if lines:
        title = f"Products of {FEW + 1} and more tokens {starts(lines)}"
        panels.append(Panel(title, plots.speedups(lines), [view.gpu]))
        files.append(view.gpu)
    if not panels:
        return None
    every = [ratio for each in lines.values() for ratio in each.values()]
    title = "Many tokens on a GPU"
    if every:
        title += f" run at {span(every)} times dense"
    elif wins:
        title += f" gain up to {tokens(max(wins))} at 90% zeros"
    text = (
        f"{files[0].about}. The map holds our own kernels against dense, orange and bold is a "
        "loss; dispatch reads it and runs dense where dense is faster."
    )
    if every and max(every) < 1:
        title += ": dense wins, and so in training"
        text += " Tensor cores do so much dense arithmetic that skipping zeros does not pay."
    return Section(title, text, panels)


def products_of_training(view: View) -> Section | None:
    """Forward and both gradients on a GPU, under free and two-way masks, and dense FP8."""
    result = view.last(lambda r: r.kind == TRAINING)
    if not result:
        return None
    cases = result.data["products"]
    rows: dict[str, dict[str, float]] = {name: {} for name in (*PASSES.values(), WHOLE)}

    def note(name: str, who: str, ratios: Iterable[float | None]) -> None:
        """Their geometric mean, where none is missing."""
        found = list(ratios)
        if None not in found:
            rows[name][who] = geometric_mean(found)

    usual = cases[0]["sparsity"]
    alike = groups(cases, lambda c: c["sparsity"], lambda c: c["mask"])
    for (sparsity, mask), found in alike.items():
        who = "two-way masks" if mask == "two-way" else "free masks"
        if sparsity != usual:
            who += f" of {sparsity:.0%} zeros"
        for op, name in PASSES.items():
            note(name, who, (c.get("speedup") for c in select(found, op=op)))
        layers = groups(found, lambda c: c["N"], lambda c: c["K"]).values()
        note(WHOLE, who, (together(layer, "sparsekern") for layer in layers))
    for contender, who in FP8.items():
        note(WHOLE, who, (together(layer, contender) for layer in layers))
    whole = rows[WHOLE]
    if not whole:
        return None
    first = cases[0]
    return Section(
        "The three products of training on a GPU: "
        + ", ".join(f"{ratio:.2f} times dense with {who}" for who, ratio in whole.items()),
        f"{result.about}. {tokens(first['M'])}, {first['sparsity']:.0%} zeros, geometric means of "
        f"{len(layers)} layers, results held to float64. Two-way: at most two of four neighbours "
        "are stored along both axes of W. FP8 is other work: dense, with operands of 8 bits.",
        [Panel("", plots.bars({name: each for name, each in rows.items() if each}), [result])],
    )


def ceilings(view: View) -> Section | None:
    """What of the machine's arithmetic and memory the products use."""
    panels = []
    for result in view.present(view.cpu.result, view.decode):
        records = plain(result.records)
        threads = threads_of(records)
        limits = result.ceilings(threads)
        records = [r for r in select(records, threads=threads, op="spmm") if r.get("moved_bytes")]
        if not limits or not records:
            continue
        found = _shares(records, limits)
        panels.append(Panel(_share_title(result, found), plots.shares(found), [result]))
    if not panels:
        return None
    return Section(
        "Why 90% zeros do not make it 10 times as fast: sparse uses less of the machine",
        "For one token the ceiling is the bandwidth of memory, of the bytes that must be read; for "
        "many tokens it is the arithmetic, of stored weights alone. Both ceilings were measured in "
        "the same run. A share above 100% comes from weights that were still in a cache.",
        panels,
    )


def _share_title(result: Result, found: dict[str, Curve]) -> str:
    """At 90 % zeros, of many tokens where they were measured."""
    where = "GPU" if is_of_a_gpu(result) else "CPU"
    for ours, dense, what in (
        ("many tokens", "many, dense", "the arithmetic"),
        ("1 token", "1 token, dense", "the bandwidth"),
    ):
        if 0.9 in found.get(ours, {}) and 0.9 in found.get(dense, {}):
            return (
                f"{where}, {ours} at 90% zeros: {found[ours][0.9]:.0%} of {what}, "
                f"dense {found[dense][0.9]:.0%}"
            )
    return where


def _shares(records: list[dict], limits: dict) -> dict[str, Curve]:
    bandwidth, peak = limits["bytes_per_s"]["memory"], limits["flop_per_s"]
    width = 4 if records[0]["dtype"] == "float32" else 2

    def dense_bytes(r: dict) -> int:
        return width * (r["N"] * r["K"] + r["M"] * (r["N"] + r["K"]))

    def dense_s(r: dict) -> float:
        return r["speedup"] * r["ours_s"]

    one, many = select(records, M=1), [r for r in records if r["M"] >= MANY]
    found = {
        "1 token": curve(one, lambda r: r["moved_bytes"] / r["ours_s"] / bandwidth),
        "1 token, dense": curve(one, lambda r: dense_bytes(r) / dense_s(r) / bandwidth),
        "many tokens": curve(many, lambda r: r["useful_flop"] / r["ours_s"] / peak),
        "many, dense": curve(many, lambda r: 2 * r["M"] * r["N"] * r["K"] / dense_s(r) / peak),
    }
    return {name: each for name, each in found.items() if each}
