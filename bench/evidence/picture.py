"""docs/quality.png: the primary outcome of each arm beside 75 % zeros."""

from typing import TYPE_CHECKING

from sparsekern.extras import require
from sparsekern.report.demo import COLOURS

from .answer import OTHERS, PRIMARY, SIZE, order_of, primary
from .differences import Difference, difference, kind
from .plan import ARMS, SIZES

if TYPE_CHECKING:
    from matplotlib.figure import Figure

BESIDE = "75"
STYLE = {"fontsize": 9.5}


def drawn(results: list[dict]) -> dict[str, Difference]:
    """Each arm of order 2 less 75 % zeros; none where no dense arm has a seed beside it."""
    arms = [arm for arm in order_of(2).arms if arm != BESIDE]
    found = {arm: difference(results, SIZE, arm, BESIDE, PRIMARY) for arm in arms}
    found = {arm: seen for arm, seen in found.items() if seen}
    return found if any(arm in OTHERS for arm in found) else {}


def picture(found: dict[str, Difference]) -> "Figure":
    """A row for each arm, a dot for each seed, a line for the 95 % interval of their mean."""
    near = {arm: seen for arm, seen in found.items() if arm in OTHERS}
    margin = primary()[0].margin
    rows = [BESIDE, *found]
    made = require("matplotlib.figure", "demo").Figure(
        figsize=(5.6, 0.45 * len(rows) + 1.8), layout="constrained"
    )
    panel = made.subplots()
    panel.axvspan(-margin, margin, color="0.9", linewidth=0)
    panel.axvline(0, color="black", linewidth=1.2)
    panel.plot(0, 0, "D", color="black", markersize=7)
    for arm, seen in near.items():
        draw(panel, rows.index(arm), seen, COLOURS[OTHERS.index(arm)])
    for arm, seen in found.items():
        if arm not in near:  # so far away that it would hide the others
            side = "right" if seen.mean > 0 else "left"
            where = {"transform": panel.get_yaxis_transform(), "ha": side, "va": "center"}
            at, arrow = (1.0, "{} →") if seen.mean > 0 else (0.0, "← {}")
            panel.text(at, rows.index(arm), arrow.format(f"{seen.mean:+.2f}"), **where, **STYLE)
    panel.margins(x=0.08)
    panel.set_yticks(range(len(rows)), [label(arm) for arm in rows], **STYLE)
    panel.set_ylim(len(rows) - 0.5, -0.5)
    panel.spines[["top", "right", "left"]].set_visible(False)
    panel.tick_params(axis="y", length=0)
    panel.locator_params(axis="x", nbins=6)
    made.supxlabel(
        "loss on code after fine-tuning, less that of 75 % zeros (nats a token)\n"
        f"left: better, right: worse; grey: within {margin:g}, counts as equal",
        **STYLE,
    )
    made.suptitle(title(near, margin), fontsize=11)
    return made


def title(found: dict[str, Difference], margin: float) -> str:
    """What is seen."""
    kinds = {arm: kind(seen, PRIMARY, margin) for arm, seen in found.items()}
    told = [f"{ARMS[arm].title}: {says}" for arm, says in kinds.items()]
    return f"Beside 75 % zeros\n{'; '.join(told)}"


def draw(panel, y: int, found: Difference, colour: str) -> None:
    if found.of_95:
        panel.plot(found.of_95, [y, y], color=colour, linewidth=2)
    panel.plot(found.values, [y] * len(found.values), "o", color=colour, markersize=6, alpha=0.7)


def label(arm: str) -> str:
    size = SIZES[SIZE]
    share = ARMS[arm].flops(size) / ARMS["dense"].flops(size)
    return (
        f"{ARMS[arm].title}\n{share:.2f} of the FLOPs"
        if share
        else ARMS[arm].title.replace(", ", ",\n")
    )
