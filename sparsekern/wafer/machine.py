"""Wafer-scale machines as data: every figure with its unit, its source and how it was obtained.

Marks: `read` in the named source; `second-hand`: in a text about it; `assumed`: by us, for want of
a source. Where sources disagree there are two machines, told apart by what follows the `@`.
"""

from dataclasses import dataclass, fields, replace
from typing import Literal

READ, SECOND_HAND, ASSUMED = "read", "second-hand", "assumed"
Mark = Literal["read", "second-hand", "assumed"]

BYTES_PER_ELEM = {"fp16": 2, "bf16": 2, "fp32": 4}
WAVELET_BYTES = 4  # the payload of one fabric message
FLOP_PER_FMA = 2


@dataclass(frozen=True)
class Figure:
    value: float
    unit: str
    mark: Mark
    source: str

    def scaled(self, factor: float) -> "Figure":
        return replace(self, value=self.value * factor)


@dataclass(frozen=True)
class Machine:
    """One system: a wafer, its links, and what streams weights to it."""

    name: str
    cores: Figure
    grid_rows: Figure  # of processing elements that a program may use
    grid_cols: Figure
    clock_hz: Figure
    fma16_per_cycle: Figure  # of one core, fp16 or bf16
    fma32_per_cycle: Figure
    sram_bytes_per_pe: Figure
    sram_bytes_per_cycle: Figure  # of one core, reads and writes together
    link_bytes_per_cycle: Figure  # of one link in one direction
    hop_cycles: Figure
    ramp_cycles: Figure  # from a core to its router
    io_bytes_per_s: Figure  # of one system, in each direction
    stream_latency_s: Figure  # from the store of the weights to the wafer
    optimizer_params_per_s: Figure  # the store of the weights, at the optimizer's step
    power_w: Figure  # of one system

    def __getitem__(self, name: str) -> float:
        return getattr(self, name).value

    def figures(self) -> dict[str, Figure]:
        return {f.name: getattr(self, f.name) for f in fields(self) if f.name != "name"}

    @property
    def grid_pes(self) -> int:
        return int(self["grid_rows"] * self["grid_cols"])

    @property
    def sram_bytes(self) -> float:
        return self["cores"] * self["sram_bytes_per_pe"]

    @property
    def sram_bytes_per_s(self) -> float:
        return self["cores"] * self["sram_bytes_per_cycle"] * self["clock_hz"]

    @property
    def fabric_bits_per_s(self) -> float:
        """Four links of each core, both directions."""
        return self["cores"] * 8 * self["link_bytes_per_cycle"] * 8 * self["clock_hz"]

    @property
    def chain_cycles(self) -> float:
        """From PE to PE in a chain of additions: to a router, a hop, from a router, an add."""
        return self["hop_cycles"] + 2 * self["ramp_cycles"] + 1

    def fma_per_cycle(self, precision: str) -> float:
        return self["fma32_per_cycle" if precision == "fp32" else "fma16_per_cycle"]

    def peak_flop_per_s(self, precision: str = "fp16") -> float:
        return self["cores"] * self.fma_per_cycle(precision) * FLOP_PER_FMA * self["clock_hz"]

    def axpy_elems_per_cycle(self, precision: str) -> float:
        """y += w x reads x and y and writes y: its rate is the lower one of arithmetic and SRAM."""
        traffic_bytes_per_elem = 3 * BYTES_PER_ELEM[precision]
        return min(
            self.fma_per_cycle(precision), self["sram_bytes_per_cycle"] / traffic_bytes_per_elem
        )

    def wavelet_elems(self, precision: str) -> float:
        return self["link_bytes_per_cycle"] / BYTES_PER_ELEM[precision]


WHITE_PAPER = "Cerebras SDK technical overview, 2022"
DEEP_DIVE = "summary of the architecture deep dive (IEEE Micro 43(3)), besthub"
SDK_EXAMPLES = "csl-examples, single-tile-matvec"
NO_SOURCE = "no public figure found"


def _figure(value: float, unit: str, mark: Mark, source: str) -> Figure:
    return Figure(value, unit, mark, source)


WSE2 = Machine(
    name="wse2",
    cores=_figure(850_000, "cores", READ, WHITE_PAPER),
    grid_rows=_figure(994, "PEs", READ, SDK_EXAMPLES),
    grid_cols=_figure(750, "PEs", READ, SDK_EXAMPLES),
    clock_hz=_figure(1.1e9, "Hz", SECOND_HAND, DEEP_DIVE + "; also WaferLLM's scripts"),
    fma16_per_cycle=_figure(4, "FMA/cycle", READ, WHITE_PAPER + ': "eight operations per clock"'),
    fma32_per_cycle=_figure(1, "FMA/cycle", READ, "roofline of SpMM_Cerebras: 2 FLOP/cycle"),
    sram_bytes_per_pe=_figure(48 * 1024, "bytes", READ, WHITE_PAPER),
    sram_bytes_per_cycle=_figure(24, "bytes/cycle", SECOND_HAND, DEEP_DIVE + ": 2 reads, 1 write"),
    link_bytes_per_cycle=_figure(WAVELET_BYTES, "bytes/cycle", READ, WHITE_PAPER + ": wavelet"),
    hop_cycles=_figure(1, "cycles", READ, WHITE_PAPER),
    ramp_cycles=_figure(2, "cycles", ASSUMED, NO_SOURCE + "; T_R of arXiv 2404.15888 not read"),
    io_bytes_per_s=_figure(150e9, "bytes/s", READ, "Argonne documentation: 1.2 Tb/s a system"),
    stream_latency_s=_figure(20e-6, "s", ASSUMED, NO_SOURCE),
    optimizer_params_per_s=_figure(
        75e9, "parameters/s", ASSUMED, "16-bit gradients at full I/O; glossary/memoryx: keeps up"
    ),
    power_w=_figure(23e3, "W", ASSUMED, "often quoted for the CS-2; not read at its source"),
)

WSE3 = replace(
    WSE2,
    name="wse3",
    cores=_figure(900_000, "cores", READ, "Argonne tutorial"),
    grid_rows=_figure(1172, "PEs", ASSUMED, "fabric size quoted for the CS-3; not read"),
    grid_cols=_figure(762, "PEs", ASSUMED, "fabric size quoted for the CS-3; not read"),
    clock_hz=_figure(0.875e9, "Hz", ASSUMED, "inferred: fits the marketed 125 PFLOPS / 10"),
    fma16_per_cycle=_figure(8, "FMA/cycle", SECOND_HAND, "nextplatform, 2024"),
    sram_bytes_per_cycle=_figure(
        24, "bytes/cycle", SECOND_HAND, "as WSE-2; 21 PB/s (press) is 26.7 bytes/cycle"
    ),
    io_bytes_per_s=_figure(150e9, "bytes/s", READ, 'Argonne: "a CS system" 1.2 Tb/s'),
    power_w=_figure(23e3, "W", SECOND_HAND, "press"),
)

MACHINES: dict[str, Machine] = {
    "wse2": WSE2,
    "wse2@0.85GHz": replace(
        WSE2,
        name="wse2@0.85GHz",
        clock_hz=_figure(0.85e9, "Hz", READ, SDK_EXAMPLES + ", run.py times with it"),
    ),
    "wse2@narrow-sram": replace(
        WSE2,
        name="wse2@narrow-sram",
        sram_bytes_per_cycle=_figure(
            12,
            "bytes/cycle",
            READ,
            "csl-skills; roofline of SpMM_Cerebras: 2 x 32-bit reads, 1 write",
        ),
    ),
    "wse3": WSE3,
    "wse3@1.1GHz": replace(
        WSE3,
        name="wse3@1.1GHz",
        clock_hz=_figure(1.1e9, "Hz", READ, "WaferLLM's WSE-3 script; may be copied from WSE-2"),
    ),
    "wse3@wide-sram": replace(
        WSE3,
        name="wse3@wide-sram",
        sram_bytes_per_cycle=_figure(
            48, "bytes/cycle", ASSUMED, "what 8 FMA/cycle of AXPY would need"
        ),
    ),
}


def machine(name: str) -> Machine:
    if name not in MACHINES:
        raise ValueError(f"machine: expected one of {', '.join(MACHINES)}, got {name!r}")
    return MACHINES[name]
