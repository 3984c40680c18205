"""Adapters: small trained modules beside a frozen layer, as LoRA's. Nothing of them is pruned."""

from collections.abc import Iterator

from torch import nn


def without_adapters(model: nn.Module) -> Iterator[tuple[str, nn.Module]]:
    """The modules of the model and their names, as `named_modules`, but of a layer with an adapter
    (by the marks of peft's) the base layer alone."""
    adapters = {
        module
        for layer in model.modules()
        if is_adapted(layer)
        for name, child in layer.named_children()
        if name != "base_layer"
        for module in child.modules()
    }
    return ((n, module) for n, module in model.named_modules() if module not in adapters)


def is_adapted(module: nn.Module) -> bool:
    """Whether it is a layer of peft's with an adapter."""
    return "base_layer" in module._modules and hasattr(module, "adapter_layer_names")
