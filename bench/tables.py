"""The tables of a CPU's page. `cases` are derived ones (sparsekern/bench/rates.py)."""

from collections.abc import Callable, Iterable
from functools import partial
from statistics import geometric_mean, median

from grids import SHAPES
from pages import Line, by_sparsity

from sparsekern.bench.records import groups, select
from sparsekern.report.curves import Curve, curves, tokens
from sparsekern.terminal import table

PASSES = {
    "spmm": "forward",
    "spmm_t": "input gradient",
    "sddmm": "values' gradient",
    "linear": "training step of a linear",
    "train_step": "GPT training step",
}
PRODUCTS = ("spmm", "spmm_t", "sddmm", "linear")
MASKS = {"pruned": "magnitude-pruned", "trained": "pruned after training", "uneven": "uneven rows"}
OURS = "sparsekern"


def standard(cases: Iterable[dict]) -> list[dict]:
    """Without the large shapes, of which not all sparsities are run: no mean holds them."""
    return [case for case in cases if (case.get("N"), case.get("K")) in (*SHAPES, (None, None))]


def label(case: dict) -> str:
    """'forward, M = 1, weights cold'."""
    if case["op"] == "train_step":
        return f"{PASSES[case['op']]}, {case['model']}"
    parts = [PASSES[case["op"]], f"M = {case['M']}"]
    if case["M"] == 1:
        parts.append("weights cold" if case["is_cold"] else "weights in cache")
    if case["dtype"] == "bfloat16":
        parts.append("bf16")
    if case["mask"] != "random":
        parts.append(MASKS.get(case["mask"], case["mask"]))
    return ", ".join(parts)


def threads_cell(cases: list[dict]) -> str:
    """'1', or '2 (2 shapes)' where not all shapes were run."""
    threads, shapes = cases[0]["threads"], len({(i.get("N"), i.get("K")) for i in cases})
    is_all = shapes == len(SHAPES) or cases[0]["op"] == "train_step"
    return f"{threads}" if is_all else f"{threads} ({shapes} shape{'s' * (shapes > 1)})"


def mean(cases: list[dict], value: Callable[[dict], float | None]) -> str:
    """Geometric mean, or nothing where there is no value for each."""
    values = [value(case) for case in cases]
    return f"{geometric_mean(values):.2f}" if values and None not in values else ""


def cell(cases: list[dict]) -> str:
    """'2.31 (0.63)': ours, and the best peer of each shape where there is one."""
    peers = mean(cases, lambda case: case["best_peer"])
    ours = mean(cases, lambda case: case["speedup"])
    return f"{ours} ({peers})" if peers else ours


def tokens_of(cases: list[dict]) -> str:
    """'256 and 1024'."""
    return " and ".join(map(str, sorted({case["M"] for case in cases})))


def summary(cases: list[dict], rows: Iterable[tuple[str, dict]]) -> str:
    """One line for each (label, fields) and number of threads; {M} in a label: the tokens run."""
    cases = [case for case in standard(cases) if "speedup" in case]
    lines = [
        ([name.format(M=tokens_of(chosen)), threads_cell(chosen)], chosen, cell)
        for name, fields in rows
        for chosen in groups(select(cases, **fields), lambda i: i["threads"]).values()
    ]
    return by_sparsity(["times dense", "threads"], 2, lines, cases)


def products(cases: Iterable[dict]) -> list[dict]:
    return [case for case in cases if case["op"] in PRODUCTS]


def competitors(cases: list[dict]) -> str:
    """Each pass with a line for us and one for every competitor but the dense calls."""
    cases = products(standard(cases))
    lines = [
        (
            [name, threads_cell(chosen), who, errors_cell(chosen, who)],
            chosen,
            lambda some, who=who: mean(some, lambda i: i["speedups"].get(who)),
        )
        for (name, _), chosen in groups(cases, label, lambda i: i["threads"]).items()
        for who in chosen[0]["speedups"]
    ]
    return by_sparsity(["pass", "threads", "times dense"], 3, lines, cases, "error")


def errors_cell(cases: list[dict], who: str) -> str:
    """The worst relative error against fp64, and whether that is wrong."""
    ways = [case["ways"][who] for case in cases if who in case["ways"]]
    worst = f"{max(way['error'] for way in ways):.0e}"
    return worst if all(way["is_right"] for way in ways) else f"{worst} **wrong**"


def by_shape(cases: list[dict]) -> str:
    cases = select(products(cases), threads=1)
    in_order = [case for (_,), alike in groups(cases, label).items() for case in alike]
    lines = []
    for (name, n, k), chosen in groups(in_order, label, lambda i: i["N"], lambda i: i["K"]).items():
        rate = median(1e-9 * case["dense_flop"] / case["dense_s"] for case in chosen)
        shares = [case["dense_share"] for case in chosen if "dense_share" in case]
        share = f" ({median(shares):.0%})" if shares else ""
        best = [name, f"{n}x{k}", most_often_best(chosen), f"{rate:.0f}{share}"]
        lines.append((best, chosen, cell))
    return by_sparsity(["pass", "N x K", "best dense", "GFLOP/s (of peak)"], 3, lines, cases)


def most_often_best(cases: list[dict]) -> str:
    """The dense call."""
    calls = [case["best_dense"] for case in cases]
    return max(dict.fromkeys(calls), key=calls.count)


def against_ourselves(cases: list[dict]) -> str:
    """How many times faster than our own call on fp32, on a random mask, or with one thread."""
    cases = products(standard(cases))
    lines: list[Line] = []
    for (name,), chosen in groups(cases, label).items():
        for who in chosen[0]["speedups"]:
            if who.startswith(f"{OURS}, ") or who.startswith(f"{OURS} "):
                ratio = lambda i, who=who: i["speedup"] / i["speedups"][who]  # noqa: E731
                lines.append(([name, who], chosen, partial(mean, value=ratio)))
        scaled = [two | {"one": one} for one, two in scalings(chosen)]
        for who, key in ((f"{OURS}, one thread", "ours_s"), ("dense against itself", "dense_s")):
            ratio = lambda i, key=key: i["one"][key] / i[key]  # noqa: E731
            lines.append(([f"{name}, two threads", who], scaled, partial(mean, value=ratio)))
    return by_sparsity(["pass", "times"], 2, lines, cases)


def scalings(cases: list[dict]) -> list[tuple[dict, dict]]:
    """The pairs of runs that differ in the number of threads alone."""
    pairs = groups(cases, lambda i: i["N"], lambda i: i["K"], lambda i: i["sparsity"]).values()
    found = [(select(pair, threads=1), select(pair, threads=2)) for pair in pairs]
    return [(one[0], two[0]) for one, two in found if one and two]


def forward_curves(cases: list[dict]) -> dict[str, Curve]:
    """For the plot, by tokens: one thread, random masks in fp32. In cache a token says little of
    decoding."""
    fields = {"op": "spmm", "threads": 1, "mask": "random", "dtype": "float32"}
    shown = [c for c in select(standard(cases), **fields) if c["is_cold"] or c["M"] > 1]
    return curves(shown, lambda case: case["M"], tokens)


def steps(cases: list[dict]) -> str:
    rows = [
        [
            f"{i['model']}: {i['layers']} layers, width {i['width']}, "
            f"vocabulary {i['vocabulary']}, {i['batch']} x {i['context']} tokens",
            i["threads"],
            f"{i['sparsity']:.0%}",
            f"{1e3 * i['dense_s']:.0f} ms",
            f"{1e3 * i['ours_s']:.0f} ms",
            f"{i['speedup']:.2f}",
            f"{i['linear_share']:.0%}",
            f"{i['cap']:.2f}",
        ]
        for i in select(cases, op="train_step")
    ]
    header = ["GPT", "threads", "sparsity", "dense", "sparse", "times dense", "linears", "cap"]
    return table(header, rows) if rows else ""


def generation(cases: list[dict]) -> str:
    """Tokens a second of all texts of a batch together."""
    rows = [
        [
            f"{i['model']}, {i['tokens']} tokens after {i['context']}",
            i["batch"],
            i["threads"],
            f"{i['sparsity']:.0%}",
            *(f"{i['batch'] * i['tokens'] / i[side]:.1f}" for side in ("dense_s", "ours_s")),
            f"{i['speedup']:.2f}",
        ]
        for i in select(cases, op="generate")
    ]
    header = ["GPT", "batch", "threads", "sparsity", "dense tokens/s", "sparse", "times dense"]
    return table(header, rows) if rows else ""


def memory(cases: list[dict]) -> str:
    rows = [
        [
            f"{i['N']}x{i['K']}, M = {i['M']}, {i['sparsity']:.0%}",
            *(f"{way['bytes'] / 2**20:.0f} MiB" for way in i["ways"].values()),
        ]
        for i in select(cases, op="memory")
    ]
    header = ["layer", "first call", "later call", "its results", "bound", "dense N x K"]
    return table(header, rows) if rows else ""


def peers(machine: dict) -> str:
    rows = [[p["name"], p["layout"], p["missing"] or "yes"] for p in machine["peers"]]
    return table(["peer", "x, y and what is not timed", "runs here"], rows, left=3)
