"""From which density on is writing W out the faster way on this machine? What dispatch then reads.

CPU: `panel` against `expand`, both rows of the kernel table, for each pass. GPU: the products of
measure_gpu.py. The entry goes to the user's cache folder (kernels/crossover.py).
"""

import json
import warnings
from collections.abc import Iterator
from datetime import date
from pathlib import Path
from statistics import geometric_mean
from typing import NamedTuple

import torch

from ..files import atomic_write, private_cache
from ..kernels import crossover
from ..kernels.cpu import expand, panel
from ..kernels.cpu.machine import NO_LIBRARY, machine_name
from ..kernels.problem import Kernel
from ..kernels.table import forget_choices
from ..terminal import Progress, table
from . import measure_gpu, noise, peers_gpu
from .crossover import GRID, crossing, summarize
from .machine import about_cpu, about_gpu, commit
from .products import Workload, normal, weight
from .race import pin
from .rates import derive
from .replay_gpu import CudaClock
from .turns import in_turns, on_host

SHAPES = ((3072, 768), (2048, 2048))
TOKENS = (1, 16, 64, 256, 1024)
DENSITIES = (0.02, 0.05, 0.1, 0.2, 0.35, 0.5, 0.6, 0.7, 0.8, 0.9, 1.0)
ROUNDS, MIN_ROUND_S = 9, 1e-3
HOPELESS = 0.8  # twice in a row: no denser W is timed
DTYPES = (torch.float32, torch.bfloat16)
OPS = ("spmm", "spmm_t", "sddmm")


class Ratio(NamedTuple):
    """How many times faster than `expand` the row `panel` is, and the larger spread of the two."""

    times: float
    spread: float


def calibrate(device: str, quick: bool, out: Path | None = None) -> str:
    """Measure, store what is no noise, and tell what was found where."""
    if out and out.is_dir():  # now, not after minutes of measuring
        raise ValueError(f"out: expected a file, {out} is a folder")
    key, entry = _of_cpu(quick) if device == "cpu" else _of_gpu(quick)
    text = render(key, entry)
    found = list(_limits(entry))
    lost = sum(limit is None for limit in found)
    if lost:
        text += (
            f"\n\n{lost} of {len(found)} are missing: too noisy (half of the rounds spread over "
            f"more than {noise.LIMIT:.0%}\nof their median) or not measured. Nothing of them is "
            "stored; dispatch goes by what ships."
        )
    if out:
        _write(out, {key: entry})
    if lost == len(found):
        return f"{text}\n\nNothing is stored."
    path = private_cache() / crossover.calibrated_file().name
    data = _stored(path)
    before = data.get(key, {})
    # Limits for other numbers of tokens do not go with these.
    data[key] = (before if before.get("tokens") == entry["tokens"] else {}) | entry
    _write(path, data)
    crossover._calibrated.cache_clear()
    forget_choices()
    return f"{text}\n\nDispatch now uses this: {path}\nTo undo it, delete that file."


def _stored(path: Path) -> dict:
    try:
        return crossover.read(path)
    except FileNotFoundError:
        return {}
    except (ValueError, OSError) as error:
        warnings.warn(f"calibrate: {path} is replaced: {error}", stacklevel=3)
        return {}


def _write(path: Path, data: dict) -> None:
    with atomic_write(path) as file:
        file.write((json.dumps(data, indent=1) + "\n").encode())


def _limits(entry: dict) -> Iterator[float | None]:
    for dtype in entry.keys() - set(crossover.NOT_DTYPES):
        for others in entry[dtype].values():
            for limits in others.values():
                yield from limits


def _measured(name: str) -> str:
    about = about_cpu()
    return f"{name}, torch {about['torch']}, {date.today()}, commit {commit()['id'][:10]}"


def _of_cpu(quick: bool) -> tuple[str, dict]:
    if panel._C is None:
        raise ValueError(f"calibrate: there is nothing to choose from, {NO_LIBRARY}")
    shapes, tokens = (SHAPES[:1], (16, 256)) if quick else (SHAPES, TOKENS)
    threads = torch.get_num_threads()
    pin(threads)
    entry: dict[str, object] = {
        "measured": _measured(f"{about_cpu()['cpu']}, {threads} threads"),
        "tokens": list(tokens),
    }
    progress = Progress(len(DTYPES) * len(OPS) * len(tokens), 0, unit="crossover")
    for dtype in DTYPES:
        found = entry[str(dtype).removeprefix("torch.")] = {}
        for op in OPS:
            limits = []
            for M in tokens:
                limit, spread = _limit(op, M, shapes, dtype, threads)
                limits.append(limit)
                told = "noisy" if limit is None else f"panel up to a density of {limit:.2f}"
                progress.line(f"{op} M = {M} {dtype}: {told} (spread {spread:.0%})")
                progress.advance()
            found[f"panel {op}"] = {"expand": limits}
    progress.close()
    return machine_name(panel.machine()), entry


def _limit(op: str, M: int, shapes, dtype: torch.dtype, threads: int) -> tuple[float | None, float]:
    """The density up to which `panel` is no slower, from the sparsest on, and the largest spread of
    what it is from. Nothing where that is noise."""
    ratios: dict[float, float] = {}
    worst = 0.0
    for density in DENSITIES:
        found = []
        for shape in shapes:
            w = Workload(M, *shape, 1 - density, threads, dtype)
            found.append(noise.quietest(lambda w=w: _ratio(op, w), lambda ratio: ratio.spread))
        worst = max(worst, *(ratio.spread for ratio in found))
        if worst > noise.LIMIT:
            return None, worst
        ratios[density] = geometric_mean([ratio.times for ratio in found])
        if len(ratios) > 1 and max(list(ratios.values())[-2:]) < HOPELESS:
            break
    return crossing(ratios), worst


def _ratio(op: str, workload: Workload) -> Ratio:
    W, _ = weight(workload)
    x = normal(workload.M, workload.K).to(workload.dtype)
    dy = normal(workload.M, workload.N).to(workload.dtype)
    operands = {
        "spmm": (W.row_offsets, W.col_indices, W.values, W.n, W.k, x),
        "spmm_t": (W.row_offsets, W.col_indices, W.values, W.n, W.k, dy),
        "sddmm": (W.row_offsets, W.col_indices, W.n, W.k, dy, x),
    }[op]
    runs = {name: lambda name=name: _row(name, op).run(*operands) for name in ("panel", "expand")}
    for run in runs.values():
        run()  # the first call pays for packing and allocation
    once_s = {name: on_host(run)()() for name, run in runs.items()}
    turns = {n: on_host(run, max(1, round(MIN_ROUND_S / once_s[n]))) for n, run in runs.items()}
    seconds = in_turns(turns, ROUNDS)
    times = min(seconds["expand"]) / min(seconds["panel"])
    return Ratio(times, max(map(noise.spread, seconds.values())))


def _row(name: str, op: str) -> Kernel:
    return next(
        row for row in (*panel.KERNELS, *expand.KERNELS) if (row.name, row.op) == (name, op)
    )


def _of_gpu(quick: bool) -> tuple[str, dict]:
    grid = measure_gpu.QUICK if quick else GRID
    products = len(grid.shapes) * len(grid.sparsities) * len(grid.tokens)
    progress = Progress(products, 0, unit="product")
    cells = []
    ways, generator = peers_gpu.crossover_ways(), torch.Generator("cuda")
    # Graphs cannot be captured on the default stream.
    with torch.no_grad(), torch.cuda.stream(torch.cuda.Stream()):
        for cell in measure_gpu.cells(grid, ways, CudaClock(), generator):
            cells.append(derive(cell))
            progress.advance()
    progress.close()
    return about_gpu()["capability"], summarize(cells, _measured(about_gpu()["gpu"]))


def render(key: str, entry: dict) -> str:
    """A line for each kernel: the densities up to which it runs, by tokens."""
    header = ["density up to which it is no slower", "than", *(f"M = {M}" for M in entry["tokens"])]
    rows = [
        [f"{kernel}, {dtype}", other, *("-" if d is None else f"{d:.2f}" for d in densities)]
        for dtype in sorted(entry.keys() - set(crossover.NOT_DTYPES))
        for kernel, others in entry[dtype].items()
        for other, densities in others.items()
    ]
    return f"{key}: {entry['measured']}\n\n{table(header, rows, left=2)}"
