"""Real models before and after accelerate_, beside what its report expects.

    python bench/accelerated.py [--model minilm|smollm2] [--out FOLDER]

Weights are those of bench/models.py, pruned by magnitude, evenly in each layer: only times are
looked at. Each model is accelerated ROUNDS times anew; one thread.
"""

import argparse
import copy
import time
from datetime import date
from pathlib import Path
from typing import Any

import models
import torch
from torch import nn

from sparsekern import accelerate_
from sparsekern.bench import records
from sparsekern.bench.machine import about_cpu, about_run
from sparsekern.bench.records import DENSE, OURS
from sparsekern.models.prune import prune_
from sparsekern.sparsity import Magnitude
from sparsekern.terminal import table

SPARSITIES = (0.5, 0.75, 0.9)
SHAPES = {"minilm": ((1, 128), (32, 128)), "smollm2": ((1, 256), (1, 1))}  # texts x tokens
ROUNDS = 3


def cases(name: str) -> list[dict]:
    dense, _ = {"minilm": models.minilm, "smollm2": models.smollm2}[name]()
    found = []
    for sparsity in SPARSITIES:
        pruned: nn.Module = copy.deepcopy(dense)
        prune_(pruned, Magnitude(sparsity))
        for texts, tokens in SHAPES[name]:
            example: dict[str, Any] = {"input_ids": torch.randint(1000, 20000, (texts, tokens))}
            for i in range(ROUNDS):
                model = copy.deepcopy(pruned)
                began = time.perf_counter()
                report = accelerate_(model, example)
                took = time.perf_counter() - began
                case = {"op": "model", "model": models.NAMES[name], "device": "cpu"}
                case |= {"dtype": "float32", "threads": 1, "case": f"{texts} x {tokens}, {i + 1}"}
                case |= {"M": texts * tokens, "sparsity": sparsity}
                ways = (
                    ("dense", DENSE, report.before_s),
                    ("accelerate_", OURS, report.after_s),
                    ("expected", OURS, report.expected_after_s),
                    ("the call of accelerate_", OURS, took),
                )
                found += [
                    case | {"contender": way, "kind": kind, "median_s": seconds}
                    for way, kind, seconds in ways
                ]
                found[-3]["error"] = report.output_error or 0.0  # None: nothing was exchanged
                print(case["case"], sparsity, [round(s, 4) for *_, s in ways], flush=True)
    return found


def page(name: str, run: records.Run) -> str:
    header = ["texts x tokens, round", "zeros", "dense ms", "after ms", "times dense"]
    header += ["expected ms", "expected / after", "the call, s"]
    rows = []
    for (case, sparsity), group in records.groups(
        run.records, lambda r: r["case"], lambda r: r["sparsity"]
    ).items():
        dense, after, expected, call = (r["median_s"] for r in group)
        times = [f"{1e3 * dense:.1f}", f"{1e3 * after:.1f}", f"{dense / after:.2f}"]
        times += [f"{1e3 * expected:.1f}", f"{expected / after:.2f}", f"{call:.1f}"]
        rows.append([case, f"{sparsity:.0%}", *times])
    error = max(r["error"] for r in run.records if "error" in r)
    about = f"commit {run.about['commit']['id'][:7]}, {run.about['machine']['cpu']}"
    return (
        f"# {models.NAMES[name]} before and after accelerate_\n\n"
        f"`python bench/accelerated.py --model {name}`, {about}, float32, one thread. Pruned by "
        f"magnitude, evenly; {ROUNDS} rounds, each of a fresh copy. `expected`: what the report "
        f"makes of its layers. The outputs of both, relative to their norm, differ by {error:.0e} "
        f"at most.\n\n{table(header, rows)}\n"
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--model", choices=SHAPES, default="minilm")
    parser.add_argument("--out", type=Path, default=Path(__file__).parent / "results")
    given = parser.parse_args()
    torch.set_num_threads(1)
    torch.manual_seed(0)
    found = cases(given.model)
    path = given.out / f"{given.model}-accelerated-{date.today().isoformat()}.csv"
    given.out.mkdir(parents=True, exist_ok=True)
    records.write(path, about_run("accelerate", about_cpu()), found)
    text = page(given.model, records.read(path))
    path.with_suffix(".md").write_text(text)
    print(text)


if __name__ == "__main__":
    main()
