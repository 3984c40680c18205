"""The module that a sparse one took the place of, without its weights, so that densify_ gives back
what was there: its class, and all that it held beside tensors and modules."""

from collections.abc import Mapping
from typing import Any

from torch import nn

_HELD = ("_parameters", "_buffers", "_modules")


class Origin:
    """The class and the plain attributes of `module`."""

    def __init__(self, module: nn.Module):
        self.kind: Any = type(module)
        self.attributes = {k: v for k, v in module.__dict__.items() if k not in _HELD}

    def with_(
        self,
        parameters: Mapping[str, nn.Parameter | None],
        modules: Mapping[str, nn.Module | None] | None = None,
    ) -> Any:
        """A module of that class with these parameters and submodules."""
        module = self.kind.__new__(self.kind)
        module.__dict__.update(self.attributes)
        module.__dict__.update(_parameters=dict(parameters), _buffers={}, _modules={})
        for name, child in (modules or {}).items():
            module._modules[name] = child
        return module
