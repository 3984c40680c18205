"""V17-V27: what public words and single figures allow to check (C), and what they do not (X)."""

from ..cost import compare_with_dense, step_cost
from ..inference import inference_cost
from ..inputs import Inputs
from ..machine import WSE2, WSE3
from ..product import product_cycles
from ..shapes import FLOR_6B, GPTShape, gpt_shape
from .points import Point

SQUARE = 12_288
SPARSITIES = (0.5, 0.6, 0.7, 0.8, 0.9)
# Sequences on a system at a time: configurations of modelzoo 2.10.0.
MICRO_BATCHES = {"cerebras-gpt-1.3b": 132, "cerebras-gpt-6.7b": 65, "cerebras-gpt-13b": 90}
FULL_TOKENS = MICRO_BATCHES["cerebras-gpt-1.3b"] * 2048
DAY_S = 86_400
FLOR_TOKENS, FLOR_DAYS, FLOR_SYSTEMS = 140e9, 2.5, (8, 64)
LLAMA3_TOKENS_PER_S = 2700


def plausible_points() -> list[Point]:
    return [
        _square(Inputs(), "the fastest mapping"),
        _square(
            Inputs(column_groups=1),
            "one group of columns",
            "; why it fails: a PE has 17 inputs, so 3.4 multiply-adds an output at 80%, beside one "
            "addition of sums that no zero saves",
        ),
        *_llama2(),
        _top_speedup(),
        _scaling(),
        *_memory(),
        *_stream(),
        _flor(),
        _decode(),
        *_unreadable(),
    ]


def square_speedups(inputs: Inputs, sparsities: tuple[float, ...] = SPARSITIES) -> list[float]:
    """Speed-ups of a 12k x 12k product over a full batch of tokens."""

    def cycles(density: float) -> float:
        return product_cycles(WSE2, inputs, FULL_TOKENS, SQUARE, SQUARE, density).total

    return [cycles(1.0) / cycles(1 - sparsity) for sparsity in sparsities]


def _square(inputs: Inputs, mapping: str, why: str = "") -> Point:
    speedups = square_speedups(inputs)
    shares = [x * (1 - s) for x, s in zip(speedups, SPARSITIES, strict=True)]
    near = all(share >= 0.8 for share, s in zip(shares, SPARSITIES, strict=True) if s <= 0.8)
    return Point(
        "V17",
        "C",
        f"12k x 12k at 50-90%, {mapping}: speed-up",
        ", ".join(f"{x:.2f}" for x in speedups),
        "near-linear, up to 10x",
        f"{min(shares):.0%} of ideal at worst",
        "80% of ideal up to 80%",
        near and speedups == sorted(speedups) and max(shares) <= 1,
        "notes on IEEE Micro 43(3), second-hand",
        f"the measured curve was not readable (V26){why}",
    )


def _llama2() -> list[Point]:
    """The vendor's words are held against the end of the range where attention costs its
    multiply-adds alone, as FLOPs count it; the other end is what public step times ask for."""
    shape, points = gpt_shape("llama2-7b"), []
    for sparsity in (0.5, 0.7):
        found = compare_with_dense(WSE3, shape, 1 - sparsity, batch=32)
        low, high = found.speedup_range
        points.append(
            Point(
                "V18",
                "C",
                f"CS-3, Llama-2 7B at {sparsity:.0%}: training speed-up",
                f"{low:.2f} to {high:.2f}x",
                f"closely matches theory ({found.flop_ratio:.2f}x)",
                f"{low / found.flop_ratio - 1:+.0%} to {high / found.flop_ratio - 1:+.0%}",
                "15%, upper end",
                abs(high / found.flop_ratio - 1) <= 0.15,
                "arXiv 2405.03594, abstract",
                "model shape from memory; batch of 32 sequences assumed; the ends: a score at no "
                "and at its highest cost",
            )
        )
    return points


def _top_speedup() -> Point:
    shape = gpt_shape("gpt3-175b")
    found = {
        percent: compare_with_dense(WSE3, shape, 1 - percent / 100, batch=32).speedup_range
        for percent in range(50, 96)
    }
    reached = [next((p for p, ends in found.items() if ends[i] >= 8), None) for i in (1, 0)]
    said = " to ".join(f"{percent}%" if percent else "never up to 95%" for percent in reached)
    return Point(
        "V19",
        "C",
        "CS-3: sparsity at which 175B trains 8x faster",
        said,
        "up to 8x",
        f"{found[95][0]:.1f} to {found[95][1]:.1f}x at 95%",
        "at most 95%, upper end",
        reached[0] is not None,
        "press, second-hand",
        "the press does not say at which sparsity; the ends as in V18",
    )


def _scaling() -> Point:
    shape, batch = gpt_shape("cerebras-gpt-6.7b"), 1040
    micro = MICRO_BATCHES[shape.name]
    seconds = {
        systems: step_cost(WSE2, shape, 1.0, batch, systems, micro_batch=micro).step_s
        for systems in (1, 16, 192)
    }
    efficiency = {n: seconds[1] / (n * s) for n, s in seconds.items()}
    return Point(
        "V20",
        "C",
        "Cerebras-GPT 6.7B, 1,040 sequences on 16 systems",
        f"{efficiency[16]:.1%} efficiency",
        "near-perfect linear",
        f"{efficiency[192]:.0%} at 192",
        "95%",
        efficiency[16] >= 0.95,
        "press, second-hand; IEEE Spectrum",
        "near 100% by construction: SwarmX is taken to broadcast and reduce at the rate of the I/O",
    )


def _memory() -> list[Point]:
    points = []
    for name, micro in MICRO_BATCHES.items():
        plan = step_cost(WSE2, gpt_shape(name), 1.0, micro).activations
        wanted = "spill" if name.endswith("13b") else "recompute"
        need = f"{plan.mode}, {plan.need_bytes / 1e9:.0f} GB"
        points.append(
            Point(
                "V21",
                "C",
                f"{name}, {micro} sequences: activations",
                need,
                f"runs; 40 GB ({wanted})",
                "",
                "the same mode",
                plan.mode == wanted,
                "modelzoo 2.10.0; 40 GB read",
                "that 13B spills is our inference: block inputs alone are 75 GB",
            )
        )
    return points


def _stream() -> list[Point]:
    points = []
    for name, micro in MICRO_BATCHES.items():
        cost = step_cost(WSE2, gpt_shape(name), 1.0, micro)
        busy = cost.forward.io_in_s + max(cost.backward.io_in_s, cost.backward.io_out_s)
        points.append(
            Point(
                "V22",
                "C",
                f"{name}, {micro} sequences: links busy",
                f"{busy / cost.step_s:.0%} of the step",
                "hidden",
                f"waits {cost.io_share:.1%}",
                "25%",
                busy / cost.step_s < 0.25,
                "modelzoo 2.10.0; 1.2 Tb/s read",
            )
        )
    return points


def _flor() -> Point:
    flop = FLOR_6B.train_flop() * FLOR_TOKENS
    peak = WSE2.peak_flop_per_s()
    used = [flop / (FLOR_DAYS * DAY_S * systems * peak) for systems in FLOR_SYSTEMS]
    return Point(
        "V23",
        "C",
        f"FLOR-6.3B on {FLOR_SYSTEMS[0]}-{FLOR_SYSTEMS[1]} CS-2: share of peak",
        f"{used[0]:.1%} to {used[1]:.1%}",
        f"{FLOR_DAYS} days",
        "",
        "between 5% and 45%",
        used[0] <= 0.45 and used[1] >= 0.05,
        "press, second-hand",
        f"neither the systems used nor the tokens were read; ours: {_share_of_peak(FLOR_6B):.0%}",
    )


def _share_of_peak(shape: GPTShape) -> float:
    return step_cost(WSE2, shape, 1.0, MICRO_BATCHES["cerebras-gpt-6.7b"]).peak_share


def _decode() -> Point:
    rate = inference_cost(WSE2, gpt_shape("llama3-8b"), 1.0).decode_tokens_per_s
    return Point(
        "V24",
        "C",
        "WSE-2, Llama3-8B decode, weights resident: tokens/s",
        f"{rate:,.0f}",
        f"{LLAMA3_TOKENS_PER_S:,}",
        f"{rate / LLAMA3_TOKENS_PER_S - 1:+.0%}",
        "factor 2",
        0.5 <= rate / LLAMA3_TOKENS_PER_S <= 2,
        "arXiv 2502.04563 v1, abstract",
        "model shape from memory; nearly all of it is hops",
    )


def _unreadable() -> list[Point]:
    ratios = ", ".join(
        f"{gpt_shape(name).flop_ratio(density):.3f}"
        for name in ("gpt2-small", "gpt3-xl")
        for density in (0.5, 0.25)
    )
    square = ", ".join(f"{x:.2f}" for x in square_speedups(Inputs()))
    wanted = {
        "V25": ("SPDF FLOP table, 125M and XL at 50, 75%", ratios, "SPDF, its tables"),
        "V26": ("12k x 12k at 50-90%: measured speed-up", square, "IEEE Micro 43(3), a figure"),
        "V27": ("CS-2 sparse training throughput", "-", "arXiv 2310.04607, a table"),
    }
    return [
        Point(id, "X", quantity, predicted, "not readable", "", "", None, source)
        for id, (quantity, predicted, source) in wanted.items()
    ]
