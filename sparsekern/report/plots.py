"""The figures of the page. Colours are told apart by every kind of colour vision."""

import math
from collections.abc import Callable, Iterable, Sequence
from statistics import geometric_mean

from ..bench.records import select, sparsities_of
from ..extras import require
from .demo import COLOURS, MARKERS

TICKS = (0.05, 0.1, 0.2, 0.5, 1, 2, 5, 10, 20, 50)
DIVERGING = "PuOr"  # orange: a loss, purple: a gain
GREY = "#666666"
LINES = ("-.", "--", "-", ":")


def figure(panels: int, width: float = 5.0, height: float = 4.2, **options):
    """A figure and its panels, in rows that a page can hold."""
    # Figure itself, not pyplot: no window system is touched and no figure stays open.
    make = require("matplotlib.figure", "demo").Figure
    columns = _columns(panels)
    rows = -(-panels // columns)
    size = max(6.0, width * columns), height * rows
    found = make(figsize=size, layout="constrained")
    places = found.subplots(rows, columns, squeeze=False, **options).flat
    for place in places[panels:]:
        place.remove()
    return found, places[:panels]


def _columns(panels: int) -> int:
    """Columns of a figure of so many panels; more than three would be too small to read."""
    return panels if panels <= 3 else 2


def _label_rows(panels, label: str) -> None:
    for panel in panels[:: _columns(len(panels))]:
        panel.set_ylabel(label)


def _grid(panel) -> None:
    panel.grid(alpha=0.3)
    panel.set_axisbelow(True)


def _log_times(panel, ratios: Iterable[float]) -> None:
    """A logarithmic axis in times, wide enough for these."""
    ratios = list(ratios)
    panel.set_yscale("log")
    panel.set_ylim(min(0.8, 0.85 * min(ratios)), max(1.25, 1.2 * max(ratios)))
    low, high = panel.get_ylim()
    ticks = [tick for tick in TICKS if low <= tick <= high]
    panel.set_yticks(ticks, [f"{tick:g}x" for tick in ticks])
    panel.minorticks_off()


def _legend_below(made, panels: int) -> None:
    """As wide as one panel has room for, or as several."""
    ncols = min(4, 2 * _columns(panels))
    made.legend(loc="outside lower center", ncols=ncols, frameon=False, fontsize=9)


def _percent_axis(panel, sparsities: Sequence[float]) -> None:
    ticks = [100 * s for s in sparsities]
    if len(ticks) > 1:
        panel.set_xlim(ticks[0] - 3, ticks[-1] + 3)
    panel.set_xticks(ticks, [f"{tick:g}" for tick in ticks])
    panel.tick_params(axis="x", labelsize=8)
    panel.set_xlabel("zeros in W (%)")


def means(records: list[dict], value: Callable[[dict], float | None]) -> dict[float, float]:
    """Sparsity -> geometric mean, where every record has the value."""
    found = {s: [value(r) for r in select(records, sparsity=s)] for s in sparsities_of(records)}
    return {s: geometric_mean(values) for s, values in found.items() if None not in values}


def speedup(passes: dict[str, list[dict]]):
    """Times dense against sparsity: a panel for each pass, a curve for each M."""
    made, panels = figure(len(passes), width=4.4, sharey=True)
    everyone = [record for records in passes.values() for record in records]
    tokens = sorted({record["M"] for record in everyone})
    styles = dict(zip(tokens, zip(COLOURS, MARKERS, strict=True), strict=False))
    shown: list[float] = [1.0]
    for panel, (name, records) in zip(panels, passes.items(), strict=True):
        for M, (colour, marker) in styles.items():
            chosen = select(records, M=M)
            ours = means(chosen, lambda r: r["speedup"])
            peers = means(chosen, lambda r: r.get("best_peer"))
            style = {"color": colour, "linewidth": 1.6}
            panel.plot([100 * s for s in ours], ours.values(), marker=marker, **style)
            panel.plot([100 * s for s in peers], peers.values(), linestyle="--", **style)
            shown += [*ours.values(), *peers.values()]
        panel.axhline(1, color="black", linewidth=1.2)
        panel.set_title(name, fontsize=10)
        _percent_axis(panel, sparsities_of(records))
        _grid(panel)
    _log_times(panels[0], shown)
    _label_rows(panels, "times faster than the best dense call")
    for M, (colour, marker) in styles.items():
        label = f"M = {M:,} token{'s' * (M > 1)}"
        panels[0].plot([], [], color=colour, marker=marker, label=label)
    if any(r.get("best_peer") is not None for r in everyone):
        panels[0].plot([], [], color=GREY, linestyle="--", label="best sparse peer")
    panels[0].plot([], [], color="black", linewidth=1.2, label="best dense call")
    _legend_below(made, len(panels))
    return made


def crossover(passes: dict[str, list[dict]]):
    """Times dense by M and sparsity; orange cells are losses."""
    made, panels = figure(len(passes), width=4.6, height=3.9)
    values = {
        name: {M: means(select(records, M=M), lambda r: r["speedup"]) for M in _tokens(records)}
        for name, records in passes.items()
    }
    ratios = [r for rows in values.values() for row in rows.values() for r in row.values()]
    limit = min(3.0, max(1.0, *(abs(math.log2(r)) for r in ratios)))
    for panel, (name, rows) in zip(panels, values.items(), strict=True):
        sparsities = sparsities_of(passes[name])
        grid = [[math.log2(row.get(s, math.nan)) for s in sparsities] for row in rows.values()]
        image = panel.imshow(
            grid, cmap=DIVERGING, vmin=-limit, vmax=limit, aspect="auto", origin="lower"
        )
        for y, row in enumerate(rows.values()):
            for s, ratio in row.items():
                text = f"{ratio:.2f}" if ratio < 10 else f"{ratio:.1f}"
                style = {"weight": "bold"} if ratio < 0.995 else {}
                is_dark = abs(math.log2(ratio)) > 0.6 * limit
                style |= {"color": "white" if is_dark else "black", "fontsize": 9}
                panel.text(sparsities.index(s), y, text, ha="center", va="center", **style)
        panel.set_xticks(range(len(sparsities)), [f"{100 * s:g}" for s in sparsities])
        panel.set_yticks(range(len(rows)), [f"{M:,}" for M in rows])
        panel.set(xlabel="zeros in W (%)", ylabel="M (tokens)")
        panel.set_title(name, fontsize=10)
    bar = made.colorbar(image, ax=list(panels), label="times the best dense call")
    ticks = [t for t in (-3, -2, -1, 0, 1, 2, 3) if abs(t) <= limit]
    bar.set_ticks(ticks, labels=[f"{2.0**t:g}x" for t in ticks])
    return made


def _tokens(records: list[dict]) -> list[int]:
    return sorted({record["M"] for record in records})


def roofline(records: list[dict], names: dict[str, str], ceilings: dict):
    """Useful rate against useful FLOPs for each byte that must be moved, under the ceilings."""
    made, (panel,) = figure(1, width=8.0, height=5.2)
    points = [
        (r["useful_flop"] / r["moved_bytes"], 1e-9 * r["useful_flop"] / r["ours_s"], r)
        for r in records
    ]
    low, high = min(p[0] for p in points) / 2, max(p[0] for p in points) * 2
    peak = 1e-9 * ceilings["flop_per_s"]
    panel.axhline(peak, color="black", linewidth=1.2, label=f"{peak:,.0f} GFLOP/s")
    for (level, rate), style in zip(ceilings["bytes_per_s"].items(), LINES, strict=False):
        rate *= 1e-9
        ends = [low, max(low, min(high, peak / rate))]
        label = f"{level.upper() if level != 'memory' else level}, {rate:,.0f} GB/s"
        panel.plot(ends, [rate * x for x in ends], style, color=GREY, linewidth=1.3, label=label)
    for (op, name), colour, marker in zip(names.items(), COLOURS, MARKERS, strict=False):
        chosen = [p for p in points if p[2]["op"] == op]
        if chosen:
            style = {"color": colour, "marker": marker, "linestyle": "none", "alpha": 0.7}
            panel.plot([p[0] for p in chosen], [p[1] for p in chosen], label=name, **style)
    panel.set(xscale="log", yscale="log", xlim=(low, high))
    panel.set_ylim(min(0.5 * min(p[1] for p in points), 0.05 * peak), 2 * peak)
    for axis in (panel.xaxis, panel.yaxis):
        axis.set_major_formatter("{x:,.10g}")
        axis.set_minor_formatter("")
    panel.set_xlabel("useful FLOPs for each byte of W and activations, read or written once")
    panel.set_ylabel("useful GFLOP/s")
    made.legend(loc="outside lower center", ncols=4, frameon=False, fontsize=9)
    _grid(panel)
    return made


def bars(groups: dict[str, dict[str, float]], ylabel: str, ratio_of: tuple[str, str] | None = None):
    """Groups of bars: group -> who -> value. ratio_of: (over, under) writes their ratio on top of
    the first of them."""
    made, (panel,) = figure(1, width=max(6.0, 1.5 + 1.2 * len(groups)), height=4.2)
    names = list(dict.fromkeys(name for values in groups.values() for name in values))
    width = 0.8 / len(names)
    for i, (name, colour) in enumerate(zip(names, COLOURS, strict=False)):
        at = [x + (i - (len(names) - 1) / 2) * width for x in range(len(groups))]
        heights = [values.get(name, 0.0) for values in groups.values()]
        panel.bar(at, heights, 0.92 * width, color=colour, label=name)
    for x, values in enumerate(groups.values()):
        if ratio_of and set(ratio_of) <= values.keys():
            over, under = (values[name] for name in ratio_of)
            at = x + (names.index(ratio_of[0]) - (len(names) - 1) / 2) * width
            place = {"textcoords": "offset points", "ha": "center", "fontsize": 9}
            panel.annotate(f"{over / under:.2f}x", (at, over), (0, 3), **place)
    panel.set_xticks(range(len(groups)), list(groups), fontsize=9)
    panel.set_ylabel(ylabel)
    panel.margins(y=0.12)
    panel.yaxis.set_major_formatter("{x:,.0f}")
    if len(names) > 1:
        made.legend(loc="outside upper right", ncols=len(names), frameon=False, fontsize=9)
    _grid(panel)
    panel.grid(visible=False, axis="x")
    return made


def losses(arms: dict[str, dict]):
    """Validation loss against seconds in steps, and against FLOPs: a curve for each run."""
    made, panels = figure(2, width=4.8, sharey=True)
    for (name, run), colour, marker in zip(arms.items(), COLOURS, MARKERS, strict=False):
        points = [p for p in run["evaluations"] if p["step"]]  # the first would hide the others
        values = [p["loss"] for p in points]
        spent = (
            [p["seconds"] for p in points],
            [run["flops"] * p["step"] / points[-1]["step"] for p in points],
        )
        style = {"color": colour, "marker": marker, "markersize": 5, "label": name}
        for panel, places in zip(panels, spent, strict=True):
            panel.plot(places, values, **style)
    panels[0].set(xlabel="seconds spent in training steps")
    panels[1].set(xlabel="training FLOPs, of stored weights alone")
    _label_rows(panels, "validation loss (nats per token)")
    panels[1].legend(frameon=False, fontsize=9)
    for panel in panels:
        _grid(panel)
    return made


def prediction(passes: dict[str, dict[str, dict[float, float]]]):
    """Times dense against sparsity, pass -> who -> curve: measured here, predicted for a wafer."""
    made, panels = figure(len(passes), width=4.2, sharey=True)
    names = list(dict.fromkeys(name for curves in passes.values() for name in curves))
    styles = dict(zip(names, zip(COLOURS, MARKERS, strict=True), strict=False))
    for panel, (title, curves) in zip(panels, passes.items(), strict=True):
        for name, curve in curves.items():
            colour, marker = styles[name]
            panel.plot([100 * s for s in curve], curve.values(), color=colour, marker=marker)
        panel.axhline(1, color="black", linewidth=1.2)
        panel.set_title(title, fontsize=10)
        _percent_axis(panel, sorted({s for curve in curves.values() for s in curve}))
        _grid(panel)
    ratios = [r for curves in passes.values() for curve in curves.values() for r in curve.values()]
    _log_times(panels[0], ratios)
    _label_rows(panels, "times faster than dense")
    for name, (colour, marker) in styles.items():
        panels[0].plot([], [], color=colour, marker=marker, label=name)
    _legend_below(made, len(panels))
    return made
