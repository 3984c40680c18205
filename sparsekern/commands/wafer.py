"""python -m sparsekern wafer {predict, sweep, validate, compare, sensitivity}"""

import argparse
import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

from ..bench import records
from ..bench.rates import derived
from ..files import atomic_write, check_writable
from ..terminal import Progress
from ..wafer import compare as comparing
from ..wafer import plots, predict, sensitivity, sweep
from ..wafer.balance import Mask
from ..wafer.cost import Weight, compare_with_dense
from ..wafer.inference import inference_cost
from ..wafer.inputs import ACTIVATIONS, STREAM_FORMATS, Inputs
from ..wafer.machine import BYTES_PER_ELEM, MACHINES, machine
from ..wafer.shapes import GPT_SHAPES, GPTShape, gpt_shape
from ..wafer.validation import mesh, pe_kernels, validate

INPUT_FLAGS = {
    "utilisation": "share of the datapath's rate that is reached; an input, never a result",
    "axpy_overhead_cycles": "cycles a nonzero costs beside its AXPY",
    "attention_efficiency": "rate of attention over that of a dense product",
    "column_groups": "groups of columns side by side; 0 takes the fastest",
}
MACHINE_HELP = "one of " + ", ".join(MACHINES) + ", or a TOML file of your own"


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

    added = command("predict", _run_predict, "one training step, and inference")
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
    added.add_argument("--sources", action="store_true", help="every figure with its source")
    added.set_defaults(checkpoint_weights=checkpoint_weights)

    added = command("sweep", _run_sweep, "every combination of the lists given")
    added.add_argument("--models", nargs="+", default=sweep.MODELS, choices=GPT_SHAPES)
    added.add_argument("--sparsities", nargs="+", type=float, default=sweep.SPARSITIES)
    added.add_argument("--machines", nargs="+", default=["wse2"], help=MACHINE_HELP)
    added.add_argument("--systems", nargs="+", type=int, default=[1])
    added.add_argument("--batch", type=int, help="sequences of all systems (each is filled)")
    added.add_argument(
        "--plots", type=Path, metavar="FOLDER", help="draw there, for the first machine"
    )
    added.add_argument(
        "--data", type=Path, help="CSV files: adds their points to the imbalance plot"
    )
    _add_inputs(added)

    added = command("validate", _run_validate, "every published point; fails where one must hold")
    added.add_argument("--data", type=Path, help="folder of the CSV files of pr0f3ss/SpMM_Cerebras")

    added = command("compare", _run_compare, "measured speed-ups beside the wafer's")
    added.add_argument("--results", type=Path, nargs="+", help="tables (bench/results/*.csv)")
    added.add_argument("--match", default="", help="only measurements with this in their name")
    _add_machine(added)
    added.set_defaults(benchmark_mask=benchmark_mask)

    added = command(
        "sensitivity", _run_sensitivity, "each input 20%% down and up, and over its range"
    )
    _add_model(added)
    _add_machine(added)
    added.add_argument("--plots", type=Path, metavar="FOLDER", help="draw the bars there")


def _add_model(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--model", default="gpt3-xl", help="one of: " + ", ".join(GPT_SHAPES))
    for name in ("layers", "width", "ffn", "vocabulary", "sequence"):
        parser.add_argument(f"--{name}", type=int, help="instead of the model's")
    parser.add_argument(
        "--sparsity", type=float, default=0.75, help="of the linear layers (%(default)s)"
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
    shape = gpt_shape(options["model"])
    names = ("layers", "width", "ffn", "vocabulary", "sequence")
    given = {name: options[name] for name in names if options[name] is not None}
    if "width" in given:
        given.setdefault("ffn", 4 * given["width"])
    return replace(shape, **given, name=f"{shape.name}, changed") if given else shape


def _density(options: dict) -> float:
    if not 0 <= options["sparsity"] < 1:
        raise ValueError(f"sparsity: expected 0 <= sparsity < 1, got {options['sparsity']}")
    return 1 - options["sparsity"]


def _batch(options: dict, shape: GPTShape, systems: int) -> int:
    if options["batch"] is not None:
        return options["batch"]
    return max(1, sweep.FULL_TOKENS // shape.sequence) * systems


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
    inputs, wafer, systems = _inputs(options), machine(options["machine"]), options["systems"]
    with Progress(None, unit="part") as progress:
        if path := options["checkpoint"]:
            progress.about(f"reading {path}")
            shape, weights = options["checkpoint_weights"](path)
            progress.about(f"predicting from the masks of {len(weights)} layers")
            kept = sum(w.n * w.k * w.density for w in weights) / shape.linear_fma
        else:
            shape = _shape(options)
            weights = kept = _density(options)
        batch = _batch(options, shape, systems)
        found = compare_with_dense(
            wafer, shape, weights, batch, systems, inputs, options["micro_batch"]
        )
    inference = inference_cost(wafer, shape, kept, inputs)
    print(predict.render(shape, found, inference))
    if options["sources"]:
        print("\n" + predict.render_sources(wafer, inputs))
    _write_json(options["json"], predict.as_dict(shape, found, inference))


def _run_sweep(**options) -> None:
    inputs = _inputs(options)
    for sparsity in options["sparsities"]:
        _density({"sparsity": sparsity})
    rows = sweep.sweep(
        options["models"],
        options["sparsities"],
        options["machines"],
        options["systems"],
        options["batch"],
        inputs,
    )
    print(sweep.render(rows))
    print("\n" + predict.UNVALIDATED)
    _write_json(options["json"], [row.as_dict() for row in rows])
    if options["plots"]:
        wafer = machine(options["machines"][0])
        figures = {
            "speedup": plots.speedup(wafer, inputs),
            "roofline": plots.roofline(wafer, inputs),
            "imbalance": plots.imbalance(_measured_imbalance(options["data"])),
        }
        for name in options["models"]:
            figures[f"stacked-time-{name}"] = plots.stacked_time(wafer, inputs, gpt_shape(name))
            figures[f"total-cost-{name}"] = plots.total_cost(wafer, inputs, gpt_shape(name))
        for path in plots.write(options["plots"], figures):
            print(f"wrote {path}")


def _measured_imbalance(data: Path | None) -> list[tuple[float, float]]:
    if data is None:
        return []
    rows = [row for kind in ("CSC", "CSR") for row in pe_kernels.load(data, kind)]
    return [
        (pe_kernels.features(row, "CSC")[0], row["max_cycles"] / row["avg_cycles"]) for row in rows
    ]


def _run_validate(**options) -> int:
    with Progress(len(mesh.PROBLEMS), unit="mesh") as progress:
        found = validate.validate(options["data"], progress.advance)
    print(validate.render(found))
    _write_json(options["json"], found.as_dict())
    return 1 if found.failed else 0


def _run_compare(**options) -> None:
    paths = options["results"] or sorted(Path("bench/results").glob("*.csv"))
    if not paths:
        raise ValueError("results: none in bench/results; give --results")
    results = {path.stem: _measured(path) for path in paths}
    with Progress(None, unit="measurement") as progress:
        pairs = comparing.compare(
            machine(options["machine"]),
            results,
            _inputs(options),
            options["benchmark_mask"],
            options["match"],
            progress=lambda pair: progress.advance(f"{pair.what}, {pair.sparsity:.0%} zeros"),
        )
    print(comparing.render(pairs))
    _write_json(options["json"], [pair.as_dict() for pair in pairs])


def _measured(path: Path) -> list[dict]:
    """The cases of a table in which dense was timed too."""
    try:
        cases = derived(records.read(path))
    except (FileNotFoundError, ValueError) as error:
        raise type(error)(f"results: {error}") from error
    return [case for case in cases if "speedups" in case]


def _run_sensitivity(**options) -> None:
    shape = _shape(options)
    swings = sensitivity.sensitivity(
        machine(options["machine"]),
        shape,
        _density(options),
        _batch(options, shape, 1),
        _inputs(options),
    )
    print(sensitivity.render(swings))
    _write_json(options["json"], [vars(swing) for swing in swings])
    if options["plots"]:
        figures = {"sensitivity": plots.sensitivity_bars(swings)}
        for path in plots.write(options["plots"], figures):
            print(f"wrote {path}")
