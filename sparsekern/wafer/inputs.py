"""Inputs of the model that no public source tells, each with the range it may lie in."""

from dataclasses import dataclass, fields, replace
from typing import Literal

from .machine import BYTES_PER_ELEM

STREAM_FORMATS = ("index16", "bitmap", "best")
Activations = Literal["auto", "resident", "recompute", "spill"]
ACTIVATIONS = ("auto", "resident", "recompute", "spill")


@dataclass(frozen=True)
class Range:
    low: float
    high: float
    unit: str
    why: str


RANGES: dict[str, Range] = {
    "utilisation": Range(0.2, 1.0, "share of the datapath's rate", "no public MFU of a CS-2"),
    "axpy_overhead_cycles": Range(
        0, 40, "cycles per nonzero", "0: started by its wavelet; 37: measured, programs in CSL"
    ),
    "partial_sum_share": Range(0.05, 0.5, "share of a PE's SRAM", "for sums waiting to leave"),
    "attention_efficiency": Range(0.25, 1.0, "of a dense product's rate", "attention, dense"),
    "gradient_bytes": Range(2, 4, "bytes per nonzero", "values alone: the store knows the pattern"),
}


@dataclass(frozen=True)
class Inputs:
    precision: str = "fp16"
    stream_format: str = "index16"  # of sparse weights on the I/O links; the machine takes CSR
    activations: Activations = "auto"
    column_groups: int = 0  # token groups side by side on the grid; 0: the fastest number
    utilisation: float = 0.5
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
        for name in ("utilisation", "partial_sum_share", "attention_efficiency"):
            if not 0 < getattr(self, name) <= 1:
                raise ValueError(f"{name}: expected a share in (0, 1], got {getattr(self, name)}")
        for name in ("axpy_overhead_cycles", "gradient_bytes", "column_groups"):
            if getattr(self, name) < 0:
                raise ValueError(f"{name}: expected at least 0, got {getattr(self, name)}")

    def scaled(self, name: str, factor: float) -> "Inputs":
        value = getattr(self, name) * factor
        return replace(self, **{name: min(value, 1.0) if RANGES[name].high == 1 else value})

    def as_dict(self) -> dict[str, object]:
        return {field.name: getattr(self, field.name) for field in fields(self)}
