"""Checks of what functions and modules are given: an optimizer, a weight."""

from torch import nn


def check_optimizer(optimizer: object) -> None:
    if not hasattr(optimizer, "param_groups"):
        raise TypeError(f"optimizer: expected one of torch.optim, got {type(optimizer).__name__}")


def cannot_be_set(module: nn.Module, name: str, advice: str) -> AttributeError:
    """nn.Module itself has a KeyError for a Parameter in the place of a property."""
    return AttributeError(f"{name}: of a {type(module).__name__} it cannot be set; {advice}")
