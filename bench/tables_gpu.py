"""The tables of a GPU's page. `cells` are derived cases (sparsekern/bench/rates.py)."""

from collections.abc import Callable, Iterable
from functools import partial
from statistics import geometric_mean, median

from pages import by_sparsity
from tables import most_often_best

from sparsekern.bench.measure_gpu import SHAPES
from sparsekern.bench.rates import case_name
from sparsekern.bench.records import DENSE, OURS, groups, select
from sparsekern.terminal import table

FEW_TOKENS, TRITON = "few_tokens", "triton"
# Rows of the table in docs/benchmarks.md.
SUMMARY_TOKENS = (
    ("1 token", (1,)),
    ("8 and 16 tokens", (8, 16)),
    ("32 tokens", (32,)),
    ("64 tokens", (64,)),
)


def speedup(cell: dict, name: str) -> float | None:
    """Times the best dense call; nothing where `name` did not run."""
    return cell["speedups"].get(name)


def is_wrong(cell: dict, name: str) -> bool:
    return name in cell["ways"] and not cell["ways"][name]["is_right"]


def shapes_of(cells: Iterable[dict]) -> set[tuple[int, int]]:
    return {(cell["N"], cell["K"]) for cell in cells}


def ratio_cell(cells: list[dict], name: str, is_spread: bool = True) -> str:
    """'1.31 [0.98-1.66]': geometric mean and extremes over the shapes where `name` ran."""
    cells = [cell for cell in cells if name in cell["ways"]]
    ratios = [r for cell in cells if (r := speedup(cell, name)) is not None]
    if not cells:
        return ""
    if not ratios:
        return "failed"
    text = f"{geometric_mean(ratios):.2f}"
    if is_spread:
        text += f" [{min(ratios):.2f}-{max(ratios):.2f}]"
    if len(ratios) < len(cells):
        text += f" ({len(cells) - len(ratios)} failed)"
    return f"{text} **wrong**" if any(is_wrong(cell, name) for cell in cells) else text


def summary(cells: list[dict]) -> str:
    """Geometric means of the CUDA kernels over shapes and tokens."""
    cells = select(cells, mask="random")
    lines = []
    for label, tokens in SUMMARY_TOKENS:
        chosen = select(cells, M=tokens)
        count = len(shapes_of(chosen))
        if 0 < count < len(SHAPES):
            label += f" ({count} shape{'s' * (count > 1)})"
        lines.append(([label], chosen, partial(ratio_cell, name=FEW_TOKENS, is_spread=False)))
    return by_sparsity(["times dense"], 1, lines, cells)


def competitors(cells: list[dict]) -> str:
    """A line for each number of tokens and everyone but the dense calls."""
    cells = select(cells, mask="random")
    lines = [
        (
            [M, label_of(chosen, name), worst_error(chosen, name)],
            chosen,
            partial(ratio_cell, name=name),
        )
        for (M,), chosen in groups(cells, lambda c: c["M"]).items()
        for name in names_of(chosen)
    ]
    header = ["tokens", "times dense [lowest-highest shape]"]
    return by_sparsity(header, 2, lines, cells, "error")


def names_of(cells: list[dict]) -> list[str]:
    """All but the dense calls, in the order of first appearance."""
    found = (n for c in cells for n, way in c["ways"].items() if way["kind"] != DENSE)
    return list(dict.fromkeys(found))


def label_of(cells: list[dict], name: str) -> str:
    notes = {c["ways"][name].get("note") for c in cells if name in c["ways"]} - {"", None}
    return f"{name} ({'; '.join(sorted(notes))})" if notes else name


def worst_error(cells: list[dict], name: str) -> str:
    errors = [c["ways"][name]["error"] for c in cells if "error" in c["ways"].get(name, {})]
    return f"{max(errors, key=lambda e: float('inf') if e != e else e):.0e}" if errors else ""


def by_shape(cells: list[dict]) -> str:
    """Microseconds of the best dense call and of the CUDA kernels, with the ratio."""
    cells = select(cells, mask="random")
    shapes = groups(cells, lambda c: c["M"], lambda c: c["N"], lambda c: c["K"])
    lines = []
    for (M, n, k), chosen in shapes.items():
        dense_us = 1e6 * median(c["dense_s"] for c in chosen)
        rate = 1e-12 * chosen[0]["dense_bytes"] / (1e-6 * dense_us)
        labels = [M, f"{n}x{k}", most_often_best(chosen), f"{dense_us:.1f}", f"{rate:.2f}"]
        lines.append((labels, chosen, _times))
    return by_sparsity(["tokens", "N x K", "best dense", "us", "TB/s"], 3, lines, cells)


def _times(cells: list[dict]) -> str:
    return ", ".join(
        f"{1e6 * c['ways'][FEW_TOKENS]['median_s']:.1f} ({speedup(c, FEW_TOKENS):.2f})"
        for c in cells
        if speedup(c, FEW_TOKENS) is not None
    )


def bytes_read(cells: list[dict], limit_bytes_per_s: float) -> str:
    """Share of the copy bandwidth that one token reaches, by the bytes of the packed weights."""
    cells = select(cells, M=1, mask="random")

    def column(cell: dict) -> str:
        way = cell["ways"].get(FEW_TOKENS, {})
        if "median_s" not in way:
            return ""
        rate, share = way["bytes"] / way["median_s"], way["bytes"] / cell["dense_bytes"]
        return f"{1e-12 * rate:.2f} ({rate / limit_bytes_per_s:.0%}; {share:.3f})"

    lines = [
        ([f"{n}x{k}"], chosen, lambda some: ", ".join(map(column, some)))
        for (n, k), chosen in groups(cells, lambda c: c["N"], lambda c: c["K"]).items()
    ]
    return by_sparsity(["TB/s (of the limit; bytes of dense)"], 1, lines, cells)


def shares(cells: list[dict], ratio: Callable[[dict], float | None]) -> str:
    """'0.97 [0.91-1.02]' by tokens and sparsity: the mean and the extremes over the shapes."""

    def text(some: list[dict]) -> str:
        found = [r for c in some if (r := ratio(c)) is not None]
        return f"{geometric_mean(found):.2f} [{min(found):.2f}-{max(found):.2f}]" if found else ""

    by_tokens = groups(cells, lambda c: c["M"]).items()
    return by_sparsity(["tokens"], 1, [([M], chosen, text) for (M,), chosen in by_tokens], cells)


def pruned(cells: list[dict]) -> str:
    """Speed on a magnitude-pruned W as a share of the speed on a random mask."""

    def key(cell: dict) -> tuple:
        return tuple(cell[field] for field in ("M", "N", "K", "sparsity"))

    def seconds(cell: dict) -> float:
        return cell["ways"][FEW_TOKENS]["median_s"]

    random = {key(c): seconds(c) for c in select(cells, mask="random") if speedup(c, FEW_TOKENS)}

    def ratio(cell: dict) -> float | None:
        if key(cell) not in random or not speedup(cell, FEW_TOKENS):
            return None
        return random[key(cell)] / seconds(cell)

    return shares(select(cells, mask="pruned"), ratio)


def triton(cells: list[dict]) -> str:
    """Speed of the Triton kernel as a share of the CUDA kernels'."""

    def ratio(cell: dict) -> float | None:
        both = speedup(cell, TRITON), speedup(cell, FEW_TOKENS)
        return None if None in both else both[0] / both[1]

    return shares(select(cells, mask="random"), ratio)


def failures(cells: list[dict]) -> list[str]:
    """One line for each of ours that failed or was wrong."""
    return [
        f"{case_name(c)} {name}: " + (way.get("failed") or f"error {way['error']:.1e}")
        for c in cells
        for name, way in c["ways"].items()
        if way["kind"] == OURS and not way["is_right"]
    ]


def absent(machine: dict) -> str:
    rows = [[name, reason] for name, reason in machine["missing"].items()]
    return table(["did not run", "because"], rows, left=2) if rows else "Everyone ran."
