"""The tables of training on a GPU. `cases` are derived (sparsekern/bench/rates.py)."""

import math
from collections.abc import Iterable
from statistics import geometric_mean

from sparsekern.bench import least_size_gpu, memory_gpu
from sparsekern.bench.gpt_gpu import CAPTURED, COMPILED, EAGER, FREE, TWO_WAY
from sparsekern.bench.products_gpu import NAME
from sparsekern.bench.rates import together
from sparsekern.bench.records import DENSE, OURS, groups, select
from sparsekern.bench.train_float8_gpu import SHOWN
from sparsekern.bench.train_products_gpu import FP8, FP8_CAST, OPS
from sparsekern.gpt.model import GPTConfig
from sparsekern.gpt.presets import PRESETS
from sparsekern.terminal import table

MASKS = {FREE: "free", TWO_WAY: "two-way"}
WHOLE, MEAN = "together", "geometric mean"
GB = 1e9


def steps(cells: list[dict]) -> str:
    """A line for each model and mask: the fastest form of each side, and each form against the
    same of dense."""
    lines = []
    for cell in cells:
        ways = cell["ways"]

        def ms(way: dict) -> float:
            return way.get("median_s", math.nan) * 1e3

        ratios = [
            f"{form.removeprefix(', ') or 'eager'} {ms(ways['dense' + form]) / ms(way):.2f}"
            for form in (EAGER, COMPILED, CAPTURED)
            if (way := ways.get(NAME + form))
        ]
        best_dense = min((way for way in ways.values() if way["kind"] == DENSE), key=ms)
        labels = [
            f"{cell['model']}, {cell['layers']} layers, {cell['M']} tokens",
            f"{cell['sparsity']:.0%} {'two-way' if cell['mask'] == TWO_WAY else 'free'}",
            f"{ms(best_dense):.2f}",
        ]
        if "ours" in cell:
            best = ways[cell["ours"]]
            found = [f"{ms(best):.2f}", f"{cell['speedup']:.3f}", ", ".join(ratios)]
            lines.append([*labels, *found, best["kernel"]])
        else:
            failed = next(way["failed"] for way in ways.values() if way["kind"] == OURS)
            lines.append([*labels, "failed", "", failed.partition(":")[0], ""])
    header = ["model", "mask", "dense ms", "ours ms", "times dense", "form by form", "kernels"]
    return table(header, lines, left=2)


def float8_arms(cases: list[dict]) -> str:
    """A line for each arm: its step, against dense in both types, losses and memory."""
    of_dense = {
        case["dtype"]: way["median_s"]
        for case in cases
        if "median_s" in (way := case["ways"].get("dense", {}))
    }
    lines = []
    for case in cases:
        for name, way in case["ways"].items():
            if "failed" in way:
                lines.append([f"{name} {case['dtype']}", way["failed"], *[""] * 5])
                continue
            ratios = [
                f"{of_dense[dtype] / way['median_s']:.3f}" if dtype in of_dense else ""
                for dtype in ("bfloat16", "float8")
            ]
            ms, peak = f"{1e3 * way['median_s']:.2f}", f"{way['peak_bytes'] / GB:.1f}"
            found = [ms, *ratios, f"{way['spread']:.3f}", way["note"], peak]
            lines.append([f"{name} {case['dtype']}", *found])
    losses = f"losses, means of {SHOWN} steps"
    against = ["times dense bfloat16", "times dense float8"]
    header = ["arm", "ms", *against, "spread", losses, "peak GB"]
    return table(header, lines)


def forms(cases: list[dict]) -> str:
    """A line for each model and form, a column for each mask: times dense of the same form."""
    columns = list(dict.fromkeys((case["sparsity"], case["mask"]) for case in cases))
    lines: dict[tuple, list[str]] = {}
    for case in cases:
        for form in (EAGER, COMPILED, CAPTURED):
            dense, ours = (case["ways"].get(name + form) for name in ("dense", NAME))
            if dense is None or ours is None:
                continue
            key = f"{case['model']}, {case['layers']} layers", form.removeprefix(", ") or "eager"
            line = lines.setdefault(key, [*key, *("not measured" for _ in columns)])
            text = "failed"
            if "median_s" in ours and "median_s" in dense:
                text = f"{dense['median_s'] / ours['median_s']:.2f}"
                text = f"**{text}, a loss**" if float(text) < 1 else text
            line[2 + columns.index((case["sparsity"], case["mask"]))] = text
    header = ["times dense", "form", *(f"{s:.0%} {MASKS[mask]}" for s, mask in columns)]
    return table(header, list(lines.values()), left=2)


def products(cases: list[dict]) -> str:
    """A line for each W and mask: times the best dense call of each product and of all three."""
    lines, means = [], {}
    for each_mask, of_mask in groups(cases, lambda c: c["sparsity"], lambda c: c["mask"]).items():
        label = _mask_label(*each_mask, cases[0]["sparsity"])
        columns: list[list[float | None]] = []
        for (n, k), of_shape in groups(of_mask, lambda c: c["N"], lambda c: c["K"]).items():
            each = {case["op"]: case for case in of_shape}
            found = [each.get(op, {}).get("speedup") for op in OPS]
            found += [together(each.values(), name) for name in (NAME, FP8, FP8_CAST)]
            kernels = dict.fromkeys(each[op].get("kernel", "failed") for op in OPS if op in each)
            lines.append([f"{n}x{k}", label, *map(_ratio, found), ", ".join(kernels)])
            columns.append(found)
        means[label] = [_mean(column) for column in zip(*columns, strict=True)]
    lines += [[MEAN, label, *map(_ratio, each), ""] for label, each in means.items()]
    header = ["N x K", "mask", "forward", "dX", "dW", WHOLE, "FP8", "FP8 with casts", "kernels"]
    return table(header, lines, left=2)


def _mask_label(sparsity: float, mask: str, usual: float) -> str:
    """The kind of mask, and its zeros where they are not as many as `usual`."""
    return MASKS[mask] if sparsity == usual else f"{sparsity:.0%} {MASKS[mask]}"


def _mean(ratios: Iterable[float | None]) -> float | None:
    """Of all, and of none where one is missing."""
    found = list(ratios)
    return None if None in found else geometric_mean(found)


def _ratio(ratio: float | None) -> str:
    return "not measured" if ratio is None else f"{ratio:.2f}"


def write_outs(cases: list[dict], limit_bytes_per_s: float) -> str:
    """Microseconds, bandwidth, and its share of the limit."""
    lines = []
    for case in cases:
        (way,) = case["ways"].values()
        rate = way["bytes"] / way["median_s"]
        lines.append(
            [case["op"], f"{case['N']}x{case['K']}", f"{1e6 * way['median_s']:.1f}"]
            + [f"{1e-12 * rate:.2f}", f"{rate / limit_bytes_per_s:.0%}"]
        )
    return table(["kernel", "N x K", "us", "TB/s", "of copies"], lines)


def config_of(case: dict) -> GPTConfig:
    """The model of a case. One that is not known has heads of 128."""
    names = ("width", "context", "vocabulary")
    other = GPTConfig(case["layers"], max(1, case["width"] // 128), *(case[n] for n in names))
    return PRESETS.get(case["model"], other)


def memory(cases: list[dict]) -> str:
    """A line for each model, dense and under each mask: its parts in GB, predicted, and the sums,
    predicted and measured."""
    lines: dict[tuple, list[str]] = {}
    dense: dict[tuple, int] = {}
    for case, way in ((c, w) for c in cases for w in (_last(c, DENSE), _last(c, OURS)) if w):
        is_dense, key = way["kind"] == DENSE, (case["model"], arm(case, way))
        mask, sparsity = (memory_gpu.DENSE, 0.0) if is_dense else (case["mask"], case["sparsity"])
        at_a_time = case.get("micro_batch", case["batch"])
        parts = memory_gpu.predict(config_of(case), at_a_time, sparsity, mask)
        parts["places"] = sum(parts[name] for name in ("indices", "bitmaps", "2:4 tails", "orders"))
        line = [*key]
        state = memory_gpu.state_bytes(parts)
        peak = memory_gpu.peak_bytes(parts, accumulates="micro_batch" in case)
        for names, predicted, field in (
            (("weights", "gradients", "AdamW", "places"), state, "state_bytes"),
            (("casts", "activations", "loss"), peak, "peak_bytes"),
        ):
            measured = way.get(field)
            if is_dense and measured:
                dense[case["model"], field] = measured
            base = dense.get((case["model"], field))
            ratio = f"{measured / base:.2f}" if measured and base else ""
            line += [*(_gb(parts[name]) for name in names), _gb(predicted), _gb(measured), ratio]
        lines.setdefault(key, [*line, _gb(way.get("pool_bytes"))])
    header = ["model", "mask", "weights", "gradients", "AdamW", "places", "state", "measured"]
    header += ["of dense", "casts", "activations", "loss", "peak", "measured", "of dense"]
    return table([*header, "pool of a graph"], list(lines.values()), left=2)


def _last(case: dict, kind: str) -> dict | None:
    """Of the contenders of a kind the last one: a captured step, where there is one."""
    return next((way for way in reversed(case["ways"].values()) if way["kind"] == kind), None)


def arm(case: dict, way: dict) -> str:
    return "dense" if way["kind"] == DENSE else f"{case['sparsity']:.0%} {MASKS[case['mask']]}"


def _gb(nbytes: int | None) -> str:
    return "" if nbytes is None else f"{nbytes / GB:.2f}"


def largest(cases: list[dict]) -> str:
    """A line for each model, a column for each limit: sequences and tokens a second."""
    limits = list(dict.fromkeys(case.get("case", "") for case in cases))
    lines = []
    for chosen in groups(cases, lambda c: c["mask"]).values():
        found = {case.get("case", ""): _speed(case) for case in chosen}
        (way,) = chosen[0]["ways"].values()
        lines.append([arm(chosen[0], way), *(found.get(limit, "not measured") for limit in limits)])
    return table(["mask", *(limit or "measured above" for limit in limits)], lines)


def _speed(case: dict) -> str:
    (way,) = case["ways"].values()
    if "failed" in way:
        return "none"
    return f"{case['batch']} ({case['M'] / way['median_s']:,.0f} tokens/s)"


def least_sizes(cases: list[dict], row: least_size_gpu.Row) -> str:
    """A line for each number of tokens, a column for each size; the last one says from where on."""
    cases = select(cases, mask=row.mask)
    sizes = sorted({case["N"] for case in cases})
    lines = []
    for M, least in least_size_gpu.summarize(cases, row):
        chosen = [least_size_gpu.ratio(select(cases, M=M, N=size), row) for size in sizes]
        lines.append([M, *(f"{each:.2f}" for each in chosen), least or "never"])
    return table(["tokens", *map(str, sizes), "from"], lines)
