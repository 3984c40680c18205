"""README's table and picture, from committed results: python bench/readme.py

Five representative products and training steps, one line each, none of them a mean over shapes.
docs/benchmarks.md gets the same lines with the file that each one comes from.
"""

import sys
from dataclasses import dataclass
from typing import TYPE_CHECKING

import pages

from sparsekern.bench import records
from sparsekern.bench.rates import derived
from sparsekern.files import write_picture
from sparsekern.report import plots
from sparsekern.terminal import table

if TYPE_CHECKING:
    from matplotlib.figure import Figure

ROOT = pages.BENCH.parent
README = ROOT / "README.md"
PICTURE = ROOT / "docs" / "speedup.png"


def newest(name: str) -> str:
    """The last of the results `name`-<date>, without its suffix."""
    found = pages.RESULTS.glob(f"{name}-[0-9]*.csv")
    return max((path.stem for path in found), default=name)


SPARSITIES = (0.75, 0.9, 0.95)
SPARSITIES_DRAWN = 0.5, 0.95  # from, to
TIMES_DRAWN = 0.6, 12.0
NEAREST = {0.75: 0.7}  # stands in, and says so, where the first was not measured
CPU = "intel-r-xeon-r-processor-2-cores-avx512-2026-11-24"
CPU_NAME = "Intel Xeon, 2 cores, AVX-512"
DECODE = "nvidia-h200-decode-bfloat16-2026-11-29"
TRAIN = newest("nvidia-h200-train-bfloat16")
GPU_NAME = "NVIDIA H200"
DECODED = {"N": 4096, "K": 11008, "mask": "random"}


@dataclass(frozen=True)
class Row:
    label: str  # in README
    what: str  # in docs/benchmarks.md
    machine: str
    file: str  # in bench/results, without its suffix
    fields: dict[str, object]  # of the one case for each sparsity
    kernel: str | None = None

    def speedups(self) -> dict[float, float]:
        """Times the best dense call by sparsity."""
        chosen = records.select(cases(self.file, self.kernel), **self.fields)
        found = {record["sparsity"]: record["speedup"] for record in chosen}
        if len(found) != len(chosen) or not found:
            raise ValueError(f"{self.file}: expected one case a sparsity with {self.fields}")
        return found


ROWS = (
    Row(
        "training, CPU",
        "a step of the demo's GPT, 3 layers of width 768, 1,024 tokens, fp32, 2 threads",
        CPU_NAME,
        CPU,
        {"op": "train_step", "model": "demo", "threads": 2},
    ),
    Row(
        "one token, CPU",
        "W 2048 x 2048 from memory, 1 token, fp32, 1 thread",
        CPU_NAME,
        CPU,
        {
            **{"op": "spmm", "M": 1, "N": 2048, "K": 2048, "threads": 1, "is_cold": True},
            **{"dtype": "float32", "mask": "random"},
        },
    ),
    Row(
        "one token, GPU",
        "W 4096 x 11008 from memory, 1 token, bf16",
        GPU_NAME,
        DECODE,
        {**DECODED, "M": 1},
        "few_tokens",
    ),
    Row(
        "batch of 32, GPU",
        "W 4096 x 11008 from memory, 32 tokens, bf16",
        GPU_NAME,
        DECODE,
        {**DECODED, "M": 32},
        "few_tokens",
    ),
    Row(
        "training, GPU",
        "a step of GPT-2 small, 8,192 tokens, bf16, captured in a CUDA graph on both sides",
        GPU_NAME,
        TRAIN,
        {"op": "train_step", "model": "gpt2-small", "mask": "random"},
    ),
)


def cases(file: str, kernel: str | None) -> list[dict]:
    """Measurements with `speedup` of this kernel, or of our fastest, over the best dense call."""
    found = derived(records.read(pages.RESULTS / f"{file}.csv"))
    if kernel is None:
        return [case for case in found if "speedup" in case]
    return [
        case | {"speedup": case["speedups"][kernel]} for case in found if kernel in case["speedups"]
    ]


def cell(found: dict[float, float], sparsity: float) -> str:
    """'2.15', '**0.69, a loss**', '2.00 at 70%' or 'not measured'."""
    measured = sparsity if sparsity in found else NEAREST.get(sparsity)
    if measured not in found:
        return "not measured"
    text = f"{found[measured]:.2f}"
    if measured != sparsity:
        text += f" at {measured:.0%}"
    return f"**{text}, a loss**" if round(found[measured], 2) < 1 else text


def cells(row: Row) -> list[str]:
    found = row.speedups()
    return [cell(found, sparsity) for sparsity in SPARSITIES]


def front_table() -> str:
    header = ["times dense", *(f"{s:.0%} zeros" for s in SPARSITIES)]
    return table(header, [[row.label, *cells(row)] for row in ROWS])


def sources_table() -> str:
    """The same lines with what was measured, where, and in which file."""
    lines = [
        [row.label, row.what, row.machine, f"[{row.file}](../bench/results/{row.file}.csv)"]
        for row in ROWS
    ]
    return table(["row", "measured", "machine", "file"], lines, left=4)


def plot() -> "Figure":
    """A line for each row, as on the report's page."""
    found = {row.label: sorted(row.speedups().items()) for row in ROWS}
    low, high = SPARSITIES_DRAWN
    figure = plots.speedups(
        {label: {s: t for s, t in curve if low <= s <= high} for label, curve in found.items()},
        times=TIMES_DRAWN,
    )
    panel = figure.axes[0]
    panel.set_xticks([plots.place(s) for s in plots.ZEROS_TICKS if s <= high])
    panel.set_xticklabels([f"{s:.0%}" for s in plots.ZEROS_TICKS if s <= high])
    panel.set_xlim(right=plots.place(high) + 2.5)
    panel.set_xlabel("zeros in the weights")
    panel.set_title("CPUs gain most, GPU training breaks even", loc="left", fontsize=11)
    return figure


def main() -> int:
    pages.replace_section(README, "readme", front_table())
    pages.replace_section(pages.BENCHMARKS, "readme", sources_table())
    write_picture(plot(), PICTURE, dpi=160)
    return 0


if __name__ == "__main__":
    sys.exit(main())
