"""Masks of checkpoints and of benchmarks, as the wafer model takes them."""

from functools import lru_cache
from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn

from ..gpt.build import load_model
from ..nn import SparseLinear
from ..testing import random_mask
from ..wafer.balance import Mask
from ..wafer.shapes import GPTShape
from ..wafer.weights import Weight


def from_tensor(kept: Tensor) -> Mask:
    return Mask.from_dense(kept.numpy())


def checkpoint_weights(path: Path) -> tuple[GPTShape, tuple[Weight, ...]]:
    """The shape of a trained model, and its linear layers' weights with their actual masks."""
    model, _ = load_model(path)
    c = model.config
    run = path if path.is_dir() else path.parent
    shape = GPTShape(
        run.name, c.n_layer, c.n_embd, c.n_head, c.mlp_width, c.vocab_size, c.block_size
    )
    weights = []
    for name, module in model.blocks.named_modules():
        mask = _mask(module)
        if mask is not None:
            weights.append(Weight(name, *mask.shape, mask.density, 1, mask))
    return shape, tuple(weights)


def _mask(module: nn.Module) -> Mask | None:
    if isinstance(module, SparseLinear):
        shape = (module.out_features, module.in_features)
        return Mask(shape, *(t.numpy().astype(np.int64) for t in _pattern(module)))
    if isinstance(module, nn.Linear):
        return from_tensor(module.weight.detach() != 0)
    return None


def _pattern(module: SparseLinear) -> tuple[Tensor, Tensor]:
    return module.row_offsets, module.col_indices


def benchmark_mask(workload: dict) -> Mask | None:
    """The random mask of a measurement of bench/, made again; None for the others."""
    if workload["mask"] != "random":
        return None
    return _random(workload["N"], workload["K"], workload["sparsity"])


@lru_cache(maxsize=64)
def _random(n: int, k: int, sparsity: float) -> Mask:
    # bench/products.py draws the values first, from the same generator.
    generator = torch.Generator().manual_seed(0)
    torch.randn(n, k, generator=generator)
    return from_tensor(random_mask(n, k, sparsity, generator))
