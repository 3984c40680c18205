"""Sparse weights as values and bits: exact, smaller than dense, and refused where they are not."""

import json
import math
import os

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from sparsekern import SparseLinear, SparseTensor, Static, sparsify_, weights
from sparsekern.gpt.build import load_model
from sparsekern.gpt.data import BPETokenizer, ByteTokenizer
from sparsekern.gpt.model import GPT, GPTConfig
from sparsekern.nn import bitmask, stored
from sparsekern.weights import layouts

safetensors = pytest.importorskip("safetensors.torch")


def same(a: SparseTensor, b: SparseTensor) -> bool:
    """Bit for bit, NaN and -0.0 too."""
    bits = [w.values.contiguous().view(torch.uint8) for w in (a, b)]
    patterns = [(a.row_offsets, b.row_offsets), (a.col_indices, b.col_indices), bits]
    return a.shape == b.shape and a.dtype == b.dtype and all(torch.equal(*p) for p in patterns)


def random_sparse(n: int, k: int, share: float, dtype=torch.float32) -> SparseTensor:
    mask = torch.rand(n, k) < share
    return SparseTensor.from_dense(torch.randn(n, k).to(dtype), mask)


@settings(max_examples=60)
@given(st.integers(0, 9), st.integers(0, 40), st.floats(0, 1), st.integers(1, 50))
def test_bits_are_the_pattern(n, k, share, chunk):
    mask = torch.rand(n, k) < share
    w = SparseTensor.from_dense(mask.float(), mask)
    usual, bitmask.CHUNK_PLACES = bitmask.CHUNK_PLACES, chunk
    try:
        bits = bitmask.pack(w.row_offsets, w.col_indices, k)
        assert torch.equal(
            bits, torch.from_numpy(np.packbits(mask.numpy(), axis=-1, bitorder="little"))
        )
        if n and not k:
            with pytest.raises(ValueError, match="expected columns"):
                bitmask.unpack(bits, (n, k), 0)
            return
        rows, cols = bitmask.unpack(bits, (n, k), w.nnz)
    finally:
        bitmask.CHUNK_PLACES = usual
    assert torch.equal(rows, w.row_offsets) and torch.equal(cols, w.col_indices)
    assert rows.dtype == cols.dtype == torch.int32


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float64])
def test_what_is_stored_comes_back_bit_for_bit(tmp_path, dtype):
    """Zeros that are stored, -0.0 and NaN are values like others: the pattern says what is kept."""
    odd = torch.tensor([0.0, -0.0, math.nan, math.inf, -math.inf, 1e-30], dtype=dtype)
    w = SparseTensor(torch.tensor([0, 2, 2, 6]), torch.tensor([0, 8, 1, 3, 4, 6]), odd, (3, 9))
    stored = {"w": w, "none": random_sparse(4, 6, 0, dtype), "all": random_sparse(3, 5, 1, dtype)}
    stored |= {f"{n}x{k}": random_sparse(n, k, 0.5, dtype) for n, k in ((0, 3), (3, 0), (0, 0))}
    stored["few"] = random_sparse(40, 400, 0.01, dtype)
    weights.save_weights(stored, tmp_path / "w.safetensors")
    found = weights.load_weights(tmp_path / "w.safetensors")
    assert found.keys() == stored.keys() and all(same(w, found[name]) for name, w in stored.items())
    names = safetensors.load_file(tmp_path / "w.safetensors").keys()
    assert {"w_bitmask", "few_col_indices"} <= names and "few_bitmask" not in names


@pytest.mark.parametrize("sparsity, share", [(0.5, 0.66), (0.75, 0.40)])
def test_a_file_is_smaller_than_the_dense_one(tmp_path, sparsity, share):
    model = nn.Sequential(*(nn.Linear(256, 256) for _ in range(4)), nn.LayerNorm(256)).bfloat16()
    weights.save_weights(model, tmp_path / "dense.safetensors")
    sparse = sparsify_(model, Static(sparsity))
    weights.save_weights(sparse, tmp_path / "sparse.safetensors")
    dense_bytes, sparse_bytes = (
        (tmp_path / f"{name}.safetensors").stat().st_size for name in ("dense", "sparse")
    )
    assert sparse_bytes <= share * dense_bytes


def test_files_of_the_first_version_are_read(tmp_path):
    w = random_sparse(5, 9, 0.4)
    parts = {
        f"w.{p}": t
        for p, t in zip(weights.read.PARTS, (w.row_offsets, w.col_indices, w.values), strict=True)
    }
    header = {"format_version": 1, "sparse": {"w": {"layout": "csr", "shape": [5, 9]}}}
    header |= {"aliases": {"v": "w"}, "metadata": {"step": 3}}
    path = tmp_path / "w.safetensors"
    safetensors.save_file(parts | {"b": torch.ones(5)}, path, {"sparsekern": json.dumps(header)})
    found = weights.load_weights(path)
    assert (
        same(found["w"], w) and found["v"] is found["w"] and torch.equal(found["b"], torch.ones(5))
    )
    assert weights.load_metadata(path) == {"step": 3}


# Hostile files


def parts(**changes) -> dict[str, torch.Tensor]:
    w = SparseTensor.from_dense(torch.tensor([[1.0, 0, 2], [0, 3, 0]]))
    whole = layouts.parts_of("w", w) | {f"w{name}": t for name, t in changes.items()}
    return {name: t for name, t in whole.items() if t is not None}


HUGE = 2**31 - 1
DAMAGED = {
    "no values": (lambda: {k: t for k, t in parts().items() if k != "w"}, "expected values and"),
    "no pattern": (
        lambda: parts(_bitmask=None, _col_indices=torch.ones(3).int()),
        "expected values and _bitmask or _row_offsets and _col_indices beside _shape, got values",
    ),
    "two patterns": (lambda: parts(_col_indices=torch.ones(3).int()), "expected values and _bitm"),
    "dense values": (lambda: parts() | {"w": torch.ones(2, 3)}, r"expected values \[nnz\] beside"),
    "int values": (lambda: parts() | {"w": torch.ones(3).int()}, "values: expected float32, bf"),
    "a value too many": (lambda: parts() | {"w": torch.ones(4)}, "expected 3 values, as many as"),
    "another shape": (lambda: parts(_shape=torch.tensor([3, 2])), "expected a uint8 bitmask of sh"),
    "huge": (lambda: parts(_shape=torch.tensor([HUGE, HUGE])), "expected a uint8 bitmask of shape"),
    "huge, empty": (
        lambda: parts(_shape=torch.tensor([HUGE, 0]), _bitmask=torch.zeros(HUGE, 0).byte()),
        "expected columns, got a bitmask",
    ),
    "negative": (lambda: parts(_shape=torch.tensor([-2, 3])), r"expected the shape \[N, K\]"),
    "long shape": (lambda: parts(_shape=torch.ones(10**6).long()), r"\[N, K\].*shape \(1000000,\)"),
    "float shape": (lambda: parts(_shape=torch.tensor([2.0, 3.0])), r"expected the shape \[N, K\]"),
    "float bits": (lambda: parts(_bitmask=torch.ones(2, 1)), "uint8 bitmask .* got torch.float32"),
    "bits past K": (
        lambda: parts(_bitmask=torch.tensor([[0b10101], [0]]).byte()),
        "expected no bits past column 3, got 1",
    ),
    "columns": (
        lambda: {
            "w": torch.ones(3),
            "w_shape": torch.tensor([2, 3]),
            "w_row_offsets": torch.tensor([0, 2, 3]),
            "w_col_indices": torch.tensor([0, 5, 1]),
        },
        r"col_indices: expected to lie in \[0, 3\)",
    ),
    "offsets": (
        lambda: {
            "w": torch.ones(3),
            "w_shape": torch.tensor([HUGE, 3]),
            "w_row_offsets": torch.tensor([0, 2, 3]),
            "w_col_indices": torch.tensor([0, 2, 1]),
        },
        "row_offsets: expected 2147483648 elements, got 3",
    ),
}


@pytest.mark.parametrize("name", DAMAGED)
@pytest.mark.parametrize("suffix", [".safetensors", ".bin"])
def test_a_file_that_lies_is_one_error_that_names_it_and_the_tensor(tmp_path, name, suffix):
    make, message = DAMAGED[name]
    path = tmp_path / f"m{suffix}"
    (safetensors.save_file if suffix == ".safetensors" else torch.save)(make(), path)
    with pytest.raises(ValueError, match=message) as caught:
        weights.load_weights(path)
    assert str(caught.value).startswith(f"weights: {path}: w: ")


# State_dicts and files of torch.save


def linear() -> nn.Sequential:
    return nn.Sequential(nn.Linear(9, 5), nn.ReLU(), nn.Linear(5, 3))


def outputs(model: nn.Module) -> torch.Tensor:
    return model(torch.linspace(-1, 1, 18).view(2, 9))


@pytest.fixture
def sparse() -> nn.Sequential:
    return sparsify_(linear(), Static(0.5))


def test_a_sparse_model_loads_the_tensors_of_its_file(tmp_path, sparse):
    """As Trainer of transformers resumes a run: load_state_dict of what the file holds."""
    weights.save_weights(sparse, tmp_path / "m.safetensors")
    other = sparsify_(linear(), Static(0.7))
    other.load_state_dict(safetensors.load_file(tmp_path / "m.safetensors"))
    assert torch.equal(outputs(other), outputs(sparse))
    few = SparseTensor.from_dense(torch.eye(5, 9))
    state = layouts.parts_of("0.weight", few)
    del state["0.weight_bitmask"]
    state |= {"0.weight_row_offsets": few.row_offsets, "0.weight_col_indices": few.col_indices}
    other.load_state_dict(state, strict=False)
    assert same(other[0].weight, few)


@pytest.mark.parametrize(
    "changes, message",
    [
        (
            {"0.weight_shape": torch.tensor([9, 5])},
            r"0.weight_shape: expected \[5, 9\], got \[9, 5\]",
        ),
        ({"0.weight_shape": None}, r"0.weight_shape: expected \[5, 9\], got none"),
        (
            {"0.weight": torch.ones(2)},
            "0.weight: expected .* values, as many as bits are set, got 2",
        ),
        ({"0.weight_bitmask": torch.zeros(5, 2)}, "0.weight: expected a uint8 bitmask"),
        ({"0.weight_bitmask": None}, "0.weight: a dense weight, but|0.values"),
    ],
)
def test_tensors_of_a_file_that_do_not_fit_leave_the_layer(tmp_path, sparse, changes, message):
    weights.save_weights(sparse, tmp_path / "m.safetensors")
    state = safetensors.load_file(tmp_path / "m.safetensors") | changes
    other = sparsify_(linear(), Static(0.7))
    before = {name: t.clone() for name, t in other[0].state_dict().items()}
    with pytest.raises(RuntimeError, match=message):
        other.load_state_dict({name: t for name, t in state.items() if t is not None})
    assert all(torch.equal(t, before[name]) for name, t in other[0].state_dict().items())


@pytest.mark.parametrize("suffix", [".bin", ".pt", ".safetensors"])
def test_a_state_dict_of_sparse_layers_is_weights(tmp_path, sparse, suffix):
    path = tmp_path / f"m{suffix}"
    state = dict(sparse.state_dict())
    safetensors.save_file(state, path) if suffix == ".safetensors" else torch.save(state, path)
    model = weights.set_weights_(linear(), weights.load_weights(path))
    assert isinstance(model[0], SparseLinear) and torch.equal(outputs(model), outputs(sparse))
    state["0.col_indices"] = state["0.col_indices"] + 9
    with pytest.raises(ValueError, match="weights: 0.weight: col_indices: expected to lie in"):
        weights.set_weights_(linear(), state)
    with pytest.raises(ValueError, match="0.weight is there twice"):
        weights.set_weights_(linear(), state | {"0.weight": torch.ones(5, 9)})


class CallsSystem:
    def __reduce__(self):
        return os.system, ("exit 1",)


def test_files_of_torch_save(tmp_path, sparse):
    path = tmp_path / "pytorch_model.bin"
    dense = linear()
    torch.save(dense.state_dict(), path)
    assert torch.equal(weights.load_weights(tmp_path)["0.weight"], dense[0].weight)
    torch.save({"epoch": 3, "state_dict": dense.state_dict(), "optimizer": {"state": {}}}, path)
    assert weights.load_weights(path).keys() == dense.state_dict().keys()
    assert weights.load_metadata(path) == {}
    torch.save(weights.weights_of(sparse), path)
    assert same(weights.load_weights(path)["0.weight"], sparse[0].weight)
    for content, message in (
        ([1], "expected a state_dict, got list"),
        ({"a": 1, "b": "c"}, "got the keys a, b; dicts of tensors among them: none"),
        ({"ema": {"w": torch.ones(1)}, "model": {"w": torch.ones(1)}}, "among them: ema, model"),
        ({"w": torch.zeros(1).expand(2**40)}, "w: expected a tensor with all its elements"),
        ({"w": torch.eye(3).to_sparse()}, "w: expected a tensor with all its elements"),
        ({"w": nn.ReLU()}, "holds objects, which could run code: expected tensors"),
        ({"w": CallsSystem()}, "holds objects, which could run code: expected tensors"),
        (dense, "holds objects, which could run code: expected tensors"),
    ):
        torch.save(content, path)
        with pytest.raises(ValueError, match=message) as caught:
            weights.load_weights(path)
        assert str(path) in str(caught.value)
    torch.save(dense.state_dict(), path)
    whole = path.read_bytes()
    path.write_bytes(whole[: len(whole) // 2])
    with pytest.raises(ValueError, match=f"{path} is truncated"):
        weights.load_weights(path)


def test_several_files_of_torch_save(tmp_path, sparse):
    state = weights.weights_of(sparse)
    parts = layouts.parts_of("0.weight", state.pop("0.weight"))
    parts |= layouts.parts_of("2.weight", state.pop("2.weight")) | state
    places = {name: f"pytorch_model-{i % 2}.bin" for i, name in enumerate(parts)}
    for file in set(places.values()):
        torch.save({name: t for name, t in parts.items() if places[name] == file}, tmp_path / file)
    (tmp_path / "pytorch_model.bin.index.json").write_text(json.dumps({"weight_map": places}))
    model = weights.set_weights_(linear(), weights.load_weights(tmp_path))
    assert torch.equal(outputs(model), outputs(sparse))


# Names


class Wrapped(nn.Module):
    """Names as a compiled block in a model under DDP has them."""

    def __init__(self, model: nn.Module):
        super().__init__()
        self.module = nn.Module()
        self.module._orig_mod = model


@pytest.mark.parametrize("prefix", ["_orig_mod.", "module.", "module._orig_mod.", "model."])
def test_prefixes_of_all_names(sparse, prefix):
    given = {prefix + name: w for name, w in weights.weights_of(sparse).items()}
    model = weights.set_weights_(linear(), given)
    assert isinstance(model[0], SparseLinear) and torch.equal(outputs(model), outputs(sparse))
    given = {prefix + name: w for name, w in sparse.state_dict().items()}
    assert torch.equal(outputs(weights.set_weights_(linear(), given)), outputs(sparse))


def test_wrapped_models_and_blocks(sparse):
    wrapped = Wrapped(linear())
    weights.set_weights_(wrapped, weights.weights_of(sparse))
    assert torch.equal(outputs(wrapped.module._orig_mod), outputs(sparse))
    blocks = {n.replace("0.", "0._orig_mod."): w for n, w in weights.weights_of(sparse).items()}
    assert torch.equal(outputs(weights.set_weights_(linear(), blocks)), outputs(sparse))
    with pytest.raises(ValueError, match="missing: 0.bias, 2.bias, 2.weight; unexpected: 0.x$"):
        weights.set_weights_(linear(), {"0.weight": torch.ones(5, 9), "0.x": torch.ones(1)})


class Shared(nn.Module):
    """The same layer twice, and two layers with the same weight."""

    def __init__(self):
        super().__init__()
        self.a = self.b = nn.Linear(8, 8)
        self.c, self.d = nn.Linear(8, 8, bias=False), nn.Linear(8, 8, bias=False)
        self.d.weight = self.c.weight
        self.emb = nn.Embedding(8, 8)


def test_shared_layers_are_written_once_and_stay_shared(tmp_path):
    model, path = Shared(), tmp_path / "m.safetensors"
    model.a = model.b = SparseLinear.from_linear(model.a, torch.rand(8, 8) < 0.5)
    weights.save_weights(model, path)
    names = safetensors.load_file(path).keys()
    assert {"a.weight", "a.weight_bitmask"} <= names and not any(n.startswith("b.") for n in names)
    other = weights.set_weights_(Shared(), weights.load_weights(path))
    assert other.a is other.b and same(other.a.weight, model.a.weight)
    assert other.c.weight is other.d.weight and torch.equal(other.c.weight, model.c.weight)


def test_what_stays_dense_is_written_out_and_named():
    model, w = Shared(), random_sparse(8, 8, 0.5)
    given = weights.weights_of(model) | {"c.weight": w, "d.weight": w, "emb.weight": w}
    match = r"written out.*: c.weight \(tied\), d.weight \(tied\), emb.weight \(of Embedding\)"
    with pytest.warns(UserWarning, match=match):
        weights.set_weights_(model, given)
    assert type(model.c) is nn.Linear and model.c.weight is model.d.weight
    assert torch.equal(model.c.weight, w.to_dense()) and torch.equal(model.emb.weight, w.to_dense())


# Models of our own GPT


@pytest.mark.parametrize("kind", ["bytes", "bpe"])
def test_weights_with_config_and_tokenizer_beside_them(tmp_path, kind):
    pytest.importorskip("tokenizers")
    tokenizer = ByteTokenizer() if kind == "bytes" else BPETokenizer.train("a b c " * 50, 260)
    config = {"layers": 1, "heads": 2, "width": 16, "context": 8}
    model = sparsify_(GPT(GPTConfig(1, 2, 16, 8, tokenizer.vocab_size)), Static(0.5))
    path = tmp_path / "model.safetensors"
    weights.save_weights(model, path)
    with pytest.raises(ValueError, match=f"{path}: expected the weights of a run.* a config.json"):
        load_model(path)
    (tmp_path / "config.json").write_text(json.dumps(config))
    state = tokenizer.state()
    text = json.dumps(state) if kind == "bytes" else state["serialized"]
    (tmp_path / "tokenizer.json").write_text(text)
    for source in (path, tmp_path):
        loaded, other = load_model(source)
        assert other.state() == state
        assert torch.equal(loaded(torch.arange(8)[None])[0], model(torch.arange(8)[None])[0])
    for damage, message in (
        ("[", "config.json: expected JSON"),
        ("[]", "config.json: expected an object, got list"),
        (json.dumps(config | {"width": 10**9}), "wte.weight: expected shape"),
        (json.dumps(config | {"heads": True}), "config: heads: expected a number, got True"),
        ("{}", "config: layers: expected a number, got None"),
        ('{"model_type": "llama"}', "expected a GPT of .* got a llama of transformers"),
    ):
        (tmp_path / "config.json").write_text(damage)
        with pytest.raises(ValueError, match=message) as caught:
            load_model(path)
        assert str(tmp_path) in str(caught.value)
    (tmp_path / "tokenizer.json").unlink()  # which a model of transformers need not have
    with pytest.raises(ValueError, match="got a llama of transformers"):
        load_model(path)


@pytest.mark.gpu
def test_a_model_on_a_gpu(tmp_path, sparse):
    path = tmp_path / "m.safetensors"
    weights.save_weights(sparse.cuda(), path)
    model = weights.set_weights_(linear().cuda(), weights.load_weights(path))
    assert model[0].values.is_cuda and same(model[0].weight, sparse[0].weight)
    other = sparsify_(linear(), Static(0.7)).cuda()
    other.load_state_dict(safetensors.load_file(path, device="cuda"))
    assert other[0].col_indices.is_cuda and same(other[0].weight, sparse[0].weight)
    few = stored.transposed(sparse[0].weight.detach())
    assert few.col_indices.is_cuda
    assert torch.equal(few.to_dense(), sparse[0].weight.detach().to_dense().t())
