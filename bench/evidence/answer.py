"""The first words of docs/quality.md: what 75 % zeros cost, and what else the same FLOPs buy."""

import math
from collections.abc import Mapping, Sequence

from .differences import (
    Difference,
    by_seed,
    difference,
    is_diverged,
    is_unstable,
    kind,
    standing,
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


# Of the primary outcome, the same in both.
SEEDS, MARGIN = len(order_of(PLAIN).seeds), primary()[0].margin


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
    if orders := answered(results):
        return "  \n".join(cost_and_rivals(results, orders[0]))  # a line for each
    return (
        "**Not known yet.** The runs that would say it have not been made: what follows is the "
        "plan, with what was expected before the first run, and the runs that there are."
        + hint(results)
    )


def cost_and_rivals(results: list[dict], number: int) -> list[str]:
    """What 75 % zeros cost and buy, plain or normed: a sentence for each."""
    found = compared(results, number)
    dense, small, short = found.values()
    a_small, a_short = RIVALS.values()
    so_far = "" if is_whole(number, found) else "**Runs are missing or diverged.** "
    return [
        f"{so_far}{cost(dense)}.",
        f"For the same FLOPs of pre-training, {beside(a_small, small)}.",
        f"Also for the same FLOPs, {beside(a_short, short)}.",
    ]


def measured(number: int) -> str:
    """What the numbers of these sentences are."""
    norm = " All arms here have a norm of queries and keys." if number == NORMED else ""
    return (
        "This is the primary outcome: the loss on Python code, in nats a token, after all weights "
        "were fine-tuned; less is better. Before the first run it was fixed that up to "
        f"{MARGIN:g} counts as equal. In brackets: the loss with 75 % zeros less that of the "
        f"other, and the 95 % interval of this, over {SEEDS} seeds.{norm}"
    )


def notes(results: list[dict]) -> str:
    """What belongs to the answer, in a list: other ways and measures, whether training was stable,
    and what arms without a norm say, or with one; "" where nothing does."""
    number = next(iter(answered(results)), None)
    told = [before_tuning(results, number)] if number else []
    if number == NORMED:
        told = [with_dense_end(results), *told, stability(results), without_a_norm(results)]
    else:
        told += [unstable(results, PLAIN), stable_words(results)]
    return "\n".join(f"- {part}" for part in told if part)


def before_tuning(results: list[dict], number: int) -> str:
    """The same differences in held-out text; "" where there is none."""
    planned = [{p.a, p.b} for p in order_of(number).predictions if p.metric == "held-out"]
    told = []
    for name, p in zip(("the dense model", *RIVALS.values()), primary(number), strict=True):
        if found := difference(results, SIZE, p.a, p.b, "held-out"):
            late = "" if {p.a, p.b} in planned else " (not planned)"
            told.append(f"\n  - beside {name}{late}: {shown(found, SEEDS)}")
    where = "**Before fine-tuning**, the same differences by held-out text:"
    return f"{where}{''.join(told)}" if told else ""


def stability(results: list[dict]) -> str:
    """Of arms with a norm, whose answer is the first."""
    told = (
        f"**Stability**: with a norm of queries and keys (section {NORMED}) {how_stable(results)}"
    )
    return " ".join(filter(None, [told, unstable(results, NORMED)]))


def without_a_norm(results: list[dict]) -> str:
    """The verdicts of what was planned first, whose figures stand below; "" where none has run."""
    found = zip(primary(), compared(results, PLAIN).values(), strict=True)
    told = [f"beside {ARMS[p.b].title}: {standing(d, PRIMARY, p.margin)}" for p, d in found if d]
    if not told:
        return ""
    where = f"**Without that norm**, as was planned first (section {PLAIN})"
    when = "The norm was added to the plan after first runs without it, before any run with it."
    parts = [f"{where}, 75 % zeros {'; '.join(told)}.", unstable(results, PLAIN), when]
    return " ".join(filter(None, parts))


def with_dense_end(results: list[dict]) -> str:
    """What 75 % zeros cost where the last steps are dense; "" where that was not run."""
    (p,) = primary(DENSE_END)
    found = difference(results, SIZE, p.a, p.b, PRIMARY)
    if not found:
        return ""
    says = {
        "equal": "75 % zeros are **as good as the dense model**",
        "worse": "75 % zeros are **still worse than the dense model**",
        "better": "75 % zeros are **better than the dense model**",
        "open": "whether 75 % zeros are worse than the dense model **is open**",
    }[kind(found, PRIMARY, p.margin)]
    flops = ARMS[p.a].flops(SIZES[SIZE]) / ARMS[p.b].flops(SIZES[SIZE])
    share = 100 * (1 - ARMS[p.a].sparsity.until)
    return (
        f"**Dense last steps**: with all weights trained in the last {share:.0f} % of pre-training "
        f"(section {DENSE_END}; {flops:.2f} of the FLOPs), {says} ({shown(found, SEEDS)})."
    )


def stable_words(results: list[dict]) -> str:
    """What arms say whose training a norm keeps stable, where the plain answer is the first; ""
    where none has run."""
    if not runs_of(results, "-normed"):
        return ""
    told = [f"**With a norm of queries and keys** (section {NORMED}) {how_stable(results)}"]
    if NORMED in answered(results):
        told += [*cost_and_rivals(results, NORMED), unstable(results, NORMED)]
    else:
        told += [f"These were not fine-tuned yet.{hint(results, '-normed', NORMED)}"]
    return " ".join(filter(None, told))


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
    return f"Training was not stable {where}: {'; '.join(told)}." if told else ""


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


def cost(found: Difference | None) -> str:
    if not found:
        return "75 % zeros beside the dense model on the same text: not run yet"
    says = {
        "equal": "75 % zeros keep the quality of the dense model",
        "worse": "75 % zeros cost quality: they are worse than the dense model",
        "better": "75 % zeros are better than the dense model",
        "open": "Whether 75 % zeros are worse than the dense model is open",
    }[kind(found, PRIMARY, MARGIN)]
    return f"**{says}** on the same text ({shown(found, SEEDS)})"


def beside(rival: str, found: Difference | None) -> str:
    """What `rival` is beside 75 %; `found` is of 75 % less the rival."""
    if not found:
        return f"{rival} was not run yet"
    says = {
        "equal": f"**{rival} is as good as 75 % zeros**",
        "worse": f"**{rival} is better than 75 % zeros**",
        "better": f"**{rival} is worse than 75 % zeros**",
        "open": f"whether {rival} is better or worse than 75 % zeros **is open**",
    }[kind(found, PRIMARY, MARGIN)]
    return f"{says} ({shown(found, SEEDS)})"


def shown(found: Difference, planned: int = 0, prediction: Prediction | None = None) -> str:
    """'+0.123, +0.100 to +0.146, 3 seeds'; '2 of 3 seeds' where more are planned, and no word of
    them where they are as many as that. All with as many digits as tell on which side of the
    prediction, or of nothing, they are."""
    digits = 3 if max(map(abs, found.values)) < 1 else 2
    made = len(found.values)
    count = f"{made} of {planned} seeds" if made < planned else f"{made} seed{'s' * (made > 1)}"
    limits = (prediction.low, prediction.high) if prediction else ()
    mean = signed(found.mean, digits_beside(found.mean, limits, digits))
    ends = [signed(x, digits_beside(x, (0.0,), digits)) for x in found.of_95 or ()]
    return ", ".join(filter(None, [mean, " to ".join(ends), count * (made != planned)]))


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
