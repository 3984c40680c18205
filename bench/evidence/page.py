"""docs/quality.md: the question, the primary outcome first, and everything behind it."""

import json
import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path

from sparsekern.files import atomic_write
from sparsekern.terminal import table

from . import clock, plan, study
from .build import TRAINING
from .differences import METRICS, Difference, by_seed, difference, interval, value, verdict
from .plan import ARMS, PLAN, SIZES, SWEEP_SEED, Order, Prediction

TEXT = Path(__file__).with_name("manifest.json")
PRIMARY = "code"  # fine-tuned loss, 75 % against dense and these, order 2
RIVALS = {
    "small": "a small dense model of the same FLOPs",
    "short": "the dense model with the same FLOPs by fewer tokens",
}
SIZE = "S"
CLOCK_QUESTION = "Which is better after the same minutes on a CPU?"
TITLE = "# Does quality survive?"
METHOD = """\
A sparse model is worth its kernels only if it is as good as what the same work buys otherwise. So
each arm below gets the same text, a swept learning rate (or that of the arm it is a variant of) and
the same seeds, and is then fine-tuned dense on the same tasks. Predictions and margins were fixed
before the first run (bench/evidence/plan.py); this page is made from bench/results/quality.jsonl.

- **Text**: {text}. Each paragraph once, documents held out by a hash of their names. Held-out
  tokens that stand in 13 tokens of the training text are not scored. Rates are chosen on every
  other row of it, the others are reported. `python bench/quality.py corpus` makes it again
  (bench/evidence/manifest.json has its hashes); the text itself is not shipped.
- **Training**: masked dense weights in one CUDA graph for all arms of a shape; `python
  bench/quality.py check` holds 200 of its steps to the same steps by the sparse kernels. AdamW
  (0.9, 0.95), weight decay 0.1, clipping at 1, warm-up over 5 % of the steps, then straight down to
  zero. A seed fixes weights, order of the text and mask. Embeddings, head and norms are dense. A
  model that is trained on begins with the dense model of its seed, with a warm-up, a schedule and
  an order of the text of its own; it is pruned by magnitude, each layer alike.
- **Tasks**: sentiment (5,000 reviews held out, % right), WebNLG (nats a token of the text), Python
  of held-out packages (nats a token), each at the rate that is best on dev; before fine-tuning
  BLiMP (67,000 pairs) and the last words of passages of held-out novels (cloze).
- **FLOPs** count stored weights, and attention over the full square (sparsekern/gpt/flops.py).
- **Intervals**: 95 %, over seeds (Student); of sentiment and cloze over seeds and items. "Equal
  within a margin": the 90 % interval lies inside it. No difference seen is not equality. Each
  line stands for itself: of 20 true equalities one is expected to look like a difference.
"""


def publish(kept: Path, page: Path, new: Sequence[Path], by_clock: Path) -> None:
    """Add new results to those that are kept, then write the page. A run that is kept stays.
    `by_clock`: results of clock.py."""
    paths = ([kept] if kept.exists() else []) + list(new)
    results = study.read(paths)
    if len({result["corpus"] for result in results}) > 1:
        raise ValueError("results: expected one text, got several")
    study.check_plan(results)
    if new:
        lines = "".join(json.dumps(result) + "\n" for result in results)
        with atomic_write(kept) as file:
            file.write(lines.encode())
    with atomic_write(page) as file:
        file.write(text(results, clock.read(by_clock)).encode())


def text(results: list[dict], by_clock: Sequence[dict] = ()) -> str:
    """The whole page. What was not run says so."""
    parts = [
        TITLE,
        first_words(results),
        "## The primary outcome\n\n" + primary(results),
        "## How\n\n" + METHOD.format(text=text_of(json.loads(TEXT.read_text()))),
    ]
    for order in PLAN:
        parts.append(f"## {order.number}. {order.question}\n\n" + section(order, results))
    parts.append(f"## {len(PLAN) + 1}. {CLOCK_QUESTION}\n\n" + clock_section(by_clock))
    parts.append("## Not run\n\n" + not_run(results))
    machines = {
        f"{r['device']}, torch {r['torch']}, {r['date']}, commit {r['commit'][:10]}"
        for r in [*results, *by_clock]
    }
    if machines:
        parts.append(f"Runs: {'; '.join(sorted(machines))}.")
    return "\n\n".join(part.rstrip() for part in parts) + "\n"


def text_of(manifest: dict) -> str:
    """How much of what, in words."""
    domains: dict[str, list[str]] = {}
    for source in manifest["sources"]:
        if "characters" in source:
            name = f"{source['name']} {source['version'][:10]}"
            domains.setdefault(source["domain"], []).append(name)
    told = "; ".join(f"{domain}: {', '.join(names)}" for domain, names in domains.items())
    (tokens,) = manifest["arrays"][TRAINING]["shape"]
    return f"{tokens / 1e6:.1f}M tokens of English prose out of packages ({told})"


def first_words(results: list[dict]) -> str:
    """The answer so far; which dense way to spend the same FLOPs ties with 75 % or beats it."""
    found = {b: difference(results, SIZE, "75", b, PRIMARY) for b in (*RIVALS, "dense")}
    if not any(found.values()):
        return (
            "**Not known yet.** The runs that would say it have not been made: what follows is the "
            "plan, with what was expected before the first run, and the runs that there are."
        )
    margins = {p.b: p.margin for p in order_of(2).predictions if p.metric == PRIMARY}
    words = [against(rival, found[arm], margins[arm]) for arm, rival in RIVALS.items()]
    if not found["dense"]:
        words.append("against dense with the same tokens: not run yet")
    else:
        is_equal = found["dense"].is_within(margins["dense"])
        side = f"equal within {margins['dense']:g}" if is_equal else "not shown to be equal"
        words.append(f"against dense with the same tokens: {side}, {shown(found['dense'])}")
    is_whole = all(f and f.seeds == [*order_of(2).seeds] for f in found.values())
    so_far = "" if is_whole else "**Not all runs are there yet.** "
    return f"{so_far}Nats a token of code after dense fine-tuning: {'; '.join(words)}."


def against(rival: str, found: Difference | None, margin: float) -> str:
    """75 % less `rival`, in words."""
    if not found:
        return f"against {rival}: not run yet"
    if found.is_within(margin):
        says = f"**{rival} is as good as 75 % zeros** (within {margin:g})"
    elif found.is_clear:
        says = f"75 % zeros are {'better' if found.mean < 0 else '**worse**'} than {rival}"
    else:
        says = f"whether 75 % zeros beat {rival} is open"
    return f"{says}: {shown(found)}"


def order_of(number: int) -> Order:
    return next(order for order in PLAN if order.number == number)


def primary(results: list[dict]) -> str:
    lines = [p for p in order_of(2).predictions if p.metric == PRIMARY]
    return predictions(replace(order_of(2), predictions=tuple(lines)), results)


def section(order: Order, results: list[dict]) -> str:
    parts = [sweeps(order, results)] if order.swept else []
    if order.arms:
        parts.append(arms(order, results))
    if order.predictions:
        parts.append(predictions(order, results))
    parts += [part for part in (seeds(order, results), sparse_tuning(order, results)) if part]
    return "\n\n".join(parts)


def arms(order: Order, results: list[dict]) -> str:
    """What each arm that has run costs and comes to, means over its seeds; which have not."""
    size = SIZES[order.size]
    full = ARMS["dense"].flops(size)
    rows, missing = [], []
    for name in order.arms if "dense" in order.arms else ("dense", *order.arms):
        arm, found = ARMS[name], by_seed(results, order.size, name)
        told = f"{arm.flops(size) / full:.2f}"
        if not found and name in order.arms:
            missing.append(f"{arm.title} ({told})")
        if not found:
            continue
        trained = [r["pretrained"] for r in found.values() if "step_s" in r.get("pretrained", {})]
        seconds = [t["step_s"] * t["steps"] for t in trained]
        rates = ", ".join(sorted({f"{r['rate']:g}" for r in found.values()})) if trained else "-"
        cells = [mean_of([value(r, m) for r in found.values()], m) for m in METRICS]
        rows.append([arm.title, told, mean_text(seconds, ".0f"), rates, numbers(found), *cells])
    parts = []
    if rows:
        parts.append(table(*filled(["arm", "FLOPs", "s", "rate", "seeds", *METRICS], rows)))
        parts.append(
            "FLOPs are those of pre-training, times dense; s is the time of an arm's own steps "
            "with masked dense weights, the same for all arms of a shape: what the sparse kernels "
            "need is in [benchmarks](benchmarks.md)."
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
    form = ".4f" if METRICS[metric].startswith("nats") else ".2f"
    return mean_text([x for x in found if x is not None], form)


def mean_text(found: Sequence[float], form: str) -> str:
    return f"{sum(found) / len(found):{form}}" if found else "-"


def predictions(order: Order, results: list[dict]) -> str:
    rows = []
    for p in order.predictions:
        found = difference(results, order.size, p.a, p.b, p.metric)
        so_far = "so far " if found and found.seeds != [*order.seeds] else ""
        rows.append(
            [
                f"{ARMS[p.a].title} - {ARMS[p.b].title}",
                METRICS[p.metric],
                f"{p.low:+g} to {p.high:+g}",
                f"{p.margin:g}" if p.margin is not None else "-",
                shown(found, len(order.seeds)) if found else "-",
                so_far + verdict(p, found) if found else "-",
            ]
        )
    header = ["difference", "in", "predicted", "margin", "found", "so"]
    return table(*filled(header, rows), left=2)


def shown(found: Difference, planned: int = 0) -> str:
    """'+0.123 (0.100 to 0.146; 3 seeds)', or '2 of 3 seeds' where more are planned."""
    form = ".4f" if max(map(abs, found.values)) < 1 else ".3f"
    made = len(found.values)
    count = f"{made} of {planned} seeds" if made < planned else f"{made} seed{'s' * (made > 1)}"
    if found.of_95 is None:
        return f"{found.mean:+{form}} ({count})"
    low, high = found.of_95
    return f"{found.mean:+{form}} ({low:+{form}} to {high:+{form}}; {count})"


def seeds(order: Order, results: list[dict]) -> str:
    """Each seed of each arm."""
    rows = []
    for arm in order.arms:
        for seed, result in by_seed(results, order.size, arm).items():
            cells = [mean_of([value(result, metric)], metric) for metric in METRICS]
            rows.append([ARMS[arm].title, seed, *cells])
    return table(*filled(["arm", "seed", *METRICS], rows)) if rows else ""


def sparse_tuning(order: Order, results: list[dict]) -> str:
    """What is left of the gap where the mask stays for fine-tuning, too."""
    rows = []
    for arm in order.arms:
        found = list(by_seed(results, order.size, arm).values())
        for way in ("dense", "sparse"):
            cells = [[value(r, m, way) for r in found] for m in ("code", "webnlg", "sentiment")]
            if ARMS[arm].is_tuned_sparse and any(x is not None for x in cells[0]):
                names = zip(cells, ("code", "webnlg", "sentiment"), strict=True)
                rows.append([ARMS[arm].title, way, *(mean_of(c, m) for c, m in names)])
    header = ["pre-trained", "fine-tuned", "code", "webnlg", "sentiment"]
    return table(*filled(header, rows), left=2) if rows else ""


def sweeps(order: Order, results: list[dict]) -> str:
    """Losses on dev by rate."""
    parts = []
    for arm in order.swept:
        losses = swept(order.size, arm, results)
        end = " (not done)" if losses and plan.best_rate(losses) is None else ""
        parts.append(tried(arm, losses, is_done=not end) + end)
    return (
        "Nats a token of text held out for this, by rate; full length, a seed of its own.\n\n"
        + "\n".join(parts)
    )


def swept(size: str, arm: str, results: list[dict]) -> dict[float, float]:
    """Loss on dev by rate."""
    found = {
        r["rate"]: r.get("pretrained", {}).get("dev")
        for r in results
        if (r["size"], r["arm"], r["seed"]) == (size, arm, SWEEP_SEED)
    }
    return {rate: math.inf if x is None else x for rate, x in found.items()}


def tried(arm: str, losses: Mapping[float, float], is_done: bool = True) -> str:
    """Losses by rate, the best one in bold where all were tried."""
    cells = {rate: f"{x:.4f}" if math.isfinite(x) else "diverged" for rate, x in losses.items()}
    if losses and is_done:
        best = min(losses, key=losses.__getitem__)
        cells[best] = f"**{cells[best]}**"
    told = ", ".join(f"{rate:g}: {cells[rate]}" for rate in sorted(cells))
    return f"- {ARMS[arm].title}: {told or 'not run yet'}"


def clock_section(results: Sequence[dict]) -> str:
    low, high = clock.PREDICTED
    told = (
        f"A GPT of {clock.SHAPE.layers} layers, {clock.SHAPE.width} wide, both arms at the same "
        "time on a core each of a quiet machine, for the same minutes, in which it does not see as "
        "many tokens as it has parameters; 75 % with sparsekern's kernels, dense with torch's. "
        "Rates are chosen by short runs, each arm's by as many, on every 16th row of the held-out "
        "text; every eighth row, none of those, is reported. Predicted, each at its best rate: "
        f"75 % - dense {low:+g} to {high:+g} nats a token, margin {clock.MARGIN:g}."
    )
    made = sorted((r for r in results if r["seed"] != SWEEP_SEED), key=clock.key)
    parts = [told]
    if len(made) < len(results):
        parts.append("\n".join(tried(arm, clock.losses(results, arm)) for arm in clock.ARMS))
    if not made:
        return "\n\n".join([*parts, "Not run yet."])
    rows = [
        [
            ARMS[r["arm"]].title,
            f"{r['minutes']:g}",
            f"{r['rate']:g}",
            r["seed"],
            f"{r['tokens_per_s']:,.0f}",
            f"{r['tokens'] / 1e6:.2f}M",
            "diverged" if r["held-out"] is None else f"{r['held-out']:.4f}",
        ]
        for r in made
    ]
    header = ["arm", "minutes", "rate", "seed", "tokens/s", "tokens", "held-out"]
    parts.append(table(header, rows))
    for minutes in sorted({r["minutes"] for r in made}):
        of = {(r["arm"], r["seed"]): r["held-out"] for r in made if r["minutes"] == minutes}
        pairs = {seed: (of.get(("75", seed)), of.get(("dense", seed))) for _, seed in of}
        seeds = [seed for seed, pair in pairs.items() if None not in pair]
        if values := [of["75", seed] - of["dense", seed] for seed in seeds]:
            found = Difference(seeds, values, interval(values, 0.95), interval(values, 0.90))
            so = verdict(Prediction("75", "dense", "held-out", low, high, clock.MARGIN), found)
            parts.append(f"75 % - dense after {minutes:g} minutes: {shown(found)}: {so}.")
    return "\n\n".join(parts)


def not_run(results: list[dict]) -> str:
    done = {r["key"] for r in results}
    parts = []
    for order in PLAN:
        unswept = [a for a in order.swept if not plan.best_rate(swept(order.size, a, results))]
        if unswept:
            titles = "; ".join(ARMS[arm].title for arm in unswept)
            parts.append(f"- {order.number}. {order.question} Sweeps not done: {titles}.")
        wanted = [(arm, seed) for arm in order.arms for seed in order.seeds]
        left = [w for w in wanted if f"{order.size} {w[0]} seed {w[1]}" not in done]
        if left:
            parts.append(f"- {order.number}. {order.question} {len(left)} of {len(wanted)} runs.")
    parts.append(
        "- Not in the plan: pruning of SmolLM2-135M with distillation (its text cannot be had, and "
        "it wants an hour of a GPU); a third size."
    )
    return "\n".join(parts)
