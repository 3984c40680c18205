"""The page of `run_gpu.py eight-bits`: decode with weights of 8 bits, on one GPU."""

import decode
import tables_gpu
import two_way

from sparsekern.bench.rates import derived
from sparsekern.bench.records import Run, groups

PAGE = """\
# {name}

{heading}

Times faster than the best dense call in bfloat16: cuBLAS and cuBLASLt, both layouts of W and of
the result, and mv for one token. `few_tokens`: packed values of 16 bits; with int8 and e4m3 behind,
of 8 bits with a scale for each row, x in bfloat16. Dense E4M3: torch._scaled_mm with one scale for
W and one for x, or with one for each row of both. Dense int4: torch._weight_int4pack_mm. Medians of
{rounds} CUDA-graph replays of {fewest} calls or more, all competitors in turn; every call reads
another copy of W, {cold_mb:.0f} MB or more of them. Geometric means over {shapes}, random masks.
Below 1 is a loss.

{competitors}

Errors, in the Frobenius norm, the worst of all: of the products of the rounded operands,
{tolerance:g} or more is wrong; and what the rounding to fewer bits makes of the result.

{errors}

## By shape

Microseconds of the best dense call, and times faster.

{by_shape}
"""


def page(name: str, run: Run) -> str:
    cells = derived(run)
    return PAGE.format(
        **decode.told(name, run, cells),
        errors=two_way.errors(cells),
        competitors=tables_gpu.competitors(cells),
        by_shape="\n\n".join(
            f"{sparsity:.0%} zeros\n\n{two_way.by_shape(chosen)}"
            for (sparsity,), chosen in groups(cells, lambda c: c["sparsity"]).items()
        ),
    )
