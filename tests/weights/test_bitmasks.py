"""The layouts of compressed-tensors, as its versions 0.9.4 and 0.14 wrote and read them."""

import json

import numpy as np
import pytest
import torch
from torch import nn

from sparsekern import SparseTensor, weights


def sparse(*shape: int) -> torch.Tensor:
    return torch.randn(shape) * (torch.rand(shape) < 0.4)


def compressed(name: str, w: torch.Tensor) -> dict[str, torch.Tensor]:
    """X.shape and the others, with the integers of fp8."""
    raw = w.view(torch.int8) if w.itemsize == 1 else w
    kept = w.float().numpy() != 0
    counts = torch.from_numpy(kept.sum(-1, keepdims=w.ndim == 1))
    return {
        f"{name}.shape": torch.tensor(w.shape),
        f"{name}.compressed": raw[torch.from_numpy(kept)].view(w.dtype),
        f"{name}.bitmask": torch.from_numpy(np.packbits(kept, axis=-1, bitorder="little")),
        f"{name}.row_offsets": counts.cumsum(0) - counts,
    }


def test_names_of_early_and_late_writers():
    w, norm = sparse(5, 9), sparse(13)
    late = weights.from_bitmasks(compressed("a", w) | {"a.bias": norm})
    assert late.keys() == {"a.weight", "a.bias"} and torch.equal(late["a.weight"].to_dense(), w)
    early = weights.from_bitmasks(compressed("a.weight", w) | compressed("a.bias", norm))
    assert early.keys() == {"a.weight", "a.bias"} and torch.equal(early["a.weight"].to_dense(), w)
    assert isinstance(early["a.bias"], torch.Tensor) and torch.equal(early["a.bias"], norm)
    conv = sparse(4, 3, 2, 3)
    assert torch.equal(weights.from_bitmasks(compressed("c", conv))["c.weight"], conv)
    with pytest.raises(ValueError, match="a.weight is there twice"):
        weights.from_bitmasks(compressed("a", w) | {"a.weight": w})
    with pytest.raises(ValueError, match="a.weight has a bitmask but lacks shape, compressed"):
        weights.from_bitmasks({"a.bitmask": torch.zeros(1, 1).byte()})


@pytest.mark.parametrize("dtype", [torch.float8_e4m3fn, torch.float8_e5m2, torch.int8])
@pytest.mark.parametrize("scale", [(), (1,), (6,), (6, 1), (6, 3), (1, 3)])
def test_quantized_values_are_multiplied_by_their_scales(dtype, scale):
    q = (sparse(6, 12) * 20).round().clamp(-100, 100).to(dtype)
    scales = torch.rand(scale).bfloat16()
    whole = scales.reshape(1, 1) if scales.numel() == 1 else scales
    whole = whole[:, None] if whole.ndim == 1 else whole
    want = q.bfloat16() * whole.repeat_interleave(12 // whole.shape[1], 1)
    extra = {"weight_scale": scales, "weight_zero_point": torch.zeros(1).char()}
    extra |= {"weight_g_idx": torch.full((12,), -1), "input_scale": torch.ones(1)}
    found = weights.from_bitmasks(compressed("a", q) | {f"a.{n}": t for n, t in extra.items()})
    assert found.keys() == {"a.weight"} and found["a.weight"].dtype == torch.bfloat16
    assert torch.equal(found["a.weight"].to_dense(), want)
    assert found["a.weight"].nnz == int((q.float() != 0).sum())


@pytest.mark.parametrize("dtype", [torch.float32, torch.float8_e4m3fn])
def test_2_of_4(dtype):
    """Two values in four places always, zeros among them."""
    w = torch.randn(8, 16)
    w[0] = 0
    places = w.view(-1, 4).abs().topk(2, dim=1).indices
    mask = torch.zeros(32, 4).scatter_(1, places, 1).view(8, 16).bool()
    w = (w * mask).to(dtype)
    tensors = {
        "a.shape": torch.tensor([[8], [16]]),
        "a.compressed": w.view(torch.int8 if w.itemsize == 1 else dtype)[mask]
        .view(dtype)
        .view(8, 8),
        "a.bitmask": torch.from_numpy(np.packbits(mask.numpy(), axis=-1, bitorder="little")),
        "b.weight": torch.ones(2),
    }
    if dtype != torch.float32:
        tensors["a.weight_scale"] = torch.tensor(0.5)
    found = weights.from_bitmasks(tensors)
    scale = 1 if dtype == torch.float32 else 0.5
    assert found["a.weight"].nnz == 64 and torch.equal(
        found["a.weight"].to_dense(), w.float() * scale
    )
    assert torch.equal(found["b.weight"], torch.ones(2))


def test_bitmasks_are_written_as_others_read_them(tmp_path):
    safetensors = pytest.importorskip("safetensors.torch")
    model = nn.Sequential(nn.Linear(9, 5))
    w = sparse(5, 9)
    weights.set_weights_(model, {"0.weight": SparseTensor.from_dense(w), "0.bias": torch.ones(5)})
    tensors = weights.to_bitmasks(model)
    assert {n: t.tolist() for n, t in tensors.items() if n != "0.bias"} == {
        n: t.tolist() for n, t in compressed("0", w).items()
    }
    weights.save_weights(tensors, tmp_path / "model.safetensors")
    assert torch.equal(weights.load_weights(tmp_path)["0.weight"].to_dense(), w)
    assert safetensors.load_file(tmp_path / "model.safetensors").keys() == tensors.keys()
    for name in ("w", "weight", "0.bias"):
        with pytest.raises(ValueError, match=f"{name}: expected a name that ends in .weight"):
            weights.to_bitmasks({name: SparseTensor.from_dense(w)})
    tied = dict.fromkeys(("a.weight", "b.weight"), SparseTensor.from_dense(w))
    weights.save_weights(weights.to_bitmasks(tied), tmp_path / "model.safetensors")
    assert torch.equal(weights.load_weights(tmp_path)["b.weight"].to_dense(), w)
    none = {"w.weight": SparseTensor.from_dense(torch.zeros(5, 0))}
    weights.save_weights(weights.to_bitmasks(none), tmp_path / "model.safetensors")
    assert weights.load_weights(tmp_path)["w.weight"].shape == (5, 0)
    with pytest.raises(ValueError, match="0.weight is a transpose"):
        weights.to_bitmasks({"0.weight": SparseTensor.from_dense(w).T})


def test_dense_tensors_with_zeros_for_everybody(tmp_path):
    model = nn.Sequential(nn.Linear(9, 5))
    w = SparseTensor.from_dense(sparse(5, 9))
    weights.set_weights_(model, {"0.weight": w, "0.bias": torch.ones(5)})
    plain = nn.Sequential(nn.Linear(9, 5))
    plain.load_state_dict(weights.to_zeros(model))
    assert torch.equal(plain[0].weight, w.to_dense())
    assert torch.equal(weights.to_zeros({"w": w, "v": w.values})["w"], w.to_dense())


def test_a_bitmask_of_an_embedding_fills_the_embedding(tmp_path):
    safetensors = pytest.importorskip("safetensors.torch")
    model = nn.Sequential(nn.Embedding(10, 8), nn.Linear(8, 4, bias=False))
    emb, w = sparse(10, 8), sparse(4, 8)
    file = "model-00001-of-00001.safetensors"
    tensors = compressed("0", emb) | compressed("1", w)
    safetensors.save_file(tensors, tmp_path / file)
    index = {"weight_map": dict.fromkeys(tensors, file)}
    (tmp_path / "model.safetensors.index.json").write_text(json.dumps(index))
    with pytest.warns(UserWarning, match=r"written out.*0.weight \(of Embedding\)$"):
        weights.set_weights_(model, weights.load_weights(tmp_path))
    assert torch.equal(model[0].weight, emb) and torch.equal(model[1].weight.to_dense(), w)
