"""The measurement behind `python -m sparsekern bench`: a grid of products, its JSON, its table.

The JSON has the fields of pytest-benchmark's that bench/run.py writes, so both are read alike.
"""

from collections.abc import Callable, Iterator
from dataclasses import replace
from datetime import UTC, datetime
from statistics import median

import torch

from .. import __version__
from ..terminal import table
from . import ceilings, machine, noise, products, work_gpu
from .products import Workload
from .race import Rival, derive, pin
from .rates import add_rates

SHAPES = ((768, 768), (3072, 768), (4096, 4096))  # N x K
SPARSITIES = (0.5, 0.75, 0.9, 0.95)
TOKENS, GRADIENT_TOKENS = (16, 256, 1024), 1024
QUICK_SHAPES, QUICK_SPARSITIES = ((768, 768),), (0.5, 0.9)
QUICK_TOKENS, QUICK_ROUNDS = (16, 256), 3

Work = Callable[[], dict]  # a measurement to be made -> a benchmark of the JSON


def cpu_work(quick: bool, threads: int) -> list[Work]:
    """Forward for one cold token and for some, the gradients, and a training step of a linear."""
    shapes, sparsities, tokens, gradient_tokens = (
        (QUICK_SHAPES, QUICK_SPARSITIES, QUICK_TOKENS, QUICK_TOKENS[-1])
        if quick
        else (SHAPES, SPARSITIES, TOKENS, GRADIENT_TOKENS)
    )
    found = []
    for N, K in shapes:
        for sparsity in sparsities:
            w = Workload(gradient_tokens, N, K, sparsity, threads)
            grid = [("spmm", replace(w, M=1, is_cold=True))]
            grid += [("spmm", replace(w, M=M)) for M in tokens]
            grid += [(op, w) for op in ("spmm_t", "sddmm", "linear")]
            found += [lambda op=op, w=w: _on_cpu(op, w, quick) for op, w in grid]
    return found


def _on_cpu(op: str, workload: Workload, quick: bool) -> dict:
    with torch.no_grad():
        product = products.PRODUCTS[op](workload)
        peers = []
        if op == "spmm" and workload.M > 1:
            peers = [products.torch_csr(product.W, product.x)]
        return noise.quietest(lambda: _raced(product, peers, quick), noise.of_benchmark)


def _raced(product: products.Product, peers: list[Rival], quick: bool) -> dict:
    race = product.race(peers, **({"most_rounds": QUICK_ROUNDS} if quick else {}))
    seconds = race.run()
    benchmark = {
        "group": product.group,
        "name": product.group,
        "stats": stats(seconds),
        "extra_info": product.info() | race.records(),
    }
    derive(benchmark)
    return benchmark


def stats(seconds: list[float]) -> dict[str, float]:
    return {
        "min": min(seconds),
        "median": median(seconds),
        "max": max(seconds),
        "rounds": len(seconds),
        "spread": noise.spread(seconds),
    }


def measure(device: str, quick: bool) -> Iterator[dict]:
    """First the result without benchmarks, with their number, then each of them."""
    about = machine.about_cpu() | {"device": device}
    if device == "cpu":
        threads = torch.get_num_threads()
        pin(threads)
        about["ceilings"] = {str(threads): ceilings.of_cpu(threads)}
        limits, work = about["ceilings"][str(threads)], cpu_work(quick, threads)
    else:
        limits = ceilings.of_gpu(torch.bfloat16)
        about |= machine.about_gpu()
        about |= {"under_load": machine.gpu_under_load(), "ceilings": {"cuda": limits}}
        work = work_gpu.work(quick)
    yield {
        "machine_info": about,
        "commit_info": machine.commit(),
        "datetime": datetime.now(UTC).isoformat(),
        "version": __version__,
        "wanted": len(work),
        "benchmarks": [],
        "noisy": [],  # benchmarks too: to be seen, and not to be compared or drawn
    }
    for each in work:
        benchmark = each()
        derive(benchmark)
        add_rates(benchmark["extra_info"], limits)
        yield benchmark


def heading(result: dict) -> str:
    """Machine, clocks and ceilings, in words."""
    about = result["machine_info"]
    name = about.get("gpu", f"{about['cpu']}, {about['isa']}")
    lines = [f"{name}, torch {about['torch']}, commit {result['commit_info']['id'][:10]}"]
    for threads, limits in about["ceilings"].items():
        if not limits:
            lines.append("No ceilings: the C++ library is not built.")
            continue
        clock = f"{limits['clock_hz'] / 1e9:.2f} GHz, " if "clock_hz" in limits else ""
        levels = ", ".join(f"{n} {rate / 1e9:.0f}" for n, rate in limits["bytes_per_s"].items())
        where = f"{threads} threads" if threads.isdigit() else "GPU"
        lines.append(
            f"Ceilings, {where}: {clock}{limits['flop_per_s'] / 1e9:.0f} GFLOP/s, GB/s: {levels}"
        )
    return "\n".join(lines)


NOISY = " noisy"
COLUMNS = ["product", "M", "N x K", "zeros", "kernel", "us", "spread", "useful GFLOP/s"]
COLUMNS += ["GB/s", "of peak", "of bandwidth", "of roofline", "times dense", "torch CSR", "error"]


def row(benchmark: dict) -> list[object]:
    """us: the median; spread: the larger of ours and dense's (noise.py)."""
    info, spread = benchmark["extra_info"], noise.of_benchmark(benchmark)
    shares = info.get("shares", {})
    cold = " cold" if info["is_cold"] else ""
    csr = info["speedups"].get("torch CSR")
    return [
        info["op"] + cold,
        info["M"],
        f"{info['N']}x{info['K']}" if "N" in info else info["model"],
        f"{info['sparsity']:.0%}",
        info["kernel"],
        f"{1e6 * info['ours_s']:.1f}",
        f"{spread:.0%}{NOISY * (spread > noise.LIMIT)}",
        f"{1e-9 * info['useful_flop_per_s']:.1f}",
        f"{1e-9 * info['moved_bytes_per_s']:.1f}" if "moved_bytes" in info else "",
        f"{shares['flop']:.0%}" if shares else "",
        f"{shares['bytes']:.0%} {info['level']}" if shares else "",
        f"{shares['roofline']:.0%}" if shares else "",
        f"{info['speedup']:.2f}",
        "" if csr is None else f"{csr:.2f}",
        f"{info['error']:.0e}",
    ]


def render(result: dict) -> str:
    rows = [row(benchmark) for benchmark in [*result["benchmarks"], *result["noisy"]]]
    text = f"{heading(result)}\n\n{table(COLUMNS, rows)}"
    if result["noisy"]:
        text += (
            f"\n\n{len(result['noisy'])} of {len(rows)} are noisy, the last ones: half of the"
            f"\nrounds spread over more than {noise.LIMIT:.0%} of their median, measured again too."
            "\nThey stand apart in the file, under `noisy`, and nothing is concluded from them."
        )
    return text
