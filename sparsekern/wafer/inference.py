"""Inference with all weights resident: no stream; the way through the wafer is what takes time.

Decode, one token: every product is a vector times a matrix spread over the whole grid. A PE
multiplies the nonzeros it holds; the sums are reduced along one side of the grid and sent back
along the other. So each of the STAGES of a block, one after the other, pays two sides of hops and
the depth of a tree of two levels of chains. Sparsity shrinks the arithmetic and the memory, never
the way.
"""

import math
from dataclasses import dataclass

from .inputs import Inputs
from .machine import BYTES_PER_ELEM, FLOP_PER_FMA, Machine
from .shapes import GPTShape

INDEX_BYTES = 2
# Two norms; q, k, v; scores; their weighted sum; projection; up; down.
STAGES = 8


@dataclass(frozen=True)
class InferenceCost:
    decode_token_s: float  # of one request
    decode_compute_s: float  # its share of arithmetic
    prefill_tokens_per_s: float
    weight_bytes: float
    cache_bytes_per_token: float
    free_bytes: float  # of SRAM, beside the weights; negative: they do not fit

    @property
    def fits(self) -> bool:
        return self.free_bytes >= 0

    @property
    def decode_tokens_per_s(self) -> float:
        return 1 / self.decode_token_s


def reduce_cycles(machine: Machine, pes: int, wavelets: int) -> float:
    """A chain of additions over `pes` in a row: T = max(C, E / N + L) + (2 T_R + 1) D with
    C = E / N = wavelets, L = D = pes - 1 (Luczynski et al., arXiv 2404.15888; second-hand)."""
    depth = pes - 1
    return max(wavelets, wavelets + depth) + (2 * machine["ramp_cycles"] + 1) * depth


def inference_cost(
    machine: Machine, shape: GPTShape, density: float, inputs: Inputs | None = None
) -> InferenceCost:
    inputs = inputs or Inputs()
    if not 0 < density <= 1:
        raise ValueError(f"density: expected 0 < density <= 1, got {density}")
    elem_bytes = BYTES_PER_ELEM[inputs.precision]
    stored_bytes = min(elem_bytes, density * (elem_bytes + INDEX_BYTES))
    weight_bytes = shape.linear_fma * stored_bytes + shape.head_fma * elem_bytes

    rows, cols = machine["grid_rows"], machine["grid_cols"]
    fma_per_s = (
        machine.grid_pes
        * machine.axpy_elems_per_cycle(inputs.precision)
        * machine["clock_hz"]
        * inputs.utilisation
    )
    compute_s = shape.forward_flop(density) / FLOP_PER_FMA / fma_per_s
    depth = 2 * math.sqrt(max(rows, cols))
    stage_cycles = (rows + cols) * machine["hop_cycles"]
    stage_cycles += depth * (2 * machine["ramp_cycles"] + 1)
    latency_s = shape.layers * STAGES * stage_cycles / machine["clock_hz"]
    return InferenceCost(
        decode_token_s=compute_s + latency_s,
        decode_compute_s=compute_s,
        prefill_tokens_per_s=1 / compute_s,
        weight_bytes=weight_bytes,
        cache_bytes_per_token=2 * shape.layers * shape.width * elem_bytes,
        free_bytes=machine.sram_bytes - weight_bytes,
    )
