"""Predicted time of a data-parallel training step: of its compute, its bytes and its links.

A step computes; gradients are sent in buckets while backward goes on (gpt/buckets.py), so what
costs is (1) what is still under way when backward ends, the embedding's gradient at least, which is
the last to come; (2) what the products beside it lose to sending; (3) waiting
for the slowest of all GPUs.

    all-reduce of S bytes on n GPUs   2 (n - 1) / n S / bandwidth + 2 log2(n) latency

The bandwidth of a GPU is that of NVLink in a node; on several nodes that of a node's network, which
its GPUs share, pipelined with NVLink, so that the slower of the two counts. Latency is a tree's.
(NCCL's own model: github.com/NVIDIA/nccl-tests, doc/PERFORMANCE.md.)

Figures in BEFORE are from data sheets, and were there before anything was measured; those in
MEASURED were fitted to two H200s (bench/results/nvidia-h200-scale-bfloat16-2026-11-29.md). DEAR and
CHEAP are guesses about the same figures, and make the error bars.
"""

import math
from dataclasses import dataclass, replace

from ..gpt.buckets import BUCKET_BYTES
from ..gpt.flops import multiply_adds
from ..gpt.model import GPTConfig

GPUS_PER_NODE = 8
FP32 = 4
# AdamW reads the gradient, the weight and two moments and writes three; clipping reads the gradient
# twice and writes it.
ADAMW_BYTES, CLIP_BYTES = (4 + 3) * FP32, 3 * FP32
UPDATE_BYTES = ADAMW_BYTES + CLIP_BYTES
MEMORY_BYTES_PER_S = 4.27e12  # copies, measured: nvidia-h200-train-bfloat16-2026-11-29.csv


@dataclass(frozen=True)
class Links:
    """What sending costs on H200s."""

    # NVLink 4: 900 GB/s in both directions together (H200 data sheet), and the share of it.
    inside_bytes_per_s: float = 450e9 * 0.8
    # A 400 Gb/s port for each GPU (DGX H200 data sheet), and the share of it.
    between_bytes_per_s: float = 50e9 * 0.8
    inside_latency_s: float = 5e-6
    between_latency_s: float = 10e-6
    # Of a step's time while it sends: NCCL's blocks take some 24 of 132 multiprocessors.
    interference: float = 0.2
    # Standard deviation of a GPU's step, as a share: spreads of the tables of steps are 0.3 to 4 %.
    spread: float = 0.005

    def all_reduce_s(self, nbytes: float, gpus: int) -> float:
        if gpus == 1:
            return 0.0
        bandwidth = self.inside_bytes_per_s
        latency_s = 2 * math.log2(min(gpus, GPUS_PER_NODE)) * self.inside_latency_s
        if gpus > GPUS_PER_NODE:
            bandwidth = min(bandwidth, GPUS_PER_NODE * self.between_bytes_per_s)
            latency_s += 2 * math.log2(gpus / GPUS_PER_NODE) * self.between_latency_s
        return 2 * (gpus - 1) / gpus * nbytes / bandwidth + latency_s

    def slowest(self, gpus: int) -> float:
        """How many times as long the slowest of so many GPUs takes: the expected maximum of
        normal deviates, at most this."""
        return 1 + self.spread * math.sqrt(2 * math.log(gpus))


BEFORE = Links()
# All-reduces of 1 to 512 MiB; exposed times of five steps, which ask for 0.35 to 0.9.
MEASURED = replace(BEFORE, inside_bytes_per_s=320e9, inside_latency_s=15e-6, interference=0.5)
DEAR = replace(
    MEASURED,
    inside_bytes_per_s=270e9,
    between_bytes_per_s=50e9 * 0.5,
    between_latency_s=30e-6,
    interference=1.0,
    spread=0.015,
)
CHEAP = replace(
    MEASURED,
    inside_bytes_per_s=400e9,
    between_bytes_per_s=50e9 * 0.95,
    between_latency_s=5e-6,
    interference=0.2,
    spread=0.002,
)


@dataclass(frozen=True)
class Step:
    """Seconds of a step, `exposed_s` more than of one GPU, and the bytes of its gradients."""

    step_s: float
    exposed_s: float
    sent_bytes: int


def gradients(config: GPTConfig, sparsity: float) -> list[int]:
    """Bytes of the float32 gradients of each block, of sparse weights at nnz, then of embeddings
    and head, which are one."""
    shapes = config.linears
    vectors = sum(n for n, _ in shapes) + 4 * config.n_embd
    block = sum(round((1 - sparsity) * n * k) for n, k in shapes) + vectors
    return [FP32 * block] * config.n_layer + [FP32 * config.embedding_rows * config.n_embd]


def predict(
    config: GPTConfig,
    sparsity: float,
    compute_s: float,
    gpus: int,
    links: Links = MEASURED,
    is_sharded: bool = False,
) -> Step:
    """A step on `gpus` GPUs that takes `compute_s` on one. Products and attention of backward take
    two thirds of a step without its update.

    Sharded (gpt/shards.py), a reduce-scatter takes half of an all-reduce, the update is that of a
    share, and all-gathers go beside its AdamW, which they outlast."""
    *blocks, embedding = gradients(config, sparsity)
    sent = sum(blocks) + embedding
    update_s = UPDATE_BYTES * sent / FP32 / MEMORY_BYTES_PER_S
    backward_s = 2 / 3 * (compute_s - update_s)
    macs = multiply_adds(config)
    of_head = macs.head / macs.total  # as of a dense step; its backward comes first
    half = 0.5 if is_sharded else 1.0
    busy_until = sending_s = 0.0
    for i, nbytes in enumerate(blocks):
        ready_s = backward_s * (of_head + (1 - of_head) * (i + 1) / len(blocks))
        parts = max(1, round(nbytes / BUCKET_BYTES))
        took_s = half * parts * links.all_reduce_s(nbytes / parts, gpus)
        busy_until = max(ready_s, busy_until) + took_s
        sending_s += took_s
    tail_s = max(backward_s, busy_until) - backward_s + half * links.all_reduce_s(embedding, gpus)
    beside_s = sending_s - max(0.0, busy_until - backward_s)
    waiting_s = (links.slowest(gpus) - 1) * compute_s
    exposed_s = tail_s + links.interference * beside_s + waiting_s
    if is_sharded:
        adamw_s = ADAMW_BYTES / UPDATE_BYTES * update_s / gpus
        clip_s = CLIP_BYTES / UPDATE_BYTES * update_s / gpus
        exposed_s += max(adamw_s, half * links.all_reduce_s(sent, gpus)) + clip_s - update_s
    return Step(compute_s + exposed_s, exposed_s, sent)
