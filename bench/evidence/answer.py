"""The first words of docs/quality.md: what 75 % zeros cost, and what else the same FLOPs buy."""

import math
from collections.abc import Mapping, Sequence

from .differences import (
    Difference,
    by_seed,
    difference,
    is_as_predicted,
    is_diverged,
    is_unstable,
    kind,
)
from .plan import ARMS, PLAN, SIZES, SWEEP_SEED, Order, Prediction, finite

PRIMARY = "code"  # loss after fine-tuning, 75 % against dense and its rivals
SIZE = "S"
# The orders that ask for it: as was planned first, and of arms whose training is stable.
PLAIN, NORMED = 2, 10
DENSE_END = 3  # the order that ends with dense steps
# The dense arms beside 75 %, and what they are called in a sentence.
RIVALS = {"small": "a small dense model", "short": "the dense model on fewer tokens"}
OTHERS = ("dense", *RIVALS)
WORDS = {  # of each kind of standing: its heading, and what stands between two arms
    "equal": ("Equal within the margin", "and"),
    "worse": ("Worse", "than"),
    "better": ("Better", "than"),
    "open": ("Open", "and"),
}
COLUMNS = {  # of the metrics
    "held-out": "held-out text",
    "code": "code",
    "webnlg": "WebNLG",
    "sentiment": "sentiment %",
    "blimp": "BLiMP %",
    "cloze": "cloze %",
}


def order_of(number: int) -> Order:
    return next(order for order in PLAN if order.number == number)


def primary(number: int = PLAIN) -> tuple[Prediction, ...]:
    return tuple(p for p in order_of(number).predictions if p.metric == PRIMARY)


def compared(results: list[dict], number: int) -> dict[str, Difference | None]:
    """75 % zeros less dense, and less each of its rivals, of this order."""
    return {p.b: difference(results, SIZE, p.a, p.b, PRIMARY) for p in primary(number)}


def answered(results: list[dict]) -> list[int]:
    """The orders that have an answer. That of stable training is the first as soon as a difference
    in it has an interval."""
    found = {n: [d for d in compared(results, n).values() if d] for n in (PLAIN, NORMED)}
    is_first = any(d.of_95 for d in found[NORMED])
    return [n for n in sorted(found, reverse=is_first) if found[n]]


def first_words(results: list[dict]) -> str:
    """The answer so far, good for us or not."""
    orders = answered(results)
    if not orders:
        return (
            "**Not known yet.** The runs that would say it have not been made: what follows is the "
            "plan, with what was expected before the first run, and the runs that there are."
            + hint(results)
        )
    measured = (
        " Measured by the loss on Python code, in nats a token, after all weights were fine-tuned; "
        f"before the first run it was fixed that up to {primary()[0].margin:g} counts as equal. In "
        "brackets: the loss with 75 % zeros less that of the other, and the 95 % interval of this."
        + before_tuning(results, orders[0])
    )
    if orders[0] == NORMED:
        words = (
            f"{cost_and_rivals(results, NORMED)}{with_dense_end(results)}{measured} All of these "
            f"have a norm of queries and keys (section {NORMED}), with which {how_stable(results)}"
        )
        plain = (
            f"**Without that norm**, as was planned first (section {PLAIN}): "
            f"{cost_and_rivals(results, PLAIN)}{unstable(results, PLAIN)} The norm was added to "
            "the plan after first runs without it, before any run with it."
        )
        return f"{words}{unstable(results, NORMED)}\n\n{plain}"
    words = f"{cost_and_rivals(results, PLAIN)}{measured}{unstable(results, PLAIN)}"
    return "\n\n".join(filter(None, [words, stable_words(results)]))


def cost_and_rivals(results: list[dict], number: int) -> str:
    """What 75 % zeros cost and buy, plain or normed."""
    margin, found = primary(number)[0].margin, compared(results, number)
    dense, small, short = found.values()
    rivals = [beside(n, d, margin) for n, d in zip(RIVALS.values(), (small, short), strict=True)]
    so_far = "" if is_whole(number, found) else "**Runs are missing or diverged.** "
    same = f"For the same FLOPs of pre-training, {'; '.join(rivals)}."
    return f"{so_far}{cost(dense, margin)}. {same}"


def before_tuning(results: list[dict], number: int) -> str:
    """The same differences in held-out text; "" where there is none."""
    planned = [{p.a, p.b} for p in order_of(number).predictions if p.metric == "held-out"]
    told = []
    for name, p in zip(("the dense model", *RIVALS.values()), primary(number), strict=True):
        if found := difference(results, SIZE, p.a, p.b, "held-out"):
            late = "" if {p.a, p.b} in planned else " (not planned)"
            told.append(f"beside {name}{late} {shown(found)}")
    return f" Before fine-tuning, by held-out text: {'; '.join(told)}." if told else ""


def with_dense_end(results: list[dict]) -> str:
    """What 75 % zeros cost where the last steps are dense; "" where that was not run."""
    (p,) = primary(DENSE_END)
    found = difference(results, SIZE, p.a, p.b, PRIMARY)
    if not found:
        return ""
    says = {
        "equal": "they are **as good as the dense model**",
        "worse": "they are **still worse than the dense model**",
        "better": "they are **better than the dense model**",
        "open": "whether they are worse than the dense model **is open**",
    }[kind(found, PRIMARY, p.margin)]
    flops = ARMS[p.a].flops(SIZES[SIZE]) / ARMS[p.b].flops(SIZES[SIZE])
    share = 100 * (1 - ARMS[p.a].sparsity.until)
    return (
        f" With all weights trained in the last {share:.0f} % of pre-training (section "
        f"{DENSE_END}; {flops:.2f} of the FLOPs) {says} ({shown(found)})."
    )


def stable_words(results: list[dict]) -> str:
    """What follows the plain answer, of arms whose training a norm keeps stable; "" where none has
    run."""
    if not runs_of(results, "-normed"):
        return ""
    says = (
        f"{cost_and_rivals(results, NORMED)}{unstable(results, NORMED)}"
        if NORMED in answered(results)
        else f"These were not fine-tuned yet.{hint(results, '-normed', NORMED)}"
    )
    return f"**With a norm of queries and keys** (section {NORMED}) {how_stable(results)} {says}"


def how_stable(results: list[dict]) -> str:
    """Of all runs of these arms, at the rates that were tried too."""
    normed, plain = (runs_of(results, suffix) for suffix in ("-normed", ""))
    return (
        "training of dense, 75 % zeros, small dense and dense on fewer tokens was unstable in "
        f"{share_of_unstable(normed)} (the choice of rates included), "
        f"without one in {share_of_unstable(plain)}."
    )


def runs_of(results: list[dict], suffix: str) -> list[dict]:
    """Of 75 % zeros and what stands beside it."""
    arms = {f"{arm}{suffix}" for arm in ("75", *OTHERS)}
    return [r for r in results if r["size"] == SIZE and r["arm"] in arms]


def share_of_unstable(results: list[dict]) -> str:
    return f"{sum(map(is_unstable, results))} of {len(results)} runs"


def unstable(results: list[dict], number: int) -> str:
    """Which runs of the primary outcome of this order were not stable."""
    arms = dict.fromkeys(arm for p in primary(number) for arm in (p.a, p.b))
    told = [
        f"{ARMS[arm].title}, seed {seed}" + " (diverged: in no figure)" * is_diverged(result)
        for arm in arms
        for seed, result in by_seed(results, SIZE, arm).items()
        if is_unstable(result)
    ]
    where = f"(*rise* in section {number})"
    return f" Training was not stable {where}: {'; '.join(told)}." if told else ""


def hint(results: list[dict], suffix: str = "", section: int = 1) -> str:
    """What the sweeps let expect, where all of them have begun."""
    best: dict[str, float] = {}
    for r in results:
        if (r["size"], r["seed"]) == (SIZE, SWEEP_SEED) and "pretrained" in r:
            best[r["arm"]] = min(best.get(r["arm"], math.inf), finite(r["pretrained"]["dev"]))
    dense, sparse, small = (best.get(a + suffix, math.inf) for a in ("dense", "75", "small"))
    if not all(map(math.isfinite, (dense, sparse, small))):
        return ""
    return (
        f" A hint from the choice of rates (section {section}), before fine-tuning, one seed, each "
        f"at the best rate tried: dense {dense:.2f}, 75 % zeros {sparse:.2f}, the small dense "
        f"model of the same FLOPs {small:.2f} nats a token of held-out text."
    )


def is_whole(number: int, found: Mapping[str, Difference | None]) -> bool:
    """All runs of the primary outcome of this order have been made and none diverged."""
    seeds = [*order_of(number).seeds]
    return all(each and each.seeds == seeds for each in found.values())


def cost(found: Difference | None, margin: float | None) -> str:
    if not found:
        return "75 % zeros beside the dense model on the same text: not run yet"
    says = {
        "equal": "75 % zeros keep the quality of the dense model",
        "worse": "75 % zeros cost quality: they are worse than the dense model",
        "better": "75 % zeros are better than the dense model",
        "open": "Whether 75 % zeros are worse than the dense model is open",
    }[kind(found, PRIMARY, margin)]
    return f"**{says}** on the same text ({shown(found)})"


def beside(rival: str, found: Difference | None, margin: float | None) -> str:
    """What `rival` is beside 75 %; `found` is of 75 % less the rival."""
    if not found:
        return f"{rival} was not run yet"
    says = {
        "equal": f"**{rival} is as good as 75 % zeros**",
        "worse": f"**{rival} is better than 75 % zeros**",
        "better": f"**{rival} is worse than 75 % zeros**",
        "open": f"whether {rival} is better or worse than 75 % zeros **is open**",
    }[kind(found, PRIMARY, margin)]
    return f"{says} ({shown(found)})"


def shown(found: Difference, planned: int = 0, prediction: Prediction | None = None) -> str:
    """'+0.123, +0.100 to +0.146, 3 seeds', or '2 of 3 seeds' where more are planned. Both with as
    many digits as tell on which side of the prediction, or of nothing, they are."""
    digits = 3 if max(map(abs, found.values)) < 1 else 2
    made = len(found.values)
    count = f"{made} of {planned} seeds" if made < planned else f"{made} seed{'s' * (made > 1)}"
    limits = (prediction.low, prediction.high) if prediction else ()
    mean = signed(found.mean, digits_beside(found.mean, limits, digits))
    ends = [signed(x, digits_beside(x, (0.0,), digits)) for x in found.of_95 or ()]
    return ", ".join([mean, *([" to ".join(ends)] if ends else []), count])


def digits_beside(x: float, limits: Sequence[float], digits: int) -> int:
    """The least number of digits, from this one on, that do not move x to the other side of a limit
    or onto it; this one where no few more are enough."""
    for more in range(digits, digits + 4):
        near = round(x, more)
        if all((near < y, near > y) == (x < y, x > y) for y in limits):
            return more
    return digits


def signed(x: float, digits: int) -> str:
    """Without a minus before nothing."""
    return f"{round(x, digits) + 0.0:+.{digits}f}"


def holds(results: list[dict], orders: Sequence[Order]) -> str:
    """All differences of these orders by what they turned out to be."""
    groups: dict[str, dict[tuple[str, int], list[str]]] = {}
    unexpected = []
    for order in orders:
        for p in order.predictions:
            found = difference(results, order.size, p.a, p.b, p.metric)
            if not found:
                continue
            says, name = kind(found, p.metric, p.margin), COLUMNS[p.metric].rstrip(" %")
            pair = f"{ARMS[p.a].title} {WORDS[says][1]} {ARMS[p.b].title}"
            groups.setdefault(says, {}).setdefault((pair, order.number), []).append(name)
            if not is_as_predicted(p, found):
                pair = f"{ARMS[p.a].title} - {ARMS[p.b].title}"
                unexpected.append(f"{pair} ({name}; section {order.number})")
    lines = [
        f"- **{title}**: "
        + "; ".join(
            f"{pair} ({', '.join(names)}; section {number})"
            for (pair, number), names in groups[says].items()
        )
        for says, (title, _) in WORDS.items()
        if says in groups
    ]
    if lines:
        lines.append(f"- **Not as predicted**: {'; '.join(unexpected) or 'none'}")
    return ".\n".join(lines) + "." * bool(lines)
