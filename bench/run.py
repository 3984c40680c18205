"""Runs the benchmarks: results/<machine>-<isa>-<date>.csv, .md and .png, and docs/benchmarks.md.

python bench/run.py [--part NAME [--note TEXT]] [pytest's arguments]

With arguments the files go to build/bench and docs/benchmarks.md stays: both are of the whole grid.
With --part they are a result of their own, <machine>-<isa>-NAME-<date>.csv and .md, whose page
says what was run and holds TEXT:

python bench/run.py --part trained -k "test_spmm_masks and trained"

The part many-tokens is held to what is asked of it (targets.py): it runs no other cases and no
peers, and only its page is kept, for the table goes to build/bench.
"""

import argparse
import re
import shlex
import sys
import tempfile
from datetime import date
from pathlib import Path

import pages
import pytest
import tables
import targets

from sparsekern.bench import machine, records
from sparsekern.bench.products import COLD_BYTES
from sparsekern.bench.race import CORES
from sparsekern.bench.rates import derived
from sparsekern.bench.records import Run
from sparsekern.report import plots

PLAIN = {"dtype": "float32", "mask": "random", "is_cold": False}
# Rows of the page's table: (label, fields of its cases).
SUMMARY = (
    ("forward, M = {M}", {"op": "spmm", "M": (256, 1024), **PLAIN}),
    ("input gradient, M = {M}", {"op": "spmm_t", "M": (256, 1024), **PLAIN}),
    ("values' gradient, M = {M}", {"op": "sddmm", "M": (256, 1024), **PLAIN}),
    ("forward, M = 16", {"op": "spmm", "M": 16, **PLAIN}),
    ("forward, M = 1, weights cold", {"op": "spmm", "M": 1, **PLAIN, "is_cold": True}),
    ("forward, M = 1, weights in cache", {"op": "spmm", "M": 1, **PLAIN}),
    (
        "forward, M = 1, weights cold, bf16",
        {"op": "spmm", "M": 1, **PLAIN, "is_cold": True, "dtype": "bfloat16"},
    ),
    ("training step of a linear, M = {M}", {"op": "linear", "M": 1024, **PLAIN}),
    ("training step of the demo's GPT", {"op": "train_step", "model": "demo"}),
    ("training step of GPT-2 small", {"op": "train_step", "model": "gpt2-small"}),
)

SECTIONS = """\
# {name}

{heading}

Times faster than the best dense call, which is the fastest of {dense}
on the same operands (for bf16 of both types). Medians of interleaved rounds, geometric means over
the shapes; in brackets the best sparse peer of each shape. Below 1 is a loss.

{overview}

## Everyone

Errors are relative to |x| |W|^T in fp64, the worst of all shapes and, with cold weights, of all
copies of W. Cold weights: each competitor goes through {cold_mb:.0f} MB or more of copies of W.

{competitors}

{peers}

## By shape

One thread. GFLOP/s of the best dense call, and its share of what multiply-adds of float32 on
registers reach here; bf16 has more than that.

{by_shape}

## Against ourselves

Times faster than our own call on fp32 operands, on a random mask of as many values, or with one
thread.

{against_ourselves}

## Training step

Cap: with linears that take no time, by their share of the dense step.

{steps}

## Generation

Tokens a second of all texts of a batch together, the prompt's reading included.

{generation}

## Memory

Growth of the process's peak by a forward and backward of SparseLinear. The first call also derives
its schedules from the pattern and keeps them. Bound of a later one: its results, packed panels and
the values in walking order.

{memory}
"""


def overview(name: str, run: Run, cases: list[dict]) -> str:
    """The plot and the table of the whole grid, or which part of it this is."""
    if part := run.about.get("part"):
        note = f" {part['note']}" if part["note"] else ""
        return f"A part of the grid alone: `{part['command']}`.{note}"
    return f"![speed-up against sparsity]({name}.png)\n\n{tables.summary(cases, SUMMARY)}"


def dense_calls(run: Run) -> str:
    """The dense calls of the products, or of whole steps where there are none, as they were in this
    run: older ones had no oneDNN."""
    dense = [r for r in run.records if r.get("kind") == records.DENSE]
    products = [r for r in dense if r["op"] in tables.PRODUCTS]
    names = dict.fromkeys(r["contender"].removesuffix(" bf16") for r in products or dense)
    return ", ".join(names) or "none"


def page(name: str, run: Run) -> str:
    if run.about.get("part", {}).get("name") == targets.PART:
        return targets.page(run)
    cases = derived(run)
    text = SECTIONS.format(
        name=name,
        heading=machine.in_words(run.about, "fp32"),
        cold_mb=COLD_BYTES / 1e6,
        overview=overview(name, run, cases),
        dense=dense_calls(run),
        peers=tables.peers(run.about["machine"]),
        **{
            table.__name__: table(cases) or pages.NOT_RUN
            for table in (
                tables.competitors,
                tables.by_shape,
                tables.against_ourselves,
                tables.steps,
                tables.generation,
                tables.memory,
            )
        },
    )
    if "part" not in run.about:
        return text
    sections = re.split(r"(?m)^(?=## )", text)
    return "".join(each for each in sections if pages.NOT_RUN not in each).rstrip() + "\n"


def update_page(name: str, run: Run) -> None:
    summary = tables.summary(derived(run), SUMMARY)
    pages.update("bench", name, summary, machine.in_words(run.about, "fp32"))


def write(folder: Path, name: str, run: Run) -> None:
    is_whole = "part" not in run.about
    figure = plots.speedups(tables.forward_curves(derived(run))) if is_whole else None
    pages.publish(folder, name, run, page(name, run), figure)


def main() -> int:
    parser = argparse.ArgumentParser(allow_abbrev=False)
    parser.add_argument("--part")
    parser.add_argument("--note", default="")
    options, selection = parser.parse_known_args()
    is_whole = len(sys.argv) == 1
    cpu = pages.slug(machine.processor())
    part = f"-{options.part}" if options.part else ""
    name = f"{cpu}-{len(CORES)}-cores-{machine.isa()}{part}-{date.today()}"
    with tempfile.TemporaryDirectory() as folder:
        fresh = Path(folder) / f"fresh{records.SUFFIX}"
        more = ["--asked"] * (options.part == targets.PART)
        if code := pytest.main([str(pages.BENCH), "-q", f"--table={fresh}", *more, *selection]):
            return code
        run = records.read(fresh)
    if options.part:
        command = shlex.join(["bench/run.py", "--part", options.part, *selection])
        run.about["part"] = {"name": options.part, "command": command, "note": options.note}
    is_kept = is_whole or options.part not in (None, targets.PART)
    write(pages.RESULTS if is_kept else pages.PARTIAL, name, run)
    if options.part == targets.PART:
        (pages.RESULTS / f"{name}.md").write_text(page(name, run))
    if is_whole:
        update_page(name, run)
    print(page(name, run))
    return 0


if __name__ == "__main__":
    sys.exit(main())
