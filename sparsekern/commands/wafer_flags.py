"""What the flags of `wafer` commands say of a model, its zeros and the machine."""

import argparse
import json
import sys
from dataclasses import replace
from pathlib import Path

from ..gpt.flags import check_sparsity
from ..wafer.inputs import ACTIVATIONS, STREAM_FORMATS, Inputs
from ..wafer.machine import BYTES_PER_ELEM, MACHINES
from ..wafer.models import model_shape
from ..wafer.shapes import GPT_SHAPES, GPTShape

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
MACHINE_HELP = "one of " + ", ".join(MACHINES) + ", or a TOML file of your own"
MODEL_HELP = "one of: " + ", ".join(GPT_SHAPES) + "; or the config.json of a Hugging Face model"


def add_model(parser: argparse.ArgumentParser) -> None:
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


def add_machine(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--machine", default="wse2", help=MACHINE_HELP)
    add_inputs(parser)


def add_inputs(parser: argparse.ArgumentParser) -> None:
    default = Inputs()
    for name, text in INPUT_FLAGS.items():
        value = getattr(default, name)
        parser.add_argument(
            f"--{name.replace('_', '-')}", type=type(value), default=value, help=f"{text} ({value})"
        )
    parser.add_argument("--precision", choices=BYTES_PER_ELEM, default=default.precision)
    parser.add_argument("--stream-format", choices=STREAM_FORMATS, default=default.stream_format)
    parser.add_argument("--activations", choices=ACTIVATIONS, default=default.activations)


def inputs_of(options: dict) -> Inputs:
    names = (*INPUT_FLAGS, "precision", "stream_format", "activations")
    return Inputs(**{name: options[name] for name in names})


def shape_of(options: dict) -> GPTShape:
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


def density_of_model(options: dict) -> tuple[float, str]:
    """That of its linear layers, and what to tell of it: nothing where it was given."""
    if options["sparsity"] is not None:
        return density_of(options["sparsity"]), ""
    if pruned := _pruned(options["model"]):
        path, found = pruned
        text = f"sparsity: {found:.4g} is that of {path}, as --sparsity was not given; which "
        return 1 - found, text + "weights are zero is not read: the masks are taken as random"
    text = f"sparsity: {DEFAULT_SPARSITY} is the default, as --sparsity was not given"
    if options["model"] not in (None, *GPT_SHAPES):
        text += f"; of {options['model']} its config is read, not how many weights are zero"
    return density_of(DEFAULT_SPARSITY), text


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


def density_of(sparsity: float) -> float:
    check_sparsity(sparsity)
    return 1 - sparsity


def tell(text: str) -> None:
    if text:
        print(text, file=sys.stderr)
