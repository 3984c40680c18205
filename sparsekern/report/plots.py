"""The figures of the page: one panel each, as wide as a phone, so that it wraps and not shrinks.

All speed-ups share their axes: zeros spaced by log2(1 / density), so that a kernel that saved all
the work would be a straight line, and a logarithmic scale of times the best dense call. Colours are
told apart by every kind of colour vision; markers differ as well.
"""

import math
from collections.abc import Sequence

from ..extras import require
from .curves import Curve
from .demo import COLOURS, MARKERS

DIVERGING = "PuOr"  # orange: a loss, purple: a gain
GREY = "#666666"
SIZE = 4.6, 3.9  # inches
TIMES = 0.25, 22.0  # of every axis in times dense
TIMES_TICKS = (0.1, 0.2, 0.5, 1, 2, 5, 10, 20, 50)
ZEROS = 0.45, 0.985
ZEROS_TICKS = (0.5, 0.75, 0.9, 0.95, 0.98)
BEHIND = {"facecolor": "white", "alpha": 0.9, "linewidth": 0, "pad": 0.6}  # of text on a line
LABEL = {"fontsize": 9.5, "va": "center", "bbox": BEHIND | {"alpha": 1.0}}


def _panel(height: float = SIZE[1]):
    """A figure and its panel."""
    # Figure itself, not pyplot: no window system is touched and no figure stays open.
    made = require("matplotlib.figure", "demo").Figure(
        figsize=(SIZE[0], height), layout="constrained"
    )
    panel = made.subplots()
    panel.set_axisbelow(True)
    panel.spines[["top", "right"]].set_visible(False)
    panel.tick_params(labelsize=9.5)
    return made, panel


def place(sparsity: float) -> float:
    """Where zeros stand on their axis: log2(1 / density)."""
    return -math.log2(1 - sparsity)


def _zeros_axis(panel) -> None:
    """With room for labels where lines end."""
    panel.set_xticks([place(s) for s in ZEROS_TICKS], [f"{s:.0%}" for s in ZEROS_TICKS])
    panel.set_xlim(place(ZEROS[0]), place(ZEROS[1]) + 2.6)
    panel.set_xlabel("zeros in W")


def _times_axis(axis, limits: tuple[float, float]) -> None:
    """A logarithmic axis in times dense."""
    ticks = [tick for tick in TIMES_TICKS if limits[0] <= tick <= limits[1]]
    axis.set_ticks(ticks, [f"{tick:g}" for tick in ticks])
    axis.set_ticks([], minor=True)


def _limits(ratios: Sequence[float], times: tuple[float, float] = TIMES) -> tuple[float, float]:
    """Those of every panel, or wider where a value would be cut off."""
    return min(times[0], 0.9 * min(ratios)), max(times[1], 1.1 * max(ratios))


def apart(wanted: Sequence[float], least: float, low: float, high: float) -> list[float]:
    """The places nearest to the wanted ones, ascending, that are `least` from each other and lie
    between low and high where there is room.

    Neighbours that are too near become a block around their mean."""
    blocks: list[tuple[float, int]] = []  # of places less their rank times `least`: mean, count
    for i, at in enumerate(wanted):
        blocks.append((at - i * least, 1))
        while len(blocks) > 1 and blocks[-2][0] >= blocks[-1][0]:
            (one, n), (other, m) = blocks[-2:]
            blocks[-2:] = [((n * one + m * other) / (n + m), n + m)]
    lowest = [mean for mean, count in blocks for _ in range(count)]
    most = high - (len(wanted) - 1) * least
    return [max(low, min(at, most)) + i * least for i, at in enumerate(lowest)]


def _end_labels(panel, x: float, ends: dict[str, tuple[float, str]]) -> None:
    """Labels right of where lines end, text -> (y, colour), apart where lines end together."""
    height = panel.transData + panel.transAxes.inverted()
    wanted = sorted(
        (height.transform((x, y))[1], text, colour) for text, (y, colour) in ends.items()
    )
    places = apart([at for at, *_ in wanted], 0.065, 0.03, 0.97)
    for at, (_, text, colour) in zip(places, wanted, strict=True):
        panel.text(x, at, text, color=colour, transform=panel.get_xaxis_transform(), **LABEL)


def speedups(
    curves: dict[str, Curve],
    floor: str = "dense is faster",
    ylabel: str = "times dense",
    times: tuple[float, float] = TIMES,
):
    """Times dense, or another, against zeros: a labelled line for each curve. `times` are the
    limits of a figure that stands alone."""
    made, panel = _panel()
    ratios = [ratio for curve in curves.values() for ratio in curve.values()]
    limits = _limits(ratios, times)
    panel.set(yscale="log", ylim=limits)
    _zeros_axis(panel)
    _times_axis(panel.yaxis, limits)
    panel.grid(alpha=0.3)
    panel.axhspan(limits[0], 1, color="0.94")
    panel.axhline(1, color="black", linewidth=1.2, zorder=1)
    corner = {"transform": panel.transAxes, "va": "bottom", "fontsize": 9}
    panel.text(0.02, 0.01, floor, color=GREY, **corner)
    if ylabel == "times dense":
        ends = [place(s) for s in (ZEROS[0], 0.95)]
        panel.plot(ends, [2**x for x in ends], ":", color=GREY, linewidth=1)
        panel.text(place(0.75) - 0.1, 4.2, "1 / density", color=GREY, fontsize=9, ha="right")
    _lines(panel, curves)
    panel.set_ylabel(ylabel)
    return made


def _lines(panel, curves: dict[str, Curve]) -> None:
    """A line for each curve, labelled at its end."""
    ends = {}
    colours, markers = COLOURS + COLOURS, MARKERS + MARKERS[::-1]
    for (name, curve), colour, marker in zip(curves.items(), colours, markers, strict=False):
        x = [place(s) for s in curve]
        panel.plot(x, curve.values(), color=colour, marker=marker, markersize=5, linewidth=1.8)
        ends[name] = list(curve.values())[-1], colour
    end = place(max(s for curve in curves.values() for s in curve))
    _end_labels(panel, end + 0.22, ends)


def summary(rows: dict[str, Curve]):
    """A line for each situation, a dot for each share of zeros, losses in the shade."""
    made, panel = _panel(height=0.62 * len(rows) + 1.3)
    ratios = [ratio for row in rows.values() for ratio in row.values()]
    limits = _limits(ratios)
    panel.set(xscale="log", xlim=limits, ylim=(len(rows) - 0.35, -0.75))
    panel.axvspan(limits[0], 1, color="0.94")
    panel.axvline(1, color="black", linewidth=1.2)
    sparsities = sorted({s for row in rows.values() for s in row})
    styles = dict(zip(sparsities, zip(COLOURS, MARKERS, strict=True), strict=False))
    for y, (name, row) in enumerate(rows.items()):
        panel.plot(row.values(), [y] * len(row), color="0.7", linewidth=2, zorder=1)
        for s, ratio in row.items():
            panel.plot(ratio, y, color=styles[s][0], marker=styles[s][1], markersize=8)
        panel.text(1.04 * limits[0], y - 0.38, name, fontsize=10, va="center", bbox=BEHIND)
    for s, (colour, marker) in styles.items():
        panel.plot([], [], color=colour, marker=marker, linestyle="none", label=f"{s:.0%} zeros")
    style = {"frameon": False, "fontsize": 9, "handletextpad": 0.1, "columnspacing": 0.9}
    made.legend(loc="outside upper center", ncols=len(styles), **style)
    _times_axis(panel.xaxis, limits)
    panel.set_yticks([])
    panel.spines["left"].set_visible(False)
    panel.set_xlabel("times as fast as the best dense call (shaded: slower)")
    return made


def crossover(rows: dict[int, Curve]):
    """Times dense by tokens and zeros; orange and bold: dense is faster."""
    sparsities = sorted({s for row in rows.values() for s in row})
    made, panel = _panel(height=0.36 * len(rows) + 1.2)
    limit = 2.0  # log2: one scale of colours for every map
    grid = [[math.log2(row.get(s, math.nan)) for s in sparsities] for row in rows.values()]
    panel.imshow(grid, cmap=DIVERGING, vmin=-limit, vmax=limit, aspect="auto", origin="lower")
    for y, row in enumerate(rows.values()):
        for s, ratio in row.items():
            style = {"weight": "bold"} if ratio < 0.995 else {}
            is_dark = abs(math.log2(ratio)) > 0.6 * limit
            style |= {"color": "white" if is_dark else "black", "fontsize": 8.5}
            text = f"{ratio:.2f}" if ratio < 10 else f"{ratio:.1f}"
            panel.text(sparsities.index(s), y, text, ha="center", va="center", **style)
    panel.set_xticks(range(len(sparsities)), [f"{s:.0%}" for s in sparsities], fontsize=9)
    panel.set_yticks(range(len(rows)), [f"{M:,}" for M in rows])
    panel.set(xlabel="zeros in W", ylabel="tokens")
    return made


def shares(curves: dict[str, Curve]):
    """Share of what the machine can do, against zeros."""
    made, panel = _panel()
    _zeros_axis(panel)
    panel.set_ylim(0, max(1.05, 1.05 * max(v for curve in curves.values() for v in curve.values())))
    panel.yaxis.set_major_formatter(lambda value, _: f"{value:.0%}")
    panel.grid(alpha=0.3)
    panel.axhline(1, color="black", linewidth=1.2)
    _lines(panel, curves)
    panel.set_ylabel("of the ceiling")
    return made


def bars(rows: dict[str, dict[str, float]]):
    """Times dense: a group of lying bars for each row, from 1 to the right or to the left."""
    names = list(dict.fromkeys(name for values in rows.values() for name in values))
    made, panel = _panel(height=0.62 * len(rows) * max(1, len(names) / 1.6) + 1.3)
    ratios = [ratio for values in rows.values() for ratio in values.values()]
    limits = min(0.15, 0.7 * min(ratios)), max(6.0, 1.4 * max(ratios))
    panel.set(xscale="log", xlim=limits, ylim=(len(rows) - 0.45, -0.7))
    panel.axvspan(limits[0], 1, color="0.94")
    height = 0.62 / len(names)
    for y, (name, values) in enumerate(rows.items()):
        panel.text(1.04 * limits[0], y - 0.44, name, **LABEL)
        for i, who in enumerate(name for name in names if name in values):
            at, ratio = y - 0.2 + (i + 0.5) * height, values[who]
            colour = COLOURS[names.index(who)]
            panel.barh(at, ratio - 1, 0.85 * height, left=1, color=colour)
            side = {"ha": "left" if ratio >= 1 else "right", "va": "center"}
            panel.annotate(
                f"{ratio:.2f}",
                (ratio, at),
                (3 if ratio >= 1 else -3, 0),
                fontsize=9,
                textcoords="offset points",
                **side,
            )
    panel.axvline(1, color="black", linewidth=1.2)
    if len(names) > 1:
        for who, colour in zip(names, COLOURS, strict=False):
            panel.bar(0, 0, color=colour, label=who)
        made.legend(loc="outside upper center", ncols=len(names), frameon=False, fontsize=9.5)
    _times_axis(panel.xaxis, limits)
    panel.set_yticks([])
    panel.spines["left"].set_visible(False)
    panel.set_xlabel("times as fast as dense (shaded: slower)")
    return made
