"""The beginning of the page: four sentences and one picture."""

from collections.abc import Sequence

from ..bench.records import groups, select
from . import measured, plots
from .curves import Curve, common, crossing, curve, plain, span
from .load import Result
from .view import FEW, Panel, View, cpu_products, main_step

SHOWN = (0.5, 0.75, 0.9, 0.95)
STANDS_FOR = {0.7: 0.75}  # where the latter was not measured


def decode_curve(view: View, tokens: int) -> Curve:
    records = plain(view.decode.records) if view.decode else []
    return curve(common(select(records, op="spmm", M=tokens)))


def picture(view: View) -> Panel | None:
    model, trained = main_step(view.cpu.result)
    gpu_model, gpu_trained = main_step(view.gpu_steps)
    one = common(select(cpu_products(view), op="spmm", M=1))
    rows = {
        f"CPU, training step of {model}": trained,
        "CPU, one token": curve(one),
        "GPU, one token": decode_curve(view, 1),
        "GPU, 32 tokens": decode_curve(view, 32),
        "GPU, 64 tokens": decode_curve(view, 64),
        f"GPU, training step of {gpu_model}": gpu_trained,
    }
    shown = {}
    for name, found in rows.items():
        at = {STANDS_FOR.get(s, s): ratio for s, ratio in found.items()} | found
        points = {s: at[s] for s in SHOWN if s in at}
        if points:
            shown[name] = points
    files = [r for r in (view.cpu.result, view.decode, view.gpu_steps) if r]
    if not shown:
        return None
    title = "Where sparse weights win and where they lose"
    if any(0.7 in found and 0.75 not in found for found in rows.values()):
        title += " (GPU products: 70% in the place of 75%)"
    return Panel(title, plots.summary(shown), files)


def sentences(view: View) -> list[tuple[str, Sequence[Result]]]:
    """What was found, each with its files; what was not measured is left out."""
    found = [_cpu_training(view), _cpu_token(view), _gpu_token(view), _losses(view)]
    return [sentence for sentence in found if sentence]


def times_at(found: Curve, sparsities: Sequence[float] = (0.75, 0.9)) -> str:
    """'1.72 times as fast at 75% zeros and 2.68 times at 90%'"""
    at = {STANDS_FOR.get(s, s): (s, ratio) for s, ratio in found.items()}
    at |= {s: (s, ratio) for s, ratio in found.items()}
    parts = [at[s] for s in sparsities if s in at] or [max(found.items())]
    first, *others = [f"{ratio:.2f} times as fast at {s:.0%} zeros" for s, ratio in parts]
    others = [text.replace(" as fast", "").replace(" zeros", "") for text in others]
    return " and ".join([first, *others])


def _cpu_training(view: View):
    model, found = main_step(view.cpu.result)
    if not found:
        return None
    return f"On a CPU a training step of {model} is {times_at(found)}.", [view.cpu.result]


def _cpu_token(view: View):
    found = curve(common(select(cpu_products(view), op="spmm", M=1)))
    if not found:
        return None
    return f"A product of one token, as in writing text, is {times_at(found)}.", [view.cpu.result]


def _gpu_token(view: View):
    found = decode_curve(view, 1)
    if not found:
        return None
    text, files = f"On a GPU a product of one token is {times_at(found)}", [view.decode]
    for result in view.results:
        for run in measured.generations(result):
            if run.first_token_s and run.batch == 1:
                dense_s, sparse_s = run.first_token_s
                text += (
                    f"; a whole {run.model} at {run.sparsity:.0%} writes {run.speedup:.2f} times as"
                    f" many tokens a second, but its first token takes {1e3 * sparse_s:.0f} ms"
                    f" instead of {1e3 * dense_s:.0f}"
                )
                return f"{text}.", [*files, result]
    return f"{text}.", files


def _losses(view: View):
    parts, files = [], []
    if many := decode_curve(view, FEW):
        if min(many.values()) < 1:
            parts.append(f"{FEW} tokens on a GPU reach {span(many.values())} of dense speed")
            files.append(view.decode)
    model, found = main_step(view.gpu_steps)
    if found and round(min(found.values()), 2) < 1:
        parts.append(f"a training step of {model} on a GPU {span(found.values())}")
        files.append(view.gpu_steps)
    starts = [crossing(c) for c in cpu_curves(view).values()]
    late = [s for s in starts if s is not None and s > 0.5]
    if late:
        parts.append(f"a CPU needs up to {max(late):.0%} zeros before every product gains")
        files.append(view.cpu.result)
    if not parts:
        return None
    return f"It loses too: {', '.join(parts)}.", files


def cpu_curves(view: View) -> dict[str, Curve]:
    records = cpu_products(view)
    alike = groups(records, lambda r: r["op"], lambda r: r["M"])
    found = {f"{op} {M}": curve(common(rows)) for (op, M), rows in alike.items()}
    return {name: each for name, each in found.items() if len(each) > 1}
