"""The tables and the plot of a result. `infos` are the extra_info of its benchmarks."""

from collections.abc import Callable, Iterable
from statistics import geometric_mean, median
from typing import TYPE_CHECKING

from measure import SHAPES

from sparsekern.bench.records import groups, select, sparsities_of
from sparsekern.report.demo import COLOURS, MARKERS, table

if TYPE_CHECKING:
    from matplotlib.figure import Figure

PASSES = {
    "spmm": "forward",
    "spmm_t": "input gradient",
    "sddmm": "values' gradient",
    "linear": "training step of a linear",
    "train_step": "GPT training step",
}
PRODUCTS = ("spmm", "spmm_t", "sddmm", "linear")
PANELS = PRODUCTS[:3]
MASKS = {"pruned": "magnitude-pruned", "trained": "pruned after training", "uneven": "uneven rows"}
OURS = "sparsekern"


def standard(infos: Iterable[dict]) -> list[dict]:
    """Without the large shapes, of which not all sparsities are run: no mean holds them."""
    return [info for info in infos if (info.get("N"), info.get("K")) in (*SHAPES, (None, None))]


def is_fp32_random(info: dict) -> bool:
    return info["dtype"] == "torch.float32" and info["mask"] == "random"


def label(info: dict) -> str:
    """'forward, M = 1, weights cold'."""
    if info["op"] == "train_step":
        return f"{PASSES[info['op']]}, {info['model']}"
    parts = [PASSES[info["op"]], f"M = {info['M']}"]
    if info["M"] == 1:
        parts.append("weights cold" if info["is_cold"] else "weights in cache")
    if info["dtype"] == "torch.bfloat16":
        parts.append("bf16")
    if info["mask"] != "random":
        parts.append(MASKS.get(info["mask"], info["mask"]))
    return ", ".join(parts)


def percent(sparsities: Iterable[float]) -> list[str]:
    return [f"{sparsity:.0%}" for sparsity in sparsities]


def threads_cell(infos: list[dict]) -> str:
    """'1', or '2 (2 shapes)' where not all shapes were run."""
    threads, shapes = infos[0]["threads"], len({(i.get("N"), i.get("K")) for i in infos})
    is_all = shapes == len(SHAPES) or infos[0]["op"] == "train_step"
    return f"{threads}" if is_all else f"{threads} ({shapes} shape{'s' * (shapes > 1)})"


def mean(infos: list[dict], value: Callable[[dict], float | None]) -> str:
    """Geometric mean, or nothing where there is no value for each."""
    values = [value(info) for info in infos]
    return f"{geometric_mean(values):.2f}" if values and None not in values else ""


def cell(infos: list[dict]) -> str:
    """'2.31 (0.63)': ours, and the best peer of each shape where there is one."""
    peers = mean(infos, lambda info: info["best_peer"])
    ours = mean(infos, lambda info: info["speedup"])
    return f"{ours} ({peers})" if peers else ours


def tokens_of(infos: list[dict]) -> str:
    """'256 and 1024'."""
    return " and ".join(map(str, sorted({info["M"] for info in infos})))


def summary(infos: list[dict], rows: Iterable[tuple[str, dict]]) -> str:
    """One line for each (label, fields) and number of threads; {M} in a label: the tokens run."""
    infos = standard(infos)
    sparsities = sparsities_of(infos)
    lines = []
    for name, fields in rows:
        for chosen in groups(select(infos, **fields), lambda i: i["threads"]).values():
            cells = [cell(select(chosen, sparsity=s)) for s in sparsities]
            lines.append([name.format(M=tokens_of(chosen)), threads_cell(chosen), *cells])
    return table(["times dense", "threads", *percent(sparsities)], lines, left=2)


def competitors(infos: list[dict]) -> str:
    """Each pass with a line for us and one for every competitor but the dense calls."""
    products = [info for info in standard(infos) if info["op"] in PRODUCTS]
    sparsities = sparsities_of(products)
    lines = []
    for (name, _), chosen in groups(products, label, lambda i: i["threads"]).items():
        for who in (OURS, *chosen[0]["speedups"]):
            cells = [
                mean(
                    select(chosen, sparsity=s),
                    lambda i, who=who: i["speedup"] if who == OURS else i["speedups"].get(who),
                )
                for s in sparsities
            ]
            lines.append([name, threads_cell(chosen), who, *cells, errors_cell(chosen, who)])
    header = ["pass", "threads", "times dense", *percent(sparsities), "error"]
    return table(header, lines, left=3)


def errors_cell(infos: list[dict], who: str) -> str:
    """The worst relative error against fp64, and whether that is wrong."""
    if who == OURS:
        return f"{max(info['error'] for info in infos):.0e}"
    rivals = [info["rivals"][who] for info in infos if who in info["rivals"]]
    worst = f"{max(rival['error'] for rival in rivals):.0e}"
    return worst if all(rival["is_right"] for rival in rivals) else f"{worst} **wrong**"


def by_shape(infos: list[dict]) -> str:
    products = [info for info in infos if info["op"] in PRODUCTS and info["threads"] == 1]
    sparsities = sparsities_of(products)
    lines = []
    in_order = [info for (_,), alike in groups(products, label).items() for info in alike]
    for (name, n, k), chosen in groups(in_order, label, lambda i: i["N"], lambda i: i["K"]).items():
        rates = [1e-9 * info["dense_flop"] / info["dense_s"] for info in chosen]
        calls = [info["best_dense"] for info in chosen]
        cells = [cell(select(chosen, sparsity=s)) for s in sparsities]
        best = max(dict.fromkeys(calls), key=calls.count)
        lines.append([name, f"{n}x{k}", best, f"{median(rates):.0f}", *cells])
    header = ["pass", "N x K", "best dense", "GFLOP/s", *percent(sparsities)]
    return table(header, lines, left=3)


def against_ourselves(infos: list[dict]) -> str:
    """How many times faster than our own call on fp32, on a random mask, or with one thread."""
    products = [info for info in standard(infos) if info["op"] in PRODUCTS]
    sparsities = sparsities_of(products)
    lines = []
    for (name,), chosen in groups(products, label).items():
        others = [who for who in chosen[0]["speedups"] if who.startswith(OURS)]
        for who in others:
            cells = [
                mean(
                    select(chosen, sparsity=s), lambda i, who=who: i["speedup"] / i["speedups"][who]
                )
                for s in sparsities
            ]
            lines.append([name, who, *cells])
        scaled = scalings(chosen)
        for who, key in ((f"{OURS}, one thread", "ours_s"), ("dense against itself", "dense_s")):
            if scaled:
                cells = [
                    mean(
                        [two | {"one": one} for one, two in scaled if two["sparsity"] == s],
                        lambda i, key=key: i["one"][key] / i[key],
                    )
                    for s in sparsities
                ]
                lines.append([f"{name}, two threads", who, *cells])
    return table(["pass", "times", *percent(sparsities)], lines, left=2) if lines else ""


def scalings(infos: list[dict]) -> list[tuple[dict, dict]]:
    """The pairs of runs that differ in the number of threads alone."""
    pairs = groups(infos, lambda i: i["N"], lambda i: i["K"], lambda i: i["sparsity"]).values()
    found = [(select(pair, threads=1), select(pair, threads=2)) for pair in pairs]
    return [(one[0], two[0]) for one, two in found if one and two]


def steps(infos: list[dict]) -> str:
    rows = [
        [
            f"{i['model']}: {i['layers']} layers, width {i['width']}, "
            f"vocabulary {i['vocabulary']}, {i['batch']} x {i['context']} tokens",
            i["threads"],
            f"{i['sparsity']:.0%}",
            f"{1e3 * i['dense_s']:.0f} ms",
            f"{1e3 * i['ours_s']:.0f} ms",
            f"{i['speedup']:.2f}",
            f"{i['linear_share']:.0%}",
            f"{i['cap']:.2f}",
        ]
        for i in select(infos, op="train_step")
    ]
    header = ["GPT", "threads", "sparsity", "dense", "sparse", "times dense", "linears", "cap"]
    return table(header, rows) if rows else ""


def generation(infos: list[dict]) -> str:
    """Tokens a second of all texts of a batch together."""
    rows = [
        [
            f"{i['model']}, {i['tokens']} tokens after {i['context']}",
            i["batch"],
            i["threads"],
            f"{i['sparsity']:.0%}",
            *(f"{i['batch'] * i['tokens'] / i[side]:.1f}" for side in ("dense_s", "ours_s")),
            f"{i['speedup']:.2f}",
        ]
        for i in select(infos, op="generate")
    ]
    header = ["GPT", "batch", "threads", "sparsity", "dense tokens/s", "sparse", "times dense"]
    return table(header, rows) if rows else ""


def memory(infos: list[dict]) -> str:
    def mib(size: int) -> str:
        return f"{size / 2**20:.0f} MiB"

    rows = [
        [
            f"{i['N']}x{i['K']}, M = {i['M']}, {1 - 1 / i['every']:.0%}",
            *(mib(i[f"{key}_bytes"]) for key in ("first", "later", "result", "bound", "dense")),
        ]
        for i in select(infos, op="memory")
    ]
    header = ["layer", "first call", "later call", "its results", "bound", "dense N x K"]
    return table(header, rows) if rows else ""


def peers(machine: dict) -> str:
    rows = [[p["name"], p["layout"], p["missing"] or "yes"] for p in machine["peers"]]
    return table(["peer", "x, y and what is not timed", "runs here"], rows, left=3)


def plot(infos: list[dict], title: str) -> "Figure":
    """Times dense against sparsity, one thread: a panel for each pass, a colour for each M."""
    from matplotlib.figure import Figure  # no table needs it

    products = [
        info
        for info in select(
            standard(infos), op=PANELS, threads=1, mask="random", dtype="torch.float32"
        )
        # In cache a single token says little of decoding.
        if is_fp32_random(info) and (info["is_cold"] or info["M"] > 1)
    ]
    tokens = sorted({info["M"] for info in products})
    sparsities = sparsities_of(products)
    figure = Figure(figsize=(12, 4.8), layout="constrained")
    panels = figure.subplots(1, len(PANELS), sharey=True)
    for panel, op in zip(panels, PANELS, strict=True):
        for M, colour, marker in zip(tokens, COLOURS, MARKERS, strict=False):
            _curves(panel, select(products, op=op, M=M), colour, marker)
        panel.axhline(1, color="black", linewidth=1)
        panel.set(title=PASSES[op], xlabel="zeros in W (%)", yscale="log")
        panel.set_xticks([100 * s for s in sparsities], [f"{100 * s:g}" for s in sparsities])
        panel.tick_params(labelsize=8)
        panel.set_yticks(*_ticks())
        panel.minorticks_off()
        panel.grid(alpha=0.3)
    panels[0].set_ylabel("times faster than the best dense call")
    for M, colour, marker in zip(tokens, COLOURS, MARKERS, strict=False):
        name = f"M = {M} tokens" if M > 1 else "M = 1, weights from memory"
        panels[0].plot([], [], color=colour, marker=marker, label=name)
    panels[0].plot([], [], color="black", linestyle="--", linewidth=1, label="best sparse peer")
    panels[0].plot([], [], color="black", linewidth=1, label="best dense call")
    panels[0].legend(frameon=False, fontsize=9)
    figure.suptitle(title, fontsize=10)
    return figure


def _curves(panel, infos: list[dict], colour: str, marker: str) -> None:
    for value, style in (("speedup", {"marker": marker}), ("best_peer", {"linestyle": "--"})):
        points = {
            100 * s: [info[value] for info in select(infos, sparsity=s)]
            for s in sparsities_of(infos)
        }
        points = {x: geometric_mean(y) for x, y in points.items() if None not in y}
        panel.plot(points.keys(), points.values(), color=colour, linewidth=1.5, **style)


def _ticks() -> tuple[list[float], list[str]]:
    ticks = [0.1, 0.2, 0.5, 1, 2, 5, 10, 20, 50]
    return ticks, [f"{tick:g}x" for tick in ticks]
