"""Runs the benchmarks. Writes results/<machine>-<isa>-<date>.json, its table, and README's table.

python bench/run.py [pytest's arguments]
"""

import json
import re
import sys
import tempfile
from datetime import date
from pathlib import Path
from statistics import geometric_mean

import measure
import pytest

BENCH = Path(__file__).parent
RESULTS = BENCH / "results"
README = BENCH.parent / "README.md"
MARKERS = "<!-- bench: begin -->", "<!-- bench: end -->"

PASSES = {
    "spmm": "forward",
    "spmm_t": "input gradient",
    "sddmm": "values' gradient",
    "train_step": "GPT training step",
}
# Rows of README's table: (label, ops, tokens or None for any).
SUMMARY = (
    ("forward, M = 256 and 1024", ("spmm",), (256, 1024)),
    ("both gradients, M = 256 and 1024", ("spmm_t", "sddmm"), (256, 1024)),
    ("forward, M = 16", ("spmm",), (16,)),
    ("GPT training step", ("train_step",), None),
)


def details(infos: list[dict]) -> list[tuple]:
    """One row for each pass and M."""
    order = list(PASSES)
    pairs = {(order.index(info["op"]), info["M"]) for info in infos}
    return [(f"{PASSES[order[op]]}, M = {M}", (order[op],), (M,)) for op, M in sorted(pairs)]


def table(infos: list[dict], rows) -> str:
    """Markdown: geometric means of the speed-up over dense; in brackets those of the best peer."""
    sparsities = sorted({info["sparsity"] for info in infos})
    lines = [
        " | ".join(["| times dense", "threads", *(f"{s:.0%}" for s in sparsities)]) + " |",
        "|---" * (2 + len(sparsities)) + "|",
    ]
    for label, ops, tokens in rows:
        for threads in sorted({info["threads"] for info in infos}):
            chosen = [
                info
                for info in infos
                if info["op"] in ops
                and info["threads"] == threads
                and (tokens is None or info["M"] in tokens)
            ]
            if chosen:
                cells = [cell([i for i in chosen if i["sparsity"] == s]) for s in sparsities]
                lines.append(" | ".join([f"| {label}", str(threads), *cells]) + " |")
    return "\n".join(lines)


def cell(infos: list[dict]) -> str:
    """'2.31 (0.63)': ours, and the best peer of each shape where there is one."""
    if not infos:
        return ""
    peers = [max(info["peer_speedups"].values()) for info in infos if info["peer_speedups"]]
    ours = f"{geometric_mean(info['speedup'] for info in infos):.2f}"
    return f"{ours} ({geometric_mean(peers):.2f})" if peers else ours


def heading(result: dict) -> str:
    machine, commit = result["machine_info"], result["commit_info"]
    changed = " with local changes" if commit["dirty"] else ""
    return (
        f"{machine['cpu']}, {machine['cores']} cores, {machine['isa']}, torch {machine['torch']} "
        f"({machine['isa_of_torch']}), fp32, "
        f"{result['datetime'][:10]}, commit {commit['id'][:10]}{changed}."
    )


def update_readme(name: str, result: dict, infos: list[dict]) -> None:
    begin, end = MARKERS
    text = f"{heading(result)} Details: [bench/results/{name}.md](bench/results/{name}.md)."
    section = f"{begin}\n{table(infos, SUMMARY)}\n\n{text}\n{end}"
    before, rest = README.read_text().split(begin)
    README.write_text(before + section + rest.split(end)[1])


def main() -> int:
    machine = re.sub(r"[^a-z0-9]+", "-", measure.cpu_name().lower()).strip("-")
    name = f"{machine}-{len(measure.CORES)}-cores-{measure.isa()}-{date.today()}"
    with tempfile.TemporaryDirectory() as folder:
        fresh = Path(folder) / "result.json"
        options = ["-q", "--benchmark-quiet", f"--benchmark-json={fresh}"]
        if code := pytest.main([str(BENCH), *options, *sys.argv[1:]]):
            return code  # no numbers from a red run
        text = fresh.read_text()
    RESULTS.mkdir(exist_ok=True)
    (RESULTS / f"{name}.json").write_text(text)
    result = json.loads(text)
    infos = [benchmark["extra_info"] for benchmark in result["benchmarks"]]
    rows = details(infos)
    page = f"# {name}\n\n{heading(result)}\n\n{table(infos, rows)}\n"
    (RESULTS / f"{name}.md").write_text(page)
    if len(sys.argv) == 1:
        update_readme(name, result, infos)
    print(page)
    return 0


if __name__ == "__main__":
    sys.exit(main())
