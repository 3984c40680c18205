"""Checks of what functions and modules are given: a model, an optimizer, a weight."""

from typing import Any

from torch import nn
from torch.nn.parallel import DistributedDataParallel


def check_model(model: Any) -> None:
    """TypeError for what is no module."""
    if not isinstance(model, nn.Module):
        raise TypeError(f"model: expected a torch.nn.Module, got {type(model).__name__}")


def refuse_wrapped(caller: str, model: nn.Module) -> None:
    """TypeError for what is no module, and for one whose gradients others average."""
    check_model(model)
    if isinstance(model, DistributedDataParallel):
        raise TypeError(
            f"{caller}: expected the model itself, got a DistributedDataParallel, which would not "
            "average the gradients of new Parameters; give its .module, and wrap that anew"
        )


def refuse_sharded(caller: str, model: nn.Module) -> None:
    """NotImplementedError for a model that FSDP2 has cut up. After a forward pass its weights may
    look whole, but what is written there is lost, or trained by nobody."""
    for name, module in model.named_modules():
        if any(kind.__name__ == "FSDPModule" for kind in type(module).__mro__):
            raise NotImplementedError(
                f"{caller}: FSDP2 has cut the weights of {name or 'the model'} into shards; load "
                "the full state_dict into a model without fully_shard, and give that"
            )


def check_optimizer(optimizer: object) -> None:
    if not hasattr(optimizer, "param_groups"):
        raise TypeError(f"optimizer: expected one of torch.optim, got {type(optimizer).__name__}")


def cannot_be_set(module: nn.Module, name: str, advice: str) -> AttributeError:
    """nn.Module itself has a KeyError for a Parameter in the place of a property."""
    return AttributeError(f"{name}: of a {type(module).__name__} it cannot be set; {advice}")
