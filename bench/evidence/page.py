"""docs/quality.md: the answer and the primary outcome first, and everything behind it."""

import json
from collections.abc import Sequence
from pathlib import Path

from sparsekern.files import atomic_write, write_picture

from . import clock, converged_section, study, trends
from .answer import NORMED, PLAIN, SIZE, answered, first_words, measured, notes
from .build import TRAINING
from .check import FIRST, LAST, MOST_APART
from .converged import NEEDED
from .differences import LEAST_RISE, by_seed
from .picture import drawn, picture
from .plan import ARMS, PLAN, SIZES, SWEEP_SEED, Order
from .tables import (
    arms,
    by_clock,
    clock_difference,
    is_normed,
    not_run,
    predictions,
    primary_outcome,
    seeds,
    sparse_tuning,
    sweeps,
    swept,
    title,
    tuning_ends,
    verdicts,
)

TEXT = Path(__file__).with_name("manifest.json")
PICTURE = "quality.png"
CHECKED = {"size", "steps", "step_s", "sparse_step_s", "apart_first", "apart_last", "is_same"}
CHECKED |= study.ABOUT  # needed of check.py
CLOCK = len(PLAN) + 1  # its section; that of converged_section is the last
LAST_SECTION = CLOCK + 1
CLOCK_QUESTION = "Which is better after the same minutes on a CPU?"
TITLE = "# Does quality survive?"
QUESTION = """\
*Is a model that is trained with 75 % of its weights at zero, and then fine-tuned with all of them,
as good as one that never had zeros? And is it better than what else the same arithmetic buys?*"""
COMPARED = """\
A weight that is zero need not be multiplied. The same arithmetic buys other things, too: a smaller
model without zeros, or one without zeros that sees less text."""
READING = f"""\
How to read the numbers:

- A model is scored by its **loss** on text that it never saw, in nats a token: lower is better, and
  0.01 more means that it holds each right token for about 1 % less probable. So are held-out text,
  code and WebNLG told, and the rest in % right.
- Code, WebNLG and sentiment are scored after fine-tuning, held-out text, BLiMP and cloze before it
  ([what these are](#how)).
- A **seed** is a repetition with other first weights, another order of the text and other zeros. A
  difference is told of all that were planned, or else says of how many.
- **FLOPs** are the arithmetic of pre-training, as a share of that of dense.
- **Equal within** a margin: the 90 % interval lies inside it. **Worse**, **better**: zero lies
  outside of the 95 % interval; **by more than** a margin: so does all of the margin. **Open**: none
  of these.
- **Rise**: by how much the loss in training, in means of a twentieth of the run, rose once it had
  been lower. A run with {LEAST_RISE:g} or more was not stable. (Pruning while training raises it
  too, and so do the turn to dense last steps and the new warm-up of a model that is trained on.)"""
HOLDS = """\
What the first of two arms is beside the second, in bold where a margin was fixed and it is not
open. Figures, predictions and margins stand in the section that is named."""
NORM = "All arms here have a norm of queries and keys."
METHOD = """\
Predictions and margins were fixed before the first run (bench/evidence/plan.py), but for sections 9
and 10, which were added after the sweeps of section 1 and first runs of section 2 (no more than one
or two of an arm), for section {clock}, and for section {last}, which was added last, before its own
first run (bench/evidence/converged.py); after those sweeps too, but before its first run, section 7
got scaled arms and no fine-tuning, and the model of sections 6 and 7 became smaller (7 layers
instead of 8). When the sweeps of section 10 had shown that normed arms train stably, and before any
of their runs, sections 3, 4, 6 and 8 got normed arms with the predictions of the plain ones, 4 and
6 no fine-tuning, 6 an arm with two-way masks; the seeds of section 9 were given up. This page is
made from bench/results/quality*.jsonl.

- **Text**: {text}. Each paragraph once, documents held out by a hash of their names. Held-out
  tokens that stand in 13 tokens of the training text are not scored. Rates are chosen on every
  other row of it, the others are reported. `python bench/quality.py corpus` makes it again
  (bench/evidence/manifest.json has its hashes); the text itself is not shipped.
- **Training**: each arm at the best of several learning rates that were tried at full length, or at
  that of the arm it is a variant of; the larger models of sections 6 and 7 at half of it. Masked
  dense weights in one CUDA graph for all arms of a shape; `python bench/quality.py check` holds 200
  of its steps to the same steps by the sparse kernels. AdamW (0.9, 0.95), weight decay 0.1,
  clipping at 1, warm-up over 5 % of the steps, then straight down to zero. A seed fixes weights,
  order of the text and mask. Embeddings, head and norms are dense. A model that is trained on
  begins with the dense model of its seed, with a warm-up, a schedule and an order of the text of
  its own; it is pruned by magnitude, each layer alike.
- **Scaled** arms: first weights of the sparse layers times 1 / sqrt(density), their rates, and with
  them their decay, times 1 / density (SµPar, Dey et al. 2024, arXiv 2405.15743); the rates told are
  those of the rest. **Normed** arms: an RMS norm of queries and keys in each head
  (bench/evidence/normed.py). Fine-tuning has one rate for all.
- **Tasks**, after fine-tuning with all weights, each at the rate that is best on other items:
  Python of held-out packages (nats a token; the spaces of indents are tokens that count, easily
  guessed, so differences a word are larger), WebNLG, which puts facts into words (nats a token of
  the text), sentiment of 5,000 held-out film reviews (% right). Without fine-tuning: held-out text,
  BLiMP (which of two sentences is grammatical, 67,000 pairs), cloze (the last word of a passage of
  a held-out novel).
- **FLOPs** count stored weights, and attention over the full square (sparsekern/gpt/flops.py).
  Fine-tuning is not in them: it is the same for all arms of a shape, but for the one that says so.
- **Seconds and tokens/s** are those of pre-training with masked dense weights, on which zeros save
  nothing. {kernels}
  A smaller model and fewer tokens do save seconds. For a CPU see section {clock}.
- **Intervals**: 95 %, of the mean over seeds of the two arms' difference (Student); of sentiment
  and cloze over seeds and items; a loss is that of this text, no other. What is "equal within" a
  margin is not called "worse" or "better", even where the 90 % interval leaves zero out. "As
  predicted": the mean is between the two figures, wherever the interval ends. A run that was not
  stable counts as any other. No difference seen is not equality. Each line stands for itself: of 20
  true equalities one is expected to look like a difference."""

UNTIMED = """\
**Nor would sparse kernels save seconds at this size on this GPU**: they were not timed at this
  width, but a step of GPT-2 small, twice as wide, with 75 % zeros is 0.998 times as fast as dense
  ([measured](../bench/results/nvidia-h200-train-bfloat16-2026-11-30.md))."""
TIMED = """\
"By kernels" is what they would be with the sparse kernels: in {steps} steps of {size}, with
  75 % zeros and no norm, these were **{times:.2f} times as fast** as masked dense weights
  ({sparse:.2f} ms a step beside {masked:.2f}, both in captured graphs). Their losses are
  {last:+.4f} nats apart in the mean of the last {mean_of} steps, {within}, and at most {first:.2g}
  in one of the first {count} (one seed)."""
WITHIN = {True: "within the limit of {:g}", False: "**more than the limit of {:g}**"}

NEVER = "- Not in the plan: a third size."


def publish(
    kept: Path, page: Path, new: Sequence[Path], by_clock: Path, checked: Path, others: Path
) -> None:
    """Add new results to those that are kept, then write the page and its picture. A run that is
    kept stays. `by_clock`: results of clock.py; `checked`: what check.py wrote; `others`: results
    of converged.py."""
    paths = ([kept] if kept.exists() else []) + list(new)
    results, clocked, timed = study.read(paths), clock.read(by_clock), read_check(checked)
    converged = study.kept(others, NEEDED)
    every = [*results, *clocked, *converged, *filter(None, [timed])]
    if len({result["corpus"] for result in every}) > 1:
        raise ValueError("results: expected one text, got several")
    study.check_plan(results)
    if new:
        lines = "".join(json.dumps(without_items(result)) + "\n" for result in results)
        with atomic_write(kept) as file:
            file.write(lines.encode())
    if found := drawn(results):
        write_picture(picture(found), page.with_name(PICTURE))
    with atomic_write(page) as file:
        file.write(text(results, clocked, timed, converged).encode())


def without_items(result: dict) -> dict:
    """Of a run that rates were chosen by: its single answers are in no interval."""
    if result["seed"] != SWEEP_SEED or "pretrained" not in result:
        return result
    cloze = {n: part for n, part in result["pretrained"]["cloze"].items() if n != "bits"}
    return result | {"pretrained": result["pretrained"] | {"cloze": cloze}}


def read_check(path: Path) -> dict | None:
    """None where there is no file."""
    return next(iter(study.kept(path, CHECKED)), None)


def text(
    results: list[dict],
    clocked: Sequence[dict] = (),
    checked: dict | None = None,
    converged: Sequence[dict] = (),
) -> str:
    """The whole page. What was not run says so."""
    parts = [*top(results), *what_holds(results, clocked, converged)]
    begun = [order for order in PLAN if is_begun(order, results)]
    waiting = [order for order in PLAN if order not in begun]
    for order in begun:
        parts += [f"## {order.number}. {order.question}", section(order, results, checked)]
    parts += [f"## {CLOCK}. {CLOCK_QUESTION}", by_clock(clocked)]
    parts += [f"## {LAST_SECTION}. {converged_section.QUESTION}"]
    parts += [converged_section.section(converged)]
    corpus, kernels = text_of(json.loads(TEXT.read_text())), of_kernels(checked)
    told = METHOD.format(text=corpus, clock=CLOCK, last=LAST_SECTION, kernels=kernels)
    parts += ["## How", told, "## Not run", what_is_left(results, converged)]
    for order in waiting:
        parts += [f"### {order.number}. {order.question}", expected(order, results)]
    machines = {
        f"{r['device']}, torch {r['torch']}, {r['date']}, commit {r['commit'][:7]}"
        for r in [*results, *clocked, *converged, *filter(None, [checked])]
    }
    if machines:
        parts.append(f"Runs: {'; '.join(sorted(machines))}.")
    return "\n\n".join(part.rstrip() for part in parts if part) + "\n"


def top(results: list[dict]) -> list[str]:
    """The question and its answer, in words, a table and a picture, and what is compared."""
    parts = [TITLE, f"{QUESTION}  \n{first_words(results)}"]
    if orders := answered(results):
        parts += [primary_outcome(orders[0], results), measured(orders[0])]
        parts.append(f"![Loss on code after fine-tuning of each arm beside 75 % zeros]({PICTURE})")
    return [*parts, notes(results), "## What is compared", COMPARED, the_arms(), READING]


def what_holds(
    results: list[dict], clocked: Sequence[dict], converged: Sequence[dict]
) -> list[str]:
    """All verdicts, by the question that they answer; arms whose training is stable first."""
    first = answered(results)[:1]
    parts = []
    for order in sorted(PLAN, key=lambda o: (o.number not in first, not is_normed(o))):
        if told := verdicts(order, results):
            parts += [asked(order.question, about(order)), told]
            parts.append(trends.holds(order.number, results))
    if told := clock_difference(clocked):
        parts += [asked(CLOCK_QUESTION, f"section {CLOCK}"), told]
    if told := converged_section.holds(converged):
        where = f"section {LAST_SECTION}; a model of others"
        parts += [asked(converged_section.QUESTION, where), told]
    return ["## What holds and what does not", HOLDS, *parts] if parts else []


def asked(question: str, where: str) -> str:
    return f"**{question}** ({where})"


def about(order: Order) -> str:
    """Its section, whether its arms have a norm, and how many seeds were planned."""
    norm = "with the norm" if is_normed(order) else "without the norm"
    told = {PLAIN: f"{norm}, as was planned first", NORMED: "with and without the norm"}
    return f"section {order.number}; {told.get(order.number, norm)}; {len(order.seeds)} seeds"


def what_is_left(results: list[dict], converged: Sequence[dict]) -> str:
    left = not_run(PLAN, results)
    if of_another := converged_section.not_run(converged):
        left.append(f"- {LAST_SECTION}. {converged_section.QUESTION} {of_another}")
    return "\n".join([*left, NEVER])


def the_arms() -> str:
    """The arms of order 2, in words, and what makes them those of order 10."""
    size, text = SIZES[SIZE], json.loads(TEXT.read_text())["arrays"][TRAINING]["shape"][0]
    share = {name: ARMS[name].flops(size) / ARMS["dense"].flops(size) for name in ("75", "small")}
    tokens = {name: ARMS[name].steps(size) * size.shape.tokens for name in ("dense", "short")}
    told = {
        "dense": f"a GPT of {size.shape.in_words}, on "
        f"{tokens['dense'] / 1e6:.0f}M tokens: {tokens['dense'] / text:.1f} times through the text",
        "75": "the same; 75 % of the weights of its blocks' linear layers are zero, at random "
        f"places that stay until fine-tuning, which trains all weights: {share['75']:.2f} of the "
        "FLOPs, but to fine-tune and use it costs what dense does",
        "small": f"{size.small.in_words}, on as many tokens: "
        f"{share['small']:.2f} of the FLOPs, and cheaper to fine-tune and use, too",
        "short": f"the dense model on {tokens['short'] / 1e6:.0f}M tokens, so that it has the "
        "FLOPs of 75 % zeros; at the best rate of dense, with no sweep of its own",
        "scratch": "the dense model, fine-tuned alone",
        "scratch-4": "the same, with four times as much fine-tuning",
    }
    lines = [f"- **{ARMS[name].title}**: {words}." for name, words in told.items()]
    lines.append(
        "- **normed**: the same arm with a norm of queries and keys in each head, and rates that "
        "were tried with it."
    )
    return "\n".join(lines)


def of_kernels(checked: dict | None) -> str:
    """What the sparse kernels would save, and whether losses by them are the same."""
    if not checked:
        return UNTIMED
    sparse, masked = checked["sparse_step_s"], checked["step_s"]
    return TIMED.format(
        steps=checked["steps"],
        size=SIZES[checked["size"]].shape.in_words,
        times=masked / sparse,
        masked=1e3 * masked,
        sparse=1e3 * sparse,
        within=WITHIN[checked["is_same"]].format(MOST_APART["cuda"]),
        first=checked["apart_first"],
        last=checked["apart_last"],
        count=FIRST,
        mean_of=LAST,
    )


def is_begun(order: Order, results: list[dict]) -> bool:
    swept_ones = any(swept(order.size, arm, results) for arm in order.swept)
    own = [arm for arm in order.arms if arm != "dense"] or order.arms
    return swept_ones or any(by_seed(results, order.size, arm) for arm in own)


def section(order: Order, results: list[dict], checked: dict | None) -> str:
    parts = [NORM] * is_normed(order)
    parts.append(trends.section(order.number, results))
    parts += [sweeps(order, results)] * bool(order.swept)
    parts += [arms(order, results, checked)] * bool(order.arms)
    parts += [predictions(order, results)] * bool(order.predictions)
    parts += [seeds(order, results), tuning_ends(order, results), sparse_tuning(order, results)]
    return "\n\n".join(filter(None, parts))


def expected(order: Order, results: list[dict]) -> str:
    """Of an order that nothing was run of."""
    size, full = SIZES[order.size], ARMS["dense"].flops(SIZES[order.size])
    costs = [f"{title(order, arm)} ({ARMS[arm].flops(size) / full:.2f})" for arm in order.arms]
    told = [f"Arms, with their FLOPs: {'; '.join(costs)}.", *[NORM] * is_normed(order)]
    return f"{' '.join(told)}\n\n{predictions(order, results)}"


def text_of(manifest: dict) -> str:
    """How much of what, in words."""
    domains: dict[str, int] = {}
    for source in manifest["sources"]:
        if "characters" in source:
            domains[source["domain"]] = domains.get(source["domain"], 0) + source["characters"]
    whole = sum(domains.values())
    told = ", ".join(f"{name} {count / whole:.0%}" for name, count in domains.items())
    (tokens,) = manifest["arrays"][TRAINING]["shape"]
    return f"{tokens / 1e6:.1f}M tokens of English prose out of packages ({told})"
