"""python -m sparsekern report"""

from pathlib import Path

from ..extras import require
from ..report import page
from . import BENCH_OUT


def run_report(results: Path, out: Path) -> None:
    require("matplotlib", "demo")
    print(f"Wrote {', '.join(map(str, page.write(results, BENCH_OUT, out)))}")
