"""python -m sparsekern report"""

from pathlib import Path

from ..extras import require
from ..files import check_writable
from ..report import page
from . import BENCH_OUT


def run_report(results: Path, out: Path) -> None:
    check_writable("out", out / "report.md")  # now, not after all figures are drawn
    require("matplotlib", "demo")
    print(f"Wrote {', '.join(map(str, page.write(results, BENCH_OUT, out)))}")
