"""Cost of Python, dispatch and autograd in a call, beside the kernel: one token through a layer
so small that nothing else counts, ours and torch's in turn, in one thread.

    python bench/calls.py [--device cuda] [--out FOLDER]

On a CPU it is the CPU time of the thread, so that what others run counts less. On a GPU it is the
time of the host, which launches and does not wait; and, as a second table, what the look for
infinities adds to a product of a W that is written out (replayed CUDA graphs).
"""

import argparse
import contextlib
import json
import statistics
import time
from collections.abc import Callable, Iterable
from datetime import date
from pathlib import Path

import torch
from torch import Tensor, nn

from sparsekern import SparseLinear, SparseTensor
from sparsekern.bench.machine import about_cpu, about_gpu, commit
from sparsekern.kernels.cuda import rows as cuda_rows
from sparsekern.kernels.problem import Problem
from sparsekern.kernels.table import pick
from sparsekern.testing import random_csr

SIZES = {"cpu": 8, "cuda": 64}
BLOCKS, CALLS = 400, 100
GRAPH_CALLS, REPLAYS = 20, 15


def block_us(calls: dict[str, Callable[[], object]], device: str) -> dict[str, dict[str, float]]:
    """Microseconds of each call, in the fastest and in the median of blocks that take turns."""
    clock = time.thread_time if device == "cpu" else time.perf_counter
    blocks = {name: [] for name in calls}
    for _ in range(BLOCKS):
        for name, call in calls.items():
            began = clock()
            for _ in range(CALLS):
                call()
            blocks[name].append(1e6 * (clock() - began) / CALLS)
            if device == "cuda":
                torch.cuda.synchronize()
    return {
        "us": {name: min(times) for name, times in blocks.items()},
        "median_us": {name: statistics.median(times) for name, times in blocks.items()},
    }


def layers(device: str, dtype: torch.dtype) -> tuple[nn.Linear, SparseLinear, SparseTensor]:
    size = SIZES[device]
    W = SparseTensor(*random_csr(size, size, 0.5, dtype), (size, size)).to(device)
    dense = nn.Linear(size, size, device=device, dtype=dtype)
    with torch.no_grad():
        dense.weight.copy_(W.to_dense())
    bias = dense.bias.detach().clone()
    return dense, SparseLinear(size, size, W.row_offsets, W.col_indices, W.values, bias), W


def check(dense: nn.Linear, sparse: SparseLinear, x: Tensor) -> float:
    """The largest error against float64, of the largest output."""
    exact = nn.functional.linear(x.double(), dense.weight.double(), dense.bias.double())
    error = ((sparse(x).double() - exact).abs().max() / exact.abs().max()).item()
    assert error < 0.01, error
    return error


def host_times(device: str) -> Iterable[dict]:
    dtype = torch.float32 if device == "cpu" else torch.bfloat16
    dense, sparse, W = layers(device, dtype)
    w, size = dense.weight.detach(), SIZES[device]
    x = torch.randn(1, size, device=device, dtype=dtype)
    xg, ones = x.clone().requires_grad_(), torch.ones(1, size, device=device, dtype=dtype)
    error = check(dense, sparse, x)
    run = pick(Problem("spmm", device, dtype, 1, size, size, W.nnz)).run
    operands = W.row_offsets, W.col_indices, W.values, size, size, x

    def training(layer: nn.Module) -> Callable[[], None]:
        return lambda: layer(xg).backward(ones)

    matmuls = {
        "torch": lambda: torch.matmul(x, w.T),
        "ours": lambda: torch.matmul(x, W.T),
        "kernel": lambda: run(*operands),
    }
    modules = {"torch": lambda: dense(x), "ours": lambda: sparse(x)}
    cases = (
        ("matmul, no grad", torch.no_grad(), matmuls),
        ("module, no grad", torch.no_grad(), modules),
        ("module, inference_mode", torch.inference_mode(), modules),
        ("module, records a graph", contextlib.nullcontext(), modules),
        ("module, autocast", torch.autocast(device, torch.bfloat16), modules),
        (
            "forward and backward",
            contextlib.nullcontext(),
            {"torch": training(dense), "ours": training(sparse)},
        ),
    )
    for name, context, calls in cases:
        with context:
            yield {"case": name, **block_us(calls, device), "error": error}


def graph_us(call: Callable[[], object]) -> float:
    call()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        for _ in range(GRAPH_CALLS):
            call()
    times = []
    for _ in range(REPLAYS):
        begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        begin.record()
        graph.replay()
        end.record()
        torch.cuda.synchronize()
        times.append(1e3 * begin.elapsed_time(end) / GRAPH_CALLS)
    return statistics.median(times)


def mend_times() -> Iterable[dict]:
    mend = cuda_rows._mend
    for n, k in ((768, 768), (2048, 2048), (8192, 2048)):
        W = SparseTensor(*random_csr(n, k, 0.75, torch.bfloat16), (n, k)).to("cuda")
        for m in (256, 2048, 8192):
            x = torch.randn(m, k, device="cuda", dtype=torch.bfloat16)
            operands = W.row_offsets, W.col_indices, W.values, n, k, x, None

            def product(operands=operands) -> Tensor:
                return cuda_rows._spmm_expand(*operands)

            with_mend = graph_us(product)
            try:
                cuda_rows._mend = lambda *arguments: arguments[-1]
                without = graph_us(product)
            finally:
                cuda_rows._mend = mend
            case = f"{n} x {k}, {m} tokens"
            yield {"case": case, "us": {"without": without, "with": with_mend}}


def cell(row: dict, name: str) -> str:
    if name not in row["us"]:
        return ""
    median = f" ({row['median_us'][name]:.2f})" if "median_us" in row else ""
    return f"{row['us'][name]:.2f}{median}"


def table(title: str, rows: list[dict]) -> str:
    names = list(dict.fromkeys(name for row in rows for name in row["us"]))
    lines = [f"## {title}", "", f"| microseconds | {' | '.join(names)} |"]
    lines.append("|---|" + "---:|" * len(names))
    for row in rows:
        lines.append(f"| {row['case']} | {' | '.join(cell(row, name) for name in names)} |")
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description="What a call costs beside its kernel")
    parser.add_argument("--device", choices=SIZES, default="cpu")
    parser.add_argument("--out", type=Path, default=Path(__file__).parent / "results")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    torch.manual_seed(0)
    tables = {"Host time of a call": list(host_times(arguments.device))}
    machine = {"machine": about_cpu(), "commit": commit()}
    name = machine["machine"]["cpu"].lower().replace(" ", "-").strip("-")
    if arguments.device == "cuda":
        machine["gpu"] = about_gpu()
        name = machine["gpu"]["gpu"].lower().replace(" ", "-")
        tables["What the look for infinities adds to a product (row expand)"] = list(mend_times())
    page = "\n\n".join(table(title, rows) for title, rows in tables.items())
    path = arguments.out / f"{name}-calls-{date.today()}"
    path.with_suffix(".json").write_text(json.dumps({**machine, "tables": tables}, indent=1))
    path.with_suffix(".md").write_text(
        f"# What a call costs beside its kernel\n\n`python bench/calls.py --device "
        f"{arguments.device}`, commit {machine['commit']['id'][:7]}, fastest (median) of {BLOCKS} "
        f"blocks of {CALLS} calls that take turns, one thread; results checked against float64."
        f"\n\n{page}\n"
    )
    print(page)


if __name__ == "__main__":
    main()
