"""The tables and the plot of a GPU result. `cells` are its records, through measure_gpu.derive."""

import textwrap
from collections.abc import Callable, Iterable
from statistics import geometric_mean, median
from typing import TYPE_CHECKING

from tables import percent

from sparsekern.bench.measure_gpu import SHAPES
from sparsekern.bench.records import groups, select, sparsities_of
from sparsekern.bench.replay_gpu import OURS
from sparsekern.report.demo import COLOURS, MARKERS, table

if TYPE_CHECKING:
    from matplotlib.figure import Figure

STREAM, TRITON = "stream", "triton"
# Rows of the table in docs/benchmarks.md.
SUMMARY_TOKENS = (
    ("1 token", (1,)),
    ("8 and 16 tokens", (8, 16)),
    ("32 tokens", (32,)),
    ("64 tokens", (64,)),
)


def speedup(cell: dict, name: str) -> float | None:
    """Times the best dense call; nothing where `name` did not run."""
    return cell["speedups"].get(name)


def is_wrong(cell: dict, name: str) -> bool:
    return name in cell["ways"] and not cell["ways"][name]["is_right"]


def shapes_of(cells: Iterable[dict]) -> set[tuple[int, int]]:
    return {(cell["N"], cell["K"]) for cell in cells}


def ratio_cell(cells: list[dict], name: str, is_spread: bool = True) -> str:
    """'1.31 [0.98-1.66]': geometric mean and extremes over the shapes where `name` ran."""
    cells = [cell for cell in cells if name in cell["ways"]]
    ratios = [r for cell in cells if (r := speedup(cell, name)) is not None]
    if not cells:
        return ""
    if not ratios:
        return "failed"
    text = f"{geometric_mean(ratios):.2f}"
    if is_spread:
        text += f" [{min(ratios):.2f}-{max(ratios):.2f}]"
    if len(ratios) < len(cells):
        text += f" ({len(cells) - len(ratios)} failed)"
    return f"{text} **wrong**" if any(is_wrong(cell, name) for cell in cells) else text


def summary(cells: list[dict]) -> str:
    """Geometric means of the CUDA kernels over shapes and tokens."""
    cells = select(cells, mask="random")
    sparsities = sparsities_of(cells)
    rows = []
    for label, tokens in SUMMARY_TOKENS:
        chosen = select(cells, M=tokens)
        if not chosen:
            continue
        count = len(shapes_of(chosen))
        if count < len(SHAPES):
            label += f" ({count} shape{'s' * (count > 1)})"
        cells_of = [select(chosen, sparsity=s) for s in sparsities]
        rows.append([label, *(ratio_cell(each, STREAM, is_spread=False) for each in cells_of)])
    return table(["times dense", *percent(sparsities)], rows)


def competitors(cells: list[dict]) -> str:
    """A line for each number of tokens and everyone but the dense calls."""
    cells = select(cells, mask="random")
    sparsities = sparsities_of(cells)
    rows = []
    for (M,), chosen in groups(cells, lambda c: c["M"]).items():
        for name in names_of(chosen):
            cells_of = [select(chosen, sparsity=s) for s in sparsities]
            ratios = [ratio_cell(each, name) for each in cells_of]
            rows.append([M, label_of(chosen, name), *ratios, worst_error(chosen, name)])
    header = ["tokens", "times dense [lowest-highest shape]", *percent(sparsities), "error"]
    return table(header, rows, left=2) if rows else ""


def names_of(cells: list[dict]) -> list[str]:
    """All but the dense calls, in the order of first appearance."""
    found = (n for c in cells for n, way in c["ways"].items() if way["kind"] != "dense")
    return list(dict.fromkeys(found))


def label_of(cells: list[dict], name: str) -> str:
    notes = {c["ways"][name].get("note") for c in cells if name in c["ways"]} - {"", None}
    return f"{name} ({'; '.join(sorted(notes))})" if notes else name


def worst_error(cells: list[dict], name: str) -> str:
    errors = [c["ways"][name]["error"] for c in cells if "error" in c["ways"].get(name, {})]
    return f"{max(errors, key=lambda e: float('inf') if e != e else e):.0e}" if errors else ""


def by_shape(cells: list[dict]) -> str:
    """Microseconds of the best dense call and of the CUDA kernels, with the ratio."""
    cells = select(cells, mask="random")
    sparsities = sparsities_of(cells)
    rows = []
    for (M, n, k), chosen in groups(
        cells, lambda c: c["M"], lambda c: c["N"], lambda c: c["K"]
    ).items():
        calls = [c["best_dense"] for c in chosen]
        best = max(dict.fromkeys(calls), key=calls.count)
        dense_us = 1e6 * median(c["dense_s"] for c in chosen)
        rate = 1e-12 * chosen[0]["dense_bytes"] / (1e-6 * dense_us)
        columns = [
            ", ".join(
                f"{1e6 * c['ways'][STREAM]['median_s']:.1f} ({speedup(c, STREAM):.2f})"
                for c in select(chosen, sparsity=s)
                if speedup(c, STREAM) is not None
            )
            for s in sparsities
        ]
        rows.append([M, f"{n}x{k}", best, f"{dense_us:.1f}", f"{rate:.2f}", *columns])
    header = ["tokens", "N x K", "best dense", "us", "TB/s", *percent(sparsities)]
    return table(header, rows, left=3)


def bytes_read(cells: list[dict], limit_bytes_per_s: float) -> str:
    """Share of the copy bandwidth that one token reaches, by the bytes of the packed weights."""
    cells = select(cells, M=1, mask="random")
    sparsities = sparsities_of(cells)

    def column(cell: dict) -> str:
        way = cell["ways"].get(STREAM, {})
        if "median_s" not in way:
            return ""
        rate, share = way["bytes"] / way["median_s"], way["bytes"] / cell["dense_bytes"]
        return f"{1e-12 * rate:.2f} ({rate / limit_bytes_per_s:.0%}; {share:.3f})"

    rows = [
        [f"{n}x{k}", *(", ".join(map(column, select(chosen, sparsity=s))) for s in sparsities)]
        for (n, k), chosen in groups(cells, lambda c: c["N"], lambda c: c["K"]).items()
    ]
    return table(["TB/s (of the limit; bytes of dense)", *percent(sparsities)], rows)


def shares(cells: list[dict], ratio: Callable[[dict], float | None]) -> str:
    """'0.97 [0.91-1.02]' by tokens and sparsity: the mean and the extremes over the shapes."""
    sparsities = sparsities_of(cells)
    rows = []
    for (M,), chosen in groups(cells, lambda c: c["M"]).items():
        columns = []
        for s in sparsities:
            found = [r for c in select(chosen, sparsity=s) if (r := ratio(c)) is not None]
            spread = f" [{min(found):.2f}-{max(found):.2f}]" if found else ""
            columns.append(f"{geometric_mean(found):.2f}{spread}" if found else "")
        if any(columns):
            rows.append([M, *columns])
    return table(["tokens", *percent(sparsities)], rows) if rows else ""


def pruned(cells: list[dict]) -> str:
    """Speed on a magnitude-pruned W as a share of the speed on a random mask."""

    def key(cell: dict) -> tuple:
        return tuple(cell[field] for field in ("M", "N", "K", "sparsity"))

    def seconds(cell: dict) -> float:
        return cell["ways"][STREAM]["median_s"]

    random = {key(c): seconds(c) for c in select(cells, mask="random") if speedup(c, STREAM)}

    def ratio(cell: dict) -> float | None:
        if key(cell) not in random or not speedup(cell, STREAM):
            return None
        return random[key(cell)] / seconds(cell)

    return shares(select(cells, mask="pruned"), ratio)


def triton(cells: list[dict]) -> str:
    """Speed of the Triton kernel as a share of the CUDA kernels'."""

    def ratio(cell: dict) -> float | None:
        both = speedup(cell, TRITON), speedup(cell, STREAM)
        return None if None in both else both[0] / both[1]

    return shares(select(cells, mask="random"), ratio)


def failures(cells: list[dict]) -> list[str]:
    """One line for each of ours that failed or was wrong."""
    return [
        f"{c['mask']} {c['N']}x{c['K']} M={c['M']} {c['sparsity']:.0%} {name}: "
        + (way.get("failed") or f"error {way['error']:.1e}")
        for c in cells
        for name, way in c["ways"].items()
        if way["kind"] == OURS and not way["is_right"]
    ]


def absent(machine: dict) -> str:
    rows = [[name, reason] for name, reason in machine["missing"].items()]
    return table(["did not run", "because"], rows, left=2) if rows else "Everyone ran."


def plot(cells: list[dict], title: str) -> "Figure":
    """Times dense against sparsity: the means by tokens, and each shape at one token."""
    from matplotlib.figure import Figure  # no table needs it

    cells = [c for c in select(cells, mask="random") if speedup(c, STREAM)]
    figure = Figure(figsize=(10, 4.8), layout="constrained")
    means, shapes = figure.subplots(1, 2, sharey=True)
    by_tokens = groups(cells, lambda c: c["M"])
    one = groups(select(cells, M=1), lambda c: f"{c['N']}x{c['K']}")
    for panel, curves, name in ((means, by_tokens, "M = {}"), (shapes, one, "{}")):
        for ((key,), chosen), colour, marker in zip(curves.items(), COLOURS, MARKERS, strict=False):
            points = {
                100 * s: geometric_mean([speedup(c, STREAM) for c in select(chosen, sparsity=s)])
                for s in sparsities_of(chosen)
            }
            style = {"color": colour, "marker": marker, "linewidth": 1.5}
            panel.plot(points.keys(), points.values(), label=name.format(key), **style)
        panel.axhline(1, color="black", linewidth=1)
        ticks = [100 * s for s in sparsities_of(cells)]
        panel.set(xlabel="zeros in W (%)", yscale="log")
        panel.set_xticks(ticks, [f"{t:g}" for t in ticks])
        times = (0.5, 1, 2, 3, 4, 6, 8, 10)
        panel.set_yticks(times, [f"{t:g}x" for t in times])
        panel.minorticks_off()
        panel.grid(alpha=0.3)
        panel.legend(frameon=False, fontsize=9)
    means.set(title="geometric mean of the shapes", ylabel="times faster than the best dense call")
    shapes.set(title="one token, N x K")
    figure.suptitle(textwrap.fill(title, 130), fontsize=9)
    return figure
