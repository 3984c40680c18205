"""Speed-ups measured here (bench/results) beside the wafer's, for the same shapes and masks."""

from collections.abc import Callable, Iterator
from dataclasses import dataclass

from ..terminal import table
from .balance import Mask
from .cost import compare_with_dense
from .inputs import Inputs
from .machine import Machine
from .product import FORWARD, INPUT_GRADIENT, WEIGHT_GRADIENT, product_cycles, stream_bytes
from .shapes import GPTShape
from .sweep import FULL_TOKENS, default_batch

PRODUCTS = {"spmm": FORWARD, "spmm_t": INPUT_GRADIENT, "sddmm": WEIGHT_GRADIENT}
STEP = "train_step"
DENSITY, ACTUAL = MASKS = ("density", "actual")


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
    same_range: tuple[float, float] | None = None  # of a training step: Comparison.speedup_range
    full_range: tuple[float, float] | None = None

    def as_dict(self) -> dict[str, object]:
        return dict(vars(self))


def compare(
    machine: Machine,
    results: dict[str, list[dict]],
    inputs: Inputs | None = None,
    mask_of: Callable[[dict], Mask | None] = lambda workload: None,
    match: str = "",
    progress: Callable[[Pair], None] = lambda pair: None,
) -> list[Pair]:
    """Pairs for every product and training step in `results`, which are measured cases by the name
    of their table (bench/rates.py), with `match` in what is said of them.

    `mask_of` makes the mask of a measurement on a CPU again from its parameters, or gives None:
    then, and for those on a GPU, a random one of its density is assumed. `progress` is
    called with each pair as it is found. Raises ValueError where nothing matches."""
    pairs = []
    for source, what, case, kernel in _measurements(results, match):
        if kernel is None:
            pair = _step(machine, inputs or Inputs(), source, what, case)
        else:
            mask = mask_of(case) if case["threads"] else None
            info = case | {"speedup": case["speedups"][kernel]}
            pair = _product(machine, inputs or Inputs(), source, what, info, mask)
        progress(pair)
        pairs.append(pair)
    if not pairs:
        raise ValueError(f"match: no measurement has {match!r} in its name")
    return pairs


def count(results: dict[str, list[dict]], match: str = "") -> int:
    """How many pairs compare would find."""
    return sum(1 for _ in _measurements(results, match))


def _measurements(
    results: dict[str, list[dict]], match: str
) -> Iterator[tuple[str, str, dict, str | None]]:
    """Table, what was measured, case, and the kernel of a product or None for a training step."""
    for source, cases in results.items():
        for case in cases:
            if case["op"] == STEP and "speedup" in case and match in (what := _what_step(case)):
                yield source, what, case, None
            elif case["op"] in PRODUCTS:
                for kernel in _ours(case):
                    if match in (what := _what_product(case, kernel)):
                        yield source, what, case, kernel


def _ours(case: dict) -> list[str]:
    """Our kernels that are right."""
    ways = case["ways"].items()
    return [name for name, way in ways if way["kind"] == "ours" and way["is_right"]]


def _what_product(case: dict, kernel: str) -> str:
    how = f"{case['threads']} threads" if case["threads"] else kernel
    parts = [f"{case['op']} {case['N']}x{case['K']}", f"{case['M']} tokens", case["dtype"], how]
    return ", ".join([*parts, *["cold"] * case["is_cold"], *_mask_of(case)])


def _what_step(case: dict) -> str:
    where = f"{case['threads']} threads" if case["threads"] else "GPU"
    parts = [f"{STEP} {case['model']}", f"{case['M']} tokens", where]
    return ", ".join([*parts, *_mask_of(case)])


def _mask_of(case: dict) -> list[str]:
    """Its name, where it is not as most are."""
    mask = case.get("mask", "random")
    return [] if mask == "random" else [mask]


def _product(
    machine: Machine, inputs: Inputs, source: str, what: str, info: dict, mask: Mask | None
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

    return Pair(
        source,
        what,
        info["sparsity"],
        info["speedup"],
        1 / info["density"],
        speedup(info["M"]),
        speedup(FULL_TOKENS),
        "of its density" if mask is None else "actual",
    )


def _step(machine: Machine, inputs: Inputs, source: str, what: str, info: dict) -> Pair:
    width = info["width"]
    # The tables do not tell; these are the heads of gpt/presets.py and of the demo.
    heads = max(1, width // (64 if width < 2048 else 128))
    shape = GPTShape(
        info["model"], info["layers"], width, heads, 4 * width, info["vocabulary"], info["context"]
    )

    def predicted(batch: int):
        return compare_with_dense(machine, shape, 1 - info["sparsity"], batch, inputs=inputs)

    same, full = (predicted(batch) for batch in (info["batch"], default_batch(shape, 1)))
    return Pair(
        source,
        what,
        info["sparsity"],
        info["speedup"],
        full.flop_ratio,
        same.speedup,
        full.speedup,
        "of its density",
        same.speedup_range,
        full.speedup_range,
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
                _times(pair.same, pair.same_range),
                _times(pair.full, pair.full_range),
                pair.mask,
            ]
            for pair in pairs
            if pair.source == source
        ]
        blocks.append(f"{source}\n\n{table(header, rows)}")
    return "\n\n".join(blocks)


def _times(value: float, span: tuple[float, float] | None) -> str:
    return f"{value:.2f}x" if span is None else f"{span[0]:.2f} to {span[1]:.2f}x"
