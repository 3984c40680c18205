"""Speed-ups measured here (bench/results) beside the wafer's, for the same shapes and masks."""

import json
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

from ..terminal import table
from .balance import Mask
from .cost import compare_with_dense
from .inputs import Inputs
from .machine import Machine
from .product import FORWARD, INPUT_GRADIENT, WEIGHT_GRADIENT, product_cycles, stream_bytes
from .shapes import GPTShape
from .sweep import FULL_TOKENS

PRODUCTS = {"spmm": FORWARD, "spmm_t": INPUT_GRADIENT, "sddmm": WEIGHT_GRADIENT}
STEP = "train_step"


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
    progress: Callable[[Pair], None] = lambda pair: None,
) -> list[Pair]:
    """Pairs for every product and training step in the files of `results` with `match` in the name.

    `mask_of` makes the mask of a measurement on a CPU again from its parameters, or gives None:
    then, and for those on a GPU, a random one of its density is assumed. `progress` is
    called with each pair as it is found."""
    pairs = []
    for pair in _pairs(machine, results, inputs or Inputs(), mask_of, match):
        progress(pair)
        pairs.append(pair)
    if not pairs:
        raise ValueError(f"match: no measurement has {match!r} in its name")
    return pairs


def _pairs(
    machine: Machine,
    results: list[Path],
    inputs: Inputs,
    mask_of: Callable[[dict], Mask | None],
    match: str,
) -> Iterator[Pair]:
    for path in results:
        result = read(path)
        if result is None:
            raise ValueError(f"results: {path} is not a result of bench/run.py or bench/run_gpu.py")
        for benchmark in result.get("benchmarks", ()):
            info = benchmark["extra_info"]
            if "speedup" not in info or match not in benchmark["name"]:
                continue
            if info["op"] in PRODUCTS:
                mask = mask_of(info) if info["threads"] else None
                yield _product(machine, inputs, path, info, _where(info), mask)
            elif info["op"] == STEP:
                yield _step(machine, inputs, path, info)
        for info, kernel in _gpu_products(result.get("cells", ())):
            pair = _product(machine, inputs, path, info, kernel, None)
            if match in pair.what:
                yield pair


def read(path: Path) -> dict | None:
    """A result of bench/run.py or bench/run_gpu.py; None for any other JSON."""
    if not path.is_file():
        raise FileNotFoundError(f"results: {path} does not exist")
    try:
        result = json.loads(path.read_text())
    except json.JSONDecodeError:
        return None
    is_result = isinstance(result, dict) and ("benchmarks" in result or "cells" in result)
    return result if is_result else None


def _gpu_products(cells: list[dict]) -> Iterator[tuple[dict, str]]:
    """Our kernels' right products in a result of bench/run_gpu.py, with the kernel's name."""
    for cell in cells:
        density = cell["nnz"] / (cell["N"] * cell["K"])
        for kernel, speedup in cell["speedups"].items():
            if cell["ways"][kernel]["kind"] == "ours" and cell["ways"][kernel]["is_right"]:
                yield cell | {"density": density, "speedup": speedup, "is_cold": True}, kernel


def _product(
    machine: Machine, inputs: Inputs, path: Path, info: dict, how: str, mask: Mask | None
) -> Pair:
    n, k, product = info["N"], info["K"], PRODUCTS[info["op"]]
    pattern = info["density"] if mask is None else mask

    def seconds(tokens: int, weight: float | Mask, density: float) -> float:
        """Seconds of the product, or of its stream: weights in, or their gradients out."""
        cycles = product_cycles(machine, inputs, tokens, n, k, weight, product).total
        streamed = stream_bytes(inputs, n, k, density)
        if product == WEIGHT_GRADIENT:
            streamed = n * k * density * inputs.gradient_bytes
        return max(cycles / machine["clock_hz"], streamed / machine["io_bytes_per_s"])

    def speedup(tokens: int) -> float:
        return seconds(tokens, 1.0, 1.0) / seconds(tokens, pattern, info["density"])

    details = f"{info['dtype'].removeprefix('torch.')}, {how}"
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
        f"{STEP} {info['model']}, {info['M']} tokens, {_where(info)}",
        info["sparsity"],
        info["speedup"],
        full.flop_ratio,
        predicted(info["batch"]).speedup,
        full.speedup,
        "of its density",
    )


def _where(info: dict) -> str:
    return f"{info['threads']} threads" if info["threads"] else "GPU"


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
