"""The experts of mixtures in transformers with sparse weights: 3-D Parameters, of which each expert
has a matrix. What decides whether a module fits stands in kinds.py."""

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from .kinds import biases, matrices, stacks_of, takes_sorted_rows
from .linear import SparseLinear
from .origin import Origin
from .stand_ins import StandIn


class SparseExperts(StandIn):
    """Experts of a mixture: y = sum over the k experts of a token of weight * down(gate(up(x))),
    with biases or without, with a gate, or an activation alone, with a norm after each or without.

    A SparseLinear for each expert and projection. The names are not those of the Parameters that
    were there: transformers takes `experts.gate_up_proj` apart when it saves a model.
    """

    def __init__(self, layers: Mapping[str, list[SparseLinear]], experts: nn.Module):
        """`layers`: those of each stack, by its name."""
        super().__init__()
        for name, of_stack in layers.items():
            self.add_module(f"sparse_{name}", nn.ModuleList(of_stack))
        for name, child in experts._modules.items():  # the activation
            self.add_module(name, child)
        self.stacks, self.origin = tuple(layers), Origin(experts)

    @classmethod
    def from_dense(cls, experts: nn.Module) -> "SparseExperts":
        def layers(name: str) -> list[SparseLinear]:
            pairs = zip(matrices(experts, name), biases(experts, name), strict=True)
            stack = getattr(experts, name)
            return [SparseLinear.from_weight(stack, bias, None, w) for w, bias in pairs]

        return sparse_experts({name: layers(name) for name in stacks_of(experts)}, experts)

    def layers(self, name: str) -> list[SparseLinear]:
        """Those of a stack."""
        found: Any = self._modules[f"sparse_{name}"]
        return list(found)

    @property
    def dense_names(self) -> list[str]:
        return [name + part for name in self.stacks for part in ("", "_bias")]

    def to_dense(self) -> nn.Module:
        parameters: dict[str, nn.Parameter | None] = {}
        for name in self.stacks:
            layers = self.layers(name)
            weight = torch.stack([layer.weight.detach().to_dense() for layer in layers])
            if self.is_transposed:
                weight = weight.mT.contiguous()
            parameters[name] = nn.Parameter(weight, layers[0].values.requires_grad)
            of_layers = [layer.bias for layer in layers if layer.bias is not None]
            if of_layers:
                bias = torch.stack([b.detach() for b in of_layers])
                parameters[f"{name}_bias"] = nn.Parameter(bias, of_layers[0].requires_grad)
        own = {f"sparse_{name}" for name in self.stacks}
        others = {name: child for name, child in self._modules.items() if name not in own}
        return self.origin.with_(parameters, others).train(self.training)

    def forward(self, hidden_states: Tensor, top_k_index: Tensor, top_k_weights: Tensor) -> Tensor:
        """hidden_states [T, H], the experts [T, k] of each token and their weights [T, k]."""
        count, top_k = len(self.layers(self.stacks[0])), top_k_index.shape[1]
        ids, order = top_k_index.flatten().sort(stable=True)
        sizes = torch.bincount(ids, minlength=count).tolist()[:count]  # others are masked out
        y = torch.zeros_like(hidden_states)
        first = 0
        for expert, size in enumerate(sizes):
            if not size:
                continue
            places = order[first : first + size]
            first += size
            tokens = places // top_k
            h = self._one(expert, hidden_states[tokens]) * top_k_weights.flatten()[places, None]
            y.index_add_(0, tokens, h.to(y.dtype))
        return y

    @property
    def is_transposed(self) -> bool:
        return self.origin.attributes.get("is_transposed", False)

    def _one(self, expert: int, x: Tensor) -> Tensor:
        up, down = (self.layers(name)[expert] for name in self.stacks)
        y = down(activated(self, self.origin, up(x)))
        return self.post_expert_norm(y) if self.has_post_expert_norm else y

    @property
    def has_post_expert_norm(self) -> bool:
        return self.origin.attributes.get("has_post_expert_norm", False)


class SortedExperts(SparseExperts):
    """Experts each of which gets its share of the rows (Llama 4): x [E * T, H] -> y [E * T, H].

    Rows of zeros, tokens of others, give zeros and are left out.
    """

    is_transposed = True

    def forward(self, hidden_states: Tensor) -> Tensor:  # type: ignore[override]
        ys = []
        for expert, x in enumerate(hidden_states.chunk(len(self.layers(self.stacks[0])))):
            rows, y = x.any(-1).nonzero().squeeze(-1), torch.zeros_like(x)
            if rows.numel():
                y = y.index_copy(0, rows, self._one(expert, x[rows]).to(y.dtype))
            ys.append(y)
        return torch.cat(ys)


def sparse_experts(layers: Mapping[str, list[SparseLinear]], experts: nn.Module) -> SparseExperts:
    """With the layers of each stack, in the place of these experts."""
    kind = SortedExperts if takes_sorted_rows(experts) else SparseExperts
    return kind(layers, experts).train(experts.training)


def activated(experts: Any, origin: Origin, h: Tensor) -> Tensor:
    """What goes into down_proj: the gate of the class that was there, or its activation alone."""
    if not origin.attributes.get("has_gate", True):
        return experts.act_fn(h)
    if hasattr(origin.kind, "_apply_gate"):
        return origin.kind._apply_gate(experts, h)
    gate, up = h.chunk(2, -1)
    return experts.act_fn(gate) * up
