"""python -m sparsekern bench [compare]"""

import argparse
import json
import warnings
from pathlib import Path

import torch

from ..bench import calibrate as calibrating
from ..bench import compare, measure, noise
from ..files import atomic_write
from ..gpt.progress import Progress

OUT = Path("out/bench.json")


def add_commands(parser: argparse.ArgumentParser) -> None:
    parser.set_defaults(run=run_bench)
    parser.add_argument("--quick", action="store_true", help="one small shape, few rounds")
    parser.add_argument("--device", choices=("cpu", "cuda"), help="cuda where there is one")
    parser.add_argument(
        "--calibrate",
        action="store_true",
        help="measure from which density on dense is faster, for dispatch to use from now on",
    )
    parser.add_argument(
        "--out", type=Path, help=f"JSON ({OUT}; with --calibrate beside what dispatch reads)"
    )
    parser.add_argument("--commit", help="where there is no repository")
    commands = parser.add_subparsers(dest="bench_command")
    added = commands.add_parser("compare", help="fails where NEW is slower than OLD")
    added.set_defaults(run=run_compare)
    added.add_argument("old", type=Path)
    added.add_argument("new", type=Path)
    added.add_argument(
        "--threshold", type=float, default=0.1, help="share that is no regression (%(default)s)"
    )


def run_bench(
    quick: bool, device: str | None, out: Path | None, commit: str | None, calibrate: bool
) -> None:
    warnings.filterwarnings("ignore", message="Sparse .* tensor support is in beta state")
    has_gpu = torch.cuda.is_available()
    if device == "cuda" and not has_gpu:
        raise ValueError("device: torch finds no NVIDIA GPU")
    device = device or ("cuda" if has_gpu else "cpu")
    if calibrate:
        print(calibrating.calibrate(device, quick, out))
        return
    out = out or OUT
    benchmarks = measure.measure(device, quick)
    result = next(benchmarks)
    if commit:
        result["commit_info"] = {"id": commit, "dirty": False}
    progress = Progress(result.pop("wanted"), 0, unit="product")
    progress.line(measure.heading(result))
    try:
        for benchmark in benchmarks:
            is_noisy = noise.of_benchmark(benchmark) > noise.LIMIT
            result["noisy" if is_noisy else "benchmarks"].append(benchmark)
            speedup = benchmark["extra_info"]["speedup"]
            progress.advance()
            flag = measure.NOISY * is_noisy
            progress.line(f"{benchmark['group']}: {speedup:.2f} times dense{flag}")
    except BaseException:
        _write(out.with_suffix(".partial.json"), result)
        raise
    progress.close()
    _write(out, result)
    count = len(result["benchmarks"]) + len(result["noisy"])
    print(f"\n{measure.render(result)}\n\n{count} products: {out}")


def _write(path: Path, result: dict) -> None:
    with atomic_write(path) as file:
        file.write(json.dumps(result, indent=1).encode())


def run_compare(old: Path, new: Path, threshold: float, **options) -> int:
    changes = compare.compare(old, new)
    print(compare.render(changes, threshold))
    return int(any(change.is_slower(threshold) for change in changes))
