"""Other kinds of layers as nn.Linear modules for a while: what prunes these prunes them too.

Conv1D    of transformers (GPT-2): weight [K, N]
experts   of mixtures in transformers: Parameters gate_up_proj [E, 2I, H], down_proj [E, H, I]
"""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from ..nn import replace_modules
from ..sparsity.blockwise import Parallel

STACKS = ("gate_up_proj", "down_proj")
OTHER_FORMS = ("has_bias", "is_transposed", "has_post_expert_norm", "_is_expert_parallel")


@contextmanager
def as_linears(model: nn.Module) -> Iterator[nn.Module]:
    """Inside, these layers of the model are linears; afterwards they are what they were, with the
    weights of the linears."""
    originals: dict[nn.Module, Any] = {}

    def stand_in(name: str, module: Any) -> nn.Module | None:
        made: nn.Module | None = None
        if type(module).__name__ == "Conv1D" and hasattr(module, "nf"):
            made = _linear(module.weight.detach().t().contiguous(), module.weight, module.bias)
        elif _is_experts(module):
            made = _Experts(module)
        if made is not None:
            originals[made.train(module.training)] = module
        return made

    replace_modules(model, stand_in)
    places = {name: originals[m] for name, m in model.named_modules() if m in originals}
    try:
        yield model
    finally:
        replace_modules(model, lambda name, m: _restored(places.get(name), m))


def _restored(original: Any, now: Any) -> nn.Module | None:
    """The module that was there, with the weights of the linears that stand in its place now."""
    if original is None:
        return None
    if isinstance(now, _Experts):
        for name in STACKS:
            for weight, layer in zip(getattr(original, name), getattr(now, name), strict=True):
                weight.data.copy_(layer.weight)
    else:
        original.weight.data.copy_(now.weight.detach().t())
    return original


def _linear(weight: Tensor, parameter: Tensor, bias: Any = None) -> nn.Linear:
    """Of this weight [N, K], trained if the parameter is."""
    n, k = weight.shape
    linear = nn.Linear(k, n, bias=False, device="meta")
    linear.weight = nn.Parameter(weight, parameter.requires_grad)
    linear.register_parameter("bias", bias)
    return linear


def _is_experts(module: Any) -> bool:
    parts = module._parameters
    if any(parts.get(name) is None or parts[name].ndim != 3 for name in STACKS):
        return False
    if not hasattr(module, "_apply_gate") or not getattr(module, "has_gate", True):
        return False
    up, down = (parts[name].shape for name in STACKS)
    has_form = up[0] == down[0] and up[2] == down[1] and up[1] == 2 * down[2]
    return has_form and not any(getattr(module, flag, False) for flag in OTHER_FORMS)


class _Experts(nn.Module):
    """The experts of a mixture with a linear for each."""

    def __init__(self, experts: Any) -> None:
        super().__init__()
        self.__dict__["experts"] = experts  # no part of the model meanwhile
        for name in STACKS:
            stack = getattr(experts, name)
            setattr(self, name, Parallel(_linear(w, stack) for w in stack.detach()))

    def __getattr__(self, name: str) -> Any:
        try:
            return super().__getattr__(name)
        except AttributeError:
            return getattr(self.__dict__["experts"], name)

    def forward(self, hidden: Tensor, index: Tensor, weights: Tensor) -> Tensor:
        """hidden [T, H], the experts [T, k] of each token, and their weights [T, k]."""
        y = torch.zeros_like(hidden)
        pairs = zip(self.gate_up_proj, self.down_proj, strict=True)
        for expert, (up, down) in enumerate(pairs):
            tokens, choice = torch.where(index == expert)
            if tokens.numel():
                out = down(self.experts._apply_gate(up(hidden[tokens])))
                y.index_add_(0, tokens, (out * weights[tokens, choice, None]).to(y.dtype))
        return y
