"""Bytes of a GPT's training step on a GPU, by parts: predicted, and as torch's allocator counts.

Weights, gradients and AdamW's state are float32, products bfloat16 by autocast, as the trainer has
them. W [N, K] is a linear of a block, nnz what it stores, C the width, h that of the MLP, V the
vocabulary, T the context. Formulas count tensors, not the allocator's rounding and not the
workspaces of cuBLAS and cuSPARSELt.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn

from ..gpt.llama import LlamaConfig
from ..gpt.model import GPTConfig
from ..kernels.cuda import ordered
from ..kernels.cuda.bitmap import COLUMNS
from ..kernels.problem import Problem
from .two_way_mask import TWO_WAY

DENSE = "dense"  # beside the masks
# What is there between steps. The last four are what sparse weights add.
STATE = ("weights", "gradients", "AdamW", "indices", "bitmaps", "2:4 tails", "orders")
FP32, BF16, INT32 = 4, 2, 4
WORD_BYTES = 8 + INT32  # of a bitmap: its bits, and where its values begin
TAIL_SHARE = 8  # an operand of 2:4 products has N K / 2 slots, and N K / 8 bytes after them


def linears(config: GPTConfig) -> list[tuple[int, int]]:
    """N, K of a block's linears. ValueError for LLaMA's: what is kept for its backward pass is not
    counted here."""
    if isinstance(config, LlamaConfig):
        raise ValueError(f"config: expected blocks as GPT-2's, got {type(config).__name__}")
    return config.linears


def predict(
    config: GPTConfig, batch: int, sparsity: float = 0.0, mask: str = DENSE
) -> dict[str, int]:
    """Bytes of each part for `batch` sequences of T tokens.

    Between steps, for P parameters, of which those of a sparse W are nnz:

        weights    4 P
        gradients  4 P: of the values alone where W is sparse
        AdamW      8 P, two moments, and 4 for each tensor, its step
        indices    4 nnz + 4 (N + 1) for each sparse W: col_indices, row_offsets, int32
        bitmaps    12 for each 64 columns of a row: the places again, as the kernels read them
        2:4 tails  N K / 8 for each W, and for each W^T, that sparse tensor cores take (two_of_four,
                   ordered): what stands behind the slots
        orders     2 nnz for each W that is put into an order (ordered), and 6 nnz for each W^T:
                   where its values belong

    In a step:

        casts        2 for each weight of a linear or stored value, and of the head: autograd keeps
                     autocast's casts from forward to backward
        activations  of each block and token 20 C + 4 h + 4 a head + 16: the inputs of both norms in
                     float32 (8 C) with mean and deviation (16), the inputs of four linears in
                     bfloat16 (4 C for qkv and up, 2 C for proj, 2 h for down), query, key and value
                     (6 C), the scores' logarithms of sums (4 a head), and the input of GELU (2 h);
                     of the last norm and the head 6 C + 8. Attention's result is the input of proj
        loss         12 V a token: the log-softmax in float32, its gradient, and that of the logits
        scratch      of one linear at a time, the largest: W written out or the dense gradient of W,
                     2 N K each, or the operand of 2:4 products, 9/8 N K, never two at once; then
                     2 nnz, what was collected. Dense has the 2 N K of its own gradient
        embedding    4 V C: its gradient, before it is added to that of the head
    """
    C, h, V, T, L = (
        *(config.n_embd, config.mlp_width, config.vocab_size, config.block_size),
        config.n_layer,
    )
    is_sparse, tokens, one = mask != DENSE, batch * T, 1 + config.bias
    shapes = linears(config)
    places = [n * k for n, k in shapes]
    counts = [round((1 - sparsity) * each) for each in places] if is_sparse else places
    vectors = config.bias * sum(n for n, _ in shapes) + 2 * one * C
    parameters = (V + T) * C + L * (sum(counts) + vectors) + one * C
    tensors = 2 + L * (4 + 4 * config.bias + 2 * one) + one
    block = 20 * C + 4 * h + 4 * config.n_head + 16
    found = {
        "weights": FP32 * parameters,
        "gradients": FP32 * parameters,
        "AdamW": 2 * FP32 * parameters + FP32 * tensors,
        "indices": L * sum(INT32 * (c + n + 1) for c, (n, _) in zip(counts, shapes, strict=True)),
        "bitmaps": L * sum(WORD_BYTES * n * max(1, -(-k // COLUMNS)) for n, k in shapes),
        "2:4 tails": L * 2 * sum(places) // TAIL_SHARE,
        "orders": 0,
        "casts": BF16 * (L * sum(counts) + V * C),
        "activations": tokens * (L * block + 6 * C + 8),
        "loss": 12 * V * tokens,
        "scratch": BF16 * max(p + is_sparse * c for p, c in zip(places, counts, strict=True)),
        "embedding": FP32 * V * C,
    }
    if not is_sparse:
        found |= {"indices": 0, "bitmaps": 0}
    if mask != TWO_WAY:
        found |= _of_orders(shapes, counts, tokens, L) if is_sparse else {"2:4 tails": 0}
    return found


def _of_orders(
    shapes: list[tuple[int, int]], counts: list[int], tokens: int, layers: int
) -> dict[str, int]:
    """The parts that `ordered` adds for a free mask, where its sizes are those that it takes."""
    tails = places = 0
    for (n, k), nnz in zip(shapes, counts, strict=True):
        for op, nbytes in (("spmm", 2), ("spmm_t", 6)):
            problem = Problem(op, "cuda", torch.bfloat16, tokens, n, k, nnz)
            if ordered.refuse_size(problem) is None:
                tails += n * k // TAIL_SHARE
                places += nbytes * nnz
    return {"2:4 tails": layers * tails, "orders": layers * places}


def state_bytes(parts: dict[str, int]) -> int:
    """Between steps, with the gradients of the last one."""
    return sum(parts[name] for name in STATE)


def peak_bytes(parts: dict[str, int], accumulates: bool = False) -> int:
    """The most at a time. A backward pass gives activations back layer by layer while gradients
    come, both evenly: so this is where it begins, without gradients, or where it ends, with all.
    accumulates: there are those of an earlier micro-batch when it begins."""
    begins = parts["casts"] + parts["activations"] + parts["loss"]
    ends = parts["gradients"] + max(parts["scratch"], parts["embedding"])
    if accumulates:
        begins += parts["gradients"]
    return state_bytes(parts) - parts["gradients"] + max(begins, ends)


class Meter:
    """Bytes that torch's allocator has handed out for one model since this was made; on a CPU none
    are counted. What others have stays, and does not count."""

    def __init__(self, device: torch.device) -> None:
        self._is_cuda = device.type == "cuda"
        self._parameters: list[nn.Parameter] = []
        self._found: dict[str, int] = {}
        self._begin_bytes = self._allocated()

    def _allocated(self) -> int:
        return torch.cuda.memory_allocated() if self._is_cuda else 0

    def _gradients(self) -> int:
        return sum(p.grad.nbytes for p in self._parameters if p.grad is not None)

    def built(self, model: nn.Module) -> None:
        """To be called when the model is there: weights, and indices of sparse ones."""
        self._parameters = list(model.parameters())
        self._found["built_bytes"] = self._allocated() - self._begin_bytes

    @contextmanager
    def step(self, info: dict[str, Any]) -> Iterator[None]:
        """Around each step. The first brings gradients, optimizer state and what is derived from
        patterns; a later one gives `info` the numbers, unless it has them: counting takes time."""
        if not self._is_cuda or "peak_bytes" in info:
            yield
            return
        found, before = self._found, self._allocated() - self._gradients()
        torch.cuda.reset_peak_memory_stats()
        yield
        if "state_bytes" not in found:
            found["state_bytes"] = found["built_bytes"] + self._allocated() - before
            return
        others = before - (found["state_bytes"] - self._gradients())
        info |= found | {"peak_bytes": torch.cuda.max_memory_allocated() - others}
