"""The page of `run_gpu.py two-way`: two-way patterns packed for many tokens, on one GPU."""

import decode
import tables_gpu

from sparsekern.bench.rates import derived
from sparsekern.bench.records import Run, groups
from sparsekern.terminal import table

PAGE = """\
# {name}

{heading}

Times faster than the best dense call in bfloat16: cuBLAS and cuBLASLt, both layouts of W and of
the result. Weights of {sparsity:.0%} sparsity, two-way masks, compressed beforehand; products
through cuSPARSELt. Medians of {rounds} CUDA-graph replays of {fewest} calls or more (fewer where
they take long), all competitors in turn; every call reads another copy of W, {cold_mb:.0f} MB or
more of them. Geometric means over {shapes}. Below 1 is a loss. In E4M3 W and x have one scale each,
a power of two: that of x is known from an example, or found in each call.

{speed}

Errors, in the Frobenius norm, the worst of all shapes: of the products of the rounded operands,
{tolerance:g} or more is wrong; and what the rounding to E4M3 makes of the result.

{errors}

## By shape

Microseconds of the best dense call, and times faster.

{by_shape}
"""


def page(name: str, run: Run) -> str:
    cells = derived(run)
    return PAGE.format(
        **decode.told(name, run, cells),
        sparsity=cells[0]["sparsity"],
        errors=errors(cells),
        speed=speed(cells),
        by_shape=by_shape(cells),
    )


def speed(cells: list[dict]) -> str:
    """A line for each way, a column for each number of tokens."""
    by_tokens = groups(cells, lambda c: c["M"])
    rows = [
        [tables_gpu.label_of(cells, name)]
        + [tables_gpu.ratio_cell(chosen, name, is_spread=False) for chosen in by_tokens.values()]
        for name in tables_gpu.names_of(cells)
    ]
    return table(["", *(f"{M} tokens" for (M,) in by_tokens)], rows)


def errors(cells: list[dict]) -> str:
    rows = []
    for name in tables_gpu.names_of(cells):
        roundings = [
            c["ways"][name]["rounding"] for c in cells if "rounding" in c["ways"].get(name, {})
        ]
        rounding = f"{max(roundings):.1e}" if roundings else ""
        rows.append([name, tables_gpu.worst_error(cells, name), rounding])
    return table(["", "error", "rounding"], rows)


def by_shape(cells: list[dict]) -> str:
    names = tables_gpu.names_of(cells)
    rows = []
    for (n, k, M), (cell,) in groups(
        cells, lambda c: c["N"], lambda c: c["K"], lambda c: c["M"]
    ).items():
        found = [tables_gpu.ratio_cell([cell], name, is_spread=False) for name in names]
        rows.append([f"{n}x{k}", M, f"{1e6 * cell['dense_s']:.1f}", *found])
    return table(["N x K", "tokens", "dense, us", *names], rows) if rows else ""
