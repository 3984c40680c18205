"""What many functions take, a model, an optimizer, a file, weights by their names, is nothing else:
the error names the argument, what was expected and what came."""

import re

import pytest
import torch
from torch import nn

from sparsekern import SparseLinear, SparseTensor, Static, densify_, sparsify_, wafer
from sparsekern.models.prune import prune_pretrained
from sparsekern.nn import forget_graphs_, replace_modules, sparsifiable
from sparsekern.nn.float8 import to_float8_
from sparsekern.nn.stand_ins import SparseConv, SparseMultiheadAttention
from sparsekern.sparsity import load_config
from sparsekern.wafer.runs import read_runs
from sparsekern.weights import (
    from_bitmasks,
    from_masks,
    from_zeros,
    load_matrix,
    load_metadata,
    load_weights,
    save_weights,
    set_weights_,
    to_bitmasks,
    to_zeros,
    weights_of,
)

W = SparseTensor.from_dense(torch.eye(4))
CSR = W.row_offsets, W.col_indices, W.values
FILE = "here/s.safetensors"


def dense() -> nn.Sequential:
    return nn.Sequential(nn.Linear(4, 4), nn.ReLU())


def sparse() -> nn.Sequential:
    return sparsify_(dense(), Static(0.5))


NO_MODEL = "model: expected a torch.nn.Module, got "
NO_WEIGHTS = "weights: expected a state_dict, got "
NEITHER = "weights: expected a model or a state_dict, got "
NO_PATH = "path: expected a path, got "
WRONG = [
    (lambda: set_weights_("a", {}), NO_MODEL + "str"),
    (lambda: weights_of({}), NO_MODEL + "dict"),
    (lambda: densify_("a"), NO_MODEL + "str"),
    (lambda: sparsifiable(None), NO_MODEL + "NoneType"),
    (lambda: forget_graphs_(W), NO_MODEL + "SparseTensor"),
    (lambda: replace_modules("a", lambda name, module: None), NO_MODEL + "str"),
    (lambda: to_float8_("a"), NO_MODEL + "str"),
    (lambda: densify_(sparse(), sparse()), "optimizer: expected one of torch.optim, got Sequent"),
    (lambda: replace_modules(dense(), 3), "replace: expected a function of a name and a module"),
    (lambda: set_weights_(dense(), FILE), NO_WEIGHTS + "str: sparsekern.weights.load_weights"),
    (lambda: set_weights_(dense(), dense()), NO_WEIGHTS + "Sequential: give its state_dict()"),
    (lambda: set_weights_(dense(), [("0.bias", W)]), NO_WEIGHTS + "list"),
    (lambda: from_zeros(dense()), NO_WEIGHTS + "Sequential: give its state_dict()"),
    (lambda: from_zeros({}, names="0.weight"), "names: expected a list of names, got '0.weight'"),
    (lambda: from_zeros({}, names=3), "names: expected a list of names, got 3"),
    (lambda: from_bitmasks(None), "tensors: expected a state_dict, got NoneType"),
    (lambda: from_masks(FILE), "source: expected a model or a state_dict, got str: sparsekern."),
    (lambda: to_bitmasks(None), NEITHER + "NoneType"),
    (lambda: to_zeros([]), NEITHER + "list"),
    (lambda: save_weights(None, FILE), NEITHER + "NoneType"),
    (lambda: save_weights(W, FILE), NEITHER + "SparseTensor"),
    (lambda: save_weights(FILE, dense()), NO_PATH + "Sequential"),
    (lambda: load_weights(3), NO_PATH + "int"),
    (lambda: load_metadata(None), NO_PATH + "NoneType"),
    (lambda: load_matrix(None), NO_PATH + "NoneType"),
    (lambda: load_config(3), NO_PATH + "int"),
    (lambda: read_runs(3), NO_PATH + "int"),
    (lambda: prune_pretrained(FILE, 3, 0.5), "out: expected a path, got int"),
    (lambda: prune_pretrained(3, FILE, 0.5), "source: expected a folder or a name on the hub, got"),
    (lambda: wafer.model_shape(None), "model: expected a name or a path, got NoneType"),
    (lambda: wafer.machine([]), "machine: expected a name or a path, got list"),
    (lambda: wafer.gpu(3), "gpu: expected a name or a path, got int"),
    (lambda: SparseLinear.from_linear(nn.Conv1d(4, 4, 1)), "expected a torch.nn.Linear, got Conv1"),
    (lambda: SparseLinear.from_weight("a"), "parameter: expected a tensor, got str"),
    (lambda: SparseLinear(4, 4, *CSR, "a"), "bias: expected a tensor of floats, got str"),
    (lambda: SparseLinear("4", 4, *CSR), "in_features: expected a whole number, got '4'"),
    (lambda: SparseLinear(4, 4.0, *CSR), "out_features: expected a whole number, got 4.0"),
]


@pytest.mark.parametrize(("call", "text"), WRONG, ids=[text for _, text in WRONG])
def test_a_wrong_kind_is_named(call, text, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(TypeError, match=re.escape(text)):
        call()
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    "take", [from_bitmasks, from_masks, from_zeros, to_bitmasks, to_zeros, save_weights]
)
def test_weights_have_names(take, tmp_path):
    more = [tmp_path / "s.safetensors"] if take is save_weights else []
    with pytest.raises(ValueError, match="expected names of tensors, got 3"):
        take({3: W}, *more)


def test_a_replacement_that_is_no_module_leaves_the_model():
    model = dense()
    before = list(model)
    new = {"0": nn.Identity(), "1": "a"}
    with pytest.raises(TypeError, match="replace: expected a module or None for 1, got str"):
        replace_modules(model, lambda name, module: new.get(name))
    assert list(model) == before


def test_an_optimizer_that_is_none_leaves_the_model():
    model = sparse()
    with pytest.raises(TypeError, match="optimizer"):
        densify_(model, "a")
    assert type(model[0]) is SparseLinear


HELD = [
    (lambda: sparse()[0], "weight", "`values` takes other numbers"),
    (lambda: SparseConv.from_dense(nn.Conv1d(4, 4, 1)), "weight", "densify_"),
    (lambda: SparseConv.from_dense(nn.Conv1d(4, 4, 1)), "bias", "densify_"),
    (
        lambda: SparseMultiheadAttention.from_dense(nn.MultiheadAttention(4, 2)),
        "in_proj_weight",
        "densify_",
    ),
    (
        lambda: SparseMultiheadAttention.from_dense(nn.MultiheadAttention(4, 2)),
        "in_proj_bias",
        "densify_",
    ),
]


@pytest.mark.parametrize(("make", "name", "advice"), HELD)
@pytest.mark.parametrize("weight", [nn.Parameter(torch.eye(4)), torch.eye(4), W])
def test_a_sparse_layer_says_how_to_set_its_weight(make, name, advice, weight):
    layer = make()
    with pytest.raises(AttributeError, match=f"^{name}: of a .* it cannot be set; .*{advice}"):
        setattr(layer, name, weight)


@pytest.mark.parametrize(("weight", "kind"), [(W, SparseLinear), (torch.eye(4), nn.Linear)])
def test_and_so_it_is_set(weight, kind):
    model = sparse()
    set_weights_(model, weights_of(model) | {"0.weight": weight})
    assert type(model[0]) is kind
    assert torch.equal(model(torch.eye(4)), (torch.eye(4) + model[0].bias).relu())
