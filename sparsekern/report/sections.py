"""The sections of the page: what each shows of the results, or that it is not measured yet."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from statistics import geometric_mean, median

from ..bench.records import groups, select, sparsities_of
from ..wafer import compare as wafer
from ..wafer.machine import machine
from ..wafer.sweep import FULL_TOKENS
from . import plots
from .load import EXPERIMENTS, GENERATION, PRODUCTS, Result

PASSES = {
    "spmm": "forward",
    "spmm_t": "input gradient",
    "sddmm": "values' gradient",
    "linear": "training step of a linear",
}
NOT_YET = "Not measured yet."
WAFER_TOKENS = (256, 1024)  # of the measurements held against the prediction


@dataclass
class Part:
    """A figure, a table or both, with what they are of."""

    text: str
    figure: object = None
    header: list[str] = field(default_factory=list)
    rows: list[list[object]] = field(default_factory=list)


@dataclass
class Section:
    title: str
    text: str
    parts: list[Part]


def sections(results: Sequence[Result]) -> list[Section]:
    made: list[tuple[str, str, Callable[[Sequence[Result]], list[Part]]]] = [
        (
            "Speed-up against sparsity",
            "Times faster than the best dense call of the same run, random masks, medians; "
            "geometric means over the shapes. Below the black line is a loss.",
            speedups,
        ),
        (
            "Crossover map",
            "The same by tokens and sparsity. Orange and bold: dense is faster.",
            crossovers,
        ),
        (
            "Roofline",
            "Useful work counts stored weights alone. The ceilings were measured in the same run, "
            "on the same machine.",
            rooflines,
        ),
        ("Decode", "Tokens a second of all texts of a batch together.", decoding),
        ("Training", "Tokens a second of whole steps, optimizer included.", training),
        (
            "Loss against wall-clock",
            "Sparse pre-training beside dense, the same tokens for each; losses in nats per token.",
            loss,
        ),
        (
            "Measured here, predicted for a wafer",
            f"The model of the WSE-2 for the same products, with their tokens and with "
            f"{FULL_TOKENS:,} of them, which fill it; FLOPs: 1 / density.",
            predictions,
        ),
    ]
    return [Section(title, text, make(results)) for title, text, make in made]


def plain(records: list[dict]) -> list[dict]:
    """On random masks; one token with weights from memory, as in decoding."""
    found = [r for r in select(records, mask="random") if r["M"] > 1 or r["is_cold"]]
    dtypes = list(dict.fromkeys(r["dtype"] for r in found))
    return select(found, dtype=dtypes[0]) if dtypes else []


def common(records: list[dict]) -> list[dict]:
    """Records of shapes that were run at every sparsity: means are of the same shapes."""
    everywhere = len(sparsities_of(records))
    shapes = groups(records, lambda r: r["M"], lambda r: r["N"], lambda r: r["K"]).values()
    return [r for alike in shapes if len(sparsities_of(alike)) == everywhere for r in alike]


def by_pass(result: Result) -> list[tuple[int, dict[str, list[dict]]]]:
    """(threads, pass -> records) of a result's products."""
    found = []
    products = select(plain(result.records), op=tuple(PASSES))
    for (threads,), records in groups(products, lambda r: r["threads"]).items():
        passes = {
            name: common(chosen)
            for op, name in PASSES.items()
            if (chosen := select(records, op=op))
        }
        found.append((threads, {name: chosen for name, chosen in passes.items() if chosen}))
    return found


def _where(result: Result, threads: int) -> str:
    on = f", {threads} thread{'s' * (threads > 1)}" if threads else ""
    return f"{result.title}: {result.about}{on}."


def speedups(results: Sequence[Result]) -> list[Part]:
    parts = []
    for result in results:
        for threads, passes in by_pass(result):
            records = [r for chosen in passes.values() for r in chosen]
            if len(sparsities_of(records)) > 1:
                parts.append(Part(_where(result, threads), plots.speedup(passes)))
    return parts


def crossovers(results: Sequence[Result]) -> list[Part]:
    parts = []
    for result in results:
        for threads, passes in by_pass(result):
            maps = {n: rs for n, rs in passes.items() if len({r["M"] for r in rs}) > 1}
            if maps:
                parts.append(Part(_where(result, threads), plots.crossover(maps)))
    return parts


def rooflines(results: Sequence[Result]) -> list[Part]:
    parts = []
    for result in results:
        for (threads,), records in groups(plain(result.records), lambda r: r["threads"]).items():
            limits = result.ceilings(threads)
            records = [r for r in records if r.get("moved_bytes")]
            if limits and records:
                figure = plots.roofline(records, PASSES, limits)
                parts.append(Part(_where(result, threads), figure))
    return parts


def decoding(results: Sequence[Result]) -> list[Part]:
    parts = []
    for result in results:
        if result.kind == GENERATION:
            speeds = {
                f"{run['sparsity']:.0%} zeros\nbatch {run['batch']}": {
                    side: run[side]["tokens_per_s"] for side in ("dense", "sparse")
                }
                for run in result.data["runs"]
            }
            rows = [
                [
                    f"{run['sparsity']:.0%}",
                    run["batch"],
                    f"{run['dense']['tokens_per_s']:,.0f}",
                    f"{run['sparse']['tokens_per_s']:,.0f}",
                    f"{run['speedup']:.2f}",
                    f"{run['block_bytes_ratio']:.3f}",
                    f"{1e3 * run['dense']['first_token_s']:.1f}",
                    f"{1e3 * run['sparse']['first_token_s']:.1f}",
                ]
                for run in result.data["runs"]
            ]
            header = ["zeros", "batch", "dense tokens/s", "sparse tokens/s", "times dense"]
            header += ["memory of blocks, of dense", "first token ms, dense", "sparse"]
            parts.append(_bars(result, speeds, header, rows))
        elif found := select(result.records, op="generate"):
            speeds, rows = _speeds(
                found,
                lambda r: r["batch"] * r["tokens"],
                lambda r: f"{r['model']}, {r['sparsity']:.0%} zeros\nbatch {r['batch']}",
            )
            parts.append(_bars(result, speeds, _SPEED_HEADER, rows))
    return parts


_SPEED_HEADER = ["model", "threads", "dense tokens/s", "sparse tokens/s", "times dense"]


def _speeds(
    records: list[dict], tokens: Callable[[dict], int], label: Callable[[dict], str]
) -> tuple[dict[str, dict[str, float]], list[list[object]]]:
    """(label -> dense and sparse tokens/s, rows of a table) of records of GPTs."""
    speeds, rows = {}, []
    for r in records:
        both = {"dense": tokens(r) / r["dense_s"], "sparse": tokens(r) / r["ours_s"]}
        speeds[label(r)] = both
        figures = [f"{speed:,.0f}" for speed in both.values()]
        threads = r["threads"] or "GPU"
        rows.append([label(r).replace("\n", " "), threads, *figures, f"{r['speedup']:.2f}"])
    return speeds, rows


def _bars(result: Result, speeds: dict, header: list[str], rows: list) -> Part:
    figure = plots.bars(speeds, "tokens/s", ("sparse", "dense"))
    return Part(f"{result.title}: {result.about}.", figure, header, rows)


def training(results: Sequence[Result]) -> list[Part]:
    parts = []
    for result in results:
        if result.kind == EXPERIMENTS:
            parts += _arms(result)
            continue
        steps = select(result.records, op="train_step")
        for (threads,), chosen in groups(steps, lambda r: r["threads"]).items():
            speeds, rows = _speeds(
                chosen,
                lambda r: r["M"],
                lambda r: f"{r['model'].replace('-', chr(10))}\n{r['sparsity']:.0%} zeros",
            )
            figure = plots.bars(speeds, "tokens/s", ("sparse", "dense"))
            parts.append(Part(_where(result, threads), figure, _SPEED_HEADER, rows))
    return parts


def _arms(result: Result) -> list[Part]:
    """Sparse pre-training beside the dense run of the same experiments."""
    runs = pretrained(result)
    dense = runs.pop("dense", None)
    if not dense or not runs:
        return []
    both = {
        name: {"dense": dense["tokens_per_s"], "sparse": run["tokens_per_s"]}
        for name, run in runs.items()
    }
    rows = [
        [name, f"{s['dense']:,.0f}", f"{s['sparse']:,.0f}", f"{s['sparse'] / s['dense']:.2f}"]
        for name, s in both.items()
    ]
    return [_bars(result, both, ["pre-training", *_SPEED_HEADER[2:]], rows)]


def pretrained(result: Result, kind: str = "pretrain") -> dict[str, dict]:
    """Arm -> run of its first seed, by sparsity; of fine-tunings the best. Without those that
    diverged."""
    runs: dict[float, dict] = {}
    for key, run in result.data.items():
        words = key.split()
        if words[0] == kind and words[3] == "0" and "step_s" in run:
            arm = float(words[1])
            runs[arm] = min(run, runs.get(arm, run), key=lambda r: r["loss"])
    return {f"{s:.0%} sparse" if s else "dense": runs[s] for s in sorted(runs)}


def loss(results: Sequence[Result]) -> list[Part]:
    parts = []
    for result in results:
        arms = pretrained(result) if result.kind == EXPERIMENTS else {}
        if not arms:
            continue
        tuned = pretrained(result, "finetune")
        most = max(run["flops"] for run in arms.values())
        rows = [
            [
                name,
                f"{run['loss']:.4f}",
                f"{most / run['flops']:.2f}x",
                f"{run['steps_s']:.1f}",
                f"{tuned[name]['loss']:.4f}" if name in tuned else "-",
            ]
            for name, run in arms.items()
        ]
        header = ["pre-training", "loss", "fewer FLOPs", "seconds", "then fine-tuned dense"]
        text = f"{result.title}: {result.about}."
        parts.append(Part(text, plots.losses(arms), header, rows))
    return parts


def predictions(results: Sequence[Result]) -> list[Part]:
    parts = []
    for result in results:
        if result.kind != PRODUCTS:
            continue
        pairs = wafer.compare(machine("wse2"), {result.title: result.records})
        passes = {}
        for op, name in {**PASSES, "train_step": "training step of a GPT"}.items():
            chosen = [p for p in pairs if p.what.startswith(f"{op} ") and _is_compared(p, op)]
            sparsities = sorted({p.sparsity for p in chosen})
            columns = {
                "measured here": lambda p: p.measured,
                "wafer, the same tokens": lambda p: p.same,
                f"wafer, {FULL_TOKENS:,} tokens": lambda p: p.full,
                "FLOPs": lambda p: p.flop_ratio,
            }
            curves = {
                who: {
                    s: geometric_mean([value(p) for p in chosen if p.sparsity == s])
                    for s in sparsities
                }
                for who, value in columns.items()
            }
            if len(sparsities) > 1:
                passes[name] = curves
        if passes:
            ratios = [
                [name, *(f"{median(curve.values()):.2f}" for curve in curves.values())]
                for name, curves in passes.items()
            ]
            header = ["median over sparsities", *next(iter(passes.values()))]
            text = f"{result.title}: {result.about}."
            parts.append(Part(text, plots.prediction(passes), header, ratios))
    return parts


def _is_compared(pair: wafer.Pair, op: str) -> bool:
    """Products of many tokens in fp32 on random masks, and every training step."""
    if op == "train_step":
        return True
    _, tokens, *details = pair.what.split(", ")
    return int(tokens.split()[0]) in WAFER_TOKENS and details[0] == "float32" and len(details) == 2
