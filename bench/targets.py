"""What is asked of products of many tokens: times the best dense call, one thread; and the page of
a run that holds them to it (python bench/run.py --part many-tokens).
"""

from statistics import geometric_mean, median

from sparsekern.bench.machine import in_words
from sparsekern.bench.products import Workload
from sparsekern.bench.rates import derived
from sparsekern.bench.records import Run, select
from sparsekern.terminal import table

PART = "many-tokens"
SHAPES = ((768, 768), (3072, 768), (2048, 2048), (8192, 2048))
SPARSITIES = (0.5, 0.75, 0.9, 0.95)
_GRADIENT = (1.2, 2.2, 4.4, 6.8)
_BF16 = (1.0, 1.4, 3.0, 4.6)  # dense is then that of bfloat16
# (op, dtype, tokens): at each of the sparsities.
ASKED = {
    ("spmm", "float32", 256): (1.2, 2.15, 4.6, 7.4),
    ("spmm", "float32", 1024): (1.25, 2.2, 4.3, 6.5),
    ("spmm_t", "float32", 256): _GRADIENT,
    ("spmm_t", "float32", 1024): _GRADIENT,
    ("sddmm", "float32", 256): _GRADIENT,
    ("sddmm", "float32", 1024): _GRADIENT,
    ("spmm", "bfloat16", 256): _BF16,
    ("spmm", "bfloat16", 1024): _BF16,
}
NAMES = {"spmm": "forward", "spmm_t": "input gradient", "sddmm": "values' gradient"}


def is_asked(op: str, w: Workload) -> bool:
    """Whether there is a figure for it."""
    is_standard = w.mask == "random" and not w.is_cold and w.threads == 1
    key = op, w.fields()["dtype"], w.M
    return is_standard and key in ASKED and (w.N, w.K) in SHAPES and w.sparsity in SPARSITIES


def page(run: Run) -> str:
    cases = derived(run)
    means, cells = [], []
    for (op, dtype, M), asked in ASKED.items():
        some = select(cases, op=op, dtype=dtype, M=M)
        name = f"{NAMES[op]}, M = {M}" + ", bf16" * (dtype == "bfloat16")
        if some:
            worst = min(case["speedup"] for case in some)
            means.append([name, *map(_mean, _by_sparsity(some), asked), f"{worst:.2f}"])
        for N, K in SHAPES:
            alike = select(some, N=N, K=K)
            if alike:
                found = [", ".join(_in_words(c) for c in each) for each in _by_sparsity(alike)]
                cells.append([name, f"{N}x{K}", *found, _dense(alike)])
    columns = [f"{s:.0%}" for s in SPARSITIES]
    part = run.about["part"]
    return "\n\n".join(
        (
            "# Many tokens, times the best dense call",
            f"`{part['command']}`. {in_words(run.about, 'fp32')}",
            "One thread, random masks, medians of interleaved rounds; geometric means of all "
            "shapes, what is asked in brackets, and the lowest of all cells. "
            f"{part['note']}".rstrip(),
            table(["pass", *columns, "worst"], means),
            "Each cell, with its kernel where that is not `panel`, and dense, with its share of "
            "what multiply-adds of float32 reach on registers:",
            table(["pass", "N x K", *columns, "GFLOP/s of dense"], cells, left=2) + "\n",
        )
    )


def _by_sparsity(cases: list[dict]) -> list[list[dict]]:
    return [select(cases, sparsity=sparsity) for sparsity in SPARSITIES]


def _mean(cases: list[dict], asked: float) -> str:
    if not cases:
        return ""
    mean = geometric_mean(case["speedup"] for case in cases)
    return f"{mean:.2f} ({asked:g})" + " **missed**" * (mean < asked)


def _in_words(case: dict) -> str:
    other = "" if case["kernel"] == "panel" else f" {case['kernel']}"
    return f"{case['speedup']:.2f}{other}"


def _dense(cases: list[dict]) -> str:
    names = ", ".join(dict.fromkeys(case["best_dense"] for case in cases))
    rate = median(1e-9 * case["dense_flop"] / case["dense_s"] for case in cases)
    share = median(case.get("dense_share", 0) for case in cases)
    return f"{names} {rate:.0f}" + f" ({share:.0%})" * (share > 0)
