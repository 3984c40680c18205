"""The pages of `run_gpu.py decode`, and of `prompts` and `layouts`: few tokens, and many."""

import pages
import tables_gpu
import torch

from sparsekern.bench import measure_gpu
from sparsekern.bench.machine import in_words
from sparsekern.bench.rates import derived
from sparsekern.bench.records import Run

ROUNDS = {"layouts": 3, "two-way": 3}  # of others: measure_gpu.ROUNDS

PAGE = """\
# {name}

{heading}

Times faster than the best dense call: cuBLAS and cuBLASLt, both layouts of W and of the result, and
mv for one token. Medians of {rounds} CUDA-graph replays of {fewest} calls or more, all competitors
in turn; every call reads another copy of W, {cold_mb:.0f} MB or more of them. Geometric means over
the shapes. Random masks unless said. Below 1 is a loss.

![speed-up against sparsity]({name}.png)

{summary}

## Everyone

Errors are relative to fp64 in the Frobenius norm, the worst of all shapes and copies of W; more
than {tolerance:g} is wrong. The layout of W and x that each wants is made beforehand.

{competitors}

{absent}

## By shape

Microseconds of the best dense call, with the bytes of its weights per second, and of the CUDA
kernels, with their ratio.

{by_shape}

## Bytes

One token: packed bytes read per second by the CUDA kernels, their share of the copy bandwidth
({copy:.2f} TB/s, measured in the same run), and the packed bytes as a share of the dense ones.

{bytes_read}

## Magnitude-pruned weights

Rows and columns of log-normal scales (sigma {row_sigma} and {column_sigma}), one threshold for all.
Speed as a share of that on a random mask.

{pruned}

## Triton

Speed as a share of the CUDA kernels'.

{triton}
"""


PROMPTS = """\
# {name}

{heading}

Times faster than the best dense call: cuBLAS and cuBLASLt, both layouts of W and of the result.
W is written out from its pack, or from CSR, and torch multiplies; a pack for 64 tokens (`pairs`) is
read in place up to 256 tokens on Hopper. Medians of
{rounds} CUDA-graph replays of {fewest} calls or more, all competitors in turn; every call reads
another copy of W, {cold_mb:.0f} MB or more of them. Geometric means over {shapes}. Below 1 is a
loss.

{competitors}
"""


def rounds_of(benchmark: str) -> int:
    return ROUNDS.get(benchmark, measure_gpu.ROUNDS)


def told(name: str, run: Run, cells: list[dict]) -> dict[str, object]:
    """What a page of products on a GPU says of its run."""
    dtype = cells[0]["dtype"]
    return {
        "name": name,
        "heading": in_words(run.about, dtype),
        "rounds": rounds_of(run.about["benchmark"]),
        "fewest": measure_gpu.LAUNCHES[0],
        "cold_mb": measure_gpu.COLD_BYTES / 1e6,
        "shapes": ", ".join(f"{n}x{k}" for n, k in sorted(tables_gpu.shapes_of(cells))),
        "tolerance": measure_gpu.TOLERANCE[getattr(torch, dtype)],
    }


def page(name: str, run: Run) -> str:
    cells = derived(run)
    limit = run.about["machine"]["ceilings"]["cuda"]["bytes_per_s"]["memory"]
    names = ("summary", "competitors", "by_shape", "pruned", "triton")
    return PAGE.format(
        **told(name, run, cells),
        copy=limit / 1e12,
        row_sigma=measure_gpu.ROW_SIGMA,
        column_sigma=measure_gpu.COLUMN_SIGMA,
        bytes_read=tables_gpu.bytes_read(cells, limit),
        absent=tables_gpu.absent(run.about["machine"]),
        **{each: getattr(tables_gpu, each)(cells) or pages.NOT_RUN for each in names},
    )


def page_of_prompts(name: str, run: Run) -> str:
    cells = derived(run)
    return PROMPTS.format(**told(name, run, cells), competitors=tables_gpu.competitors(cells))
