"""Models, optimizers and learning rates of a run, from its settings or from a checkpoint."""

import json
import math
from pathlib import Path
from typing import TypeVar

import torch
from torch import Tensor, nn
from torch.optim import AdamW

from ..files import read_regular
from ..nn import SparseLinear, parameter_groups, replace_modules
from ..weights import load_metadata, load_weights, set_weights_
from .checkpoint import CHECKPOINT, WEIGHTS, about, check_shapes, checkpoint_file, load_checkpoint
from .config import TrainConfig
from .data import BPETokenizer, Tokenizer, tokenizer_from_state
from .model import GPT, GPTConfig

BETAS = (0.9, 0.95)
WEIGHT_DECAY = 0.1
WARMUP_SHARE = 0.1  # of all steps, with the learning rate rising from 0
FINAL_LR_SHARE = 0.1  # of the highest learning rate, reached by a cosine
MOST_JSON_BYTES = 2**27  # of a file that holds one of them


def build_model(config: TrainConfig, vocab_size: int) -> GPT:
    """The same weights and the same zeros for the same config."""
    torch.manual_seed(config.seed)
    model = GPT(config.model(vocab_size))
    algorithm = config.make_algorithm(config.sparsity_settings())
    return algorithm.apply(model) if algorithm else model


def model_from_state(config: GPTConfig, state: dict[str, Tensor]) -> GPT:
    """A GPT with the weights and patterns of a state_dict. ValueError names what does not fit."""

    def replace(name: str, module: nn.Module) -> nn.Module | None:
        if type(module) is not nn.Linear or f"{name}.values" not in state:
            return None
        parts = [state.get(f"{name}.{part}") for part in ("row_offsets", "col_indices", "values")]
        if any(part is None for part in parts):
            raise ValueError(f"{name}: expected row_offsets, col_indices and values")
        if parts[-1].dtype != module.weight.dtype:
            raise ValueError(
                f"{name}: values: expected {module.weight.dtype}, got {parts[-1].dtype}"
            )
        try:
            return SparseLinear(module.in_features, module.out_features, *parts, module.bias)
        except (TypeError, ValueError) as error:
            raise ValueError(f"{name}: {error}") from error

    model = replace_modules(GPT(config), replace)
    try:
        model.load_state_dict(state)
    except RuntimeError as error:
        raise ValueError(f"model: {' '.join(str(error).split())}") from error
    return model


def load_model(path: str | Path) -> tuple[GPT, Tokenizer]:
    """The trained model and its tokenizer, from the folder of a run, its checkpoint.pt or its
    model.safetensors; where that has no metadata, with config.json and tokenizer.json beside it."""
    path = Path(path)
    if path.is_dir() and not (path / CHECKPOINT).exists() and (path / WEIGHTS).exists():
        path /= WEIGHTS
    if path.suffix == ".safetensors":
        return _load_weights(path)
    path = checkpoint_file(path)
    state = load_checkpoint(path)
    with about(path):
        tokenizer = tokenizer_from_state(state["tokenizer"])
        config = model_config(state["config"], tokenizer.vocab_size)
        return model_from_state(config, state["model"]), tokenizer


def _load_weights(path: Path) -> tuple[GPT, Tokenizer]:
    found, metadata = load_weights(path), load_metadata(path)
    with about(path):
        config = metadata.get("config") or _beside(path, "config")
        if kind := config.get("model_type"):  # before a tokenizer, which it need not have
            raise ValueError(
                f"expected a GPT of `sparsekern train`, got a {kind} of transformers: "
                "from_pretrained of transformers reads it, and its generate() writes text"
            )
        tokenizer_state = metadata.get("tokenizer") or _beside(path, "tokenizer")
        for name in ("layers", "heads", "width", "context"):
            if type(config.get(name)) is not int or config[name] < 1:
                raise ValueError(f"config: {name}: expected a number, got {config.get(name)!r}")
        check_shapes(config, {name: tuple(w.shape) for name, w in found.items()})
        tokenizer = tokenizer_from_state(tokenizer_state)
        model = GPT(model_config(config, tokenizer.vocab_size))
        return set_weights_(model, found), tokenizer


def _beside(weights: Path, name: str) -> dict:
    """The config or the tokenizer of a model, from a JSON file beside its weights. A tokenizer may
    also be as the library `tokenizers` saves it."""
    path = weights.with_name(f"{name}.json")
    if not path.is_file():
        raise ValueError(
            "expected the weights of a run of sparsekern, with config and tokenizer in their "
            f"metadata, or a {path.name} beside them"
        )
    text = read_regular(path, MOST_JSON_BYTES)
    try:
        content = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{path}: expected JSON") from error
    if not isinstance(content, dict):
        raise ValueError(f"{path}: expected an object, got {type(content).__name__}")
    if name == "tokenizer" and "model" in content:
        return {"name": BPETokenizer.name, "serialized": text.decode()}
    return content


def model_config(config: dict, vocab_size: int) -> GPTConfig:
    """The shape of the model, from the settings in a file."""
    return GPTConfig(*(config[n] for n in ("layers", "heads", "width", "context")), vocab_size)


Kind = TypeVar("Kind", bound=AdamW)


def build_optimizer(model: nn.Module, lr: float, kind: type[Kind] = AdamW) -> Kind:
    """AdamW that decays matrices and the values of sparse matrices, not biases and norms."""
    groups = parameter_groups(model, WEIGHT_DECAY)
    return kind(groups, lr=lr, betas=BETAS, fused=True)


def learning_rate(config: TrainConfig, step: int) -> float:
    """A linear warm-up, then a cosine down to FINAL_LR_SHARE."""
    warmup = math.ceil(WARMUP_SHARE * config.steps)
    if step < warmup:
        return config.lr * (step + 1) / warmup
    done = (step - warmup) / max(1, config.steps - warmup)
    cosine = (1 + math.cos(math.pi * done)) / 2
    return config.lr * (FINAL_LR_SHARE + (1 - FINAL_LR_SHARE) * cosine)
