"""Two checkouts of this package in turn on one core: what a change of the CPU kernels costs.

    python bench/before_after.py OLD NEW [--rounds 15] > bench/results/NAME.md

Each checkout has its libraries built and runs in a process of its own; they take turns, product by
product, on the same random data. CPU time of one thread: what others run beside counts less.
"""

import argparse
import os
import statistics
import subprocess
import sys
from functools import partial
from pathlib import Path

from sparsekern.bench.turns import Seconds, in_turns

SHAPES = ((2048, 2048), (3072, 768))
DENSITIES = (0.05, 0.1, 0.25, 0.5)
NEARLY_EMPTY = ((16, 1_000_000, 5e-6), (64, 200_000, 2.5e-5), (64, 30_000, 1 / 3000))  # M, N = K
WORKER = """
import os, sys, time, torch
os.sched_setaffinity(0, {int(sys.argv[1])})
torch.set_num_threads(1)
from sparsekern.bench.machine import about_cpu, commit
from sparsekern.kernels import table
from sparsekern.testing import random_csr
print(about_cpu()["cpu"], about_cpu()["isa"], commit()["id"][:7], flush=True)
rows = {(row.name, row.op): row for row in table.KERNELS if row.device in ("cpu", None)}
if old := rows.get(("stream", "spmm")):  # its name in older checkouts
    rows["few_tokens", "spmm"] = old
kept = {}
for line in sys.stdin:
    if line not in kept:
        name, op, m, n, k, density, dtype = line.split()
        m, n, k, dtype = int(m), int(n), int(k), getattr(torch, dtype)
        generator = torch.Generator().manual_seed(1)
        if n * k <= 2**26:
            ro, ci, v = random_csr(n, k, 1 - float(density), dtype)
        else:
            count = round(n * k * float(density))
            places = torch.randint(n * k, (count,), generator=generator).unique()
            ro = torch.searchsorted(places, torch.arange(n + 1) * k).int()
            ci, v = (places % k).int(), torch.randn(len(places), generator=generator).to(dtype)
        x, dy = (torch.randn(m, c, generator=generator).to(dtype) for c in (k, n))
        operands = {"spmm": (v, n, k, x), "spmm_t": (v, n, k, dy), "sddmm": (n, k, dy, x)}[op]
        w = torch.sparse_csr_tensor(ro, ci, v.double(), (n, k), check_invariants=False)
        exact = {"spmm": lambda: (w @ x.double().T).T, "spmm_t": lambda: dy.double() @ w}.get(op)
        kept = {line: lambda run=rows[name, op].run: run(ro, ci, *operands)}
        began = time.thread_time()
        y = kept[line]()
        print(time.thread_time() - began, flush=True)
        if exact:
            want = exact()
            assert (y - want).abs().max() <= 0.01 * want.abs().max(), line
        kept[line]()
    began = time.thread_time()
    kept[line]()
    print(time.thread_time() - began, flush=True)
"""


class Checkout:
    """A process that runs the products of one checkout."""

    def __init__(self, path: Path, core: int):
        env = {**os.environ, "PYTHONPATH": str(path), "OMP_NUM_THREADS": "1"}
        command = [sys.executable, "-c", WORKER, str(core)]
        pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE}
        self._process = subprocess.Popen(command, env=env, cwd=path, text=True, **pipes)
        self.about = self._process.stdout.readline().strip()
        self.first: dict[str, float] = {}  # seconds of the first call, which plans

    def turn(self, case: str) -> Seconds:
        print(case, file=self._process.stdin, flush=True)
        if case not in self.first:
            self.first[case] = float(self._process.stdout.readline())
        took = float(self._process.stdout.readline())
        return lambda: took


def cases() -> list[str]:
    many = [
        f"panel {op} 1024 {n} {k} {density} float32"
        for op in ("spmm", "spmm_t", "sddmm")
        for n, k in SHAPES
        for density in DENSITIES
    ]
    few = [
        f"few_tokens spmm {m} 2048 2048 {density} {dtype}"
        for dtype in ("float32", "bfloat16")
        for m in (1, 4, 16)
        for density in DENSITIES
    ]
    empty = [
        f"panel {op} {m} {n} {n} {density:.3g} float32"
        for op in ("spmm", "spmm_t")
        for m, n, density in NEARLY_EMPTY
    ]
    return many + few + empty


def main() -> None:
    parser = argparse.ArgumentParser(description="Old and new kernels in turn on one core")
    parser.add_argument("old", type=Path)
    parser.add_argument("new", type=Path)
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--core", type=int, default=max(os.sched_getaffinity(0)))
    arguments = parser.parse_args()
    old, new = (Checkout(path, arguments.core) for path in (arguments.old, arguments.new))
    print(f"# Old and new kernels in turn\n\nold: {old.about}, new: {new.about}\n")
    print(f"CPU milliseconds of one thread, medians (least) of {arguments.rounds} rounds.")
    print("First: of the first call, which plans.\n")
    print("| kernel op M N K density dtype | old | new | new / old | old first | new first |")
    print("|---|---:|---:|---:|---:|---:|")
    for case in cases():
        turns = {"old": partial(old.turn, case), "new": partial(new.turn, case)}
        times = in_turns(turns, arguments.rounds, warm_up=1).values()
        (a, least_a), (b, least_b) = (
            (1e3 * statistics.median(seconds), 1e3 * min(seconds)) for seconds in times
        )
        cells = f"{a:.3f} ({least_a:.3f}) | {b:.3f} ({least_b:.3f})"
        firsts = f"{1e3 * old.first[case]:.3g} | {1e3 * new.first[case]:.3g}"
        ratio = f"{b / a:.2f} ({least_b / least_a:.2f})"
        print(f"| {case} | {cells} | {ratio} | {firsts} |", flush=True)


if __name__ == "__main__":
    main()
