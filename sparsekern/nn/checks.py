"""Checks of what functions and modules are given: a model, an optimizer, a weight."""

from collections.abc import Mapping
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


def refuse_sharded(caller: str, model: nn.Module, layers: Mapping[str, nn.Module]) -> None:
    """NotImplementedError where FSDP2 has cut up one of these layers of the model. After a forward
    pass their weights may look whole, but what is written there is lost, or trained by nobody."""
    kinds = {m: {kind.__name__ for kind in type(m).__mro__} for m in model.modules()}
    cut_up = {m for unit, names in kinds.items() if "FSDPModule" in names for m in unit.modules()}
    for name, layer in layers.items():
        own = layer.parameters(recurse=False)
        if layer in cut_up or any(hasattr(p, "full_tensor") for p in own):
            raise NotImplementedError(
                f"{caller}: the weights of {name or 'the model'} are cut into shards, as FSDP2 "
                "does; load the full state_dict into a model without fully_shard, and give that"
            )


def check_optimizer(optimizer: object) -> None:
    if not hasattr(optimizer, "param_groups"):
        raise TypeError(f"optimizer: expected one of torch.optim, got {type(optimizer).__name__}")


def cannot_be_set(module: nn.Module, name: str, advice: str) -> AttributeError:
    """nn.Module itself has a KeyError for a Parameter in the place of a property."""
    return AttributeError(f"{name}: of a {type(module).__name__} it cannot be set; {advice}")
