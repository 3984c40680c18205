"""Wafer-scale machines: TOML files that give every figure with its unit, its mark and its source.

Marks: `read` in the named source; `second-hand`: in a text about it; `assumed`: by us, for want of
a source. Where sources disagree there are two machines, told apart by what follows the `@`.
A file may begin with `base = "wse2"` and then gives only what differs from that machine.
"""

import math
import tomllib
from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import Literal, get_args

READ, SECOND_HAND, ASSUMED = "read", "second-hand", "assumed"
Mark = Literal["read", "second-hand", "assumed"]

BYTES_PER_ELEM = {"fp16": 2, "bf16": 2, "fp32": 4}
WAVELET_BYTES = 4  # the payload of one fabric message
FLOP_PER_FMA = 2
MACHINE_FILES = Path(__file__).parent / "machines"

UNITS = {
    "cores": "cores",
    "grid_rows": "PEs",
    "grid_cols": "PEs",
    "clock_hz": "Hz",
    "fma16_per_cycle": "FMA/cycle",
    "fma32_per_cycle": "FMA/cycle",
    "sram_bytes_per_pe": "bytes",
    "sram_bytes_per_cycle": "bytes/cycle",
    "link_bytes_per_cycle": "bytes/cycle",
    "hop_cycles": "cycles",
    "ramp_cycles": "cycles",
    "io_bytes_per_s": "bytes/s",
    "stream_latency_s": "s",
    "optimizer_params_per_s": "parameters/s",
    "power_w": "W",
}
# Of any figure: beyond, products of them are no longer numbers.
SMALLEST, LARGEST = 1e-20, 1e20
COUNTS = ("cores", "grid_rows", "grid_cols")  # whole numbers


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


def machine(name_or_path: str | Path) -> Machine:
    """One of MACHINES by its name, or the machine that a TOML file describes."""
    if name_or_path in MACHINES:
        return MACHINES[str(name_or_path)]
    path = Path(name_or_path)
    if path.suffix != ".toml":
        raise ValueError(
            f"machine: expected one of {', '.join(MACHINES)}, or a file that ends in .toml, "
            f"got {str(name_or_path)!r}"
        )
    if not path.is_file():
        wrong = "is no file" if path.exists() else "does not exist"
        raise FileNotFoundError(f"machine: {path} {wrong}")
    return _read(path, path.name)


def _read(path: Path, name: str) -> Machine:
    try:
        given = tomllib.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:  # of the text's encoding too
        raise ValueError(f"machine: {path} is not TOML: {error}") from None
    base = given.pop("base", None)
    if base is not None and base not in list(MACHINES):
        raise _mistake(path, "base", f"one of {', '.join(MACHINES)}", repr(base))
    figures = MACHINES[base].figures() if base is not None else {}
    for field, found in given.items():
        if field not in UNITS:
            raise _mistake(path, field, f"base or one of {', '.join(UNITS)}", repr(field))
        figures[field] = _figure(path, field, found)
    for field in UNITS:
        if field not in figures:
            raise _mistake(path, field, "a value, or a base above it", "nothing")
    found = Machine(name, **figures)
    if found.grid_pes > found["cores"]:
        expected = f"at least the {found.grid_pes:,} PEs of the grid"
        raise _mistake(path, "cores", expected, f"{found['cores']:,}")
    return found


def _figure(path: Path, field: str, found: object) -> Figure:
    keys = [key.name for key in fields(Figure)]
    if not isinstance(found, dict) or set(found) != set(keys):
        got = ", ".join(found) or "none" if isinstance(found, dict) else repr(found)
        raise _mistake(path, field, f"a table of {', '.join(keys)}", got)
    figure = Figure(**found)
    if type(figure.value) not in (int, float) or not 0 < figure.value < math.inf:
        raise _mistake(path, f"{field}.value", "a number above 0", repr(figure.value))
    if not SMALLEST <= figure.value <= LARGEST:
        expected = f"a number from {SMALLEST:g} to {LARGEST:g}"
        raise _mistake(path, f"{field}.value", expected, f"{figure.value!r:.40}")
    if field in COUNTS and figure.value != int(figure.value):
        raise _mistake(path, f"{field}.value", "a whole number", repr(figure.value))
    if figure.unit != UNITS[field]:
        raise _mistake(path, f"{field}.unit", repr(UNITS[field]), repr(figure.unit))
    if figure.mark not in get_args(Mark):
        expected = f"one of {', '.join(get_args(Mark))}"
        raise _mistake(path, f"{field}.mark", expected, repr(figure.mark))
    if not isinstance(figure.source, str) or not figure.source.strip():
        raise _mistake(path, f"{field}.source", "where the value is from", repr(figure.source))
    return figure


def _mistake(path: Path, field: str, expected: str, got: str) -> ValueError:
    return ValueError(f"machine: {path}: {field}: expected {expected}, got {got}")


MACHINES: dict[str, Machine] = {}
for _path in sorted(MACHINE_FILES.glob("*.toml"), key=lambda path: path.stem):  # a base comes first
    MACHINES[_path.stem] = _read(_path, _path.stem)

WSE2, WSE3 = MACHINES["wse2"], MACHINES["wse3"]
