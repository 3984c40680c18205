"""python -m sparsekern bench [compare]"""

import warnings
from pathlib import Path

import torch

from ..bench import calibrate as calibrating
from ..bench import compare, measure, noise, records
from ..bench.rates import case_name
from ..gpt.progress import Progress
from . import BENCH_OUT


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
    out = out or BENCH_OUT
    if out.suffix != records.SUFFIX:  # now, not after minutes of measuring
        raise ValueError(f"out: expected a {records.SUFFIX} file, got {out}")
    about, count, measured = measure.measure(device, quick)
    if commit:
        about["commit"] = {"id": commit, "dirty": False}
    progress = Progress(count, 0, unit="product")
    progress.line(measure.heading(about))
    cases: list[dict] = []
    try:
        for case in measured:
            case["is_noisy"] = noise.of_case(case) > noise.LIMIT
            cases.append(case)
            progress.advance()
            flag = measure.NOISY * case["is_noisy"]
            progress.line(f"{case_name(case)}: {case['speedup']:.2f} times dense{flag}")
    except BaseException:
        records.write(out.with_suffix(f".partial{records.SUFFIX}"), about, records.flat(cases))
        raise
    progress.close()
    records.write(out, about, records.flat(cases))
    print(f"\n{measure.render(about, cases)}\n\n{len(cases)} products: {out}")


def run_compare(old: Path, new: Path, threshold: float, **options) -> int:
    changes = compare.compare(old, new)
    print(compare.render(changes, threshold))
    return int(any(change.is_slower(threshold) for change in changes))
