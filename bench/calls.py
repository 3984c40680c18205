"""Cost of Python, dispatch and autograd in a call, beside the kernel: one token through a layer
so small that nothing else counts, ours and torch's in turn, in one thread.

    python bench/calls.py [--device cuda] [--out FOLDER] [--commit ID]

On a CPU it is the CPU time of the thread, so that what others run counts less. On a GPU it is the
time of the host, which launches and does not wait; and, as a second table, what the look for
infinities adds to a product of a W that is written out (replayed CUDA graphs).
"""

import argparse
import contextlib
import itertools
import statistics
import time
from collections.abc import Callable, Iterable
from datetime import date
from pathlib import Path

import pages
import torch
from torch import Tensor, nn

from sparsekern import SparseLinear, SparseTensor
from sparsekern.bench import records
from sparsekern.bench.machine import about_cpu, about_gpu, about_run
from sparsekern.bench.records import DENSE, OTHER, OURS
from sparsekern.bench.turns import Turn, in_turns, on_gpu, on_host
from sparsekern.kernels.cuda import expand
from sparsekern.kernels.problem import Problem
from sparsekern.kernels.table import pick
from sparsekern.nn import PackedLinear
from sparsekern.terminal import table
from sparsekern.testing import random_csr

SIZES = {"cpu": 8, "cuda": 64}
BLOCKS = {"cpu": 400, "cuda": 50}
CALLS = {"cpu": 100, "cuda": 50}  # on a GPU no more than its queue takes
MANY_TOKENS = 128
TWO_WAY_SIZE, TWO_WAY_TOKENS = 3072, 1024  # from which on dispatch takes `two_of_four`
GRAPH_CALLS, REPLAYS, AHEAD_S = 20, 15, 50e-6
KINDS = {"torch": DENSE, "ours": OURS, "kernel": OTHER}
TITLES = {
    "call": "Host time of a call",
    "mend": "What the look for infinities adds to a product (row expand)",
}


def block_s(calls: dict[str, Callable[[], object]], device: str) -> dict[str, dict[str, float]]:
    """Seconds of each call, in the fastest and in the median of blocks that take turns."""

    def rest(name: str) -> None:
        if device == "cuda":
            torch.cuda.synchronize()

    clock = time.thread_time if device == "cpu" else time.perf_counter
    turns = {name: on_host(call, CALLS[device], clock) for name, call in calls.items()}
    blocks = in_turns(turns, BLOCKS[device], before=rest)
    return {
        name: {"median_s": statistics.median(each), "min_s": min(each)}
        for name, each in blocks.items()
    }


def random_weight(device: str, dtype: torch.dtype) -> SparseTensor:
    size = SIZES[device]
    return SparseTensor(*random_csr(size, size, 0.5, dtype), (size, size)).to(device)


def two_way_weight() -> SparseTensor:
    """One of four, in rows and in columns."""
    at = torch.arange(TWO_WAY_SIZE, device="cuda")
    mask = (at + at.unsqueeze(1)) % 4 == 0
    return SparseTensor.from_dense(torch.randn(mask.shape, device="cuda").bfloat16(), mask)


def layers(W: SparseTensor) -> tuple[nn.Linear, SparseLinear]:
    size, device, dtype = W.n, W.device, W.dtype
    dense = nn.Linear(size, size, device=device, dtype=dtype)
    with torch.no_grad():
        dense.weight.copy_(W.to_dense())
    bias = dense.bias.detach().clone()
    return dense, SparseLinear(size, size, W.row_offsets, W.col_indices, W.values, bias)


def check(dense: nn.Linear, sparse: SparseLinear, x: Tensor) -> float:
    """The largest error against float64, of the largest output."""
    exact = nn.functional.linear(x.double(), dense.weight.double(), dense.bias.double())
    error = ((sparse(x).double() - exact).abs().max() / exact.abs().max()).item()
    assert error < 0.01, error
    return error


def training(layer: nn.Module, x: Tensor) -> Callable[[], None]:
    x = x.clone().requires_grad_()
    ones = torch.ones(len(x), layer.out_features, device=x.device, dtype=x.dtype)
    return lambda: layer(x).backward(ones)


def host_times(device: str) -> Iterable[dict]:
    dtype = torch.float32 if device == "cpu" else torch.bfloat16
    W = random_weight(device, dtype)
    dense, sparse = layers(W)
    w, size = dense.weight.detach(), SIZES[device]
    x, many = (torch.randn(m, size, device=device, dtype=dtype) for m in (1, MANY_TOKENS))
    error = max(check(dense, sparse, x), check(dense, sparse, many))
    run = pick(Problem("spmm", device, dtype, 1, size, size, W.nnz)).run
    operands = W.row_offsets, W.col_indices, W.values, size, size, x
    packed = PackedLinear.from_sparse(sparse)

    def both(call: Callable, pair: tuple = (dense, sparse)) -> dict[str, Callable]:
        return dict(zip(("torch", "ours"), map(call, pair), strict=True))

    matmuls = {
        "torch": lambda: torch.matmul(x, w.T),
        "ours": lambda: torch.matmul(x, W.T),
        "kernel": lambda: run(*operands),
    }
    modules = both(lambda layer: lambda: layer(x))
    cases: list[tuple] = [
        ("matmul, no grad", torch.no_grad(), matmuls, 1),
        ("module, no grad", torch.no_grad(), modules, 1),
        ("module, inference_mode", torch.inference_mode(), modules, 1),
        ("module, packed", torch.no_grad(), {**modules, "ours": lambda: packed(x)}, 1),
        ("module, records a graph", contextlib.nullcontext(), modules, 1),
        ("module, autocast", torch.autocast(device, torch.bfloat16), modules, 1),
        (
            "forward and backward",
            contextlib.nullcontext(),
            both(lambda layer: training(layer, x)),
            1,
        ),
    ]
    if device == "cuda":
        # W is written out; on sparse tensor cores.
        pair = layers(two_way_weight())
        more = torch.randn(TWO_WAY_TOKENS, TWO_WAY_SIZE, device=device, dtype=dtype)
        error = max(error, check(*pair, more))
        for t, of, name in ((many, (dense, sparse), ""), (more, pair, "two-way, ")):
            m, name = len(t), f"{name}{len(t)} tokens"
            calls = both(lambda layer, t=t: lambda: layer(t), of)
            cases.append((f"module, {name}, no grad", torch.no_grad(), calls, m))
            calls = both(lambda layer, t=t: training(layer, t), of)
            cases.append((f"forward and backward, {name}", contextlib.nullcontext(), calls, m))
    for name, context, calls, m in cases:
        with context:
            ways = {
                who: {"kind": KINDS[who], **seconds}
                for who, seconds in block_s(calls, device).items()
            }
            ways["ours"] |= {"error": error, "is_right": True}
            n = TWO_WAY_SIZE if m == TWO_WAY_TOKENS else size
            sizes = {"M": m, "N": n, "K": n, "device": device, "threads": 1}
            yield {"op": "call", "case": name, **sizes, "ways": ways}


def graph_of(call: Callable[[], object]) -> Turn:
    call()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        for _ in range(GRAPH_CALLS):
            call()
    return on_gpu(graph.replay, AHEAD_S)


def mend_times() -> Iterable[dict]:
    mend = expand.mend
    for n, k in ((768, 768), (2048, 2048), (8192, 2048)):
        W = SparseTensor(*random_csr(n, k, 0.75, torch.bfloat16), (n, k)).to("cuda")
        for m in (256, 2048, 8192):
            x = torch.randn(m, k, device="cuda", dtype=torch.bfloat16)
            operands = W.row_offsets, W.col_indices, W.values, n, k, x, None

            def product(operands=operands) -> Tensor:
                return expand.spmm(*operands)

            turns = {"with": graph_of(product)}
            try:
                expand.mend = lambda *arguments: arguments[-1]
                turns = {"without": graph_of(product)} | turns
            finally:
                expand.mend = mend
            ways = {
                name: {"kind": kind, "median_s": statistics.median(seconds) / GRAPH_CALLS}
                for (name, seconds), kind in zip(
                    in_turns(turns, REPLAYS).items(), (OTHER, OURS), strict=True
                )
            }
            sizes = {"M": m, "N": n, "K": k, "sparsity": 0.75, "nnz": W.nnz, "threads": 0}
            yield {"op": "mend", "device": "cuda", "dtype": "bfloat16", **sizes, "ways": ways}


def page(cases: list[dict]) -> str:
    parts = []
    for op, title in TITLES.items():
        if chosen := records.select(cases, op=op):
            names = list(dict.fromkeys(name for case in chosen for name in case["ways"]))
            rows = [
                [label(case), *(cell(case["ways"].get(n, {})) for n in names)] for case in chosen
            ]
            parts.append(f"## {title}\n\n{table(['microseconds', *names], rows)}")
    return "\n\n".join(parts)


def label(case: dict) -> str:
    return case.get("case") or f"{case['N']} x {case['K']}, {case['M']} tokens"


def cell(way: dict) -> str:
    """The fastest and the median, or what there is of both."""
    least, median = (f"{1e6 * way[at]:.2f}" if at in way else "" for at in ("min_s", "median_s"))
    return f"{least} ({median})" if least and median else least or median


def main() -> None:
    parser = argparse.ArgumentParser(description="What a call costs beside its kernel")
    parser.add_argument("--device", choices=SIZES, default="cpu")
    parser.add_argument("--out", type=Path, default=pages.RESULTS)
    parser.add_argument("--commit", help="where there is no repository")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    torch.manual_seed(0)
    cases, machine, verbs = [], about_cpu(), [host_times(arguments.device)]
    if arguments.device == "cuda":
        machine |= about_gpu()
        verbs.append(mend_times())
    for case in itertools.chain(*verbs):
        cases.append(case)
        found = (f"{name} {cell(way)}" for name, way in case["ways"].items())
        print(f"{label(case)}: {', '.join(found)}", flush=True)
    about = about_run("calls", machine, arguments.commit)
    name = pages.slug(machine.get("gpu", machine["cpu"]))
    path = arguments.out / f"{name}-calls-{date.today()}"
    records.write(path.with_suffix(records.SUFFIX), about, records.flat(cases))
    path.with_suffix(".md").write_text(
        f"# What a call costs beside its kernel\n\n`python bench/calls.py --device "
        f"{arguments.device}`, commit {about['commit']['id'][:7]}, fastest (median) of "
        f"{BLOCKS[arguments.device]} blocks of {CALLS[arguments.device]} calls in turns, one "
        f"thread; results checked against float64.\n\n{page(cases)}\n"
    )
    print(page(cases))


if __name__ == "__main__":
    main()
