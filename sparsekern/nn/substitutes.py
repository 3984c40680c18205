"""Sparse modules in the places of dense ones, with layers that come from elsewhere: from a file."""

import math
from collections.abc import Callable, Sequence
from typing import Any

from torch import nn

from .experts import sparse_experts
from .kinds import (
    CONVOLUTIONS,
    biases,
    is_conv1d,
    is_experts,
    is_linear,
    matrices,
    stacks_of,
    why_not,
)
from .linear import SparseLinear
from .origin import Origin
from .stand_ins import SparseConv, SparseConv1D, SparseMultiheadAttention, in_proj_biases

# make(class, name inside of the module, (N, K), bias, the Parameter it comes from) -> a layer
Make = Callable[
    [type[SparseLinear], str, Sequence[int], nn.Parameter | None, nn.Parameter], SparseLinear
]


def sizes_of_layers(module: nn.Module) -> dict[str, tuple[int, int]]:
    """Names inside of a dense module, "" for itself, and shapes as stored of the layers that a
    sparse one in its place has; none where nothing can take its place."""
    weight: Any = module._parameters.get("weight")
    if isinstance(module, nn.Linear) and not is_linear(module) or why_not(module):
        return {}
    if "weight" in module._buffers:
        return {}
    if type(module) in CONVOLUTIONS:
        return {"linear": (weight.shape[0], math.prod(weight.shape[1:]))}
    if isinstance(module, nn.MultiheadAttention):
        shape = module.embed_dim, module.embed_dim
        return {f"{x}_proj": shape for x in ("q", "k", "v", "out")}
    if is_experts(module):
        return {
            f"sparse_{name}.{i}": (w.shape[0], w.shape[1])
            for name in stacks_of(module)
            for i, w in enumerate(matrices(module, name))
        }
    return {"": (weight.shape[0], weight.shape[1])}


def substitute(module: Any, make: Make) -> nn.Module:
    """What takes the place of a module, with layers by `make`, called once for each of the names
    above."""
    new: Any
    if type(module) in CONVOLUTIONS:
        shape = module.weight.shape[0], math.prod(module.weight.shape[1:])
        layer = make(SparseLinear, "linear", shape, module.bias, module.weight)
        new = SparseConv(layer, module)
    elif isinstance(module, nn.MultiheadAttention):
        new = _attention(module, make)
    elif is_experts(module):
        layers = {
            name: [
                make(SparseLinear, f"sparse_{name}.{i}", w.shape, bias, getattr(module, name))
                for i, (w, bias) in enumerate(
                    zip(matrices(module, name), biases(module, name), strict=True)
                )
            ]
            for name in stacks_of(module)
        }
        new = sparse_experts(layers, module)
    elif is_conv1d(module):
        shape = module.weight.shape[::-1]
        new = make(SparseConv1D, "", shape, module.bias, module.weight)
        new.origin = Origin(module)
    else:
        new = make(SparseLinear, "", module.weight.shape, module.bias, module.weight)
    return new.train(module.training)


def _attention(attention: Any, make: Make) -> SparseMultiheadAttention:
    e, weight = attention.embed_dim, attention.in_proj_weight
    projections = [
        make(SparseLinear, f"{x}_proj", (e, e), b, weight)
        for x, b in zip("qkv", in_proj_biases(attention), strict=True)
    ]
    out = attention.out_proj
    layer = make(SparseLinear, "out_proj", (e, e), out.bias, out.weight)
    return SparseMultiheadAttention(projections, layer, Origin(attention))
