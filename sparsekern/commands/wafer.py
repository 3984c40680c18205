"""python -m sparsekern wafer COMMAND: predict, sweep, product, calibrate, validate, compare,
sensitivity."""

import argparse
import json
from collections.abc import Callable
from pathlib import Path

from ..bench import records
from ..bench.rates import derive
from ..files import atomic_write, check_writable
from ..terminal import Progress
from ..wafer import compare as comparing
from ..wafer import plots, render, sensitivity
from ..wafer.balance import Mask
from ..wafer.gpu import DECODE, GPUS, TRAINING, gpu
from ..wafer.machine import machine
from ..wafer.models import model_shape
from ..wafer.predict import predict
from ..wafer.product import offloaded_s
from ..wafer.runs import PUBLISHED, calibrate, read_runs, render_calibration
from ..wafer.shapes import GPTShape
from ..wafer.sweep import MODELS, SPARSITIES, default_batch, sweep
from ..wafer.sweep import render as render_sweep
from ..wafer.validation import mesh, pe_kernels, validate
from ..wafer.weights import Weight
from .wafer_flags import (
    MACHINE_HELP,
    MODEL_HELP,
    SHAPE_FLAGS,
    add_inputs,
    add_machine,
    add_model,
    density_of,
    density_of_model,
    inputs_of,
    shape_of,
    tell,
)

PREDICT_FLAGS = ("batch", "systems", "micro_batch", "context", "requests", "pipeline")
RESULTS = Path("bench/results")
MEASURED = (*comparing.PRODUCTS, TRAINING, DECODE)  # ops
MEASURED_HERE = ("*-train-*.csv", "*generate-*.csv")  # that predict sets beside


def add_commands(
    parser: argparse.ArgumentParser,
    checkpoint_weights: Callable[[Path], tuple[GPTShape, tuple[Weight, ...]]],
    benchmark_mask: Callable[[dict], Mask | None],
) -> None:
    """The last two read what needs torch: a checkpoint, and the masks of measurements."""
    commands = parser.add_subparsers(metavar="COMMAND", title="commands")

    def command(name: str, run: Callable, text: str, add_flags: Callable, **more: object) -> None:
        added = commands.add_parser(name, help=text)
        added.set_defaults(run=lambda **options: _checked(run, options), **more)
        added.add_argument("--json", type=Path, metavar="FILE", help="write the numbers there")
        add_flags(added)

    text = "how fast, what bounds it, how sure: one screen"
    command("predict", _run_predict, text, _predict_flags, checkpoint_weights=checkpoint_weights)
    command("sweep", _run_sweep, "every combination of the lists given", _sweep_flags)
    text = "one product, with and without its way from a host"
    command("product", _run_product, text, _product_flags)
    text = "fit utilisation and a score's cost to runs"
    command("calibrate", _run_calibrate, text, _calibrate_flags)
    text = "every published point; fails where one must hold"
    command("validate", _run_validate, text, _validate_flags)
    text = "measured speed-ups beside the wafer's"
    command("compare", _run_compare, text, _compare_flags, benchmark_mask=benchmark_mask)
    text = "each input 20%% down and up, and over its range"
    command("sensitivity", _run_sensitivity, text, _sensitivity_flags)


def _predict_flags(parser: argparse.ArgumentParser) -> None:
    add_model(parser)
    add_machine(parser)
    parser.add_argument(
        "--checkpoint",
        type=Path,
        help="of ours: its shape and its actual masks, in place of a model's",
    )
    parser.add_argument(
        "--micro-batch", type=int, help="sequences on a system at a time (its share)"
    )
    parser.add_argument("--systems", type=int, default=1, help="data parallel (%(default)s)")
    parser.add_argument("--context", type=int, help="tokens in the cache at decode (at most 2048)")
    parser.add_argument(
        "--requests", type=int, default=1, help="that decode together (%(default)s)"
    )
    parser.add_argument(
        "--pipeline", type=int, default=1, help="systems that share a model at decode (%(default)s)"
    )
    parser.add_argument(
        "--beside",
        nargs="*",
        default=["h200"],
        metavar="GPU",
        help="GPUs whose roofline stands beside (h200): " + ", ".join(GPUS) + ", or a TOML file",
    )
    parser.add_argument("--details", action="store_true", help="every term of every layer")
    parser.add_argument("--sources", action="store_true", help="every figure with its source")


def _sweep_flags(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--models", nargs="+", default=MODELS, help=MODEL_HELP)
    parser.add_argument("--sparsities", nargs="+", type=float, default=SPARSITIES)
    parser.add_argument("--machines", nargs="+", default=["wse2"], help=MACHINE_HELP)
    parser.add_argument("--systems", nargs="+", type=int, default=[1])
    parser.add_argument("--sequences", nargs="+", type=int, help="tokens of one (the model's)")
    parser.add_argument(
        "--batch", nargs="+", type=int, help="sequences of all systems (each is filled)"
    )
    parser.add_argument("--utilisations", nargs="+", type=float, help="(that of --utilisation)")
    parser.add_argument(
        "--plots", type=Path, metavar="FOLDER", help="draw there, for the first machine"
    )
    parser.add_argument(
        "--data", type=Path, help="CSV files: adds their points to the imbalance plot"
    )
    add_inputs(parser)


def _product_flags(parser: argparse.ArgumentParser) -> None:
    for name, text in (("tokens", "M"), ("n", "out_features"), ("k", "in_features")):
        parser.add_argument(f"--{name}", type=int, required=True, help=text)
    parser.add_argument("--sparsity", type=float, default=0.9, help="of W (%(default)s)")
    add_machine(parser)


def _calibrate_flags(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "file", type=Path, nargs="?", default=PUBLISHED, help="TOML (the published runs)"
    )
    add_inputs(parser)


def _validate_flags(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--data", type=Path, help="folder of the CSV files of pr0f3ss/SpMM_Cerebras"
    )


def _compare_flags(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--results", type=Path, nargs="+", help=f"tables, or folders ({RESULTS})")
    parser.add_argument("--match", default="", help="only measurements with this in their name")
    parser.add_argument(
        "--masks",
        choices=comparing.MASKS,
        default=comparing.MASKS[0],
        help="of products on a CPU: as random as theirs, or made again, which takes minutes "
        "(%(default)s)",
    )
    add_machine(parser)


def _sensitivity_flags(parser: argparse.ArgumentParser) -> None:
    add_model(parser)
    add_machine(parser)
    parser.add_argument("--plots", type=Path, metavar="FOLDER", help="draw the bars there")


def _checked(run: Callable, options: dict) -> int | None:
    """Run a command, when its files can be written."""
    if options["json"]:
        check_writable("json", options["json"])
    if options.get("plots"):
        check_writable("plots", options["plots"] / "plot.png")
    return run(**options)


def _write_json(path: Path | None, value: object) -> None:
    if path:
        with atomic_write(path) as file:
            file.write((json.dumps(value, indent=1) + "\n").encode())


def _run_predict(**options) -> None:
    inputs, wafer = inputs_of(options), machine(options["machine"])
    beside = [gpu(name) for name in options["beside"]]
    told = ""
    with Progress(None, unit="part") as progress:
        if path := options["checkpoint"]:
            given = [f for f in ("model", "sparsity", *SHAPE_FLAGS) if options[f] is not None]
            if given or options["gated"]:
                also = (given or ["gated"])[0].replace("_", "-")
                raise ValueError(
                    f"checkpoint: expected its shape and masks alone, got --{also} too"
                )
            progress.about(f"reading {path}")
            shape, weights = options["checkpoint_weights"](path)
            progress.about(f"predicting from the masks of {len(weights)} layers")
        else:
            shape = shape_of(options)
            weights, told = density_of_model(options)
        found = predict(
            wafer,
            shape,
            weights,
            inputs=inputs,
            gpus=beside,
            results=_measured_here() if beside else {},
            **{name: options[name] for name in PREDICT_FLAGS},
        )
    print(render.render(found))
    tell(told)
    if options["details"]:
        print("\n" + render.render_details(found))
    if options["sources"]:
        print("\n" + render.render_sources(wafer, inputs, beside))
    _write_json(options["json"], render.as_dict(found))


def _measured_here() -> dict[str, list[dict]]:
    """Measured cases by the name of their table, the newest first."""
    paths = sorted(path for pattern in MEASURED_HERE for path in RESULTS.glob(pattern))
    tables = {path.stem: _measured(path) for path in paths}
    newest = sorted(tables, key=lambda name: tables[name][0], reverse=True)
    return {name: tables[name][1] for name in newest}


def _run_sweep(**options) -> None:
    inputs = inputs_of(options)
    for sparsity in options["sparsities"]:
        density_of(sparsity)
    lists = ("models", "sparsities", "machines", "systems", "batch", "sequences", "utilisations")
    models, sparsities, machines, systems, batch, sequences, utilisations = (
        options[name] for name in lists
    )
    total = 1
    for name in lists:
        total *= len(options[name] or [None])
    with Progress(total, unit="row") as progress:
        rows = sweep(
            *(models, sparsities, machines, systems, batch, inputs, sequences, utilisations),
            advance=progress.advance,
        )
    print(render_sweep(rows))
    print("\n" + plots.note(inputs) + "; " + render.UNVALIDATED)
    _write_json(options["json"], [row.as_dict() for row in rows])
    if options["plots"]:
        wafer = machine(machines[0])
        figures = {
            "speedup": plots.speedup(wafer, inputs),
            "roofline": plots.roofline(wafer, inputs),
            "decode": plots.decode(wafer, inputs),
            "imbalance": plots.imbalance(inputs, _measured_imbalance(options["data"])),
        }
        for shape in map(model_shape, models):
            figures[f"stacked-time-{shape.name}"] = plots.stacked_time(wafer, inputs, shape)
            figures[f"total-cost-{shape.name}"] = plots.total_cost(wafer, inputs, shape)
        _write_plots(options["plots"], figures)


def _write_plots(folder: Path, figures: dict[str, object]) -> None:
    with Progress(len(figures), unit="plot") as progress:
        for name, figure in figures.items():
            print(f"wrote {plots.write(folder, name, figure)}")
            progress.advance(name)


def _measured_imbalance(data: Path | None) -> list[tuple[float, float]]:
    if data is None:
        return []
    rows = [row for kind in ("CSC", "CSR") for row in pe_kernels.load(data, kind)]
    return [
        (pe_kernels.features(row, "CSC")[0], row["max_cycles"] / row["avg_cycles"]) for row in rows
    ]


def _run_product(**options) -> None:
    inputs, wafer = inputs_of(options), machine(options["machine"])
    sizes = [options[name] for name in ("tokens", "n", "k")]
    dense, sparse = (
        offloaded_s(wafer, inputs, *sizes, d) for d in (1.0, density_of(options["sparsity"]))
    )
    print(render.render_product(wafer, sizes, options["sparsity"], dense, sparse))
    names = ("wafer_s", "transfer_s")
    found = {"dense": dense, "sparse": sparse}
    _write_json(
        options["json"], {key: dict(zip(names, x, strict=True)) for key, x in found.items()}
    )


def _run_calibrate(**options) -> None:
    found = calibrate(read_runs(options["file"]), inputs_of(options))
    print(render_calibration(found))
    _write_json(options["json"], found.as_dict())


def _run_validate(**options) -> int:
    with Progress(len(mesh.PROBLEMS), unit="mesh") as progress:
        found = validate.validate(options["data"], progress.advance)
    print(validate.render(found))
    _write_json(options["json"], found.as_dict())
    return 0 if found.is_as_known else 1


def _run_compare(**options) -> None:
    paths = [path for given in options["results"] or [RESULTS] for path in _tables(given)]
    if not paths:
        given = ", ".join(map(str, options["results"] or [RESULTS]))
        raise ValueError(f"results: no table in {given}; give --results with a file or a folder")
    results = {path.stem: _measured(path)[1] for path in paths}
    masks = {"mask_of": options["benchmark_mask"]} if options["masks"] == comparing.ACTUAL else {}
    with Progress(comparing.count(results, options["match"]), unit="measurement") as progress:
        pairs = comparing.compare(
            machine(options["machine"]),
            results,
            inputs_of(options),
            match=options["match"],
            progress=lambda pair: progress.advance(f"{pair.what}, {pair.sparsity:.0%} zeros"),
            **masks,
        )
    print(comparing.render(pairs))
    _write_json(options["json"], [pair.as_dict() for pair in pairs])


def _tables(path: Path) -> list[Path]:
    """Those of a folder, or the one itself."""
    return sorted(path.glob("*.csv")) if path.is_dir() or path == RESULTS else [path]


def _measured(path: Path) -> tuple[str, list[dict]]:
    """The day of a table, and its cases in which dense was timed too, each with the GPU it ran
    on."""
    try:
        run = records.read(path)
        cases = [derive(case) for case in records.cases(run.records) if case.get("op") in MEASURED]
    except (FileNotFoundError, ValueError) as error:
        raise type(error)(f"results: {error}") from error
    except (AttributeError, LookupError, TypeError) as error:
        raise records.damaged(path, error) from error
    device = (run.about.get("machine") or {}).get("gpu") or ""
    found = [case | {"gpu": device} for case in cases if "speedups" in case]
    return run.about.get("date", ""), found


def _run_sensitivity(**options) -> None:
    shape, inputs = shape_of(options), inputs_of(options)
    batch = options["batch"] if options["batch"] is not None else default_batch(shape, 1)
    density, told = density_of_model(options)
    swings = sensitivity.sensitivity(machine(options["machine"]), shape, density, batch, inputs)
    print(sensitivity.render(swings))
    tell(told)
    _write_json(options["json"], [vars(swing) for swing in swings])
    if options["plots"]:
        _write_plots(options["plots"], {"sensitivity": plots.sensitivity_bars(swings, inputs)})
