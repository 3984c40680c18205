"""Products of one to 16 tokens, and of what tiles leave over, times the best dense call: in place
and packed, weights in cache and out of memory. One thread, whose CPU time counts.

    taskset -c 1 python bench/few_tokens.py [--quick] [--out FOLDER] [--note TEXT]

Dense is the fastest, case by case, of torch (F.linear, mm, mv), OpenBLAS through NumPy, and oneDNN
with packed weights. OpenBLAS chooses its own kernel: OPENBLAS_CORETYPE and OPENBLAS_L2_SIZE must
not be set. Copies of all weights take turns in "from memory".
"""

import argparse
import itertools
import os
import statistics
import time
from collections.abc import Callable
from datetime import date
from pathlib import Path

import pages
import torch
import torch.nn.functional as F
from torch import Tensor

import sparsekern
from sparsekern import SparseTensor
from sparsekern.bench.machine import about_cpu, about_run, in_words
from sparsekern.bench.products import COLD_BYTES
from sparsekern.bench.turns import in_turns, on_host
from sparsekern.kernels.cpu import lanes
from sparsekern.nn.packed_cpu import PackedLinearOnCpu
from sparsekern.terminal import table

SHAPES = ((768, 768), (3072, 768), (2048, 2048), (8192, 2048))
SPARSITIES = (0.5, 0.75, 0.9, 0.95)
# (tokens, dtype, whether weights come from memory)
CASES = (
    *((M, torch.float32, False) for M in (1, 2, 4, 8, 16, 17, 24, 33, 65, 129)),
    *((M, torch.float32, True) for M in (1, 4, 16)),
    *((1, torch.bfloat16, is_cold) for is_cold in (False, True)),
)
# (tokens, "cache" or "memory", way): what is asked at each sparsity, in float32.
ASKED = {
    (1, "cache", "in place"): (1.0, 1.6, 2.5, 2.9),
    (1, "cache", "packed"): (1.5, 2.5, 4.8, 7.5),
    (1, "memory", "in place"): (1.6, 2.5, 5.4, 7.0),
    (8, "cache", "in place"): (0.9, 1.8, 4.2, 7.5),
    (16, "cache", "in place"): (1.0, 2.0, 4.6, 8.5),
    (33, "cache", "in place"): (0.95, 1.8, 4.2, 7.6),
    (65, "cache", "in place"): (0.95, 1.8, 4.2, 7.6),
}
PACKED_TOKENS = 4  # of more, a packed weight is not timed
MOST_COPIES = 40
BLOCK_S, ROUNDS = 0.001, 9

Call = Callable[[], object]


def dense_calls(w: Tensor, x: Tensor) -> dict[str, Call]:
    m, w_t = x.shape[0], w.t()
    calls = {"F.linear": lambda: F.linear(x, w), "mm": lambda: torch.mm(w, x.t())}
    if m == 1:
        calls["mv"] = lambda: torch.mv(w, x[0])
    if w.dtype == torch.float32:
        a, b = x.numpy(), w.numpy()
        calls["OpenBLAS"] = (lambda: b @ a[0]) if m == 1 else (lambda: a @ b.T)
    if torch.backends.mkldnn.is_available() and w.dtype == torch.float32:
        mkldnn = torch.ops.mkldnn
        packed = mkldnn._reorder_linear_weight(w, m)
        calls["oneDNN packed"] = lambda: mkldnn._linear_pointwise(x, packed, None, "none", [], "")
    expected = x.double() @ w_t.double()
    for name, call in calls.items():
        got = torch.as_tensor(call()).reshape(-1).double()
        want = (expected.t() if name == "mm" else expected).reshape(-1)
        assert (got - want).abs().max() < 0.02 * want.abs().max(), name
    return calls


def sparse_calls(w: Tensor, mask: Tensor, x: Tensor, with_packed: bool) -> dict[str, Call]:
    W = SparseTensor.from_dense(w * mask, mask)
    calls = {"in place": lambda: sparsekern.matmul(x, W.T)}
    if with_packed:
        layer = PackedLinearOnCpu(lanes.pack(W), W.nnz)
        calls["packed"] = lambda: layer(x)
    want = x.double() @ (w * mask).double().t()
    tolerance = (1e-5 if w.dtype == torch.float32 else 0.02) * want.abs().max()
    for name, call in calls.items():
        assert (call().double() - want).abs().max() < tolerance, name
    return calls


def seconds(sets: list[dict[str, Call]], rounds: int) -> dict[str, float]:
    """Of each call, the median over rounds in which all take turns; with several sets, each call
    goes through those of all in turn."""

    def turn(name: str):
        following = itertools.cycle([each[name] for each in sets])
        run = sets[0][name] if len(sets) == 1 else lambda: next(following)()
        took = min(on_host(run, 1, time.thread_time)()() for _ in range(3))
        return on_host(run, max(1, int(BLOCK_S / max(took, 1e-7))), time.thread_time)

    taken = in_turns({name: turn(name) for name in sets[0]}, rounds, warm_up=1)
    return {name: statistics.median(each) for name, each in taken.items()}


def measure(M: int, N: int, K: int, sparsity: float, dtype, is_cold: bool, rounds: int) -> dict:
    """{way: times dense}, with "dense", the name of the fastest dense call, and "GFLOP/s", its."""
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(M, K, generator=generator).to(dtype)
    size = N * K * (1 - sparsity) * (dtype.itemsize + 2)
    copies = min(MOST_COPIES, int(COLD_BYTES // size) + 1) if is_cold else 1
    dense_copies = min(MOST_COPIES, int(COLD_BYTES // (N * K * dtype.itemsize)) + 1)
    w = (torch.randn(N, K, generator=generator) * K**-0.5).to(dtype)
    sets = []
    for _ in range(copies):
        mask = torch.rand(N, K, generator=generator) >= sparsity
        sets.append(sparse_calls(w, mask, x, M <= PACKED_TOKENS))
    dense = seconds(
        [dense_calls(w.clone(), x) for _ in range(dense_copies if is_cold else 1)], rounds
    )
    best = min(dense, key=dense.__getitem__)
    found = {name: dense[best] / s for name, s in seconds(sets, rounds).items()}
    return {**found, "dense": best, "GFLOP/s": 2e-9 * M * N * K / dense[best]}


def in_words_of(mean: float, asked: float) -> str:
    """'1.02 (1.5) **missed**'; without brackets where nothing is asked."""
    return f"{mean:.2f}" + f" ({asked:g})" * (asked > 0) + " **missed**" * (mean < asked)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--quick", action="store_true", help="one shape, few rounds")
    parser.add_argument("--out", type=Path, help="a folder for the page")
    parser.add_argument("--note", default="", help="a sentence for the page")
    options = parser.parse_args()
    if set_ := [name for name in ("OPENBLAS_CORETYPE", "OPENBLAS_L2_SIZE") if name in os.environ]:
        parser.error(f"{set_[0]} is set: OpenBLAS would not choose its own kernel")
    torch.set_num_threads(1)
    shapes, rounds = (SHAPES[:1], 3) if options.quick else (SHAPES, ROUNDS)
    headers = ["tokens", "weights", "way", *(f"{s:.0%}" for s in SPARSITIES), "worst", "dense"]
    rows = []
    for M, dtype, is_cold in CASES:
        results = {
            s: [measure(M, N, K, s, dtype, is_cold, rounds) for N, K in shapes] for s in SPARSITIES
        }
        every = [found for each in results.values() for found in each]
        dense = ", ".join(dict.fromkeys(found["dense"] for found in every))
        rates = [found["GFLOP/s"] for found in every]
        where = ("memory" if is_cold else "cache") + ", bf16" * (dtype == torch.bfloat16)
        for way in ("in place", "packed")[: 2 if M <= PACKED_TOKENS else 1]:
            means = [statistics.geometric_mean(f[way] for f in each) for each in results.values()]
            worst = min(found[way] for found in every)
            speed = f"{dense} ({min(rates):.0f} to {max(rates):.0f})"
            asked = ASKED.get((M, where, way), (0.0,) * len(means))
            cells = map(in_words_of, means, asked)
            rows.append([M, where, way, *cells, f"{worst:.2f}", speed])
            print(*rows[-1], flush=True)
    about = about_run("few tokens", about_cpu())
    sizes = ", ".join(f"{N} x {K}" for N, K in shapes)
    page = "\n\n".join(
        (
            "# Few tokens, times the best dense call",
            f"`python bench/few_tokens.py`. {in_words(about, 'float32')}",
            f"One thread, its CPU time, random masks. Geometric means of {sizes}, in brackets what "
            "is asked; in `worst` the lowest of all cells; beside dense its GFLOP/s. "
            f"{options.note}".rstrip(),
            table(headers, rows),
        )
    )
    print(page)
    if options.out:
        name = pages.slug(about["machine"]["cpu"])
        options.out.mkdir(parents=True, exist_ok=True)
        (options.out / f"{name}-few-tokens-{date.today()}.md").write_text(page + "\n")


if __name__ == "__main__":
    main()
