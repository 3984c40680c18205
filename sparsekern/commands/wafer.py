"""python -m sparsekern wafer COMMAND: predict, sweep, product, calibrate, validate, compare,
sensitivity."""

import argparse
import json
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

from ..bench import records
from ..bench.rates import derive
from ..files import atomic_write, check_writable
from ..terminal import Progress
from ..wafer import compare as comparing
from ..wafer import plots, render, sensitivity
from ..wafer.balance import Mask
from ..wafer.cost import Weight
from ..wafer.gpu import DECODE, GPUS, TRAINING, gpu
from ..wafer.inputs import ACTIVATIONS, STREAM_FORMATS, Inputs
from ..wafer.machine import BYTES_PER_ELEM, MACHINES, machine
from ..wafer.models import model_shape
from ..wafer.predict import predict
from ..wafer.product import offloaded_s
from ..wafer.runs import PUBLISHED, calibrate, read_runs, render_calibration
from ..wafer.shapes import GPT_SHAPES, GPTShape
from ..wafer.sweep import MODELS, SPARSITIES, default_batch, sweep
from ..wafer.sweep import render as render_sweep
from ..wafer.validation import mesh, pe_kernels, validate

INPUT_FLAGS = {
    "utilisation": "share of the datapath's rate that is reached, calibrated",
    "score_cycles": "cycles a score of attention costs beside its multiply-adds, calibrated",
    "element_cycles": "cycles an element of norms and activations costs",
    "axpy_overhead_cycles": "cycles a nonzero costs beside its AXPY",
    "attention_efficiency": "rate of attention's multiply-adds over that of a dense product",
    "column_groups": "groups of columns side by side; 0 takes the fastest",
}
SHAPE_FLAGS = ("layers", "width", "heads", "kv_heads", "ffn", "experts", "experts_per_token")
SHAPE_FLAGS += ("vocabulary", "sequence")
DEFAULT_MODEL, DEFAULT_SPARSITY = "gpt3-xl", 0.75
RUN, PRUNED = "checkpoint.pt", "prune.json"  # what `train` and `prune` write
PREDICT_FLAGS = ("batch", "systems", "micro_batch", "context", "requests", "pipeline")
MACHINE_HELP = "one of " + ", ".join(MACHINES) + ", or a TOML file of your own"
MODEL_HELP = "one of: " + ", ".join(GPT_SHAPES) + "; or the config.json of a Hugging Face model"
RESULTS = Path("bench/results")
MEASURED = (*comparing.PRODUCTS, TRAINING, DECODE)  # ops
MEASURED_HERE = ("*-train-*.csv", "generate-*.csv")  # that predict sets beside


def add_commands(
    parser: argparse.ArgumentParser,
    checkpoint_weights: Callable[[Path], tuple[GPTShape, tuple[Weight, ...]]],
    benchmark_mask: Callable[[dict], Mask | None],
) -> None:
    """The last two read what needs torch: a checkpoint, and the masks of measurements."""
    commands = parser.add_subparsers(dest="wafer_command", metavar="COMMAND", title="commands")

    def command(name: str, run: Callable, text: str) -> argparse.ArgumentParser:
        added = commands.add_parser(name, help=text)
        added.set_defaults(run=lambda **options: _checked(run, options))
        added.add_argument("--json", type=Path, metavar="FILE", help="write the numbers there")
        return added

    added = command("predict", _run_predict, "how fast, what bounds it, how sure: one screen")
    _add_model(added)
    _add_machine(added)
    added.add_argument(
        "--checkpoint",
        type=Path,
        help="of ours: its shape and its actual masks, in place of a model's",
    )
    added.add_argument(
        "--micro-batch", type=int, help="sequences on a system at a time (its share)"
    )
    added.add_argument("--systems", type=int, default=1, help="data parallel (%(default)s)")
    added.add_argument("--context", type=int, help="tokens in the cache at decode (at most 2048)")
    added.add_argument("--requests", type=int, default=1, help="that decode together (%(default)s)")
    added.add_argument(
        "--pipeline", type=int, default=1, help="systems that share a model at decode (%(default)s)"
    )
    added.add_argument(
        "--beside",
        nargs="*",
        default=["h200"],
        metavar="GPU",
        help="GPUs whose roofline stands beside (h200): " + ", ".join(GPUS) + ", or a TOML file",
    )
    added.add_argument("--details", action="store_true", help="every term of every layer")
    added.add_argument("--sources", action="store_true", help="every figure with its source")
    added.set_defaults(checkpoint_weights=checkpoint_weights)

    added = command("sweep", _run_sweep, "every combination of the lists given")
    added.add_argument("--models", nargs="+", default=MODELS, help=MODEL_HELP)
    added.add_argument("--sparsities", nargs="+", type=float, default=SPARSITIES)
    added.add_argument("--machines", nargs="+", default=["wse2"], help=MACHINE_HELP)
    added.add_argument("--systems", nargs="+", type=int, default=[1])
    added.add_argument("--sequences", nargs="+", type=int, help="tokens of one (the model's)")
    added.add_argument(
        "--batch", nargs="+", type=int, help="sequences of all systems (each is filled)"
    )
    added.add_argument("--utilisations", nargs="+", type=float, help="(that of --utilisation)")
    added.add_argument(
        "--plots", type=Path, metavar="FOLDER", help="draw there, for the first machine"
    )
    added.add_argument(
        "--data", type=Path, help="CSV files: adds their points to the imbalance plot"
    )
    _add_inputs(added)

    added = command("product", _run_product, "one product, with and without its way from a host")
    for name, text in (("tokens", "M"), ("n", "out_features"), ("k", "in_features")):
        added.add_argument(f"--{name}", type=int, required=True, help=text)
    added.add_argument("--sparsity", type=float, default=0.9, help="of W (%(default)s)")
    _add_machine(added)

    added = command("calibrate", _run_calibrate, "fit utilisation and a score's cost to runs")
    added.add_argument(
        "file", type=Path, nargs="?", default=PUBLISHED, help="TOML (the published runs)"
    )
    _add_inputs(added)

    added = command("validate", _run_validate, "every published point; fails where one must hold")
    added.add_argument("--data", type=Path, help="folder of the CSV files of pr0f3ss/SpMM_Cerebras")

    added = command("compare", _run_compare, "measured speed-ups beside the wafer's")
    added.add_argument(
        "--results", type=Path, nargs="+", help=f"tables, or their folder ({RESULTS})"
    )
    added.add_argument("--match", default="", help="only measurements with this in their name")
    added.add_argument(
        "--masks",
        choices=comparing.MASKS,
        default=comparing.MASKS[0],
        help="of products on a CPU: as random as theirs, or made again, which takes minutes "
        "(%(default)s)",
    )
    _add_machine(added)
    added.set_defaults(benchmark_mask=benchmark_mask)

    added = command(
        "sensitivity", _run_sensitivity, "each input 20%% down and up, and over its range"
    )
    _add_model(added)
    _add_machine(added)
    added.add_argument("--plots", type=Path, metavar="FOLDER", help="draw the bars there")


def _add_model(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--model", help=f"{MODEL_HELP} ({DEFAULT_MODEL})")
    for name in SHAPE_FLAGS:
        parser.add_argument(f"--{name.replace('_', '-')}", type=int, help="instead of the model's")
    parser.add_argument("--gated", action="store_true", help="an MLP of three matrices")
    parser.add_argument(
        "--sparsity",
        type=float,
        help=f"of the linear layers ({DEFAULT_SPARSITY}; of a model with {PRUNED} what that says)",
    )
    parser.add_argument("--batch", type=int, help="sequences of all systems (each is filled)")


def _add_machine(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--machine", default="wse2", help=MACHINE_HELP)
    _add_inputs(parser)


def _add_inputs(parser: argparse.ArgumentParser) -> None:
    default = Inputs()
    for name, text in INPUT_FLAGS.items():
        value = getattr(default, name)
        parser.add_argument(
            f"--{name.replace('_', '-')}", type=type(value), default=value, help=f"{text} ({value})"
        )
    parser.add_argument("--precision", choices=BYTES_PER_ELEM, default=default.precision)
    parser.add_argument("--stream-format", choices=STREAM_FORMATS, default=default.stream_format)
    parser.add_argument("--activations", choices=ACTIVATIONS, default=default.activations)


def _inputs(options: dict) -> Inputs:
    names = (*INPUT_FLAGS, "precision", "stream_format", "activations")
    return Inputs(**{name: options[name] for name in names})


def _shape(options: dict) -> GPTShape:
    model = DEFAULT_MODEL if options["model"] is None else options["model"]
    if Path(model, RUN).is_file() and not Path(model, "config.json").is_file():
        raise ValueError(
            f"model: {model} is a run of `sparsekern train`, whose shape and masks "
            f"`wafer predict --checkpoint {model}` reads"
        )
    shape = model_shape(model)
    given = {name: options[name] for name in SHAPE_FLAGS if options[name] is not None}
    if "width" in given:
        given.setdefault("ffn", 4 * given["width"])
        given["head_size"] = 0
    if "heads" in given:
        given.setdefault("kv_heads", 0)
    if options["gated"]:
        given["is_gated"] = True
    return replace(shape, **given, name=f"{shape.name}, changed") if given else shape


def _density_of_model(options: dict) -> tuple[float, str]:
    """That of its linear layers, and what to tell of it: nothing where it was given."""
    if options["sparsity"] is not None:
        return _density(options["sparsity"]), ""
    if pruned := _pruned(options["model"]):
        path, found = pruned
        text = f"sparsity: {found:.4g} is that of {path}, as --sparsity was not given; which "
        return 1 - found, text + "weights are zero is not read: the masks are taken as random"
    text = f"sparsity: {DEFAULT_SPARSITY} is the default, as --sparsity was not given"
    if options["model"] not in (None, *GPT_SHAPES):
        text += f"; of {options['model']} its config is read, not how many weights are zero"
    return _density(DEFAULT_SPARSITY), text


def _pruned(model: str | None) -> tuple[Path, float] | None:
    """The table that `sparsekern prune` wrote beside a model, and its share of zeros."""
    if model in (None, *GPT_SHAPES):
        return None
    path = Path(model) / PRUNED if Path(model).is_dir() else Path(model).with_name(PRUNED)
    try:
        found = json.loads(path.read_text("utf-8"))["sparsity"]
        return (path, found) if 0 <= found < 1 else None
    except (OSError, ValueError, LookupError, TypeError):  # none, or not ours
        return None


def _density(sparsity: float) -> float:
    if not 0 <= sparsity < 1:
        hint = f"; did you mean {sparsity / 100:g}?" if 1 < sparsity < 100 else ""
        raise ValueError(f"sparsity: expected 0 <= sparsity < 1, got {sparsity}{hint}")
    return 1 - sparsity


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
    inputs, wafer = _inputs(options), machine(options["machine"])
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
            shape = _shape(options)
            weights, told = _density_of_model(options)
        found = predict(
            wafer,
            shape,
            weights,
            inputs=inputs,
            gpus=beside,
            results={path.stem: _measured(path) for path in _measured_here()} if beside else {},
            **{name: options[name] for name in PREDICT_FLAGS},
        )
    print(render.render(found))
    _tell(told)
    if options["details"]:
        print("\n" + render.render_details(found))
    if options["sources"]:
        print("\n" + render.render_sources(wafer, inputs, beside))
    _write_json(options["json"], render.as_dict(found))


def _tell(text: str) -> None:
    if text:
        print(text, file=sys.stderr)


def _measured_here() -> list[Path]:
    return sorted(path for pattern in MEASURED_HERE for path in RESULTS.glob(pattern))


def _run_sweep(**options) -> None:
    inputs = _inputs(options)
    for sparsity in options["sparsities"]:
        _density(sparsity)
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
    inputs, wafer = _inputs(options), machine(options["machine"])
    sizes = [options[name] for name in ("tokens", "n", "k")]
    dense, sparse = (
        offloaded_s(wafer, inputs, *sizes, d) for d in (1.0, _density(options["sparsity"]))
    )
    print(render.render_product(wafer, sizes, options["sparsity"], dense, sparse))
    names = ("wafer_s", "transfer_s")
    found = {"dense": dense, "sparse": sparse}
    _write_json(
        options["json"], {key: dict(zip(names, x, strict=True)) for key, x in found.items()}
    )


def _run_calibrate(**options) -> None:
    found = calibrate(read_runs(options["file"]), _inputs(options))
    print(render_calibration(found))
    _write_json(options["json"], found.as_dict())


def _run_validate(**options) -> int:
    with Progress(len(mesh.PROBLEMS), unit="mesh") as progress:
        found = validate.validate(options["data"], progress.advance)
    print(validate.render(found))
    _write_json(options["json"], found.as_dict())
    return 0 if found.is_as_known else 1


def _run_compare(**options) -> None:
    given = options["results"] or [RESULTS] * RESULTS.is_dir()
    paths = [table for path in given for table in _tables(path)]
    if not paths:
        where = ", ".join(map(str, given or [RESULTS]))
        raise ValueError(f"results: no table in {where}; give --results with a file or a folder")
    results = {path.stem: _measured(path) for path in paths}
    masks = {"mask_of": options["benchmark_mask"]} if options["masks"] == comparing.ACTUAL else {}
    with Progress(comparing.count(results, options["match"]), unit="measurement") as progress:
        pairs = comparing.compare(
            machine(options["machine"]),
            results,
            _inputs(options),
            match=options["match"],
            progress=lambda pair: progress.advance(f"{pair.what}, {pair.sparsity:.0%} zeros"),
            **masks,
        )
    print(comparing.render(pairs))
    _write_json(options["json"], [pair.as_dict() for pair in pairs])


def _tables(path: Path) -> list[Path]:
    """Those of a folder, or the file itself."""
    return sorted(path.glob("*.csv")) if path.is_dir() else [path]


def _measured(path: Path) -> list[dict]:
    """The cases of a table in which dense was timed too, each with the GPU it ran on."""
    try:
        run = records.read(path)
        cases = [derive(case) for case in records.cases(run.records) if case.get("op") in MEASURED]
    except (FileNotFoundError, ValueError) as error:
        raise type(error)(f"results: {error}") from error
    device = (run.about.get("machine") or {}).get("gpu") or ""
    return [case | {"gpu": device} for case in cases if "speedups" in case]


def _run_sensitivity(**options) -> None:
    shape, inputs = _shape(options), _inputs(options)
    batch = options["batch"] if options["batch"] is not None else default_batch(shape, 1)
    density, told = _density_of_model(options)
    swings = sensitivity.sensitivity(machine(options["machine"]), shape, density, batch, inputs)
    print(sensitivity.render(swings))
    _tell(told)
    _write_json(options["json"], [vars(swing) for swing in swings])
    if options["plots"]:
        _write_plots(options["plots"], {"sensitivity": plots.sensitivity_bars(swings, inputs)})
