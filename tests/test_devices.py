"""Tensors are made where their neighbours are, whatever torch.set_default_device says."""

import ast
from pathlib import Path

import pytest
import torch
from torch import nn

from sparsekern import Static
from sparsekern.weights import load_weights, save_weights

PACKAGE = Path(__file__).parents[1] / "sparsekern"
FACTORIES = {
    *("arange", "as_tensor", "empty", "eye", "full", "linspace", "ones", "rand", "randint"),
    *("randn", "randperm", "sparse_coo_tensor", "sparse_csc_tensor", "sparse_csr_tensor"),
    *("tensor", "zeros"),
}
# Programs, which set no default device; and `hf`, whose empty tensors are meant to be on meta.
PROGRAMS = {"bench", "commands", "gpt", "hf", "report"}


def makes_by_default(call: ast.Call) -> bool:
    is_factory = isinstance(call.func, ast.Attribute) and call.func.attr in FACTORIES
    if not is_factory or ast.unparse(call.func.value) != "torch":
        return False
    return all(keyword.arg != "device" for keyword in call.keywords)


def test_each_new_tensor_names_its_device():
    found = []
    for path in PACKAGE.rglob("*.py"):
        if path.relative_to(PACKAGE).parts[0] not in PROGRAMS:
            calls = (n for n in ast.walk(ast.parse(path.read_text())) if isinstance(n, ast.Call))
            found += [f"{path.name}:{c.lineno}" for c in calls if makes_by_default(c)]
    assert not found


@pytest.fixture
def elsewhere():
    torch.set_default_device("meta")
    yield
    torch.set_default_device(None)


def test_a_default_device_elsewhere(elsewhere, tmp_path):
    with torch.device("cpu"):
        model = nn.Sequential(nn.Linear(16, 24), nn.Linear(24, 16))
        x = torch.randn(3, 16)
    Static(0.5, init_method="checkerboard", param_filter="*").apply(model)
    w, v = (layer.weight.detach() for layer in model)
    assert torch.allclose((w @ v).to_dense(), w.to_dense() @ v.to_dense(), atol=1e-6)
    assert w.to_torch().device == w.T.to_torch().device == x.device
    save_weights(model, tmp_path / "model.safetensors")
    read = load_weights(tmp_path / "model.safetensors")["0.weight"]
    assert torch.equal(read.to_dense(), w.to_dense())
    assert model(x).device == x.device
