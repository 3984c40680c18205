"""A GPU beside the wafer: a roofline of the same model, from a TOML file as a wafer's.

A training step is the dense FLOPs at the share of the peak that dense training reaches, or the
gradients' way over the links, whichever is longer. Decode reads the weights and the cache once.
What zeros bring on a GPU is no roofline: where a speed-up was measured it stands beside.
"""

from collections.abc import Iterable
from dataclasses import dataclass, fields
from pathlib import Path

from .figures import Figure, by_name_or_file, check_count, check_kinds, read_figures
from .inputs import Inputs
from .machine import BYTES_PER_ELEM
from .shapes import GPTShape

GPU_FILES = Path(__file__).parent / "gpus"
UNITS = {
    "peak16_flop_per_s": "FLOP/s",
    "peak32_flop_per_s": "FLOP/s",
    "memory_bytes": "bytes",
    "memory_bytes_per_s": "bytes/s",
    "link_bytes_per_s": "bytes/s",
    "peak_share": "share",
    "memory_share": "share",
    "power_w": "W",
}
# Weights and gradients in 16 bits; fp32 weights and two moments.
TRAINING_BYTES_PER_PARAMETER = 16
GRADIENT_BYTES = 2
ALL_REDUCE_PASSES = 2  # of a ring: each gradient leaves a GPU about twice
TRAINING, DECODE = "train_step", "generate"  # as bench/results calls them
SAME_SPARSITY = 0.01
BYTES_PER_VALUE = {
    "float16": 2,
    "bfloat16": 2,
    "float32": 4,
}  # of a dtype, as bench/results names it


@dataclass(frozen=True)
class Gpu:
    """One GPU: peaks, memory and links."""

    name: str
    peak16_flop_per_s: Figure  # dense, fp16 or bf16
    peak32_flop_per_s: Figure
    memory_bytes: Figure
    memory_bytes_per_s: Figure
    link_bytes_per_s: Figure  # to the other GPUs, in one direction
    peak_share: Figure  # that dense training reaches
    memory_share: Figure  # that decoding reaches
    power_w: Figure

    def __getitem__(self, name: str) -> float:
        return getattr(self, name).value

    def figures(self) -> dict[str, Figure]:
        return {f.name: getattr(self, f.name) for f in fields(self) if f.name != "name"}


@dataclass(frozen=True)
class GpuCost:
    """A dense training step and dense decode on `systems` GPUs."""

    step_s: float
    tokens_per_s: float
    joule_per_token: float
    bound: str
    needed_bytes: float  # of weights, gradients and optimizer, on each GPU
    decode_tokens_per_s: float  # of one request, the weights on one GPU
    fits: bool  # what training needs, on each GPU


def gpu(name_or_path: str | Path) -> Gpu:
    """A GPU by its name, one of GPUS, or as a TOML file describes it."""
    return by_name_or_file("gpu", name_or_path, GPUS, _read)


def _read(path: Path, name: str) -> Gpu:
    bases = {base: found.figures() for base, found in GPUS.items()}
    found = Gpu(name, **read_figures(path, UNITS, bases, what="gpu"))
    for share in ("peak_share", "memory_share"):
        if found[share] > 1:
            raise ValueError(f"gpu: {path}: {share}: expected at most 1, got {found[share]:g}")
    return found


def gpu_cost(
    device: Gpu,
    shape: GPTShape,
    batch: int,
    systems: int = 1,
    inputs: Inputs | None = None,
    context: int = 0,
) -> GpuCost:
    """Roofline of one dense step on `batch` sequences, data parallel over `systems` GPUs, and of
    decoding with `context` tokens in the cache."""
    inputs = Inputs() if inputs is None else inputs
    check_kinds(
        device=(device, Gpu, "gpu(name)"),
        shape=(shape, GPTShape, "model_shape(name)"),
        inputs=(inputs, Inputs, "Inputs()"),
    )
    for name, value, least in (
        ("systems", systems, 1),
        ("batch", batch, 1),
        ("context", context, 0),
    ):
        check_count(name, value, least)
    precision = inputs.precision
    peak = device["peak32_flop_per_s" if precision == "fp32" else "peak16_flop_per_s"]
    tokens = batch * shape.sequence
    compute_s = tokens * shape.train_flop() / (systems * peak * device["peak_share"])
    reduced_bytes = ALL_REDUCE_PASSES * GRADIENT_BYTES * shape.parameters() if systems > 1 else 0
    link_s = reduced_bytes / device["link_bytes_per_s"]
    step_s = max(compute_s, link_s)
    needed_bytes = TRAINING_BYTES_PER_PARAMETER * shape.parameters()
    elem_bytes = BYTES_PER_ELEM[precision]
    decode_bytes = elem_bytes * (
        shape.linear_fma + shape.head_fma + 2 * shape.layers * shape.kv_width * context
    )
    read_s = decode_bytes / (device["memory_bytes_per_s"] * device["memory_share"])
    return GpuCost(
        step_s=step_s,
        tokens_per_s=tokens / step_s,
        joule_per_token=systems * device["power_w"] * step_s / tokens,
        bound="compute" if compute_s >= link_s else "links",
        needed_bytes=needed_bytes,
        decode_tokens_per_s=1 / read_s,
        fits=needed_bytes <= device["memory_bytes"],
    )


@dataclass(frozen=True)
class Measured:
    """A speed-up over the fastest dense call that was measured on a GPU."""

    speedup: float
    model: str
    source: str  # the table's name


def measured_speedup(
    device: Gpu,
    results: dict[str, list[dict]],
    op: str,
    shape: GPTShape,
    sparsity: float,
    precision: str = "fp16",
    context: int = 0,
) -> Measured | None:
    """The speed-up of the model nearest in size, of several cases that nearest in context, and of
    several the first: of those that were measured on this GPU with the same op (TRAINING, or DECODE
    of one request), a random mask, values of as many bytes and the same sparsity; None where there
    is none."""
    found = []
    for source, case in _cases(device, results, op, sparsity):
        if BYTES_PER_VALUE[case["dtype"]] != BYTES_PER_ELEM[precision]:
            continue
        size = 12 * case["layers"] * case["width"] ** 2
        ratio = max(size, shape.linear_fma) / min(size, shape.linear_fma)
        away = ratio, abs(case.get("context", 0) - context)
        found.append((away, Measured(case["speedup"], case["model"], source)))
    return min(found, key=lambda pair: pair[0])[1] if found else None


def _cases(
    device: Gpu, results: dict[str, list[dict]], op: str, sparsity: float
) -> Iterable[tuple[str, dict]]:
    for source, cases in results.items():
        for case in cases:
            is_here = case["op"] == op and device.name.lower() in case["gpu"].lower()
            if not is_here or "speedup" not in case:
                continue
            if abs(case["sparsity"] - sparsity) > SAME_SPARSITY:
                continue
            if op == TRAINING and case["mask"] != "random" or op == DECODE and case["batch"] != 1:
                continue
            yield source, case


GPUS: dict[str, Gpu] = {}
for _path in sorted(GPU_FILES.glob("*.toml"), key=lambda path: path.stem):  # a base comes first
    GPUS[_path.stem] = _read(_path, _path.stem)
