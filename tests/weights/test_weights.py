"""Weights in files and from other libraries: back bit for bit, or a clear refusal."""

import json

import numpy as np
import pytest
import torch
from torch import nn
from torch.nn.utils import parametrize, prune

from sparsekern import SparseLinear, SparseTensor, Static, sparsify_, weights
from sparsekern.gpt.model import GPT, GPTConfig

safetensors = pytest.importorskip("safetensors.torch")


def tiny() -> GPT:
    return GPT(GPTConfig(n_layer=1, n_head=2, n_embd=16, block_size=8, vocab_size=32))


def same(a, b) -> bool:
    if isinstance(a, SparseTensor):
        parts = ("row_offsets", "col_indices", "values")
        return a.shape == b.shape and all(torch.equal(getattr(a, p), getattr(b, p)) for p in parts)
    return torch.equal(a, b)


def linear() -> nn.Sequential:
    return nn.Sequential(nn.Linear(9, 5), nn.ReLU(), nn.Linear(5, 3))


def outputs(model: nn.Module) -> torch.Tensor:
    return model(torch.linspace(-1, 1, 18).view(2, 9))


@pytest.mark.parametrize("sparsity", [0.0, 0.75, 0.9999])  # the last leaves no weight
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_model_comes_back_bit_for_bit(tmp_path, sparsity, dtype):
    model = sparsify_(tiny(), Static(sparsity)).to(dtype)
    weights.save_weights(model, tmp_path / "m.safetensors", step=7, note="ünïcode")
    assert weights.load_metadata(tmp_path / "m.safetensors") == {"step": 7, "note": "ünïcode"}
    other = weights.set_weights_(tiny().to(dtype), weights.load_weights(tmp_path / "m.safetensors"))
    mine, got = weights.weights_of(model), weights.weights_of(other)
    assert mine.keys() == got.keys() and all(same(mine[k], got[k]) for k in mine)
    assert other.lm_head.weight is other.wte.weight
    idx = torch.arange(8)[None]
    assert torch.equal(model(idx)[0], other(idx)[0])


def test_the_file_holds_values_bits_and_json(tmp_path):
    path = tmp_path / "m.safetensors"
    weights.save_weights(sparsify_(tiny(), Static(0.5)), path)
    with safetensors.safe_open(path, "pt") as file:
        keys, header = set(file.keys()), json.loads(file.metadata()["sparsekern"])
    name = "blocks.0.mlp.up.weight"
    assert {name, f"{name}_shape", f"{name}_bitmask"} <= keys
    assert header["format_version"] == 2
    assert header["aliases"] == {"lm_head.weight": "wte.weight"}


def test_explicit_zeros_stay(tmp_path):
    w = SparseTensor(torch.tensor([0, 2]), torch.tensor([0, 3]), torch.tensor([0.0, -0.0]), (1, 4))
    weights.save_weights({"w": w}, tmp_path / "w.safetensors")
    got = weights.load_weights(tmp_path / "w.safetensors")["w"]
    assert same(w, got) and got.values.signbit().tolist() == [False, True]


def test_dense_weights_make_a_sparse_layer_dense_again():
    model, sparse = linear(), sparsify_(linear(), Static(0.5))
    weights.set_weights_(sparse, weights.weights_of(model))
    assert type(sparse[0]) is nn.Linear and torch.equal(outputs(sparse), outputs(model))


def test_files_that_are_refused(tmp_path):
    path = tmp_path / "m.safetensors"
    with pytest.raises(FileNotFoundError, match="does not exist"):
        weights.load_weights(path)
    w = {"0.weight": SparseTensor.from_dense(torch.eye(3))}
    weights.save_weights(w, path)
    whole = path.read_bytes()
    path.write_bytes(whole.replace(b'format_version\\": 2', b'format_version\\": 3'))
    with pytest.raises(ValueError, match="has format version 3, this sparsekern reads 1 and 2"):
        weights.load_weights(path)
    path.write_bytes(whole[:-5])
    with pytest.raises(ValueError, match="is truncated or not safetensors"):
        weights.load_weights(path)
    path.write_bytes(whole[:-8] + b"\x09" * 8)
    weights.save_weights({"a": torch.zeros(2)}, path)
    with pytest.raises(ValueError, match="they do not fit the model"):
        weights.set_weights_(linear(), weights.load_weights(path))
    with pytest.raises(ValueError, match=r"expected 0.weight of shape \(5, 9\), got \(3, 3\)"):
        weights.set_weights_(linear(), w)
    with pytest.raises(ValueError, match="w is a transpose"):
        weights.save_weights({"w": w["0.weight"].T}, path)


def test_a_damaged_pattern_is_not_saved(tmp_path):
    w = SparseTensor.from_dense(torch.eye(3))
    w.col_indices[1] = 7
    with pytest.raises(ValueError, match=r"w: col_indices: expected to lie in \[0, 3\)"):
        weights.save_weights({"w": w}, tmp_path / "m.safetensors")
    assert not list(tmp_path.iterdir())


# Importers


@pytest.mark.parametrize("as_state", [False, True])
def test_torch_prune_masks(as_state):
    model = linear()
    prune.l1_unstructured(model[0], "weight", 0.6)
    prune.random_unstructured(model[2], "bias", 1)
    with torch.no_grad():
        model[0].weight_orig[0, model[0].weight_mask[0].bool()] = 0.0  # kept, though zero
    mask = model[0].weight_mask.bool()
    found = weights.from_masks(model.state_dict() if as_state else model)
    assert found["0.weight"].nnz == mask.sum() and found.keys() == linear().state_dict().keys()
    clean = weights.set_weights_(linear(), found)
    assert isinstance(clean[0], SparseLinear) and type(clean[2]) is nn.Linear
    model(torch.zeros(1, 9))  # prune computes the weight in a hook
    torch.testing.assert_close(outputs(clean), outputs(model))


class Masked(nn.Module):
    def __init__(self, mask):
        super().__init__()
        self.register_buffer("mask", mask)

    def forward(self, w):
        return w * self.mask


def test_parametrized_masks():
    model = linear()
    mask = torch.rand(5, 9) < 0.3
    parametrize.register_parametrization(model[0], "weight", Masked(mask.float()))
    for source in (model, model.state_dict()):
        found = weights.from_masks(source)
        assert found["0.weight"].nnz == mask.sum()
        clean = weights.set_weights_(linear(), found)
        torch.testing.assert_close(outputs(clean), outputs(model))
    bare = {k: t for k, t in model.state_dict().items() if not k.endswith(".mask")}
    with pytest.raises(ValueError, match="has no mask beside it; give the model itself"):
        weights.from_masks(bare)


def test_torch_ao_pruning():
    pruning = pytest.importorskip("torch.ao.pruning")
    model = linear()
    sparsifier = pruning.WeightNormSparsifier(sparsity_level=0.5, sparse_block_shape=(1, 1))
    sparsifier.prepare(model, [{"tensor_fqn": "0.weight"}])
    sparsifier.step()
    found = weights.from_masks(model)
    assert found["0.weight"].density == pytest.approx(0.5, abs=0.1)
    torch.testing.assert_close(outputs(weights.set_weights_(linear(), found)), outputs(model))


def test_dense_with_zeros(tmp_path):
    model = linear()
    with torch.no_grad():
        model[0].weight *= torch.rand(5, 9) < 0.3
    safetensors.save_file(model.state_dict(), tmp_path / "dense.safetensors")
    loaded = weights.load_weights(tmp_path / "dense.safetensors")
    assert all(isinstance(t, torch.Tensor) for t in loaded.values())
    found = weights.from_zeros(loaded)
    assert isinstance(found["0.weight"], SparseTensor) and isinstance(
        found["2.weight"], torch.Tensor
    )
    clean = weights.set_weights_(linear(), found)
    torch.testing.assert_close(outputs(clean), outputs(model))
    assert isinstance(weights.from_zeros(loaded, ["2.weight"])["2.weight"], SparseTensor)
    with pytest.raises(ValueError, match=r"\['9.weight'\] are not among the weights"):
        weights.from_zeros(loaded, ["9.weight"])


def bitmasked(w: torch.Tensor) -> dict[str, torch.Tensor]:
    """compressed-tensors' layout, by its own recipe."""
    kept = w.numpy() != 0
    counts = torch.from_numpy(kept.sum(1))
    return {
        "shape": torch.tensor(w.shape),
        "compressed": w[w != 0],
        "bitmask": torch.from_numpy(np.packbits(kept, axis=-1, bitorder="little")),
        "row_offsets": counts.cumsum(0) - counts,
    }


@pytest.mark.parametrize("k", [8, 9, 17])
def test_sparse_bitmask(tmp_path, k):
    w = torch.randn(5, k) * (torch.rand(5, k) < 0.4)
    parts = {f"0.weight.{name}": t for name, t in bitmasked(w).items()}
    safetensors.save_file(parts | {"0.bias": torch.ones(5)}, tmp_path / "b.safetensors")
    found = weights.load_weights(tmp_path / "b.safetensors")
    assert torch.equal(found["0.weight"].to_dense(), w) and found["0.weight"].nnz == (w != 0).sum()
    assert found.keys() == {"0.weight", "0.bias"}
    with pytest.raises(ValueError, match="0.weight: expected .* values, as many as"):
        weights.from_bitmasks(parts | {"0.weight.compressed": torch.ones(1)})
    del parts["0.weight.shape"]
    with pytest.raises(ValueError, match="0.weight has a bitmask but lacks"):
        weights.from_bitmasks(parts)


def test_a_mask_is_no_weight():
    model = nn.Sequential(nn.Linear(3, 3, bias=False))
    before = model[0].weight.clone()
    with pytest.raises(ValueError, match="expected numbers for 0.weight, got a mask; SparseTensor"):
        weights.set_weights_(model, {"0.weight": torch.eye(3) > 0})
    assert torch.equal(model[0].weight, before)


@pytest.mark.parametrize("are_sparse", [False, True])
def test_a_model_on_meta_takes_no_weights(are_sparse):
    """torch would copy nothing, with a warning; a model that accelerate offloads looks the same."""
    given = weights.weights_of(linear())
    if are_sparse:
        given["0.weight"] = SparseTensor.from_dense(given["0.weight"], torch.ones(5, 9) > 0)
    model = linear().to("meta")
    with pytest.raises(ValueError, match="model: expected 0.weight in memory, .* to_empty"):
        weights.set_weights_(model, given)
    assert type(model[0]) is nn.Linear


def test_a_weight_that_is_a_buffer_stays_dense():
    model = linear()
    weight = model[0].weight.detach()
    del model[0].weight
    model[0].register_buffer("weight", torch.zeros(5, 9))
    given = weights.weights_of(model) | {"0.weight": SparseTensor.from_dense(weight)}
    with pytest.warns(UserWarning, match="stay dense: 0.weight"):
        weights.set_weights_(model, given)
    assert torch.equal(model[0].weight, weight)


def test_matrices_of_torch_sparse(tmp_path):
    state = linear().state_dict()
    kept = state["0.weight"] * (state["0.weight"] > 0)
    for t in (kept.to_sparse_csr(), kept.to_sparse(), kept.to_sparse_csc()):
        given = state | {"0.weight": t}
        with pytest.raises(ValueError, match="weights: expected 0.weight .*from_zeros takes"):
            weights.set_weights_(linear(), given)
        torch.save(given, tmp_path / "m.bin")
        with pytest.raises(ValueError, match="0.weight: .*from_zeros takes what torch.load reads"):
            weights.load_weights(tmp_path / "m.bin")
        found = weights.from_zeros(given)
        assert torch.equal(found["0.weight"].to_dense(), kept)
        assert type(weights.set_weights_(linear(), found)[0]) is SparseLinear
    with pytest.raises(ValueError, match="weights: 0.weight: "):
        weights.from_zeros({"0.weight": torch.ones(2, 2, 2).to_sparse()})
