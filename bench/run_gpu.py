"""The GPU benchmark: products of few tokens, and the density at which each kernel becomes fastest.

python bench/run_gpu.py decode      results/<GPU>-decode-<dtype>-<date>.*, docs/benchmarks.md
python bench/run_gpu.py crossover   sparsekern/kernels/crossover.json
python bench/run_gpu.py publish X.json   the same from a file that --out FOLDER wrote

With --out only the JSON is written, there: to measure on a machine without the repository or
without matplotlib. --part 1/2 and --part 2/2 share the shapes out, to two GPUs; `publish` then gets
both files. --dtype float16; --quick: one small shape, nothing is published.
"""

import argparse
import json
import math
import platform
import re
import sys
import time
from dataclasses import replace
from datetime import date
from pathlib import Path

import pages
import tables_gpu
import torch

from sparsekern.bench import ceilings, crossover, measure_gpu, peers_gpu, replay_gpu
from sparsekern.bench.machine import about_gpu, git, gpu_under_load, installed
from sparsekern.bench.measure_gpu import Grid, derive

BENCH = Path(__file__).parent
RESULTS = BENCH / "results"
PARTIAL = BENCH.parent / "build" / "bench"
PAGE = BENCH.parent / "docs" / "benchmarks.md"
MARKERS = "<!-- bench-gpu: begin -->", "<!-- bench-gpu: end -->"
CROSSOVER = BENCH.parent / "sparsekern" / "kernels" / "crossover.json"
LIMIT_S = 230.0  # no new W is begun after so long

Part = tuple[int, int]  # (2, 3): the second of three

QUICK = Grid(shapes=((512, 1024),), tokens=(1, 16), sparsities=(0.5, 0.9), masks=("random",))

SECTIONS = """\
# {name}

{heading}

Times faster than the best dense call: cuBLAS and cuBLASLt, both layouts of W and of the result, and
mv for one token. Medians of {rounds} CUDA-graph replays of {fewest} calls or more, all competitors
in turn; every call reads another copy of W, {cold_mb:.0f} MB or more of them. Geometric means over
the shapes. Random masks unless said. Below 1 is a loss.

![speed-up against sparsity]({name}.png)

{summary}

## Everyone

Errors are relative to fp64 in the Frobenius norm, the worst of all shapes and copies of W; more
than {tolerance:g} is wrong. The layout of W and x that each wants is made beforehand.

{competitors}

{absent}

## By shape

Microseconds of the best dense call, with the bytes of its weights per second, and of the CUDA
kernels, with their ratio.

{by_shape}

## Bytes

One token: packed bytes read per second by the CUDA kernels, their share of the copy bandwidth
({copy:.2f} TB/s, measured in the same run), and the packed bytes as a share of the dense ones.

{bytes_read}

## Magnitude-pruned weights

Rows and columns of log-normal scales (sigma {row_sigma} and {column_sigma}), one threshold for all.
Speed as a share of that on a random mask.

{pruned}

## Triton

Speed as a share of the CUDA kernels'.

{triton}
"""


def machine(commit: str | None) -> dict:
    """The machine measured on. nvidia-smi's numbers are read while copies keep the GPU busy."""
    limits = ceilings.of_gpu(torch.bfloat16)
    return about_gpu() | {
        "copy_bytes_per_s": limits["bytes_per_s"]["memory"],
        "ceilings": limits,
        "under_load": gpu_under_load(),
        "system": f"{platform.system()} {platform.machine()}",
        "python": platform.python_version(),
        "torch": torch.__version__,
        "commit": commit or git("rev-parse", "HEAD") or "unknown",
        "dirty": bool(git("status", "--porcelain", "--untracked-files=no")),
        "packages": {name: installed(name) for name in ("triton", "cupy-cuda12x", "cupy-cuda13x")},
    }


def measure(
    verb: str, grid: Grid, path: Path, commit: str | None, part: Part | None = None
) -> dict:
    """All cells; the file is written after each W, so that nothing is lost with a later one.
    `part`: which one of the whole `grid` is."""
    start = time.monotonic()
    make = peers_gpu.decode_ways if verb == "decode" else peers_gpu.crossover_ways
    ways = make()
    generator = torch.Generator("cuda")
    result = {
        "verb": verb,
        "date": str(date.today()),
        "seed": generator.seed(),
        "is_whole": False,
        **({"part": part} if part else {}),
        "machine": machine(commit) | {"missing": {w.name: w.missing for w in ways if w.missing}},
        "cells": [],
    }
    wanted = len(grid.masks) * len(grid.shapes) * len(grid.sparsities) * len(grid.tokens)
    # Graphs cannot be captured on the default stream.
    with torch.no_grad(), torch.cuda.stream(torch.cuda.Stream()):
        clock = replay_gpu.CudaClock()
        deadline = start + LIMIT_S
        for cell in measure_gpu.cells(grid, ways, clock, generator, deadline=deadline):
            result["cells"].append(derive(cell))
            if cell["M"] == grid.tokens[-1]:
                print(progress(result["cells"][-len(grid.tokens) :], start), flush=True)
                write_json(path, result)
    result["is_whole"] = len(result["cells"]) == wanted
    result["machine"]["under_load_at_end"] = gpu_under_load()
    result["seconds"] = time.monotonic() - start
    write_json(path, result)
    return result


def progress(cells: list[dict], start: float) -> str:
    """One line for a W: times dense by tokens."""
    first = cells[0]
    parts = [
        f"{c['M']}:" + ",".join(f"{name[:3]}{ratio:.2f}" for name, ratio in c["speedups"].items())
        for c in cells
    ]
    what = f"{first['mask']} {first['N']}x{first['K']} {first['sparsity']:.0%}"
    return f"{time.monotonic() - start:4.0f} s {what} {' '.join(parts)}"


def write_json(path: Path, result: dict) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(result, indent=1))


def heading(result: dict) -> str:
    m, clocks = result["machine"], result["machine"]["under_load"]
    changed = " with local changes" if m["dirty"] else ""
    dtype = result["cells"][0]["dtype"].removeprefix("torch.")
    smi = "".join(f", {name.replace('.', ' ')} {value}" for name, value in clocks.items())
    gpus = f", each W on one of {len(result['parts'])} such GPUs" if "parts" in result else ""
    return (
        f"{m['gpu']} ({m['capability']}, {m['multiprocessors']} multiprocessors), {dtype}, "
        f"torch {m['torch']}, CUDA {m['cuda']}{smi}{gpus}, {result['date']}, "
        f"commit {m['commit'][:10]}{changed}."
    )


def page(name: str, result: dict) -> str:
    cells, limit = result["cells"], result["machine"]["copy_bytes_per_s"]
    names = ("summary", "competitors", "by_shape", "pruned", "triton")
    dtype = getattr(torch, cells[0]["dtype"].removeprefix("torch."))
    return SECTIONS.format(
        name=name,
        heading=heading(result),
        rounds=measure_gpu.ROUNDS,
        fewest=measure_gpu.LAUNCHES[0],
        cold_mb=measure_gpu.COLD_BYTES / 1e6,
        tolerance=measure_gpu.TOLERANCE[dtype],
        copy=limit / 1e12,
        row_sigma=measure_gpu.ROW_SIGMA,
        column_sigma=measure_gpu.COLUMN_SIGMA,
        bytes_read=tables_gpu.bytes_read(cells, limit),
        absent=tables_gpu.absent(result["machine"]),
        **{each: getattr(tables_gpu, each)(cells) or "Not run." for each in names},
    )


def digest(result: dict) -> str:
    """The short of it, for a terminal."""
    cells, limit = result["cells"], result["machine"]["copy_bytes_per_s"]
    if result["verb"] == "crossover":
        return f"{heading(result)}\n\n{json.dumps(crossover.summarize(cells, ''))}"
    parts = (
        heading(result),
        tables_gpu.summary(cells),
        tables_gpu.competitors(cells),
        tables_gpu.bytes_read(cells, limit),
        f"pruned\n{tables_gpu.pruned(cells)}",
        f"triton\n{tables_gpu.triton(cells)}",
    )
    return "\n\n".join(parts)


def joined(results: list[dict]) -> dict:
    """The result of all parts of a grid, in the order of the grid, about the machine of the first;
    `parts` has all of them."""
    first, *others = results
    if not others:
        return first
    places = sorted(tuple(r.get("part", ())) for r in results)
    if places != [(i + 1, len(results)) for i in range(len(results))]:
        raise SystemExit(f"bench-gpu: expected all parts of a grid, once each, got {places}")

    def identity(r: dict) -> tuple:
        dtypes = {cell["dtype"] for cell in r["cells"]}
        return r["verb"], *(r["machine"][key] for key in ("gpu", "torch", "commit")), *dtypes

    if len(about := set(map(identity, results))) > 1:
        raise SystemExit(f"bench-gpu: expected parts of one measurement, got {about}")
    shapes = grid_of(first["verb"], torch.bfloat16, quick=False).shapes
    cells = sorted(
        (cell for r in results for cell in r["cells"]),
        key=lambda c: (measure_gpu.MASKS.index(c["mask"]), shapes.index((c["N"], c["K"]))),
    )
    parts = [{key: value for key, value in r.items() if key != "cells"} for r in results]
    whole = {key: value for key, value in first.items() if key != "part"}
    is_whole = all(r["is_whole"] for r in results)
    return whole | {"is_whole": is_whole, "parts": parts, "cells": cells}


def publish(result: dict) -> None:
    """Write the JSON, page, plot and table of a decode result, or the data file of a crossover."""
    if not result["is_whole"] or "part" in result:
        raise SystemExit("bench-gpu: not published, since some cells were not run")
    if tables_gpu.failures(result["cells"]):
        raise SystemExit("bench-gpu: not published, since one of our kernels failed or was wrong")
    if result["verb"] == "decode":
        name = name_of(result)
        write_page(RESULTS, name, result)
        if "bfloat16" in result["cells"][0]["dtype"]:
            update_page(name, result)
    else:
        update_crossover(result)


def name_of(result: dict) -> str:
    gpu = re.sub(r"[^a-z0-9]+", "-", result["machine"]["gpu"].lower()).strip("-")
    dtype = result["cells"][0]["dtype"].removeprefix("torch.")
    return f"{gpu}-{result['verb']}-{dtype}-{result['date']}"


def write_page(folder: Path, name: str, result: dict) -> None:
    write_json(folder / f"{name}.json", result)
    (folder / f"{name}.md").write_text(page(name, result))
    figure = tables_gpu.plot(result["cells"], heading(result))
    figure.savefig(folder / f"{name}.png", dpi=120)


def update_page(name: str, result: dict) -> None:
    text = f"{tables_gpu.summary(result['cells'])}\n\n{heading(result)} {pages.details(name)}"
    pages.replace_section(PAGE, MARKERS, text)


def update_crossover(result: dict) -> None:
    """Replaces what the file says of this capability and dtype; the rest stays."""
    m = result["machine"]
    measured = f"{m['gpu']}, torch {m['torch']}, {result['date']}, commit {m['commit'][:10]}"
    data = json.loads(CROSSOVER.read_text()) if CROSSOVER.exists() else {}
    found = crossover.summarize(result["cells"], measured)
    data[m["capability"]] = data.get(m["capability"], {}) | found
    CROSSOVER.write_text(json.dumps(data, indent=1) + "\n")


def grid_of(verb: str, dtype: torch.dtype, quick: bool) -> Grid:
    if quick:
        return replace(QUICK, dtype=dtype)
    if verb == "decode":
        return Grid(dtype=dtype)
    return replace(crossover.GRID, dtype=dtype)


def part_of(grid: Grid, part: Part) -> Grid:
    """Its share of the shapes: the largest first, each goes to the part with the fewest weights."""
    place, count = part
    shares: list[list[tuple[int, int]]] = [[] for _ in range(count)]
    for shape in sorted(grid.shapes, key=math.prod, reverse=True):
        min(shares, key=lambda share: sum(map(math.prod, share))).append(shape)
    return replace(grid, shapes=[shape for shape in grid.shapes if shape in shares[place - 1]])


def parse_part(text: str) -> Part:
    place, _, count = text.partition("/")
    if not (place.isdigit() and count.isdigit() and 1 <= int(place) <= int(count)):
        raise argparse.ArgumentTypeError(f"expected 1/2 or the like, got {text}")
    return int(place), int(count)


def main(arguments: list[str]) -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    verbs = parser.add_subparsers(dest="verb", required=True)
    for verb in ("decode", "crossover"):
        options = verbs.add_parser(verb)
        options.add_argument("--dtype", choices=("bfloat16", "float16"), default="bfloat16")
        options.add_argument("--out", type=Path)
        options.add_argument("--commit", help="where there is no repository")
        options.add_argument("--quick", action="store_true")
        options.add_argument("--part", type=parse_part, help="1/2: the first half of the shapes")
    verbs.add_parser("publish").add_argument("files", type=Path, nargs="+")
    args = parser.parse_args(arguments)
    if args.verb == "publish":
        publish(joined([json.loads(file.read_text()) for file in args.files]))
        return 0
    if not torch.cuda.is_available():
        raise SystemExit("bench-gpu: torch finds no NVIDIA GPU")

    folder = args.out or PARTIAL
    suffix = "-{}of{}".format(*args.part) if args.part else ""
    path = folder / f"{args.verb}-{args.dtype}{suffix}.json"
    if args.verb == "decode" and (reason := peers_gpu.stream(1).missing):
        raise SystemExit(f"bench-gpu: nothing to measure: {reason}")
    grid = grid_of(args.verb, getattr(torch, args.dtype), args.quick)
    if args.part:
        grid = part_of(grid, args.part)
    result = measure(args.verb, grid, path, args.commit, args.part)
    print(digest(result))
    print(f"{len(result['cells'])} cells in {result['seconds']:.0f} s: {path}")
    if bad := tables_gpu.failures(result["cells"]):
        print("\n".join(["Failed or wrong:", *bad[:20]]))
        return 1
    if not args.quick and not args.out and not args.part:
        publish(result)
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
