"""docs/quality.png: the primary outcome of each arm beside 75 % zeros."""

from typing import TYPE_CHECKING

from sparsekern.extras import require
from sparsekern.report.demo import COLOURS

from .answer import NORMED, PLAIN, PRIMARY, SIZE, answered, order_of, primary
from .differences import Difference, difference, kind
from .plan import ARMS, SIZES
from .tables import bare

if TYPE_CHECKING:
    from matplotlib.figure import Figure

WAYS = {PLAIN: "without a norm (planned first)", NORMED: "with a norm"}
STYLE = {"fontsize": 9.5}


def drawn(results: list[dict]) -> dict[int, dict[str, Difference]]:
    """By the orders that have an answer, the first one first: each arm less 75 % zeros."""
    found = {}
    for number in answered(results):
        zeros = primary(number)[0].a
        arms = [arm for arm in order_of(number).arms if arm != zeros]
        each = {arm: difference(results, SIZE, arm, zeros, PRIMARY) for arm in arms}
        found[number] = {arm: seen for arm, seen in each.items() if seen}
    return found


def picture(found: dict[int, dict[str, Difference]]) -> "Figure":
    """A panel for each order, in which a row for each arm, a dot for each seed, a line for the 95 %
    interval of their mean."""
    heights = [1 + len(seen) for seen in found.values()]
    made = require("matplotlib.figure", "demo").Figure(
        figsize=(5.6, 0.45 * sum(heights) + 0.4 * len(found) + 0.9), layout="constrained"
    )
    panels = made.subplots(len(found), 1, sharex=True, squeeze=False, height_ratios=heights)
    margin = primary()[0].margin
    for (number, seen), panel in zip(found.items(), panels[:, 0], strict=True):
        fill(panel, number, seen, margin)
        way = f", {WAYS[number]}" if NORMED in found else ""
        panel.set_title(f"Beside 75 % zeros{way}", fontsize=11)
    made.supxlabel(
        "loss on code after fine-tuning, less that of 75 % zeros (nats a token)\n"
        f"left: better, right: worse; grey: within {margin:g}, counts as equal",
        **STYLE,
    )
    return made


def fill(panel, number: int, found: dict[str, Difference], margin: float) -> None:
    near = dict(zip((p.b for p in primary(number)), COLOURS, strict=False))
    rows = [primary(number)[0].a, *found]
    panel.axvspan(-margin, margin, color="0.9", linewidth=0)
    panel.axvline(0, color="black", linewidth=1.2)
    panel.plot(0, 0, "D", color="black", markersize=7)
    for arm, seen in found.items():
        if arm in near:
            draw(panel, rows.index(arm), seen, near[arm])
        else:  # so far away that it would hide the others
            side = "right" if seen.mean > 0 else "left"
            where = {"transform": panel.get_yaxis_transform(), "ha": side, "va": "center"}
            at, arrow = (1.0, "{} →") if seen.mean > 0 else (0.0, "← {}")
            panel.text(at, rows.index(arm), arrow.format(f"{seen.mean:+.2f}"), **where, **STYLE)
    panel.margins(x=0.08)
    told = [label(arm, found.get(arm), margin) for arm in rows]
    panel.set_yticks(range(len(rows)), told, **STYLE)
    panel.set_ylim(len(rows) - 0.5, -0.5)
    panel.spines[["top", "right", "left"]].set_visible(False)
    panel.tick_params(axis="y", length=0)
    panel.locator_params(axis="x", nbins=6)


def draw(panel, y: int, found: Difference, colour: str) -> None:
    if found.of_95:
        panel.plot(found.of_95, [y, y], color=colour, linewidth=2)
    panel.plot(found.values, [y] * len(found.values), "o", color=colour, markersize=6, alpha=0.7)


def label(arm: str, found: Difference | None, margin: float) -> str:
    """Its name, what it is beside 75 % zeros, and its FLOPs."""
    size = SIZES[SIZE]
    share = ARMS[arm].flops(size) / ARMS["dense"].flops(size)
    name = bare(arm)
    if not share:
        return name.replace(", ", ",\n")
    says = f": {kind(found, PRIMARY, margin)}" if found else ""
    return f"{name}{says}\n{share:.2f} of the FLOPs"
