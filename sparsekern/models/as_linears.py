"""Other kinds of layers as nn.Linear modules for a while: what prunes these prunes them too.

Conv1D         of transformers (GPT-2): weight [K, N]
FalconLinear   of transformers, a subclass of nn.Linear
experts        of mixtures in transformers: 3-D Parameters, a matrix for each expert
"""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from ..nn import replace_modules
from ..nn.experts import activated
from ..nn.kinds import (
    biases,
    is_experts,
    is_linear,
    matrices,
    stacks_of,
    uses_of_parameters,
    why_not_experts,
)
from ..nn.origin import Origin
from ..sparsity.blockwise import Parallel


@contextmanager
def as_linears(model: nn.Module) -> Iterator[nn.Module]:
    """Inside, these layers of the model are linears; afterwards they are what they were, with the
    weights of the linears."""
    originals: dict[nn.Module, Any] = {}
    uses = uses_of_parameters(model)

    def stand_in(name: str, module: Any) -> nn.Module | None:
        made: nn.Module | None = None
        if any(p is not None and uses[id(p)] > 1 for p in module._parameters.values()):
            return None  # tied
        if type(module).__name__ == "Conv1D" and hasattr(module, "nf"):
            made = _linear(module.weight.detach().t().contiguous(), module.weight, module.bias)
        elif type(module) is not nn.Linear and is_linear(module):
            made = _linear(module.weight.detach(), module.weight, module.bias)
        elif is_experts(module) and why_not_experts(module) is None:
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
        for name in stacks_of(original):
            for weight, layer in zip(matrices(original, name), getattr(now, name), strict=True):
                weight.copy_(layer.weight.detach())
    else:
        weight = now.weight.detach()
        original.weight.data.copy_(weight if isinstance(original, nn.Linear) else weight.t())
    return original


def _linear(weight: Tensor, parameter: Tensor, bias: Any = None) -> nn.Linear:
    """Of this weight [N, K], trained if the parameter is."""
    n, k = weight.shape
    linear = nn.Linear(k, n, bias=False, device="meta")
    linear.weight = nn.Parameter(weight, parameter.requires_grad)
    linear.register_parameter("bias", bias)
    return linear


class _Experts(nn.Module):
    """The experts of a mixture with a linear for each."""

    def __init__(self, experts: Any) -> None:
        super().__init__()
        self.__dict__["experts"] = experts  # no part of the model meanwhile
        self.__dict__["origin"] = Origin(experts)
        self.stacks = stacks_of(experts)
        for name in self.stacks:
            stack = getattr(experts, name)
            pairs = zip(matrices(experts, name), biases(experts, name), strict=True)
            setattr(self, name, Parallel(_linear(w, stack, bias) for w, bias in pairs))

    def __getattr__(self, name: str) -> Any:
        try:
            return super().__getattr__(name)
        except AttributeError:
            return getattr(self.__dict__["experts"], name)

    def forward(
        self, hidden: Tensor, index: Tensor | None = None, weights: Tensor | None = None
    ) -> Tensor:
        """hidden [T, H], the experts [T, k] of each token, and their weights [T, k]; or of experts
        that take sorted rows hidden [E * T, H] alone."""
        ups, downs = (getattr(self, name) for name in self.stacks)
        y = torch.zeros_like(hidden)
        own = zip(hidden.chunk(len(ups)), y.chunk(len(ups)), strict=True)
        for expert, (up, down) in enumerate(zip(ups, downs, strict=True)):
            if index is None or weights is None:
                x, out = next(own)
                tokens = x.any(-1).nonzero().squeeze(-1)
            else:
                x, out = hidden, y
                tokens, choice = torch.where(index == expert)
            if not tokens.numel():
                continue
            h = down(activated(self.experts, self.origin, up(x[tokens])))
            if getattr(self.experts, "has_post_expert_norm", False):
                h = self.experts.post_expert_norm(h)
            if weights is not None:
                h = h * weights[tokens, choice, None]
            out.index_add_(0, tokens, h.to(y.dtype))
        return y
