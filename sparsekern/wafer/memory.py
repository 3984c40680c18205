"""Activations in a wafer's SRAM, and what is done where it is short.

resident   every activation that the backward pass reads stays
recompute  the input of every `stride`-th block stays; segments run forward once more
spill      recompute, and what still does not fit leaves over the I/O links and comes back
"""

from dataclasses import dataclass

from .inputs import Inputs
from .machine import BYTES_PER_ELEM, Machine
from .shapes import GPTShape


@dataclass(frozen=True)
class ActivationPlan:
    mode: str
    need_bytes: float  # of all activations, before anything spills
    spilled_bytes: float
    stride: int  # blocks between kept inputs; 0: everything stays


def block_elems_per_token(shape: GPTShape) -> int:
    """Two norms, q, k, v, the attention's and its projection's results: 7 of width d; up and GELU:
    2 of width f. Scores are not kept."""
    return 7 * shape.width + 2 * shape.ffn


def plan_activations(
    machine: Machine, inputs: Inputs, shape: GPTShape, tokens: int
) -> ActivationPlan:
    elem_bytes = BYTES_PER_ELEM[inputs.precision]
    block = tokens * block_elems_per_token(shape) * elem_bytes
    block_input = tokens * shape.width * elem_bytes
    capacity = machine.sram_bytes * (1 - inputs.partial_sum_share)

    resident = shape.layers * block
    if inputs.activations == "resident" or (inputs.activations == "auto" and resident <= capacity):
        return ActivationPlan("resident", resident, 0.0, 0)

    def recomputed(stride: int) -> float:
        """Inputs of segments, inputs inside one segment, one block whole."""
        return (-(-shape.layers // stride) + stride - 1) * block_input + block

    fitting = [s for s in range(1, shape.layers + 1) if recomputed(s) <= capacity]
    if inputs.activations != "spill" and fitting:
        return ActivationPlan("recompute", recomputed(fitting[0]), 0.0, fitting[0])
    stride = min(range(1, shape.layers + 1), key=recomputed)
    need = recomputed(stride)
    if inputs.activations == "recompute":
        return ActivationPlan("recompute", need, 0.0, stride)
    return ActivationPlan("spill", need, max(0.0, need - capacity), stride)
