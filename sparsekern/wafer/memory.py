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
    room_bytes: float  # SRAM beside the partial sums
    stride: int  # blocks between kept inputs; 0: everything stays


def _mlp_elems(shape: GPTShape) -> int:
    """Elements that the MLP's activation reads; its result is made again from them, one by one."""
    return shape.ffn * shape.experts_per_token * (2 if shape.is_gated else 1)


def block_elems_per_token(shape: GPTShape) -> int:
    """Elements that a resident block keeps: results of two norms and of the projection; q, k, v and
    what attention makes of them; the MLP before and after its activation. Scores are not kept."""
    attention = 2 * shape.q_width + 2 * shape.kv_width
    mlp = _mlp_elems(shape) + shape.ffn * shape.experts_per_token
    return 3 * shape.width + attention + mlp


def recomputed_block_elems_per_token(shape: GPTShape) -> int:
    """Elements of the block whose backward pass runs: its input and the sum in its middle, and the
    larger one of its halves. Norms and activations are made again where they are read, and a
    gradient takes the place of what it is the gradient of."""
    attention = 2 * shape.q_width + 2 * shape.kv_width
    return 2 * shape.width + max(attention, _mlp_elems(shape))


def plan_activations(
    machine: Machine, inputs: Inputs, shape: GPTShape, tokens: int
) -> ActivationPlan:
    """What stays of the activations of `tokens` tokens on one system."""
    elem_bytes = BYTES_PER_ELEM[inputs.precision]
    block_input = tokens * shape.width * elem_bytes
    capacity = machine.sram_bytes * (1 - inputs.partial_sum_share)

    resident = shape.layers * tokens * block_elems_per_token(shape) * elem_bytes
    if inputs.activations == "resident" or (inputs.activations == "auto" and resident <= capacity):
        return ActivationPlan("resident", resident, 0.0, capacity, 0)

    block = tokens * recomputed_block_elems_per_token(shape) * elem_bytes

    def recomputed(stride: int) -> float:
        """Inputs of segments, inputs inside one segment, one block at work; the input of that one
        is among its own."""
        return (-(-shape.layers // stride) + stride - 2) * block_input + block

    fitting = [s for s in range(1, shape.layers + 1) if recomputed(s) <= capacity]
    if inputs.activations != "spill" and fitting:
        return ActivationPlan("recompute", recomputed(fitting[0]), 0.0, capacity, fitting[0])
    stride = min(range(1, shape.layers + 1), key=recomputed)
    need = recomputed(stride)
    if inputs.activations == "recompute":
        return ActivationPlan("recompute", need, 0.0, capacity, stride)
    return ActivationPlan("spill", need, max(0.0, need - capacity), capacity, stride)
