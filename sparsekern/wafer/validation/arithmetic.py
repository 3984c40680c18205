"""V01-V10, V39-V41: identities between published figures. Class A."""

from ..machine import WSE2, WSE3
from ..shapes import CEREBRAS_GPT, FLOP_PER_FMA, PRODUCTS_PER_TRAINING_STEP, gpt_shape
from .points import Point, ratio_point

SPDF = "SPDF, arXiv 2303.10464, abstract"
PRUNING_BLOG = "Cerebras blog, iterative pruning (2022)"
VSPDF_BLOG = "Cerebras blog, sparse pre-training; modelzoo 2.10.0"
WHITE_PAPER = "Cerebras SDK technical overview (2022)"
ROUND = "20 PB/s, 220 Pb/s, 3.3 PB/s and 1.785 PFLOPS all read as 0.97-1.05 GHz: rounded figures"
HF_COMMIT = "Cerebras-GPT model cards, HF commit ba0377e"
PRESS = "announcement of the CS-3 as reported by oodaloop, 2024-03-13: 62.5 and 125 PFLOPS"
MARKETED_FLOP_PER_S = (62.5e15, 125e15)
VSPDF_SPARSE_STEPS, VSPDF_DENSE_STEPS = 62523, 9379
CEREBRAS_GPT_FLOP = (2.5e18, 1.1e19, 5.3e19, 2.5e20, 9.8e20, 5.9e21, 2.1e22)


def arithmetic_points() -> list[Point]:
    return [*_ratios(), _variable_spdf(), *_cerebras_gpt(), *_machines()]


def _ratios() -> list[Point]:
    xl = gpt_shape("gpt3-xl")
    pruned = 1 - 0.838
    return [
        ratio_point("V01", "A", "XL, 75%: training FLOPs, x", xl.flop_ratio(0.25), 2.5, 0.01, SPDF),
        ratio_point(
            "V02",
            "A",
            "XL, 83.8%: inference FLOPs, x",
            xl.flop_ratio(pruned),
            3,
            0.02,
            PRUNING_BLOG,
        ),
        ratio_point(
            "V03",
            "A",
            "XL, 83.8%: parameters, x",
            xl.parameter_ratio(pruned),
            4.3,
            0.02,
            PRUNING_BLOG,
        ),
    ]


def _variable_spdf() -> Point:
    left = 1 / gpt_shape("gpt-6.7b").flop_ratio(0.1)
    fewer = 1 - (VSPDF_SPARSE_STEPS * left + VSPDF_DENSE_STEPS) / VSPDF_SPARSE_STEPS
    return Point(
        "V04",
        "A",
        "variable SPDF, 6.7B: fewer FLOPs",
        f"{fewer:.1%}",
        "64%",
        f"{100 * (fewer - 0.64):+.1f} points",
        "3 points",
        abs(fewer - 0.64) <= 0.03,
        VSPDF_BLOG,
        "against a dense run of phase 1's tokens; the source does not state its baseline",
    )


def _cerebras_gpt() -> list[Point]:
    points = []
    for (shape, (steps, batch)), published in zip(
        CEREBRAS_GPT.items(), CEREBRAS_GPT_FLOP, strict=True
    ):
        # These figures count the embedding as one more product of the head's size.
        embedding = PRODUCTS_PER_TRAINING_STEP * FLOP_PER_FMA * shape.head_fma
        flop = (shape.train_flop() + embedding) * steps * batch * shape.sequence
        name = f"{shape.name}: training FLOPs"
        points.append(ratio_point("V05", "A", name, flop, published, 0.05, HF_COMMIT))
    return points


def _machines() -> list[Point]:
    return [
        ratio_point(
            "V06", "A", "WSE-2 fp16 peak, FLOP/s", WSE2.peak_flop_per_s(), 7.5e15, 0.01, WHITE_PAPER
        ),
        ratio_point("V07", "A", "WSE-2 SRAM, bytes", WSE2.sram_bytes, 40e9, 0.05, WHITE_PAPER),
        ratio_point(
            "V07",
            "A",
            "WSE-2 SRAM, bytes/s",
            WSE2.sram_bytes_per_s,
            20e15,
            0.15,
            WHITE_PAPER,
            ROUND,
        ),
        ratio_point(
            "V08",
            "A",
            "WSE-2 fabric, bits/s",
            WSE2.fabric_bits_per_s,
            220e15,
            0.10,
            WHITE_PAPER,
            ROUND,
        ),
        ratio_point(
            "V09",
            "A",
            "PEs of 48 systems",
            48 * WSE2.grid_pes,
            35_784_000,
            0,
            "SC23, TLR-MVM, abstract",
        ),
        *_marketed(),
        *_wse3_bandwidths(),
        ratio_point(
            "V41",
            "A",
            "WSE-2 fp32 peak, FLOP/s",
            WSE2.peak_flop_per_s("fp32"),
            1.785e15,
            0.05,
            "SDK slides, SC24 p. 21 (arXiv 2204.03775, Fig. 11)",
            ROUND,
        ),
    ]


def _wse3_bandwidths() -> list[Point]:
    """Published figures of one thing differ: the model's should lie between them, or close by."""
    points = []
    for name, found, low, high in (
        ("SRAM, bytes/s", WSE3.sram_bytes_per_s, 21e15, 25e15),
        ("fabric, bits/s", WSE3.fabric_bits_per_s, 214e15, 245e15),
    ):
        points.append(
            Point(
                "V40",
                "A",
                f"WSE-3 {name}",
                f"{found:.4g}",
                f"{low:.4g} to {high:.4g}",
                f"{found / min(max(found, low), high) - 1:+.1%}",
                "inside, or 5% off",
                0.95 * low <= found <= 1.05 * high,
                "product page; SDK slides, SC24 and SC25",
            )
        )
    return points


def _marketed() -> list[Point]:
    """What is marketed is FLOP/s with zeros counted: one factor over the dense peak."""
    factors = {
        "WSE-2": MARKETED_FLOP_PER_S[0] / WSE2.peak_flop_per_s(),
        "WSE-3": MARKETED_FLOP_PER_S[1] / WSE3.peak_flop_per_s(),
    }
    note = "an inference: neither announcement says which sparsity it counts"
    points = [
        ratio_point("V10", "A", f"{name}: marketed over dense peak", x, 8, 0.06, PRESS, note)
        for name, x in factors.items()
    ]
    both = factors["WSE-3"], factors["WSE-2"]
    name = "marketed over dense peak, WSE-3 and WSE-2: one factor"
    return [*points, ratio_point("V39", "A", name, *both, 0.10, PRESS)]
