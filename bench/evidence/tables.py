"""The tables of docs/quality.md: arms, differences, seeds, sweeps, the runs on a CPU."""

import math
from collections.abc import Iterable, Mapping, Sequence

from sparsekern.terminal import table

from . import clock, plan
from .answer import COLUMNS, PRIMARY, SIZE, order_of, primary, shown
from .differences import (
    LEAST_RISE,
    METRICS,
    Difference,
    by_seed,
    difference,
    interval,
    is_as_predicted,
    is_diverged,
    is_loss,
    rise,
    standing,
    value,
)
from .plan import ARMS, SIZES, SWEEP_SEED, Order, Prediction

TUNED = ("code", "webnlg", "sentiment")


def arms(order: Order, results: list[dict], checked: dict | None) -> str:
    """What each arm that has run, and what it is compared with, costs and comes to, means over its
    seeds; which have not run.
    `checked`: of check.py, with the time of a step by the sparse kernels."""
    size = SIZES[order.size]
    full = ARMS["dense"].flops(size)
    rows, missing = [], []
    metrics = [m for m in METRICS if order.is_tuned or m not in TUNED]
    is_begun = any(by_seed(results, order.size, name) for name in order.arms)
    named = dict.fromkeys(arm for p in order.predictions for arm in (p.b, p.a)) if is_begun else ()
    for name in (*(arm for arm in named if arm not in order.arms), *order.arms):
        arm, found = ARMS[name], by_seed(results, order.size, name)
        told = f"{arm.flops(size) / full:.2f}"
        if not found and name in order.arms:
            missing.append(f"{title(order, name)} ({told})")
        if not found:
            continue
        trained = [r["pretrained"] for r in found.values() if "step_s" in r.get("pretrained", {})]
        seconds = [t["step_s"] * t["steps"] for t in trained]
        tokens = [t["tokens"] / 1e6 for t in trained]
        pace = [1e3 * n / s for n, s in zip(tokens, seconds, strict=True)]
        rates = ", ".join(sorted({f"{r['rate']:g}" for r in found.values()})) if trained else "-"
        cells = [mean_of([value(r, m) for r in found.values()], m) for m in metrics]
        kernels = []
        if checked and arm.sparsity == ARMS["75"].sparsity:
            if arm.shape(size) == SIZES[checked["size"]].shape:
                kernels = [checked["sparse_step_s"] * t["steps"] for t in trained]
        costs = [told, *(mean_text(x, ".0f") for x in (tokens, pace, seconds, kernels))]
        ended = [seed for seed, r in found.items() if "pretrained" in r]
        rows.append([title(order, name), *costs, rates, numbers(ended) or "-", *cells])
    header = ["arm", "FLOPs", "M tokens", "k tokens/s", "seconds", "by kernels", "rate", "seeds"]
    parts = [table(*filled([*header, *(COLUMNS[m] for m in metrics)], rows))] if rows else []
    if rows and any(ARMS[name].start for name in order.arms):
        parts.append(
            "FLOPs of a model that is trained on are with those of dense, with which it begins; "
            "tokens and seconds are of what comes after."
        )
    if missing:
        parts.append(f"Not run yet, with their FLOPs: {'; '.join(missing)}.")
    return "\n\n".join(parts)


def numbers(seeds: Iterable[int]) -> str:
    """'0-2, 5'"""
    parts: list[list[int]] = []
    for seed in sorted(seeds):
        if parts and seed == parts[-1][-1] + 1:
            parts[-1].append(seed)
        else:
            parts.append([seed])
    return ", ".join(f"{p[0]}-{p[-1]}" if len(p) > 1 else str(p[0]) for p in parts)


def filled(header: list[str], rows: list[list]) -> tuple[list[str], list[list]]:
    """Without columns that no row has anything in."""
    kept = [i for i in range(len(header)) if any(row[i] != "-" for row in rows)]
    return [header[i] for i in kept], [[row[i] for i in kept] for row in rows]


def mean_of(found: Iterable[float | None], metric: str) -> str:
    return mean_text([x for x in found if x is not None], ".3f" if is_loss(metric) else ".1f")


def mean_text(found: Sequence[float], form: str) -> str:
    return f"{sum(found) / len(found):{form}}" if found else "-"


def predictions(order: Order, results: list[dict]) -> str:
    """What was expected of the differences of an order, and what was found."""
    rows = []
    for p in order.predictions:
        found = difference(results, order.size, p.a, p.b, p.metric)
        as_expected = ("yes" if is_as_predicted(p, found) else "**no**") if found else "-"
        rows.append(
            [
                f"{title(order, p.a)} - {title(order, p.b)}",
                COLUMNS[p.metric],
                marked(found, p),
                shown(found, len(order.seeds), p) if found else "-",
                f"{p.low:+g} to {p.high:+g}",
                as_expected,
                f"{p.margin:g}" if p.margin is not None else "-",
            ]
        )
    header = ["difference", "in", "the first is", "found, 95 % interval"]
    header += ["predicted", "as predicted", "margin"]
    return table(*filled(header, rows), left=3)


def verdicts(order: Order, results: list[dict]) -> str:
    """The same without figures, the metrics of one verdict together."""
    rows: dict[tuple[str, str, str], list[str]] = {}
    for p in order.predictions:
        if found := difference(results, order.size, p.a, p.b, p.metric):
            pair = f"{title(order, p.a)} - {title(order, p.b)}"
            key = pair, marked(found, p), "yes" if is_as_predicted(p, found) else "**no**"
            rows.setdefault(key, []).append(COLUMNS[p.metric].rstrip(" %"))
    cells = [[pair, ", ".join(names), *said] for (pair, *said), names in rows.items()]
    header = ["difference", "in", "the first is", "as predicted"]
    return table(header, cells, left=3) if cells else ""


def marked(found: Difference | None, p: Prediction) -> str:
    """What the first arm is; bold where a margin was fixed and it is not open."""
    if not found:
        return "-"
    says = standing(found, p.metric, p.margin)
    return says if says == "open" or p.margin is None else f"**{says}**"


def primary_outcome(number: int, results: list[dict]) -> str:
    """75 % zeros and each arm that they are compared with: the first table of the page."""
    order, given = order_of(number), primary(number)
    full = ARMS["dense"].flops(SIZES[SIZE])
    rows = []
    for arm, p in [(given[0].a, None), *((p.b, p) for p in given)]:
        found = p and difference(results, order.size, p.a, p.b, p.metric)
        losses = [value(r, PRIMARY) for r in by_seed(results, order.size, arm).values()]
        told = [shown(found, len(order.seeds), p), marked(found, p)] if found else ["-", "-"]
        share = f"{ARMS[arm].flops(SIZES[SIZE]) / full:.2f}"
        rows.append([bare(arm), share, mean_of(losses, PRIMARY), *told])
    header = ["arm", "FLOPs", "loss on code", "75 % zeros minus it", "75 % zeros are"]
    return table(header, rows)


def bare(arm: str) -> str:
    """Its title, whether it has a norm or not."""
    return ARMS[arm.removesuffix("-normed")].title


def is_normed(order: Order) -> bool:
    """All of its arms, and what they are compared with."""
    compared = [arm for p in order.predictions for arm in (p.a, p.b)]
    return all(ARMS[arm].is_normed for arm in (*order.swept, *order.arms, *compared))


def title(order: Order, arm: str) -> str:
    """Of an arm in an order: where all have a norm, none is called so."""
    return bare(arm) if is_normed(order) else ARMS[arm].title


def seeds(order: Order, results: list[dict]) -> str:
    """Each seed of each arm."""
    rows = []
    for arm in order.arms:
        for seed, result in by_seed(results, order.size, arm).items():
            cells = [mean_of([value(result, metric)], metric) for metric in METRICS]
            if is_diverged(result):
                cells[0] = "diverged"
            told = f"{rise(result):+.2f}" if rise(result) >= LEAST_RISE else "-"
            rows.append([title(order, arm), seed, *cells, told])
    if not rows:
        return ""
    header = ["arm", "seed", *COLUMNS.values(), "rise"]
    parts = ["Each seed:", table(*filled(header, rows))]
    if diverged := [f"{row[0]}, seed {row[1]}" for row in rows if "diverged" in row]:
        parts.append(f"Diverged, in no figure: {'; '.join(diverged)}.")
    return "\n\n".join(parts)


def sparse_tuning(order: Order, results: list[dict]) -> str:
    """What is left of the gap where the mask stays for fine-tuning, too."""
    rows = []
    for arm in order.arms:
        found = list(by_seed(results, order.size, arm).values())
        for way, told in (("dense", "all weights"), ("sparse", "the zeros stay")):
            cells = [[value(r, m, way) for r in found] for m in TUNED]
            if ARMS[arm].is_tuned_sparse and any(x is not None for x in cells[0]):
                names = zip(cells, TUNED, strict=True)
                rows.append([title(order, arm), told, *(mean_of(c, m) for c, m in names)])
    header = ["pre-trained", "fine-tuned", *(COLUMNS[m] for m in TUNED)]
    if not rows:
        return ""
    return "Fine-tuned with its zeros in place, too:\n\n" + table(*filled(header, rows), left=2)


def tuning_ends(order: Order, results: list[dict]) -> str:
    """Whether the best rates of fine-tuning have others on both sides."""
    count, at_end = 0, []
    for arm in order.arms:
        for seed, result in by_seed(results, order.size, arm).items():
            for name, tuned in result.get("tuned", {}).items():
                losses = {float(r): plan.finite(x) for r, x in tuned["dev"].items()}
                count += 1
                if plan.beyond_the_end(losses, 2.0) is not None:
                    at_end.append(f"{title(order, arm)}, seed {seed}, {name}")
    if not count:
        return ""
    if not at_end:
        return f"The best rate of each of {count} fine-tunings has others on both sides."
    return (
        f"**The best rate is at the end of those tried** in {len(at_end)} of {count} fine-tunings "
        f"(they end at {plan.LEAST_TUNING_RATE:g} and {plan.MOST_TUNING_RATE:g}): "
        f"{'; '.join(at_end)}."
    )


def sweeps(order: Order, results: list[dict]) -> str:
    """Losses on dev by rate."""
    parts = []
    for arm in order.swept:
        losses = swept(order.size, arm, results)
        is_done = plan.best_rate(arm, losses) is not None
        parts.append(tried(title(order, arm), losses, is_done) + sweep_ends(losses, is_done))
    return (
        "Loss on text held out for this, by learning rate; each run as long as those that are "
        "reported, with a seed of its own. Best in bold.\n\n" + "\n".join(parts)
    )


def sweep_ends(losses: Mapping[float, float], is_done: bool) -> str:
    """How many rates were tried, and whether the best one has others on both sides."""
    if not losses:
        return ""
    is_known = any(map(math.isfinite, losses.values()))
    at_end = is_known and plan.beyond_the_end(dict(losses), 2.0) is not None
    if is_done:
        end = "**at the end of what is tried**" if at_end else "inside"
        return f" ({len(losses)} rates, {f'the best one {end}' if is_known else 'all diverged'})"
    return f" (not done{', **the best so far is at the end**' if at_end else ''})"


def swept(size: str, arm: str, results: list[dict]) -> dict[float, float]:
    """Loss on dev by rate."""
    return {
        r["rate"]: plan.finite(r.get("pretrained", {}).get("dev"))
        for r in results
        if (r["size"], r["arm"], r["seed"]) == (size, arm, SWEEP_SEED)
    }


def tried(title: str, losses: Mapping[float, float], is_done: bool) -> str:
    """Losses by rate, the best one in bold where all were tried."""
    cells = {rate: f"{x:.3f}" if math.isfinite(x) else "diverged" for rate, x in losses.items()}
    if is_done and any(map(math.isfinite, losses.values())):
        best = min(losses, key=lambda rate: plan.finite(losses[rate]))
        cells[best] = f"**{cells[best]}**"
    told = ", ".join(f"{rate:g}: {cells[rate]}" for rate in sorted(cells))
    return f"- {title}: {told or 'not run yet'}"


def not_run(orders: Iterable[Order], results: list[dict]) -> list[str]:
    """What is left of these orders."""
    done, parts = {r["key"] for r in results}, []
    for order in orders:
        unswept = [
            a for a in order.swept if plan.best_rate(a, swept(order.size, a, results)) is None
        ]
        told = []
        if unswept:
            told.append(f"Sweeps not done: {'; '.join(title(order, arm) for arm in unswept)}.")
        wanted = [(arm, seed) for arm in order.arms for seed in order.seeds]
        left = [w for w in wanted if f"{order.size} {w[0]} seed {w[1]}" not in done]
        if left:
            titles = dict.fromkeys(title(order, arm) for arm, _ in left)
            some = f" ({'; '.join(titles)})" * (len(left) < len(wanted))
            told.append(f"{len(left)} of {len(wanted)} runs{some}.")
        if told:
            parts.append(" ".join([f"- {order.number}. {order.question}", *told]))
    return parts


def by_clock(results: Sequence[dict]) -> str:
    """Dense and sparse after the same minutes on a CPU, the answer first; what was tried."""
    made = sorted(
        (r for r in results if r["seed"] != SWEEP_SEED),
        key=lambda r: ([*clock.ARMS].index(r["arm"]), r["seed"]),
    )
    parts = [clock_difference(results) or "**Not run yet.**"]
    low, high = clock.PREDICTED
    parts.append(
        f"A GPT of {clock.SHAPE.in_words}; 75 % zeros with "
        "sparsekern's kernels, dense with torch's. Both arms run at the same time, each on a core "
        "of a quiet machine, for the same minutes: so short that fewer tokens are seen than the "
        "model has parameters. Rates are chosen by runs as long, as many for each arm, on every "
        "16th row of the held-out text; every eighth row, none of those, is reported. Predicted, "
        f"each at its best rate: 75 % zeros - dense {low:+g} to {high:+g} nats a token, margin "
        f"{clock.MARGIN:g}. **This was written after a rough probe of both arms, not before**, "
        "so it is no prediction in the sense of the others."
    )
    rows = [
        [
            ARMS[r["arm"]].title,
            r["seed"],
            f"{r['minutes']:g}",
            f"{r['rate']:g}",
            f"{r['tokens_per_s']:,.0f}",
            f"{r['tokens'] / 1e6:.2f}",
            "diverged" if r["held-out"] is None else f"{r['held-out']:.3f}",
        ]
        for r in made
    ]
    header = ["arm", "seed", "minutes", "rate", "tokens/s", "M tokens", "held-out text"]
    parts += [table(header, rows)] if rows else []
    if len(made) < len(results):
        tries = {arm: clock.losses(results, arm) for arm in clock.ARMS}
        told = [
            tried(ARMS[arm].title, x, is_done=x != {} and not clock.is_at_end(x))
            for arm, x in tries.items()
        ]
        parts.append("Loss by rate:\n\n" + "\n".join(told))
    return "\n\n".join(parts)


def clock_difference(results: Sequence[dict]) -> str:
    """75 % less dense by seeds, in words; "" where no seed has both."""
    of = {(r["arm"], r["seed"]): r for r in results if r["held-out"] is not None}
    seeds = [s for arm, s in of if arm == "75" and ("dense", s) in of and s != SWEEP_SEED]
    if not seeds:
        return ""
    pairs = [(of["75", seed], of["dense", seed]) for seed in seeds]
    values = [a["held-out"] - b["held-out"] for a, b in pairs]
    found = Difference(seeds, values, interval(values, 0.95), interval(values, 0.90))
    prediction = Prediction("75", "dense", "held-out", *clock.PREDICTED, clock.MARGIN)
    said = "" if is_as_predicted(prediction, found) else " not"
    tokens = sum(a["tokens"] for a, _ in pairs) / len(pairs)
    faster = sum(a["tokens_per_s"] / b["tokens_per_s"] for a, b in pairs) / len(pairs)
    return (
        f"75 % zeros beside dense after {pairs[0][0]['minutes']:g} minutes each: "
        f"**{standing(found, 'held-out', clock.MARGIN)}** "
        f"({shown(found, prediction=prediction)}, in nats a token of held-out text;{said} as "
        f"predicted). They saw {tokens / 1e6:.2g}M tokens, {faster:.2f} times as many: so few say "
        "nothing of models that are trained to the end."
    )
