"""Cost of Python, dispatch and autograd in a call, beside the kernel: one token through a layer
so small that nothing else counts, ours and torch's in turn, in one thread.

    python bench/calls.py [--device cuda] [--out FOLDER]

On a GPU it is the time of the host, which launches and does not wait; and, as a second table, what
the look for infinities adds to a product of a W that is written out (replayed CUDA graphs).
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
from sparsekern.kernels.cuda import expand
from sparsekern.kernels.problem import Problem
from sparsekern.kernels.table import pick
from sparsekern.testing import random_csr

SIZES = {"cpu": 8, "cuda": 64}
BLOCKS, CALLS = 400, 100  # the fastest block counts: others share these cores
GRAPH_CALLS, REPLAYS = 20, 15


def least_us(calls: dict[str, Callable[[], object]]) -> dict[str, float]:
    """Microseconds of each call: the fastest of blocks that take turns."""
    best = dict.fromkeys(calls, float("inf"))
    for _ in range(BLOCKS):
        for name, call in calls.items():
            began = time.perf_counter()
            for _ in range(CALLS):
                call()
            best[name] = min(best[name], 1e6 * (time.perf_counter() - began) / CALLS)
            if torch.cuda.is_available():
                torch.cuda.synchronize()
    return best


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
            yield {"case": name, "us": least_us(calls), "error": error}


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
    mend = expand._mend
    for n, k in ((768, 768), (2048, 2048), (8192, 2048)):
        W = SparseTensor(*random_csr(n, k, 0.75, torch.bfloat16), (n, k)).to("cuda")
        for m in (256, 2048, 8192):
            x = torch.randn(m, k, device="cuda", dtype=torch.bfloat16)
            operands = W.row_offsets, W.col_indices, W.values, n, k, x, None

            def product(operands=operands) -> Tensor:
                return expand.spmm(*operands)

            with_mend = graph_us(product)
            try:
                expand._mend = lambda *arguments: arguments[-1]
                without = graph_us(product)
            finally:
                expand._mend = mend
            case = f"{n} x {k}, {m} tokens"
            yield {"case": case, "us": {"without": without, "with": with_mend}}


def table(title: str, rows: list[dict]) -> str:
    names = list(dict.fromkeys(name for row in rows for name in row["us"]))
    lines = [f"## {title}", "", f"| microseconds | {' | '.join(names)} |"]
    lines.append("|---|" + "---:|" * len(names))
    for row in rows:
        cells = (f"{row['us'][name]:.2f}" if name in row["us"] else "" for name in names)
        lines.append(f"| {row['case']} | {' | '.join(cells)} |")
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
        f"{arguments.device}`, commit {machine['commit']['id'][:7]}, fastest of {BLOCKS} blocks of "
        f"{CALLS} calls that take turns, one thread; results checked against float64.\n\n{page}\n"
    )
    print(page)


if __name__ == "__main__":
    main()
