"""The measurement behind `python -m sparsekern bench`: a grid of products and its table."""

from collections.abc import Callable, Iterator
from dataclasses import replace

import torch

from ..terminal import table
from . import ceilings, machine, noise, products, work_gpu
from .products import Workload
from .race import pin
from .rates import derive

SHAPES = ((768, 768), (3072, 768), (4096, 4096))  # N x K
SPARSITIES = (0.5, 0.75, 0.9, 0.95)
TOKENS, GRADIENT_TOKENS = (16, 256, 1024), 1024
QUICK_SHAPES, QUICK_SPARSITIES = ((768, 768),), (0.5, 0.9)
QUICK_TOKENS, QUICK_ROUNDS = (16, 256), 3

Work = Callable[[], dict]  # a measurement to be made -> its case


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
        rounds = {"most_rounds": QUICK_ROUNDS} if quick else {}
        return noise.quietest(lambda: derive(product.race(peers, **rounds)), noise.of_case)


def measure(
    device: str, quick: bool, commit: str | None = None
) -> tuple[dict, int, Iterator[dict]]:
    """What is known about the run beforehand, the number of cases, and the cases as they come.
    `commit`: where there is no repository."""
    about = machine.about_cpu()
    if device == "cpu":
        threads = torch.get_num_threads()
        pin(threads)
        limits, work = ceilings.of_cpu(threads), cpu_work(quick, threads)
        about["ceilings"] = {str(threads): limits}
    else:
        limits, about = ceilings.of_gpu(torch.bfloat16), about | machine.about_gpu()
        all_work = work_gpu.BRIEF if quick else work_gpu.WHOLE
        fitting, left_out = all_work.within(torch.cuda.get_device_properties(0).total_memory)
        work = work_gpu.cases(fitting)
        about |= {"under_load": machine.gpu_under_load(), "ceilings": {"cuda": limits}}
        about |= {"missing": left_out, "expected_s": fitting.expected_s}
    about = machine.about_run("products", about, commit)
    return about, len(work), (derive(e(), limits) for e in work)


def heading(about: dict) -> str:
    """Machine, clocks and ceilings, in words."""
    here = about["machine"]
    lines = [machine.in_words(about, "bfloat16" if "gpu" in here else "float32")]
    for threads, limits in here["ceilings"].items():
        if not limits:
            lines.append("No ceilings: the C++ library is not built.")
            continue
        clock = f"{limits['clock_hz'] / 1e9:.2f} GHz, " if "clock_hz" in limits else ""
        levels = ", ".join(f"{n} {rate / 1e9:.0f}" for n, rate in limits["bytes_per_s"].items())
        where = f"{threads} threads" if threads.isdigit() else "GPU"
        lines.append(
            f"Ceilings, {where}: {clock}{limits['flop_per_s'] / 1e9:.0f} GFLOP/s, GB/s: {levels}"
        )
    lines += [f"Left out: {name}: {reason}" for name, reason in here.get("missing", {}).items()]
    return "\n".join(lines)


NOISY = " noisy"
COLUMNS = ["product", "M", "N x K", "zeros", "kernel", "us", "spread", "useful GFLOP/s"]
COLUMNS += ["GB/s", "of peak", "of bandwidth", "of roofline", "times dense", "dense by (of peak)"]
COLUMNS += ["torch CSR", "error"]


def row(case: dict) -> list[object]:
    """us: the median; spread: the larger of ours and dense's (noise.py)."""
    spread = noise.of_case(case)
    shares = case.get("shares", {})
    cold = " cold" if case["is_cold"] else ""
    csr = case["speedups"].get("torch CSR")
    return [
        case["op"] + cold,
        case["M"],
        f"{case['N']}x{case['K']}" if "N" in case else case["model"],
        f"{case['sparsity']:.0%}",
        case["kernel"],
        f"{1e6 * case['ours_s']:.1f}",
        f"{spread:.0%}{NOISY * (spread > noise.LIMIT)}",
        f"{1e-9 * case['useful_flop_per_s']:.1f}",
        f"{1e-9 * case['moved_bytes_per_s']:.1f}" if "moved_bytes" in case else "",
        f"{shares['flop']:.0%}" if shares else "",
        f"{shares['bytes']:.0%} {case['level']}" if shares else "",
        f"{shares['roofline']:.0%}" if shares else "",
        f"{case['speedup']:.2f}",
        case["best_dense"] + (f" ({case['dense_share']:.0%})" if shares else ""),
        "" if csr is None else f"{csr:.2f}",
        f"{case['error']:.0e}",
    ]


def render(about: dict, cases: list[dict]) -> str:
    quiet, noisy = ([c for c in cases if c["is_noisy"] == is_noisy] for is_noisy in (False, True))
    text = f"{heading(about)}\n\n{table(COLUMNS, map(row, quiet + noisy))}"
    if noisy:
        text += (
            f"\n\n{len(noisy)} of {len(cases)} are noisy, the last ones: half of the"
            f"\nrounds spread over more than {noise.LIMIT:.0%} of their median, measured again too."
            "\nThey are marked in the file, and nothing is concluded from them."
        )
    return text
