"""The commands of `python -m sparsekern`, one file each."""

from pathlib import Path

BENCH_OUT = Path("out/bench.csv")
