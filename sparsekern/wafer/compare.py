"""Speed-ups measured here (bench/results) beside the wafer's, for the same shapes and masks."""

import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from ..text import table
from .balance import Mask
from .cost import compare_with_dense
from .inputs import Inputs
from .machine import Machine
from .product import (
    FORWARD,
    INPUT_GRADIENT,
    WEIGHT_GRADIENT,
    product_cycles,
    stream_bytes,
)
from .shapes import GPTShape
from .sweep import FULL_TOKENS

PRODUCTS = {"spmm": FORWARD, "spmm_t": INPUT_GRADIENT, "sddmm": WEIGHT_GRADIENT}
STEP = "train_step"


def results_in(folder: Path) -> list[Path]:
    """The results of products and training steps there; other benchmarks have other files."""
    found = sorted(folder.glob("*.json"))
    return [path for path in found if "benchmarks" in json.loads(path.read_text())]


@dataclass(frozen=True)
class Pair:
    """`same`: predicted for the tokens of the measurement; `full`: for as many as fill a wafer."""

    source: str
    what: str
    sparsity: float
    measured: float
    flop_ratio: float
    same: float
    full: float
    mask: str  # "actual", or why not

    def as_dict(self) -> dict[str, object]:
        return dict(vars(self))


def compare(
    machine: Machine,
    results: list[Path],
    inputs: Inputs | None = None,
    mask_of: Callable[[dict], Mask | None] = lambda workload: None,
    match: str = "",
) -> list[Pair]:
    """Of every product and training step in the JSON files of `results` with `match` in its name.

    `mask_of` makes the mask of a measurement again from its parameters, or gives None: then a
    random one of its density is assumed."""
    inputs = inputs or Inputs()
    pairs = []
    for path in results:
        try:
            benchmarks = json.loads(path.read_text())["benchmarks"]
        except (json.JSONDecodeError, KeyError, TypeError) as error:
            raise ValueError(f"results: {path} is not a result of bench/run.py") from error
        for benchmark in benchmarks:
            info = benchmark["extra_info"]
            if "speedup" not in info or match not in benchmark["name"]:
                continue
            if info["op"] in PRODUCTS:
                pairs.append(_product(machine, inputs, path, info, mask_of(info)))
            elif info["op"] == STEP:
                pairs.append(_step(machine, inputs, path, info))
    return pairs


def _product(machine: Machine, inputs: Inputs, path: Path, info: dict, mask: Mask | None) -> Pair:
    n, k, product = info["N"], info["K"], PRODUCTS[info["op"]]
    pattern = info["density"] if mask is None else mask

    def seconds(tokens: int, weight: float | Mask, density: float) -> float:
        """Of the product, or of its stream: weights in, or their gradients out."""
        cycles = product_cycles(machine, inputs, tokens, n, k, weight, product).total
        streamed = stream_bytes(inputs, n, k, density)
        if product == WEIGHT_GRADIENT:
            streamed = n * k * density * inputs.gradient_bytes
        return max(cycles / machine["clock_hz"], streamed / machine["io_bytes_per_s"])

    def speedup(tokens: int) -> float:
        return seconds(tokens, 1.0, 1.0) / seconds(tokens, pattern, info["density"])

    details = f"{info['dtype'].removeprefix('torch.')}, {info['threads']} threads"
    if info.get("is_cold"):
        details += ", cold"
    if info["mask"] != "random":
        details += f", {info['mask']}"
    return Pair(
        path.stem,
        f"{info['op']} {n}x{k}, {info['M']} tokens, {details}",
        info["sparsity"],
        info["speedup"],
        1 / info["density"],
        speedup(info["M"]),
        speedup(FULL_TOKENS),
        "of its density" if mask is None else "actual",
    )


def _step(machine: Machine, inputs: Inputs, path: Path, info: dict) -> Pair:
    width = info["width"]
    shape = GPTShape(
        info["model"], info["layers"], width, 1, 4 * width, info["vocabulary"], info["context"]
    )

    def predicted(batch: int):
        return compare_with_dense(machine, shape, 1 - info["sparsity"], batch, inputs=inputs)

    full = predicted(max(1, FULL_TOKENS // shape.sequence))
    return Pair(
        path.stem,
        f"{STEP} {info['model']}, {info['M']} tokens, {info['threads']} threads",
        info["sparsity"],
        info["speedup"],
        full.flop_ratio,
        predicted(info["batch"]).speedup,
        full.speedup,
        "of its density",
    )


def render(pairs: list[Pair]) -> str:
    header = ["measured here", "zeros", "speed-up here", "FLOPs"]
    header += ["wafer, same tokens", f"wafer, {FULL_TOKENS:,} tokens", "mask"]
    blocks = []
    for source in dict.fromkeys(pair.source for pair in pairs):
        rows = [
            [
                pair.what,
                f"{pair.sparsity:.0%}",
                f"{pair.measured:.2f}x",
                f"{pair.flop_ratio:.2f}x",
                f"{pair.same:.2f}x",
                f"{pair.full:.2f}x",
                pair.mask,
            ]
            for pair in pairs
            if pair.source == source
        ]
        blocks.append(f"{source}\n\n{table(header, rows)}")
    return "\n\n".join(blocks)
