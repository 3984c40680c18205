"""Runs the benchmarks: results/<machine>-<isa>-<date>.json, .md and .png, and docs/benchmarks.md.

python bench/run.py [--part NAME [--note TEXT]] [pytest's arguments]

With arguments the files go to build/bench and docs/benchmarks.md stays: both are of the whole grid.
With --part they are a result of their own, <machine>-<isa>-NAME-<date>.json and .md, whose page
says what was run and holds TEXT:

python bench/run.py --part trained -k "test_spmm_masks and trained"
"""

import argparse
import json
import re
import shlex
import sys
import tempfile
from datetime import date
from pathlib import Path

import pages
import pytest
import tables

from sparsekern.bench import machine
from sparsekern.bench.products import COLD_BYTES
from sparsekern.bench.race import CORES

BENCH = Path(__file__).parent
RESULTS = BENCH / "results"
PARTIAL = BENCH.parent / "build" / "bench"
PAGE = BENCH.parent / "docs" / "benchmarks.md"
MARKERS = "<!-- bench: begin -->", "<!-- bench: end -->"

PLAIN = {"dtype": "torch.float32", "mask": "random", "is_cold": False}
# Rows of the page's table: (label, fields of extra_info).
SUMMARY = (
    ("forward, M = {M}", {"op": "spmm", "M": (256, 1024), **PLAIN}),
    ("input gradient, M = {M}", {"op": "spmm_t", "M": (256, 1024), **PLAIN}),
    ("values' gradient, M = {M}", {"op": "sddmm", "M": (256, 1024), **PLAIN}),
    ("forward, M = 16", {"op": "spmm", "M": 16, **PLAIN}),
    ("forward, M = 1, weights cold", {"op": "spmm", "M": 1, **PLAIN, "is_cold": True}),
    ("forward, M = 1, weights in cache", {"op": "spmm", "M": 1, **PLAIN}),
    (
        "forward, M = 1, weights cold, bf16",
        {"op": "spmm", "M": 1, **PLAIN, "is_cold": True, "dtype": "torch.bfloat16"},
    ),
    ("training step of a linear, M = {M}", {"op": "linear", "M": 1024, **PLAIN}),
    ("training step of the demo's GPT", {"op": "train_step", "model": "demo"}),
    ("training step of GPT-2 small", {"op": "train_step", "model": "gpt2-small"}),
)

SECTIONS = """\
# {name}

{heading}

Times faster than the best dense call, which is the fastest of torch and OpenBLAS on the same
operands (for bf16 of both types). Medians of interleaved rounds, geometric means over the shapes;
in brackets the best sparse peer of each shape. Below 1 is a loss.

{overview}

## Everyone

Errors are relative to |x| |W|^T in fp64, the worst of all shapes and, with cold weights, of all
copies of W. Cold weights: each competitor goes through {cold_mb:.0f} MB or more of copies of W.

{competitors}

{peers}

## By shape

One thread. GFLOP/s of the best dense call.

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
NOT_RUN = "Not run."


def infos_of(result: dict) -> list[dict]:
    return [benchmark["extra_info"] for benchmark in result["benchmarks"]]


def heading(result: dict) -> str:
    about, commit = result["machine_info"], result["commit_info"]
    changed = " with local changes" if commit["dirty"] else ""
    return (
        f"{about['cpu']}, {about['cores']} cores, {about['isa']}, torch {about['torch']} "
        f"({about['isa_of_torch']}), fp32 unless said, "
        f"{result['datetime'][:10]}, commit {commit['id'][:10]}{changed}."
    )


def overview(name: str, result: dict) -> str:
    """The plot and the table of the whole grid, or which part of it this is."""
    if part := result.get("part"):
        note = f" {part['note']}" if part["note"] else ""
        return f"A part of the grid alone: `{part['command']}`.{note}"
    summary = tables.summary(timed(infos_of(result)), SUMMARY)
    return f"![speed-up against sparsity]({name}.png)\n\n{summary}"


def page(name: str, result: dict) -> str:
    infos = infos_of(result)
    text = SECTIONS.format(
        name=name,
        heading=heading(result),
        cold_mb=COLD_BYTES / 1e6,
        overview=overview(name, result),
        peers=tables.peers(result["machine_info"]),
        **{
            table.__name__: table(infos) or NOT_RUN
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
    if "part" not in result:
        return text
    sections = re.split(r"(?m)^(?=## )", text)
    return "".join(each for each in sections if NOT_RUN not in each).rstrip() + "\n"


def timed(infos: list[dict]) -> list[dict]:
    return [info for info in infos if "rivals" in info]


def update_page(name: str, result: dict) -> None:
    summary = tables.summary(timed(infos_of(result)), SUMMARY)
    text = f"{summary}\n\n{heading(result)} {pages.details(name)}"
    pages.replace_section(PAGE, MARKERS, text)


def write(folder: Path, name: str, text: str) -> None:
    """The JSON and what is made of it."""
    result = json.loads(text)
    folder.mkdir(parents=True, exist_ok=True)
    (folder / f"{name}.json").write_text(text)
    (folder / f"{name}.md").write_text(page(name, result))
    if "part" not in result:
        title = f"{result['machine_info']['cpu']}, one thread, geometric means of the shapes"
        tables.plot(infos_of(result), title).savefig(folder / f"{name}.png", dpi=120)


def main() -> int:
    parser = argparse.ArgumentParser(allow_abbrev=False)
    parser.add_argument("--part")
    parser.add_argument("--note", default="")
    options, selection = parser.parse_known_args()
    is_whole = len(sys.argv) == 1
    cpu = re.sub(r"[^a-z0-9]+", "-", machine.processor().lower()).strip("-")
    part = f"-{options.part}" if options.part else ""
    name = f"{cpu}-{len(CORES)}-cores-{machine.isa()}{part}-{date.today()}"
    with tempfile.TemporaryDirectory() as folder:
        fresh = Path(folder) / "result.json"
        report = ["-q", "--benchmark-quiet", f"--benchmark-json={fresh}"]
        if code := pytest.main([str(BENCH), *report, *selection]):
            return code  # no numbers from a red run
        result = json.loads(fresh.read_text())
    about = result["machine_info"]
    about["cores"] = len(CORES)  # not those that the last test was pinned to
    if options.part:
        # Those of more threads were measured on that test's cores too.
        run = {str(info["threads"]) for info in infos_of(result)}
        about["ceilings"] = {n: each for n, each in about["ceilings"].items() if n in run}
        command = shlex.join(["bench/run.py", "--part", options.part, *selection])
        result["part"] = {"name": options.part, "command": command, "note": options.note}
    folder = RESULTS if is_whole or options.part else PARTIAL
    write(folder, name, json.dumps(result, indent=4))
    if is_whole:
        update_page(name, result)
    print(page(name, result))
    return 0


if __name__ == "__main__":
    sys.exit(main())
