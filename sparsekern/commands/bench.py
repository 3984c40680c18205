"""python -m sparsekern bench [compare]"""

import warnings
from pathlib import Path

import torch

from ..bench import calibrate as calibrating
from ..bench import compare, measure, noise, records
from ..bench.rates import case_name
from ..files import check_writable, private_cache
from ..kernels import crossover
from ..terminal import Progress
from . import BENCH_OUT


def run_bench(
    quick: bool, device: str | None, out: Path | None, commit: str | None, calibrate: bool
) -> None:
    warnings.filterwarnings("ignore", message="Sparse .* tensor support is in beta state")
    has_gpu = torch.cuda.is_available()
    if device == "cuda" and not has_gpu:
        raise ValueError("device: expected cpu, this torch sees no GPU, got cuda")
    device = device or ("cuda" if has_gpu else "cpu")
    out = out if calibrate else out or BENCH_OUT
    if out:
        check_writable("out", out)
    if calibrate:
        check_writable("calibrate", private_cache() / crossover.calibrated_file().name)
        print(calibrating.calibrate(device, quick, out))
        return
    if out.suffix != records.SUFFIX:
        raise ValueError(f"out: expected a {records.SUFFIX} file, got {out}")
    about, count, measured = measure.measure(device, quick, commit)
    cases: list[dict] = []
    try:
        with Progress(count, unit="case") as progress:
            progress.line(measure.heading(about))
            if expected_s := about["machine"].pop("expected_s", None):
                progress.line(f"{count} cases, about {expected_s / 60:.0f} minutes on an H200")
            for case in measured:
                case["is_noisy"] = noise.of_case(case) > noise.LIMIT
                cases.append(case)
                progress.advance()
                flag = measure.NOISY * case["is_noisy"]
                progress.line(f"{case_name(case)}: {case['speedup']:.2f} times dense{flag}")
    except BaseException:
        records.write(out.with_suffix(f".partial{records.SUFFIX}"), about, records.flat(cases))
        raise
    records.write(out, about, records.flat(cases))
    print(f"\n{measure.render(about, cases)}\n\n{len(cases)} products: {out}")


def run_compare(old: Path, new: Path, threshold: float, **options) -> int:
    if not threshold >= 0:  # nothing is above NaN
        raise ValueError(f"threshold: expected 0 or more, got {threshold}")
    changes, gone = compare.compare(old, new)
    print(compare.render(changes, gone, threshold))
    return int(any(change.is_slower(threshold) for change in changes))
