"""Shapes of well-known models, with random weights: the cost of a step does not depend on them.

Vocabularies are rounded up to a multiple of 64: dense heads are faster so.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from .. import nn
from .llama import LlamaConfig, make
from .model import GPT, Block, GPTConfig, initialise

PRESETS: dict[str, GPTConfig] = {
    "gpt2-small": GPTConfig(12, 12, 768, 1024, 50304),
    "gpt3-xl": GPTConfig(24, 16, 2048, 2048, 50304),
    "gpt3-6.7b": GPTConfig(32, 32, 4096, 2048, 50304),
    # 8 of the 80 blocks of LLaMA 70B.
    "llama-like": LlamaConfig(8, 64, 8192, 2048, 32000, n_inner=28672, n_kv_head=8),
}


@dataclass(frozen=True)
class UniformMask:
    """Keeps exactly round((1 - sparsity) * N * K) weights, drawn anew at each call, uniformly.

    Unlike Static it draws on the weight's device, by torch's own generator there: billions of
    weights take seconds, and another device has other masks."""

    sparsity: float

    def mask(self, name: str, weight: Tensor) -> Tensor:
        nnz = round((1 - self.sparsity) * weight.numel())
        kept = torch.randperm(weight.numel(), device=weight.device)[:nnz]
        mask = torch.zeros(weight.numel(), dtype=torch.bool, device=weight.device)
        return mask.index_fill_(0, kept, True).view(weight.shape)


def random_gpt(
    config: GPTConfig,
    sparsity: float = 0.0,
    device: torch.device | str = "cpu",
    dtype: torch.dtype = torch.float32,
    seed: int = 0,
    tokens: int | Sequence[int] = 1,
    keeps_dense: bool = False,
    advance: Callable[[], None] = lambda: None,
) -> GPT:
    """A GPT for inference with random weights and, in the linears of its blocks, random zeros.

    It is made where it will run, block by block: beside the result only one dense block is ever in
    memory, with what it takes to draw its masks and to pack it, as of for_inference(). `advance` is
    called after each block."""
    torch.manual_seed(seed)
    with torch.device("meta"):
        model = make(config).to(dtype).requires_grad_(False)
    embeddings = [m for name, m in model.named_children() if name not in ("blocks", "lm_head")]
    for part in (*embeddings, *model.blocks):
        part.to_empty(device=device)
        initialise(part, config.n_layer)
        if isinstance(part, Block) and sparsity:
            for_inference(nn.sparsify_(part, UniformMask(sparsity)), tokens, keeps_dense)
        if isinstance(part, Block):
            advance()
    model.lm_head.weight = model.wte.weight
    return model.eval()


def for_inference(
    model: torch.nn.Module, tokens: int | Sequence[int] = 1, keeps_dense: bool = False
) -> torch.nn.Module:
    """The sparse layers of `model` in the form that is fastest on its device, in place, for calls
    of so many tokens: the batch in generation, and where its prompt matters up to that times the
    prompt's length. On a GPU they may keep dense copies, in 16 bits alone: TypeError for others.
    Layers on a CPU stay as they are, and those of float32, which no GPU layout holds."""
    values = [part.values for part in model.modules() if isinstance(part, nn.SparseLinear)]
    if values and values[0].is_cuda and (keeps_dense or values[0].itemsize == 2):
        return nn.pack_(model, tokens, dense=keeps_dense)
    return model
