"""Toy models of each kind of layer, with zeros; and a clock by which sparse ones are faster."""

import torch
from torch import nn

from sparsekern import SparseLinear
from sparsekern.models import measure, work
from sparsekern.models.timing import Times
from sparsekern.nn.experts import SparseExperts
from sparsekern.nn.kinds import pruning_masks
from sparsekern.nn.stand_ins import (
    SparseConv,
    SparseConv1D,
    SparseMultiheadAttention,
)

H = 64


class Conv1D(nn.Module):
    """As transformers has it."""

    def __init__(self, nf, nx):
        super().__init__()
        self.nf, self.nx = nf, nx
        self.weight = nn.Parameter(torch.randn(nx, nf) / nx**0.5)
        self.bias = nn.Parameter(torch.randn(nf))

    def forward(self, x):
        return torch.addmm(self.bias, x.flatten(0, -2), self.weight).view(*x.shape[:-1], self.nf)


class Experts(nn.Module):
    """As transformers has them, of three with two for each token."""

    def __init__(self):
        super().__init__()
        self.num_experts, self.limit = 3, 2.0
        self.gate_up_proj = nn.Parameter(torch.randn(3, 2 * 48, H) / 8)
        self.down_proj = nn.Parameter(torch.randn(3, H, 48) / 8)
        self.act_fn = nn.SiLU()

    def _apply_gate(self, gate_up):
        gate, up = gate_up.chunk(2, -1)
        return self.act_fn(gate.clamp(max=self.limit)) * up

    def forward(self, hidden_states, top_k_index, top_k_weights):
        y = torch.zeros_like(hidden_states)
        for e in range(self.num_experts):
            tokens, at = torch.where(top_k_index == e)
            h = self._apply_gate(hidden_states[tokens] @ self.gate_up_proj[e].T)
            h = h @ self.down_proj[e].T * top_k_weights[tokens, at, None]
            y.index_add_(0, tokens, h)
        return y


class BiasedExperts(nn.Module):
    """As those of gpt-oss: with biases, the weights stored as [E, K, N]."""

    def __init__(self):
        super().__init__()
        self.is_transposed = self.has_bias = True
        self.gate_up_proj = nn.Parameter(torch.randn(3, H, 2 * 48) / 8)
        self.gate_up_proj_bias = nn.Parameter(torch.randn(3, 2 * 48))
        self.down_proj = nn.Parameter(torch.randn(3, 48, H) / 8)
        self.down_proj_bias = nn.Parameter(torch.randn(3, H))

    def _apply_gate(self, gate_up):
        return (gate_up[..., 1::2] + 1) * gate_up[..., ::2].sigmoid()

    def forward(self, hidden_states, router_indices=None, routing_weights=None):
        y = torch.zeros_like(hidden_states)
        for e in range(3):
            tokens, at = torch.where(router_indices == e)
            h = hidden_states[tokens] @ self.gate_up_proj[e] + self.gate_up_proj_bias[e]
            h = self._apply_gate(h) @ self.down_proj[e] + self.down_proj_bias[e]
            y.index_add_(0, tokens, h * routing_weights[tokens, at, None])
        return y


class Mixture(nn.Module):
    def __init__(self, experts=Experts):
        super().__init__()
        self.router, self.experts = nn.Linear(H, 3), experts()

    def forward(self, x):
        weights, index = self.router(x.flatten(0, -2)).softmax(-1).topk(2)
        return self.experts(x.flatten(0, -2), index, weights).view_as(x)


class Attention(nn.Module):
    def __init__(self, **settings):
        super().__init__()
        self.inner = nn.MultiheadAttention(H, 4, **settings)

    def forward(self, x, **masks):
        return self.inner(x, x, x, **masks)


class Own(nn.Linear):
    """A subclass that only holds a weight."""


class LM(nn.Module):
    """Embeddings tied to a head, and blocks between."""

    def __init__(self):
        super().__init__()
        self.embed = nn.Embedding(96, H)
        self.blocks = nn.ModuleList(nn.Sequential(nn.Linear(H, H), nn.Tanh()) for _ in range(3))
        self.head = nn.Linear(H, 96, bias=False)
        self.head.weight = self.embed.weight

    def forward(self, input_ids, scale=1.0):
        x = self.embed(input_ids)
        for block in self.blocks:
            x = x + block(x)
        return {"logits": self.head(x) * scale}


@torch.no_grad()
def pruned(model, share=0.75):
    for p in model.parameters():
        if p.ndim > 1:
            p *= torch.rand_like(p) >= share
    return model.eval()


def sparse_is_faster(monkeypatch) -> dict[str, float]:
    """Twice as fast as dense, by the seconds that are returned and may be changed."""
    seconds = {"before": 4.0, "dense": 2.0, "sparse": 1.0, "whole": 9.0, "rest": 5.0}

    def of(layer):
        if any(isinstance(m, SparseLinear) for m in layer.modules()):
            return seconds["sparse"]
        return seconds["before" if pruning_masks(layer) else "dense"]

    def times_of(ready, layers, device, is_whole_apart=True):
        return Times(seconds["whole"], seconds["rest"], [of(layer) for layer in layers])

    monkeypatch.setattr(measure, "seconds_alone", lambda runs, _: {n: seconds[n] for n in runs})
    monkeypatch.setattr(work, "times_of", times_of)
    return seconds


def kinds(model):
    return [type(m).__name__ for m in model.modules()]


def same_state(model, before):
    state = model.state_dict()
    return state.keys() == before.keys() and all(torch.equal(state[k], before[k]) for k in before)


KINDS = {
    "linear": (lambda: nn.Linear(H, 96), (7, H), SparseLinear),
    "no bias": (lambda: nn.Linear(H, 96, bias=False), (2, 7, H), SparseLinear),
    "subclass": (lambda: Own(H, 96), (7, H), SparseLinear),
    "Conv1D": (lambda: Conv1D(96, H), (2, 7, H), SparseConv1D),
    "square Conv1D": (lambda: Conv1D(H, H), (2, 7, H), SparseConv1D),
    "conv 1d": (lambda: nn.Conv1d(H, 96, 1), (2, H, 9), SparseConv),
    "conv 2d": (lambda: nn.Conv2d(H, 96, 1, stride=2, bias=False), (2, H, 9, 7), SparseConv),
    "conv 3x3": (lambda: nn.Conv2d(16, 48, 3, padding=1), (2, 16, 9, 7), SparseConv),
    "conv 4": (lambda: nn.Conv1d(32, 48, 4, padding="same", dilation=2), (32, 9), SparseConv),
    "conv 3d": (
        lambda: nn.Conv3d(16, 48, (1, 2, 3), (1, 2, 1), (0, 1, 2), padding_mode="replicate"),
        (2, 16, 3, 4, 5),
        SparseConv,
    ),
    "attention": (lambda: Attention(batch_first=True), (2, 5, H), SparseMultiheadAttention),
    "experts": (Mixture, (2, 9, H), SparseExperts),
    "biased experts": (lambda: Mixture(BiasedExperts), (2, 9, H), SparseExperts),
}
