"""Inputs of the model that belong to no machine, each with the range it may lie in."""

import math
from dataclasses import dataclass, fields, replace
from typing import Literal, get_args

from .figures import ASSUMED, CALIBRATED, Mark, check_count, check_number
from .machine import BYTES_PER_ELEM

STREAM_FORMATS = ("index16", "bitmap", "best")
Activations = Literal["auto", "resident", "recompute", "spill"]
ACTIVATIONS = get_args(Activations)


@dataclass(frozen=True)
class Range:
    low: float
    high: float
    unit: str
    mark: Mark
    why: str


RANGES: dict[str, Range] = {
    "utilisation": Range(
        0.33,
        0.5,
        "share of the datapath's rate",
        CALIBRATED,
        "fitted to 20B of arXiv 2409.00287 on one CS-2; what its six models need lies in the range",
    ),
    "score_cycles": Range(
        0,
        105,
        "cycles a score, forward",
        CALIBRATED,
        "fitted to 256M of arXiv 2409.00287; 0: the vendor's words of sparse speed-ups",
    ),
    "element_cycles": Range(
        0, 16, "cycles an element", ASSUMED, "norms, GELU, sums: some 16 operations at 4 a cycle"
    ),
    "axpy_overhead_cycles": Range(
        0,
        40,
        "cycles a nonzero",
        ASSUMED,
        "0: started by its wavelet; 37: measured, programs in CSL",
    ),
    "partial_sum_share": Range(
        0.05, 0.5, "share of a PE's SRAM", ASSUMED, "for sums waiting to leave"
    ),
    "attention_efficiency": Range(
        0.25, 1.0, "of a dense product's rate", ASSUMED, "attention's multiply-adds"
    ),
    "gradient_bytes": Range(
        2, 4, "bytes a nonzero", ASSUMED, "values alone: the store knows the pattern"
    ),
}


@dataclass(frozen=True)
class Inputs:
    """How a model is run, and what no source tells. The numbers are those of RANGES, which gives
    each a unit, a range and a mark: `calibrated` ones were fitted to a published run.

    Raises ValueError, which names the input, for a value it cannot have."""

    precision: str = "fp16"
    stream_format: str = "index16"  # of sparse weights on the I/O links; the machine takes CSR
    activations: Activations = "auto"
    column_groups: int = 0  # token groups side by side on the grid; 0: the fastest number
    utilisation: float = 0.4716
    score_cycles: float = 77.25
    element_cycles: float = 4.0
    axpy_overhead_cycles: float = 1.0
    partial_sum_share: float = 0.25
    attention_efficiency: float = 1.0
    gradient_bytes: float = 2.0

    def __post_init__(self) -> None:
        for name, allowed in (
            ("precision", tuple(BYTES_PER_ELEM)),
            ("stream_format", STREAM_FORMATS),
            ("activations", ACTIVATIONS),
        ):
            if getattr(self, name) not in allowed:
                raise ValueError(
                    f"{name}: expected one of {', '.join(allowed)}, got {getattr(self, name)!r}"
                )
        for name in RANGES:
            check_number(name, getattr(self, name))
        for name in ("utilisation", "partial_sum_share", "attention_efficiency"):
            if not 0 < getattr(self, name) <= 1:
                raise ValueError(f"{name}: expected a share in (0, 1], got {getattr(self, name)}")
        for name in (
            *("axpy_overhead_cycles", "score_cycles", "element_cycles"),
            "gradient_bytes",
        ):
            if not 0 <= getattr(self, name) < math.inf:
                raise ValueError(f"{name}: expected a number at least 0, got {getattr(self, name)}")
        check_count("column_groups", self.column_groups, least=0)

    def scaled(self, name: str, factor: float) -> "Inputs":
        value = getattr(self, name) * factor
        is_share = name in ("utilisation", "partial_sum_share", "attention_efficiency")
        return replace(self, **{name: min(value, 1.0) if is_share else value})

    def as_dict(self) -> dict[str, object]:
        return {field.name: getattr(self, field.name) for field in fields(self)}
