"""Models, optimizers and learning rates of a run, from its settings or from a checkpoint."""

import math
from pathlib import Path

import torch
from torch import Tensor, nn

from ..groups import parameter_groups
from ..nn import SparseLinear, replace_modules
from .checkpoint import load_checkpoint
from .config import TrainConfig
from .data import Tokenizer, tokenizer_from_state
from .model import GPT, GPTConfig

BETAS = (0.9, 0.95)
WEIGHT_DECAY = 0.1
WARMUP_SHARE = 0.1  # of all steps, with the learning rate rising from 0
FINAL_LR_SHARE = 0.1  # of the highest learning rate, reached by a cosine


def build_model(config: TrainConfig, vocab_size: int) -> GPT:
    """The same weights and the same zeros for the same config."""
    torch.manual_seed(config.seed)
    model = GPT(config.model(vocab_size))
    algorithm = config.make_algorithm(config.sparsity_settings())
    return algorithm.apply(model) if algorithm else model


def model_from_state(config: GPTConfig, state: dict[str, Tensor]) -> GPT:
    """A GPT with the weights and patterns of a state_dict."""

    def replace(name: str, module: nn.Module) -> nn.Module | None:
        if f"{name}.values" not in state:
            return None
        parts = (state[f"{name}.{part}"] for part in ("row_offsets", "col_indices", "values"))
        return SparseLinear(module.in_features, module.out_features, *parts, module.bias)

    model = replace_modules(GPT(config), replace)
    model.load_state_dict(state)
    return model


def load_model(path: Path) -> tuple[GPT, Tokenizer]:
    """The trained model and its tokenizer."""
    state = load_checkpoint(path)
    tokenizer = tokenizer_from_state(state["tokenizer"])
    config = TrainConfig(**state["config"]).model(tokenizer.vocab_size)
    return model_from_state(config, state["model"]), tokenizer


def build_optimizer(model: nn.Module, lr: float) -> torch.optim.AdamW:
    """AdamW that decays matrices and the values of sparse matrices, not biases and norms."""
    groups = parameter_groups(model, WEIGHT_DECAY)
    return torch.optim.AdamW(groups, lr=lr, betas=BETAS, fused=True)


def learning_rate(config: TrainConfig, step: int) -> float:
    """A linear warm-up, then a cosine down to FINAL_LR_SHARE."""
    warmup = math.ceil(WARMUP_SHARE * config.steps)
    if step < warmup:
        return config.lr * (step + 1) / warmup
    done = (step - warmup) / max(1, config.steps - warmup)
    cosine = (1 + math.cos(math.pi * done)) / 2
    return config.lr * (FINAL_LR_SHARE + (1 - FINAL_LR_SHARE) * cosine)
