"""V11-V16: measured cycles and rates. Class B; a class A line says what was fitted on all rows."""

from pathlib import Path

from ..inference import reduce_cycles
from ..machine import BYTES_PER_ELEM, WSE2, machine
from .pe_kernels import FITTED, Summary, load, summarise
from .points import Point, error_point, ratio_point
from .simulator import simulate_chain_cycles

DATA = "pr0f3ss/SpMM_Cerebras"
# Mean and worst: the stricter one of the project's targets and of the table of sources.
TOLERANCES = {"CSC": (0.05, 0.12), "CSR": (0.05, 0.12), "COO": (0.08, 0.20), "GEMM": (0.10, 0.10)}
IDS = {"CSC": "V11", "CSR": "V11+", "COO": "V12", "GEMM": "V14"}
CHAIN_PES, CHAIN_WAVELETS = 512, 256
TLR_SYSTEMS, TLR_SRAM_BYTES_PER_S = 48, 92.58e15


def measured_points(data: Path | None) -> tuple[list[Point], list[Point]]:
    """Held-out points and calibration points, from the CSV files in `data`, or as they were when
    the coefficients in pe_kernels.py were fitted."""
    is_stored = data is None
    held_out, calibration = [], []
    for kind, committed in FITTED.items():
        summary = summarise(load(data, kind), kind) if data else committed
        calibration.append(_calibration(kind, summary, is_stored))
        held_out += _held_out(kind, summary, is_stored)
    return [*held_out, _chain(), _tlr_mvm()], calibration


def _calibration(kind: str, summary: Summary, is_stored: bool) -> Point:
    coefficients = ", ".join(f"{c:.4g}" for c in summary.fit.coefficients)
    quantity = f"{kind}: cycles, coefficients {coefficients}"
    errors, limits = summary.fit.fit_error, TOLERANCES[kind]
    return error_point(IDS[kind], "B", quantity, errors, limits, DATA, "", False, is_stored)


def _held_out(kind: str, summary: Summary, is_stored: bool) -> list[Point]:
    points = []
    for tested, errors in summary.fit.held_out.items():
        quantity = f"{kind}: cycles of the {tested} family, fitted on the other"
        limits = TOLERANCES[kind]
        points.append(
            error_point(IDS[kind], "B", quantity, errors, limits, DATA, is_stored=is_stored)
        )
    if summary.imbalance_error:
        quantity = f"{kind}: imbalance max/mean, nothing fitted"
        errors, limits = summary.imbalance_error, (0.05, 0.15)
        points.append(error_point("V13", "B", quantity, errors, limits, DATA, is_stored=is_stored))
    return points


def _chain() -> Point:
    return ratio_point(
        "V15",
        "S",
        f"chain Reduce, {CHAIN_PES} PEs, {CHAIN_WAVELETS} wavelets: cycles",
        simulate_chain_cycles(CHAIN_PES, CHAIN_WAVELETS, WSE2.chain_cycles),
        reduce_cycles(WSE2, CHAIN_PES, CHAIN_WAVELETS),
        0.10,
        "arXiv 2404.15888, formula second-hand",
        "our simulator against their formula; no measured cycles were readable",
    )


def _tlr_mvm() -> Point:
    """A matrix-vector product reads each element of the matrix once, at the rate of the CSC fit."""
    wafer = machine("wse2@0.85GHz")
    cycles_per_elem = FITTED["CSC"].fit.coefficients[1]
    pe_bytes_per_s = wafer["clock_hz"] * BYTES_PER_ELEM["fp32"] / cycles_per_elem
    return ratio_point(
        "V16",
        "B",
        f"TLR-MVM on {TLR_SYSTEMS} CS-2: SRAM bytes/s",
        TLR_SYSTEMS * wafer.grid_pes * pe_bytes_per_s,
        TLR_SRAM_BYTES_PER_S,
        0.25,
        "SC23, TLR-MVM, abstract",
        "an upper bound: no start-up of vectors; 4 bytes an FMA is our reading of its convention",
    )
