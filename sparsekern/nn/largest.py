"""How large the inputs of sparse layers get."""

import math
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from .linear import SparseLinear


def largest_inputs(model: nn.Module, example: Any) -> dict[nn.Module, float]:
    """By each SparseLinear, the largest element of what the example brings it, in eval mode."""
    layers = {m: name for name, m in model.named_modules() if isinstance(m, SparseLinear)}
    found: dict[nn.Module, Tensor] = {}

    def note(module: nn.Module, arguments: tuple, named: dict) -> None:
        x = (arguments[0] if arguments else named["input"]).detach()
        if not x.numel():  # of an expert without tokens
            return
        largest = x.abs().amax()
        found[module] = torch.maximum(largest, found.get(module, largest))

    training = [module for module in model.modules() if module.training]
    hooks = [layer.register_forward_pre_hook(note, with_kwargs=True) for layer in layers]
    try:
        model.eval()
        with torch.no_grad():
            _call(model, example)
    finally:
        for module in training:
            module.training = True
        for hook in hooks:
            hook.remove()
    largest = {layer: value.item() for layer, value in found.items()}
    for layer, name in layers.items():
        if not math.isfinite(size := largest.get(layer, math.nan)):
            got = f"an input of {size}" if layer in largest else "none"
            raise ValueError(
                f"example: expected finite inputs of {name or 'the model'}, it brought {got}"
            )
    return largest


def _call(model: nn.Module, example: Any) -> None:
    if isinstance(example, Tensor):
        model(example)
    elif isinstance(example, tuple):
        model(*example)
    elif isinstance(example, Mapping):
        model(**example)
    elif callable(example):
        example(model)
    else:
        raise TypeError(
            "example: expected a tensor, a tuple, a dict or a function of the model, got "
            f"{type(example).__name__}"
        )
