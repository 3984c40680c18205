"""Weights of modules that stand in for others than nn.Linear: under the names of the dense model
where a layer takes a layer's place, and whole or not at all."""

import pytest
import torch
from torch import nn

from sparsekern import SparseLinear, SparseTensor, densify_, weights
from sparsekern.nn import replace_modules, stored
from sparsekern.nn.stand_ins import SparseConv, SparseConv1D, SparseMultiheadAttention

safetensors = pytest.importorskip("safetensors.torch")


class Conv1D(nn.Module):
    """As transformers has it."""

    def __init__(self, nf: int, nx: int):
        super().__init__()
        self.nf = nf
        self.weight, self.bias = nn.Parameter(torch.randn(nx, nf)), nn.Parameter(torch.zeros(nf))

    def forward(self, x):
        return x @ self.weight + self.bias


class Model(nn.Module):
    def __init__(self):
        super().__init__()
        self.wide, self.square = Conv1D(16, 8), Conv1D(16, 16)
        self.attention = nn.MultiheadAttention(16, 2, batch_first=True)
        self.conv, self.up = nn.Conv1d(16, 8, 1), nn.Linear(8, 3)
        with torch.no_grad():
            for p in self.parameters():
                if p.ndim > 1:
                    p *= torch.rand_like(p) < 0.4
                else:
                    p.normal_()

    def forward(self, x):
        x = self.square(self.wide(x))
        x = self.attention(x, x, x, need_weights=False)[0]
        return self.up(self.conv(x.mT).mT)


KINDS = {
    Conv1D: SparseConv1D,
    nn.Conv1d: SparseConv,
    nn.MultiheadAttention: SparseMultiheadAttention,
}


def sparse() -> Model:
    def replace(name: str, module: nn.Module):
        if type(module) is nn.Linear:
            return SparseLinear.from_linear(module)
        return KINDS[type(module)].from_dense(module) if type(module) in KINDS else None

    return replace_modules(Model(), replace)


def same(a: nn.Module, b: nn.Module) -> bool:
    x = torch.linspace(-1, 1, 2 * 5 * 8).view(2, 5, 8)
    kinds = [[type(m) for m in model.modules()] for model in (a, b)]
    return kinds[0] == kinds[1] and torch.equal(a(x), b(x))


@pytest.fixture
def path(tmp_path):
    return tmp_path / "model.safetensors"


def test_a_file_fills_a_dense_and_a_sparse_model(path):
    model = sparse()
    weights.save_weights(model, path)
    found = weights.load_weights(path)
    assert found["wide.weight"].shape == (8, 16)  # as Conv1D has it
    assert same(weights.set_weights_(Model(), found), model)
    assert same(weights.set_weights_(sparse(), found), model)
    other = sparse()
    other.load_state_dict(safetensors.load_file(path))
    assert same(other, model)


def test_state_dicts_and_dense_weights(path):
    model = sparse()
    assert same(weights.set_weights_(Model(), dict(model.state_dict())), model)
    dense = Model()
    dense.load_state_dict(weights.to_zeros(model))
    assert same(dense, densify_(weights.set_weights_(Model(), weights.weights_of(model))))
    assert same(weights.set_weights_(model, weights.weights_of(dense)), dense)
    found = weights.from_zeros(dense.state_dict(), ["square.weight"])  # that of a Conv1D
    weights.set_weights_(dense, found)
    assert type(dense.square) is SparseConv1D and same(weights.set_weights_(Model(), found), dense)


def test_what_lacks_a_part_or_does_not_fit_leaves_the_model():
    model, given = Model(), weights.weights_of(sparse())
    before = {name: t.clone() for name, t in model.state_dict().items()}
    part = {n: t for n, t in given.items() if n != "attention.v_proj.weight"}
    turned = given | {"wide.weight": stored.transposed(given["wide.weight"])}
    small = given | {"conv.linear.weight": SparseTensor.from_dense(torch.eye(3))}
    for wrong, message in (
        (part, "missing: attention.in_proj_bias, .*unexpected: .*attention.q_proj.weight"),
        (turned, r"expected wide.weight of shape \(8, 16\), got \(16, 8\)"),
        (small, r"expected conv.linear.weight of shape \(8, 16\), got \(3, 3\)"),
    ):
        with pytest.raises(ValueError, match=message):
            weights.set_weights_(model, wrong)
        after = model.state_dict()
        assert before.keys() == after.keys()
        assert all(torch.equal(t, before[name]) for name, t in after.items())


@pytest.mark.parametrize("n, k, share", [(0, 0, 1), (3, 0, 1), (4, 6, 0), (5, 7, 0.5), (7, 2, 1)])
def test_a_transpose_with_tensors_of_its_own(n, k, share):
    mask = torch.rand(n, k) < share
    w = SparseTensor.from_dense(torch.randn(n, k).bfloat16(), mask)
    t = stored.transposed(w)
    assert t.shape == (k, n) and not t.is_transposed and torch.equal(t.to_dense(), w.to_dense().t())
    assert stored.transposed(w.to("meta")).shape == (k, n)
