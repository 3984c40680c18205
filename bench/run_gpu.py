"""The GPU benchmark: products of few tokens, and the density at which each kernel becomes fastest.

python bench/run_gpu.py decode      results/<GPU>-decode-<dtype>-<date>.*, docs/benchmarks.md
python bench/run_gpu.py prompts     results/<GPU>-prompts-<dtype>-<date>.*: 96 tokens and more
python bench/run_gpu.py two-way     results/<GPU>-two-way-<dtype>-<date>.*: 2:4 and E4M3, packed
python bench/run_gpu.py eight-bits  results/<GPU>-eight-bits-bfloat16-<date>.*: decode in 8 bits
python bench/run_gpu.py crossover   sparsekern/kernels/crossover.json
python bench/run_gpu.py layouts     results/<GPU>-layouts-*, sparsekern/kernels/packed_times.json
python bench/run_gpu.py generate    results/<GPU>-generate-<preset>-<date>.*: generate_gpu.py
python bench/run_gpu.py train            results/<GPU>-train-bfloat16-<date>.*: whole steps of GPTs
python bench/run_gpu.py train-products   their three products alone, and what is written out
python bench/run_gpu.py train-memory     memory of a step; --largest: the most sequences that fit
python bench/run_gpu.py least-size       sparsekern/kernels/least_sizes.json
python bench/run_gpu.py scale            results/<GPU>-scale-bfloat16-<date>.*: on several GPUs;
                                         --cells MODEL/MASK ...: results/<GPU>-scale-cells-*
python bench/run_gpu.py models           results/<GPU>-models-bfloat16-<date>.*: of transformers;
                                         --compiled: layers of one, with torch.compile
python bench/run_gpu.py publish X.csv   the same from a file that --out FOLDER wrote

With --out only the table is written, there: to measure on a machine without the repository or
without matplotlib. --part 1/2 and --part 2/2 share the shapes out, to two GPUs; `publish` then gets
both files. --dtype float16; --quick: one small shape, nothing is published.
"""

import argparse
import json
import math
import sys
import time
from dataclasses import replace
from pathlib import Path

import decode
import eight_bits
import generate_gpu
import models_gpu
import pages
import scale
import tables_gpu
import torch
import train_gpu
import two_way

from sparsekern.bench import (
    ceilings,
    crossover,
    eight_bits_gpu,
    layouts_gpu,
    measure_gpu,
    peers_gpu,
    records,
    replay_gpu,
    scale_gpu,
    two_way_gpu,
)
from sparsekern.bench.machine import (
    about_cpu,
    about_gpu,
    about_run,
    gpu_under_load,
    in_words,
    source,
)
from sparsekern.bench.measure_gpu import Grid
from sparsekern.bench.rates import case_name, derive, derived
from sparsekern.bench.records import Run, select
from sparsekern.kernels.cuda import times
from sparsekern.report import plots
from sparsekern.report.curves import curves, tokens

CROSSOVER = pages.BENCH.parent / "sparsekern" / "kernels" / "crossover.json"
LIMIT_S = 230.0  # no new W is begun after so long

Part = tuple[int, int]  # (2, 3): the second of three

PROMPTS = Grid(
    shapes=[shape for shape in measure_gpu.SHAPES if math.prod(shape) < 2e8],
    tokens=(96, 128, 256, 512, 1024, 2048),
    sparsities=(0.75,),
    masks=("random",),
)
WAYS = {
    "decode": peers_gpu.decode_ways,
    "prompts": peers_gpu.prompt_ways,
    "crossover": peers_gpu.crossover_ways,
    "layouts": layouts_gpu.ways,
    "two-way": two_way_gpu.ways,
    "eight-bits": eight_bits_gpu.ways,
}
GRIDS = {
    "decode": Grid(),
    "prompts": PROMPTS,
    "crossover": crossover.GRID,
    "layouts": layouts_gpu.GRID,
    "two-way": replace(PROMPTS, tokens=(*PROMPTS.tokens, 8192), masks=("two-way",)),
    "eight-bits": eight_bits_gpu.GRID,
}


def machine() -> dict:
    """The machine measured on. nvidia-smi's numbers are read while copies keep the GPU busy."""
    limits = ceilings.of_gpu(torch.bfloat16)
    return (
        about_cpu() | about_gpu() | {"ceilings": {"cuda": limits}, "under_load": gpu_under_load()}
    )


def measure(verb: str, grid: Grid, path: Path, commit: str | None, part: Part | None = None) -> Run:
    """All cells; the file is written after each W, so that nothing is lost with a later one.
    `part`: which one of the whole `grid` is."""
    start = time.monotonic()
    ways = WAYS[verb]()
    generator = torch.Generator("cuda")
    about = about_run(verb, machine(), commit) | {"seed": generator.seed(), "is_whole": False}
    about["machine"]["missing"] = {w.name: w.missing for w in ways if w.missing}
    if part:
        about["part"] = part
    cells: list[dict] = []
    wanted = len(grid.masks) * len(grid.shapes) * len(grid.sparsities) * len(grid.tokens)
    # Graphs cannot be captured on the default stream.
    with torch.no_grad(), torch.cuda.stream(torch.cuda.Stream()):
        clock = replay_gpu.CudaClock()
        deadline = start + LIMIT_S
        rounds = decode.rounds_of(verb)
        for cell in measure_gpu.cells(grid, ways, clock, generator, rounds, deadline):
            cells.append(derive(cell))
            found = ", ".join(f"{name} {ratio:.2f}" for name, ratio in cell["speedups"].items())
            print(f"{time.monotonic() - start:4.0f} s {case_name(cell)}: {found}", flush=True)
            if cell["M"] == grid.tokens[-1]:
                records.write(path, about, records.flat(cells))
    about["is_whole"] = len(cells) == wanted
    about["machine"]["under_load_at_end"] = gpu_under_load()
    about["seconds"] = time.monotonic() - start
    records.write(path, about, records.flat(cells))
    return records.read(path)


PAGES = dict.fromkeys(("prompts", "layouts"), decode.page_of_prompts) | {"decode": decode.page}
PAGES |= {"two-way": two_way.page, "eight-bits": eight_bits.page}
PAGES |= {scale.WHOLE: scale.page, scale.CELLS: scale.page}
PAGES |= {models_gpu.PLAIN: models_gpu.page, models_gpu.COMPILED: models_gpu.page}
WHOLE = {"models": models_gpu, "scale": scale}  # verbs with cases of their own


def joined(runs: list[Run]) -> Run:
    """The run of all parts of a grid, in the order of the grid, about the machine of the first."""
    first, *others = runs
    if not others:
        return first
    if first.about["benchmark"] in train_gpu.PAGES:
        return train_gpu.joined(runs)
    if first.about["benchmark"] in (models_gpu.PLAIN, models_gpu.COMPILED):
        return models_gpu.joined(runs)
    places = sorted(tuple(run.about.get("part", ())) for run in runs)
    if places != [(i + 1, len(runs)) for i in range(len(runs))]:
        raise SystemExit(f"bench-gpu: expected all parts of a grid, once each, got {places}")

    train_gpu.check_of_one_measurement(runs)
    shapes = grid_of(first.about["benchmark"], torch.bfloat16, quick=False).shapes
    together = sorted(
        (record for run in runs for record in run.records),
        key=lambda r: (measure_gpu.MASKS.index(r["mask"]), shapes.index((r["N"], r["K"]))),
    )
    about = {name: value for name, value in first.about.items() if name != "part"}
    is_whole = all(run.about["is_whole"] for run in runs)
    return Run(about | {"is_whole": is_whole, "parts": len(runs)}, together)


def publish(run: Run) -> None:
    """Write the table, page, plot and section of a decode run, or the data file of a crossover."""
    if not run.about["is_whole"] or "part" in run.about:
        raise SystemExit("bench-gpu: not published, since some cells were not run")
    if tables_gpu.failures(derived(run)):
        raise SystemExit("bench-gpu: not published, since one of our kernels failed or was wrong")
    if run.about["benchmark"] in train_gpu.PAGES:
        train_gpu.publish(name_of(run), run)
    elif run.about["benchmark"] == "decode":
        name, cells, dtype = name_of(run), derived(run), run.records[0]["dtype"]
        drawn = curves(select(cells, mask="random"), lambda cell: cell["M"], tokens)
        pages.publish(pages.RESULTS, name, run, decode.page(name, run), plots.speedups(drawn))
        if dtype == "bfloat16":
            about = in_words(run.about, dtype)
            pages.update("bench-gpu", name, tables_gpu.summary(cells), about)
    elif make_page := PAGES.get(run.about["benchmark"]):
        pages.publish(pages.RESULTS, name_of(run), run, make_page(name_of(run), run), None)
        if run.about["benchmark"] == "layouts":
            found = layouts_gpu.summarize(derived(run), source(run.about))
            times.FILE.write_text(layouts_gpu.in_json(found))
        elif run.about["benchmark"] in (scale.WHOLE, scale.CELLS):
            scale.update(name_of(run), run)
    else:
        update_crossover(run)


def name_of(run: Run) -> str:
    benchmark, dtype = run.about["benchmark"], run.records[0]["dtype"]
    if not benchmark.endswith(dtype):
        benchmark += f"-{dtype}"
    return f"{pages.slug(run.about['machine']['gpu'])}-{benchmark}-{run.about['date']}"


def update_crossover(run: Run) -> None:
    """Replaces what the file says of this capability and dtype; the rest stays."""
    capability = run.about["machine"]["capability"]
    data = json.loads(CROSSOVER.read_text()) if CROSSOVER.exists() else {}
    found = crossover.summarize(derived(run), source(run.about))
    data[capability] = data.get(capability, {}) | found
    CROSSOVER.write_text(json.dumps(data, indent=1) + "\n")


def grid_of(verb: str, dtype: torch.dtype, quick: bool) -> Grid:
    grid = GRIDS[verb]
    if quick:
        grid = replace(measure_gpu.QUICK, masks=grid.masks[:1])
    return replace(grid, dtype=dtype)


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


def make_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    verbs = parser.add_subparsers(dest="verb", required=True)

    def measuring(verb: str) -> argparse.ArgumentParser:
        options = verbs.add_parser(verb)
        options.add_argument("--out", type=Path)
        options.add_argument("--commit", help="where there is no repository")
        return options

    for verb in WAYS:
        options = measuring(verb)
        options.add_argument("--dtype", choices=("bfloat16", "float16"), default="bfloat16")
        options.add_argument("--quick", action="store_true")
        options.add_argument("--part", type=parse_part, help="1/2: the first half of the shapes")
    for verb in train_gpu.PAGES:
        train_gpu.add_flags(verb, measuring(verb))
    options = measuring("models")
    options.add_argument("--limit-s", type=float, default=600.0, help="begin nothing after that")
    options.add_argument(
        "--sparsities", type=float, nargs="+", default=models_gpu.SPARSITIES, metavar="SHARE"
    )
    options.add_argument("--compiled", action="store_true", help="2 layers, with torch.compile")
    options = measuring("scale")
    options.add_argument("--gpus", type=int, help="so many alone; else 2, 4, ... that are there")
    scale_gpu.add_flags(options)
    verbs.add_parser("publish").add_argument("files", type=Path, nargs="+")
    return parser


def main(arguments: list[str]) -> int:
    if arguments[:1] == ["generate"]:
        generate_gpu.main(arguments[1:])
        return 0
    args = make_parser().parse_args(arguments)
    if args.verb == "publish":
        publish(joined([records.read(file) for file in args.files]))
        return 0
    if not torch.cuda.is_available():
        raise SystemExit("bench-gpu: torch finds no NVIDIA GPU")

    folder = args.out or pages.PARTIAL
    if args.verb in train_gpu.PAGES:
        return train(args, folder)
    if args.verb in WHOLE:
        run = WHOLE[args.verb].measure(machine(), folder / f"{args.verb}-bfloat16.csv", args)
        if not args.out:
            publish(run)
        return 0
    suffix = "-{}of{}".format(*args.part) if args.part else ""
    path = folder / f"{args.verb}-{args.dtype}{suffix}.csv"
    if args.verb != "crossover" and (reason := peers_gpu.few_tokens(1).missing):
        raise SystemExit(f"bench-gpu: nothing to measure: {reason}")
    grid = grid_of(args.verb, getattr(torch, args.dtype), args.quick)
    if args.part:
        grid = part_of(grid, args.part)
    run = measure(args.verb, grid, path, args.commit, args.part)
    cells = derived(run)
    if make_page := PAGES.get(args.verb):
        print(make_page(path.stem, run))
    else:
        print(crossover.summarize(cells, ""))
    print(f"{len(cells)} cells in {run.about['seconds']:.0f} s: {path}")
    if bad := tables_gpu.failures(cells):
        print("\n".join(["Failed or wrong:", *bad[:20]]))
        return 1
    if not args.quick and not args.out and not args.part:
        publish(run)
    return 0


def train(args: argparse.Namespace, folder: Path) -> int:
    model = getattr(args, "model", None)
    dtype = getattr(args, "dtype", "bfloat16")
    path = folder / f"{args.verb}-{dtype}{f'-{model}' if model else ''}.csv"
    run = train_gpu.measure(args, machine(), path)
    print(train_gpu.PAGES[args.verb](path.stem, run))
    print(f"{run.about['seconds']:.0f} s: {path}")
    if bad := tables_gpu.failures(derived(run)):
        print("\n".join(["Failed or wrong:", *bad]))
        return 1
    if not args.out and not model and not getattr(args, "quick", False):
        publish(run)
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
