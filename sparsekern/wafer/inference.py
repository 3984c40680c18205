"""Inference with all weights resident: no stream; the way through the wafer is what takes time.

Decode: every product is a few vectors times a matrix spread over the whole grid. A PE multiplies
the nonzeros it holds; the sums are reduced along one side of the grid and sent back along the
other. So each of the STAGES of a block, one after the other, pays two sides of hops, the depth of a
tree of two levels of chains, and the wavelets of its sums. The cache lies spread over the PEs, each
reads and multiplies its part. Sparsity shrinks the arithmetic and the memory, never the way.

Several systems are a pipeline: each holds a share of the layers and works on other requests
meanwhile. A request passes through all of them, so it is no faster; memory and throughput grow, as
far as the system with most layers lets them.
"""

import math
from dataclasses import dataclass

from .figures import check_count, check_density, check_kinds
from .inputs import Inputs
from .machine import BYTES_PER_ELEM, Machine
from .shapes import GPTShape

INDEX_BYTES = 2
# Two norms; q, k, v; scores; their weighted sum; projection; up; down.
STAGES = 8


@dataclass(frozen=True)
class InferenceCost:
    """Decode and prefill of a model: `requests` requests together on a `pipeline` of systems."""

    decode_token_s: float  # of one request
    decode_compute_s: float  # its share of arithmetic, attention over the cache included
    decode_cache_s: float  # of that, attention over the cache
    transfer_s: float  # from system to system
    prefill_tokens_per_s: float
    weight_bytes: float
    cache_bytes_per_token: float
    cache_bytes: float  # of all requests in flight
    free_bytes: float  # of SRAM, beside weights and cache; negative: they do not fit
    requests: int
    context: int
    pipeline: int
    at_work: float  # systems, while the fullest one works; of as many layers each, all of them

    @property
    def fits(self) -> bool:
        return self.free_bytes >= 0

    @property
    def decode_tokens_per_s(self) -> float:
        """Tokens a second of one request."""
        return 1 / self.decode_token_s

    @property
    def throughput_tokens_per_s(self) -> float:
        """Tokens a second of all requests: each system of the pipeline has so many."""
        return self.requests * self.at_work / self.decode_token_s

    @property
    def most_context(self) -> int:
        """Tokens of cache that fit for each request."""
        held = self.pipeline / self.at_work  # by the fullest system, over the mean one
        free = self.free_bytes / held + self.cache_bytes
        requests = self.requests * self.pipeline
        return max(0, int(free / (self.cache_bytes_per_token * requests)))


def reduce_cycles(machine: Machine, pes: int, wavelets: int) -> float:
    """A chain of additions over `pes` in a row: max(C, E / N + L) + (2 T_R + 1) D with
    C = E / N = wavelets, L = D = pes - 1 (Luczynski et al., arXiv 2404.15888; second-hand)."""
    return wavelets + (2 * machine["ramp_cycles"] + 2) * (pes - 1)


def inference_cost(
    machine: Machine,
    shape: GPTShape,
    density: float,
    inputs: Inputs | None = None,
    context: int = 0,
    requests: int = 1,
    pipeline: int = 1,
) -> InferenceCost:
    """The cost of decoding a token of each of `requests` requests with `context` tokens in the
    cache, on a `pipeline` of systems, and of prefill of sequences as long as the shape's.

    Raises ValueError, which names the argument."""
    inputs = Inputs() if inputs is None else inputs
    check_kinds(
        machine=(machine, Machine, "machine(name)"),
        shape=(shape, GPTShape, "model_shape(name)"),
        inputs=(inputs, Inputs, "Inputs()"),
    )
    density = check_density(density)
    for name, value, least in (
        ("requests", requests, 1),
        ("pipeline", pipeline, 1),
        ("context", context, 0),
    ):
        check_count(name, value, least)
    if pipeline > shape.layers:
        raise ValueError(f"pipeline: expected at most the {shape.layers} layers, got {pipeline}")
    elem_bytes = BYTES_PER_ELEM[inputs.precision]
    stored_bytes = min(elem_bytes, density * (elem_bytes + INDEX_BYTES))
    linear_bytes = shape.linear_weights * stored_bytes
    weight_bytes = linear_bytes + shape.head_fma * elem_bytes
    at_work = shape.layers / -(-shape.layers // pipeline)
    cache_bytes_per_token = 2 * shape.layers * shape.kv_width * elem_bytes
    cache_bytes = float(requests * pipeline * context * cache_bytes_per_token)
    # Room is as short everywhere as on the system with most layers.
    more_layers = (linear_bytes + cache_bytes) * (pipeline / at_work - 1)

    rows, cols, clock_hz = machine["grid_rows"], machine["grid_cols"], machine["clock_hz"]
    pes_per_s = machine.grid_pes * clock_hz * inputs.utilisation
    # Weights stay, so tokens may pass in vectors that are short enough for the cache.
    fma_per_s = pes_per_s * machine.axpy_elems_per_cycle(inputs.precision, 1)

    def attention_s(length: int) -> float:
        """Seconds of one token that attends to `length` others: multiply-adds and scores. Keys and
        values are read once a token, as fast as the SRAM gives them."""
        fma = 2 * length * shape.layers * shape.q_width
        scores_s = inputs.score_cycles * length * shape.layers * shape.heads / pes_per_s
        read_s = length * cache_bytes_per_token / machine.sram_bytes_per_s
        return max(fma / fma_per_s, read_s) + scores_s

    linear_s = (shape.linear_fma * density + shape.head_fma) / fma_per_s
    prefill_s = linear_s + attention_s(shape.sequence)
    cache_s = requests * attention_s(context)
    compute_s = requests * linear_s + cache_s

    depth = 2 * math.sqrt(max(rows, cols))
    sums = math.ceil(
        requests * math.ceil(shape.width / rows) / machine.wavelet_elems(inputs.precision)
    )
    stage_cycles = (rows + cols) * machine["hop_cycles"]
    stage_cycles += depth * (2 * machine["ramp_cycles"] + 1) + sums - 1
    latency_s = shape.layers * STAGES * stage_cycles / clock_hz
    vectors_bytes = requests * shape.width * elem_bytes
    transfer_s = (pipeline - 1) * (
        machine["stream_latency_s"] + vectors_bytes / machine["io_bytes_per_s"]
    )
    return InferenceCost(
        decode_token_s=compute_s + latency_s + transfer_s,
        decode_compute_s=compute_s,
        decode_cache_s=cache_s,
        transfer_s=transfer_s,
        prefill_tokens_per_s=at_work / prefill_s,
        weight_bytes=weight_bytes,
        cache_bytes_per_token=cache_bytes_per_token,
        cache_bytes=cache_bytes,
        free_bytes=pipeline * machine.sram_bytes - weight_bytes - cache_bytes - more_layers,
        requests=requests,
        context=context,
        pipeline=pipeline,
        at_work=at_work,
    )
