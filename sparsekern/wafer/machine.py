"""Wafer-scale machines: TOML files that give every figure with its unit, its mark and its source
(figures.py says what these are)."""

from dataclasses import dataclass, fields
from functools import cached_property
from pathlib import Path

from .figures import Figure, by_name_or_file, mistake, read_figures

BYTES_PER_ELEM = {"fp16": 2, "bf16": 2, "fp32": 4}
ACCUMULATOR_BYTES = 4  # partial sums are fp32
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
    "cache_bytes": "bytes",
    "link_bytes_per_cycle": "bytes/cycle",
    "hop_cycles": "cycles",
    "ramp_cycles": "cycles",
    "io_bytes_per_s": "bytes/s",
    "stream_latency_s": "s",
    "optimizer_params_per_s": "parameters/s",
    "power_idle_w": "W",
    "power_peak_w": "W",
}
COUNTS = ("cores", "grid_rows", "grid_cols")
MAY_BE_ZERO = ("cache_bytes", "hop_cycles", "ramp_cycles", "stream_latency_s", "power_idle_w")


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
    cache_bytes: Figure  # of one core, beside the datapath
    link_bytes_per_cycle: Figure  # of one link in one direction
    hop_cycles: Figure
    ramp_cycles: Figure  # from a core to its router
    io_bytes_per_s: Figure  # of one system, in each direction
    stream_latency_s: Figure  # from the store of the weights to the wafer
    optimizer_params_per_s: Figure  # the store of the weights, at the optimizer's step
    power_idle_w: Figure  # of one system that waits
    power_peak_w: Figure  # of one whose cores all work

    def __getitem__(self, name: str) -> float:
        return getattr(self, name).value

    def figures(self) -> dict[str, Figure]:
        return {f.name: getattr(self, f.name) for f in fields(self) if f.name != "name"}

    @property
    def base(self) -> str:
        """The name of the machine that this is, or of which it is an alternative."""
        return self.name.partition("@")[0]

    @cached_property
    def _hash(self) -> int:
        return hash((self.name, *(figure.value for figure in self.figures().values())))

    def __hash__(self) -> int:
        """Products are cached by their machine: its hash is asked for often."""
        return self._hash

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

    def axpy_elems_per_cycle(self, precision: str, tokens: float, is_dot: bool = False) -> float:
        """Elements a cycle of y += w x, vectors of `tokens` elements, or of a dot product of two:
        the lower rate of arithmetic and SRAM.

        All nonzeros of an output share y (fp32 sums), or one vector of the dot: it stays in the
        cache beside the datapath where it fits, and SRAM gives x alone."""
        elem_bytes = BYTES_PER_ELEM[precision]
        kept_bytes = elem_bytes if is_dot else ACCUMULATOR_BYTES
        is_cached = tokens * kept_bytes <= self["cache_bytes"]
        accesses = 1 if is_cached else 2 if is_dot else 3
        return min(
            self.fma_per_cycle(precision), self["sram_bytes_per_cycle"] / (accesses * elem_bytes)
        )

    def wavelet_elems(self, precision: str) -> float:
        return self["link_bytes_per_cycle"] / BYTES_PER_ELEM[precision]

    def power_w(self, busy_share: float) -> float:
        """Power of one system whose wafer works that share of the time."""
        idle, peak = self["power_idle_w"], self["power_peak_w"]
        return idle + busy_share * (peak - idle)


def machine(name_or_path: str | Path) -> Machine:
    """A machine by its name, one of MACHINES, or as a TOML file describes it.

    Raises ValueError for another name and for a wrong file, whose key it names, and
    FileNotFoundError where there is none."""
    return by_name_or_file("machine", name_or_path, MACHINES, _read)


def _read(path: Path, name: str) -> Machine:
    bases = {base: found.figures() for base, found in MACHINES.items()}
    found = Machine(name, **read_figures(path, UNITS, bases, COUNTS, MAY_BE_ZERO))
    if found.grid_pes > found["cores"]:
        expected = f"at least the {found.grid_pes:,} PEs of the grid"
        raise mistake(path, "cores", expected, f"{found['cores']:,}")
    if found["power_idle_w"] > found["power_peak_w"]:
        expected = f"at most power_peak_w, {found['power_peak_w']:,}"
        raise mistake(path, "power_idle_w", expected, f"{found['power_idle_w']:,}")
    return found


MACHINES: dict[str, Machine] = {}
for _path in sorted(MACHINE_FILES.glob("*.toml"), key=lambda path: path.stem):  # a base comes first
    MACHINES[_path.stem] = _read(_path, _path.stem)

WSE2, WSE3 = MACHINES["wse2"], MACHINES["wse3"]
