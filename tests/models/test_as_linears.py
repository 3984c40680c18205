"""Conv1D and the experts of mixtures, by their forms: pruned as linears, and themselves again."""

import copy

import pytest
import torch
from torch import nn

from sparsekern.models.as_linears import as_linears
from sparsekern.models.prune import prune_
from sparsekern.sparsity import Magnitude, SparseGPT, Static, Wanda


class Conv1D(nn.Module):
    """As that of transformers."""

    def __init__(self, nf, nx):
        super().__init__()
        self.nf, self.nx = nf, nx
        self.weight, self.bias = nn.Parameter(torch.randn(nx, nf)), nn.Parameter(torch.randn(nf))

    def forward(self, x):
        return torch.addmm(self.bias, x.flatten(0, -2), self.weight).view(*x.shape[:-1], self.nf)


class Experts(nn.Module):
    """As those of transformers' mixtures."""

    def __init__(self, count=4, width=8, inner=6):
        super().__init__()
        self.num_experts = count
        self.gate_up_proj = nn.Parameter(torch.randn(count, 2 * inner, width))
        self.down_proj = nn.Parameter(torch.randn(count, width, inner))

    def _apply_gate(self, x):
        gate, up = x.chunk(2, -1)
        return gate.sigmoid() * up

    def forward(self, hidden, index, weights):
        y = torch.zeros_like(hidden)
        for e in range(self.num_experts):
            tokens, choice = torch.where(index == e)
            h = self._apply_gate(hidden[tokens] @ self.gate_up_proj[e].T) @ self.down_proj[e].T
            y.index_add_(0, tokens, h * weights[tokens, choice, None])
        return y


class Mixture(nn.Module):
    def __init__(self, most=3):
        super().__init__()
        torch.manual_seed(0)
        self.conv, self.experts, self.out = Conv1D(8, 16), Experts(), nn.Linear(8, 4)
        self.most = most  # experts that are in use

    def forward(self, x):
        hidden = self.conv(x).flatten(0, -2)
        index = (hidden[:, :1] * 100).long().abs() % self.most
        assert self.experts.num_experts == 4
        return self.out(self.experts(hidden, index, torch.ones_like(hidden[:, :1])))


X = torch.randn(5, 9, 16, generator=torch.Generator().manual_seed(0))


def test_the_same_function_inside_and_the_same_modules_afterwards():
    model = Mixture()
    want, modules = model(X), list(model.modules())
    with as_linears(model):
        torch.testing.assert_close(model(X), want)
        assert sum(type(m) is nn.Linear for m in model.modules()) == 1 + 1 + 8
        with torch.no_grad():
            model.experts.down_proj[1].weight.zero_()
    assert list(model.modules()) == modules and not model.experts.down_proj[1].any()


@pytest.mark.parametrize("make", [Magnitude, Wanda, SparseGPT])
def test_each_expert_is_pruned_with_its_own_tokens(make):
    model = Mixture()
    modules = list(model.modules())
    how = {} if make is Magnitude else {"calibration": [X[:2], X[2:]]}
    report = prune_(model, make(0.5, **how))
    assert list(model.modules()) == modules and len(report.layers) == 10
    for weight in (model.conv.weight, *model.experts.gate_up_proj, *model.experts.down_proj):
        assert (weight == 0).sum() == weight.numel() // 2
    if make is not Magnitude:
        tokens = [r.tokens for r in report.layers if "experts.down_proj" in r.name]
        assert sum(tokens) == 45 and tokens[3] == 0 and min(tokens[:3]) > 0
        assert "2 experts' layers saw no token" in " ".join(report.notes)


def test_an_expert_of_its_own_filter_and_a_failure():
    model = Mixture()
    prune_(model, Magnitude(0.5, param_filter="*experts.gate_up_proj*"))
    assert (model.experts.gate_up_proj == 0).any() and not (model.experts.down_proj == 0).any()
    before, modules = copy.deepcopy(model.state_dict()), list(model.modules())
    with pytest.raises(ValueError, match="inputs of conv are not finite"):
        prune_(model, SparseGPT(0.5, calibration=[X * torch.inf]), prune_again=True)
    assert list(model.modules()) == modules
    assert all(torch.equal(t, before[name]) for name, t in model.state_dict().items())
    with pytest.raises(TypeError, match="expected Magnitude, Wanda or SparseGPT, got Static"):
        prune_(model, Static(0.5))
