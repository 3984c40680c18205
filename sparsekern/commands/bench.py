"""python -m sparsekern bench [compare]"""

import json
import warnings
from pathlib import Path

import torch

from ..bench import calibrate as calibrating
from ..bench import compare, measure, noise
from ..files import atomic_write, check_writable, private_cache
from ..kernels import crossover
from ..terminal import Progress
from . import BENCH_OUT


def run_bench(
    quick: bool, device: str | None, out: Path | None, commit: str | None, calibrate: bool
) -> None:
    warnings.filterwarnings("ignore", message="Sparse .* tensor support is in beta state")
    has_gpu = torch.cuda.is_available()
    if device == "cuda" and not has_gpu:
        raise ValueError("device: torch finds no NVIDIA GPU")
    device = device or ("cuda" if has_gpu else "cpu")
    out = out if calibrate else out or BENCH_OUT
    if out:
        check_writable("out", out)
    if calibrate:
        check_writable("calibrate", private_cache() / crossover.calibrated_file().name)
        print(calibrating.calibrate(device, quick, out))
        return
    benchmarks = measure.measure(device, quick)
    result = next(benchmarks)
    if commit:
        result["commit_info"] = {"id": commit, "dirty": False}
    try:
        with Progress(result.pop("wanted"), unit="product") as progress:
            progress.line(measure.heading(result))
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
