"""Damaged weights and checkpoints: found, and one error that names the file and the thing."""

import copy
import json
import math
import struct
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from tiny import same, tiny_config
from torch import nn

from sparsekern import SparseTensor, Static, sparsify_, weights
from sparsekern.gpt import train
from sparsekern.gpt.build import load_model
from sparsekern.gpt.checkpoint import CHECKPOINT, FORMATS, load_checkpoint, save_checkpoint
from sparsekern.gpt.config import TrainConfig, resumed_config
from sparsekern.gpt.start import begin


@pytest.fixture
def tiny(tmp_path: Path) -> TrainConfig:
    return tiny_config(tmp_path)


# A flipped bit


def flipped(whole: bytes, places: range):
    for place in places:
        damaged = bytearray(whole)
        damaged[place] ^= 1 << (place % 8)
        yield place, bytes(damaged)


def test_every_flipped_bit_of_weights_is_found(tmp_path):
    pytest.importorskip("safetensors")
    path = tmp_path / "m.safetensors"
    model = sparsify_(nn.Sequential(nn.Linear(9, 5), nn.Linear(5, 3)), Static(0.5))
    weights.save_weights(model, path, step=3)
    whole, want = path.read_bytes(), weights.load_weights(path)
    payload = 8 + struct.unpack("<Q", whole[:8])[0]
    found = 0
    for place, damaged in flipped(whole, range(0, len(whole), 3)):
        path.write_bytes(damaged)
        try:
            got = weights.load_weights(path)
            about = weights.load_metadata(path)
        except ValueError as error:
            assert str(path) in str(error)
            found += place >= payload
        else:  # nothing but what names no weight may differ, as the word "format"
            assert place < payload and same(want, got) and about == {"step": 3}
    assert found == len([p for p in range(0, len(whole), 3) if p >= payload])


def test_a_flipped_bit_names_its_tensor(tmp_path):
    pytest.importorskip("safetensors")
    path = tmp_path / "m.safetensors"
    weights.save_weights({"a.weight": torch.full((4,), 3.0), "b": torch.ones(2)}, path)
    whole = path.read_bytes()
    assert whole.count(struct.pack("<f", 3.0)) == 4
    path.write_bytes(whole.replace(struct.pack("<f", 3.0), struct.pack("<f", 3.5), 1))
    with pytest.raises(ValueError, match=rf"{path}: a.weight is damaged"):
        weights.load_weights(path)


def test_weights_of_older_versions_and_others_have_no_digest(tmp_path):
    safetensors = pytest.importorskip("safetensors.torch")
    header = {"format_version": 1, "sparse": {}, "aliases": {}, "metadata": {}}
    about = {"format": "pt", "sparsekern": json.dumps(header)}
    path = tmp_path / "old.safetensors"
    safetensors.save_file({"w": torch.ones(2)}, path, about)
    assert torch.equal(weights.load_weights(path)["w"], torch.ones(2))
    weights.save_weights({"w": torch.ones(2)}, path)
    assert torch.equal(safetensors.load_file(path)["w"], torch.ones(2))  # and others read ours


def test_flipped_bits_of_a_checkpoint_are_found(tiny):
    train.train(replace(tiny, sparsity=0.5, steps=2))
    path = Path(tiny.out) / CHECKPOINT
    whole, want = path.read_bytes(), load_checkpoint(path)
    found = 0
    places = range(0, len(whole), len(whole) // 150)
    for _, damaged in flipped(whole, places):
        path.write_bytes(damaged)
        try:
            got = load_checkpoint(path)
        except (ValueError, MemoryError) as error:
            assert str(path) in str(error)
            found += 1
        else:  # names and checksums of the zip, that nobody reads
            assert same(want, got)
    assert found > 0.8 * len(places)


def test_a_flipped_bit_of_a_checkpoint_names_its_tensor(tiny):
    train.train(replace(tiny, steps=1))
    path = Path(tiny.out) / CHECKPOINT
    state = torch.load(path, weights_only=True)
    state["model"]["blocks.0.mlp.up.weight"][3, 5] += 1e-6
    torch.save(state, path)
    with pytest.raises(ValueError, match=rf"{path}: model.blocks.0.mlp.up.weight is damaged"):
        load_model(path)
    state["losses"][0] += 1e-9
    torch.save(state, path)
    with pytest.raises(ValueError, match=rf"{path}: it is damaged, what is beside its tensors"):
        resumed_config({"out": tiny.out})


# Damaged weights of ours


def header_of(**changes) -> dict:
    return {
        "format_version": 1,
        "sparse": {"w": {"layout": "csr", "shape": [2, 3]}},
        "aliases": {},
        "metadata": {},
        **changes,
    }


def shape(value: object) -> dict:
    return header_of(sparse={"w": {"layout": "csr", "shape": value}})


DAMAGED_HEADERS = {
    "not json": ("{", "its sparsekern metadata is not JSON"),
    "deep": ("[" * 100_000, "its sparsekern metadata is not JSON"),
    "a list": ([], "sparsekern metadata: expected an object, got '\\[\\]'"),
    "null": (None, "sparsekern metadata: expected an object"),
    "no version": ({"sparse": {}}, "has format version None, this sparsekern reads 1 and 2"),
    "no aliases": ({"format_version": 1, "sparse": {}, "metadata": {}}, "aliases: expected an ob"),
    "sparse a list": (header_of(sparse=[]), "sparse: expected an object, got '\\[\\]'"),
    "alias of nothing": (header_of(aliases={"a": "nope"}), "aliases: expected a to .* has no nope"),
    "alias over": (
        header_of(aliases={"d": "w"}),
        "aliases: expected d to .* the file has d itself",
    ),
    "alias of a number": (header_of(aliases={"a": 3}), "aliases: a: expected a name, got '3'"),
    "layout": (
        header_of(sparse={"w": {"layout": "csc", "shape": [2, 3]}}),
        "w: layout: expected cs",
    ),
    "no shape": (header_of(sparse={"w": {"layout": "csr"}}), "w: shape: expected \\[N, K\\]"),
    "strings": (shape(["2", "3"]), "w: shape: expected"),
    "null shape": (shape(None), "w: shape: expected"),
    "floats": (shape([2.0, 3.0]), "w: shape: expected"),
    "negative": (shape([-2, 3]), "w: shape: expected"),
    "huge": (shape([2, 2**40]), "w: shape: expected"),
    "other": (shape([7, 3]), "w: row_offsets"),
    "not there": (header_of(sparse={"v": {"layout": "csr", "shape": [2, 3]}}), "lacks a part of v"),
    "twice": (header_of(sparse={"d": {"layout": "csr", "shape": [2, 3]}}), "d is there twice"),
}


@pytest.mark.parametrize("name", DAMAGED_HEADERS)
def test_damaged_metadata_is_one_error_that_names_the_file(tmp_path, name):
    safetensors = pytest.importorskip("safetensors.torch")
    header, message = DAMAGED_HEADERS[name]
    W = SparseTensor.from_dense(torch.tensor([[1.0, 0, 2], [0, 3, 0]]))
    tensors = {"d": torch.ones(1)}
    for name in "wd":
        parts = zip(weights.read.PARTS, (W.row_offsets, W.col_indices, W.values), strict=True)
        tensors |= {f"{name}.{part}": t.clone() for part, t in parts}
    path = tmp_path / "w.safetensors"
    text = header if isinstance(header, str) else json.dumps(header)
    safetensors.save_file(tensors, path, {"sparsekern": text})
    with pytest.raises(ValueError, match=message) as caught:
        weights.load_weights(path)
    assert str(path) in str(caught.value)


def test_weights_that_share_memory_are_saved(tmp_path):
    pytest.importorskip("safetensors")
    W = SparseTensor.from_dense(torch.eye(3))
    V = SparseTensor(W.row_offsets, W.col_indices, 2 * W.values, (3, 3))
    whole = torch.arange(6.0)
    stored = {"W": W, "V": V, "a": whole[:4], "b": whole[2:], "c": whole[:4]}
    weights.save_weights(stored, tmp_path / "w.safetensors")
    assert same(stored, weights.load_weights(tmp_path / "w.safetensors"))
    with pytest.raises(ValueError, match="two of them would have the name W_bitmask"):
        weights.save_weights({"W": W, "W_bitmask": whole}, tmp_path / "x.safetensors")


def test_what_no_file_holds_or_no_reader_takes_is_not_written(tmp_path):
    pytest.importorskip("safetensors")
    path, one = tmp_path / "m.safetensors", torch.ones(1)
    for given, message in (
        ({"w": torch.eye(3).to_sparse()}, "w: expected a Tensor or a SparseTensor, got a torch.sp"),
        ({"w": None}, "w: expected a Tensor or a SparseTensor, got NoneType"),
        ({"w": torch.ones(1, device="meta")}, "w: expected a tensor with data, got one on meta"),
        ({"w": one.to(torch.complex128)}, "safetensors files hold no torch.complex128"),
        ({3: one}, "expected names of tensors, got 3"),
        ({"__metadata__": one}, "expected names of tensors, got '__metadata__'"),
        ({"layer.bitmask": one}, "layer.weight has a bitmask but lacks shape, compressed"),
        ({"w_shape": one, "w_col_indices": one + 1}, "w: expected values and _bitmask or"),
    ):
        with pytest.raises(ValueError, match=message):
            weights.save_weights(given, path)
    with pytest.raises(ValueError, match=f"{path}: .*header too large"):
        weights.save_weights({"w": one}, path, note="x" * 10**8)
    for name in ("m.bin", "m.safetensors.index.json"):
        with pytest.raises(ValueError, match=f"path: expected .* would take {name} for another"):
            weights.save_weights({"w": one}, tmp_path / name)
    assert not list(tmp_path.iterdir())


def test_views_of_all_kinds_are_written(tmp_path):
    pytest.importorskip("safetensors")
    conjugate = torch.tensor([[1 + 2j, 3]]).conj()
    views = {"c": conjugate, "i": conjugate.imag, "one": torch.arange(6).view(2, 3).T[1:2, 0]}
    weights.save_weights(views, tmp_path / "model.safetensors")
    found = weights.load_weights(tmp_path)
    assert {n: t.tolist() for n, t in found.items()} == {n: t.tolist() for n, t in views.items()}


def test_metadata_is_what_json_makes_of_it(tmp_path):
    pytest.importorskip("safetensors")
    path = tmp_path / "w.safetensors"
    weights.save_weights({}, path, a=(1, 2), b={10: "x", 9: math.inf, True: None})
    want = {"a": [1, 2], "b": {"10": "x", "9": math.inf, "true": None}}
    assert weights.load_metadata(path) == want and weights.load_weights(path) == {}
    with pytest.raises(ValueError, match="metadata: expected what JSON can hold: .*complex"):
        weights.save_weights({}, path, a=1j)
    assert weights.load_metadata(path) == want


def test_the_same_weights_are_the_same_bytes(tmp_path):
    pytest.importorskip("safetensors")
    for i in range(8):  # safetensors orders metadata at random
        weights.save_weights({"w": torch.ones(3)}, tmp_path / str(i), nöte='ü"\x01')
    assert len({(tmp_path / str(i)).read_bytes() for i in range(8)}) == 1


# Weights of others


def bitmask(**changes) -> dict[str, torch.Tensor]:
    mask = np.array([[1, 0, 1, 0, 0, 0, 0, 0, 1], [0] * 9])
    parts = {
        "shape": torch.tensor([2, 9]),
        "compressed": torch.tensor([1.0, 2.0, 3.0]),
        "bitmask": torch.from_numpy(np.packbits(mask, axis=-1, bitorder="little")),
    }
    return {f"w.{name}": t for name, t in (parts | changes).items()}


DAMAGED_BITMASKS = {
    "1-D weight": (
        {"shape": torch.tensor([9])},
        r"w.weight: expected a uint8 bitmask of shape \(2,\)",
    ),
    "1-D mask": (
        {"bitmask": torch.zeros(2, dtype=torch.uint8)},
        "w.weight: expected a uint8 bitmask of s",
    ),
    "float mask": (
        {"bitmask": torch.zeros(2, 2)},
        "w.weight: expected a uint8 bitmask .* torch.float32",
    ),
    "wider mask": (
        {"bitmask": torch.zeros(2, 3, dtype=torch.uint8)},
        "w.weight: expected a uint8 bitmask",
    ),
    "bits past K": (
        {"bitmask": torch.tensor([[0b101, 0b10], [0, 0]], dtype=torch.uint8)},
        "w.weight: expected no bits past column 9, got 1",
    ),
    "NaN shape": ({"shape": torch.tensor([2, math.nan])}, "w.weight: expected its shape"),
    "negative shape": ({"shape": torch.tensor([2, -9])}, "w.weight: expected its shape"),
    "no columns": (
        {"shape": torch.tensor([2**31 - 1, 0]), "bitmask": torch.zeros(2**31 - 1, 0).byte()},
        "w.weight: expected columns",
    ),
    "2 of 4": (
        {"shape": torch.tensor([[2], [9]]), "compressed": torch.zeros(2, 4)},
        "w.weight: expected 3 values, as many as bits are set, got 8",
    ),
    "fp8": (
        {"compressed": torch.tensor([1.0, 2, 3]).to(torch.float8_e4m3fn)},
        "expected floats in w.weight_scale for its values of torch.float8_e4m3fn, got nothing",
    ),
    "int32": ({"compressed": torch.tensor([1, 2, 3]).int()}, "w.weight: expected values of"),
    "int8 scale": (
        {"compressed": torch.ones(3).char(), "weight_scale": torch.ones(1).char()},
        "expected floats in w.weight_scale .*got torch.int8",
    ),
    "scale of others": (
        {"compressed": torch.ones(3).char(), "weight_scale": torch.ones(2, 2)},
        r"expected w.weight_scale for the tensor, its 2 rows, or groups .* got shape \(2, 2\)",
    ),
    "no scale": (
        {"compressed": torch.ones(3).char(), "weight_scale": torch.ones(2, 0)},
        r"expected w.weight_scale for the tensor, its 2 rows, or groups .* got shape \(2, 0\)",
    ),
    "zero points": (
        {
            "compressed": torch.ones(3).char(),
            "weight_scale": torch.ones(1),
            "weight_zero_point": torch.ones(1).char(),
        },
        "expected zeros in w.weight_zero_point",
    ),
    "a value too many": ({"compressed": torch.ones(4)}, "w.weight: expected 3 values"),
}


@pytest.mark.parametrize("name", DAMAGED_BITMASKS)
def test_a_damaged_bitmask_names_its_tensor(name):
    assert weights.from_bitmasks(bitmask())["w.weight"].to_dense()[0, [0, 2, 8]].tolist() == [
        1,
        2,
        3,
    ]
    changes, message = DAMAGED_BITMASKS[name]
    with pytest.raises(ValueError, match=message):
        weights.from_bitmasks(bitmask(**changes))


def test_weights_in_several_files(tmp_path):
    safetensors = pytest.importorskip("safetensors.torch")
    parts = bitmask() | {"b": torch.ones(3)}
    names = {n: f"model-0000{1 + (n in ('w.shape', 'b'))}-of-00002.safetensors" for n in parts}
    for shard in set(names.values()):
        safetensors.save_file({n: parts[n] for n in parts if names[n] == shard}, tmp_path / shard)
    index = tmp_path / "model.safetensors.index.json"
    with pytest.raises(FileNotFoundError, match="holds none of model.safetensors, model.safe"):
        weights.load_weights(tmp_path)
    index.write_text(json.dumps({"weight_map": names}))
    want = weights.from_bitmasks(parts)
    assert same(want, weights.load_weights(tmp_path)) and same(want, weights.load_weights(index))
    for damage, message in (
        ("[", "expected JSON with a weight_map"),
        ("[]", "expected JSON with a weight_map"),
        ('{"weight_map": 3}', "weight_map: expected the name of a file"),
        ('{"weight_map": {"a": "../x.safetensors"}}', "expected files beside it, got '../x.saf"),
        (json.dumps({"weight_map": {"a": names["b"]}}), "00002-of-00002.safetensors lacks a"),
        ('{"weight_map": {"a": "none.safetensors"}}', "none.safetensors does not exist"),
    ):
        index.write_text(damage)
        with pytest.raises((ValueError, FileNotFoundError), match=message):
            weights.load_weights(tmp_path)


class Tied(nn.Module):
    def __init__(self):
        super().__init__()
        self.wte, self.head = nn.Embedding(6, 4), nn.Linear(4, 6, bias=False)
        self.head.weight = self.wte.weight
        self.up = nn.Linear(4, 5)


def test_what_does_not_fit_is_named_and_the_model_is_as_it_was():
    model = Tied()
    before = copy.deepcopy(model.state_dict())
    new = {name: t + 1 for name, t in before.items()}
    sparse = SparseTensor.from_dense(torch.ones(6, 4))
    up = SparseTensor.from_dense(torch.ones(5, 4))
    for damaged, message in (
        (new | {"wte.weight": sparse}, "wte.weight and head.weight, got two that differ"),
        (new | {"up.bias": torch.ones(3)}, r"expected up.bias of shape \(5,\), got \(3,\)"),
        (new | {"up.weight": up, "x": torch.ones(1)}, "do not fit the model; unexpected: x$"),
        ({"up.weight": up}, "do not fit the model; missing: head.weight, up.bias, wte.weight$"),
        ({f"module.{n}": t for n, t in new.items()} | {"module.x": up}, "model; unexpected: x$"),
    ):
        with pytest.raises(ValueError, match=message):
            weights.set_weights_(model, damaged)
        assert type(model.up) is nn.Linear and same(dict(model.state_dict()), dict(before))
    del new["head.weight"]  # files leave out a tied one
    weights.set_weights_(model, new)
    assert model.head.weight is model.wte.weight and torch.equal(
        model.wte.weight, new["wte.weight"]
    )


def test_nan_marks_are_named():
    w = torch.eye(4)
    w[1] = math.nan
    with pytest.raises(ValueError, match="w: expected numbers, 4 of 16 are NaN"):
        weights.from_zeros({"w": w})
    assert weights.from_zeros({"w": w.nan_to_num(0)})["w"].nnz == 3


# Damaged checkpoints


def optimizer_of(state: dict, index: int) -> dict:
    return state["optimizer"]["state"][index]


def set_optimizer(key: str, value: object):
    return lambda s: optimizer_of(s, 0).update({key: value})


def expanded(*shape: int) -> torch.Tensor:
    return torch.zeros(1).expand(*shape)


DAMAGED_STATES = {
    **{
        f"no {name}": (lambda s, name=name: s.pop(name), f"it has no {name}")
        for name in ("config", "model", "optimizer", "losses", "source")
    },
    "config a list": (lambda s: s.update(config=[]), "config: expected dict, got \\[\\]"),
    "unknown setting": (lambda s: s["config"].update(x=1), "config: expected settings .* got 'x'"),
    "wrong setting": (lambda s: s["config"].update(lr="high"), "config: lr: expected float"),
    "many layers": (
        lambda s: s["config"].update(layers=10**9),
        "layers: expected the 1 of its ten",
    ),
    "no layers": (
        lambda s: s["config"].update(layers=0),
        "config: layers: expected a number above",
    ),
    "wide": (lambda s: s["config"].update(width=10**7), "wte.weight: expected shape .* by its"),
    "wide, and pretends": (
        lambda s: s["model"].update({"wte.weight": expanded(256, 10**7)}),
        "model.wte.weight: expected a tensor with all its elements",
    ),
    "long context": (lambda s: s["config"].update(context=10**9), "wpe.weight: expected shape"),
    "heads": (lambda s: s["config"].update(heads=5), "multiple of n_head, got 32 and 5"),
    "more losses than steps": (
        lambda s: s.update(losses=[1.0] * 9, seconds=[1.0] * 9),
        "losses: expected at most 2",
    ),
    "NaN losses": (lambda s: s.update(losses=[math.nan] * 2), "losses: expected finite numbers"),
    "NaN weights": (
        lambda s: s["model"]["norm.weight"].fill_(math.nan),
        "model.norm.weight: expected finite numbers, 32 are not",
    ),
    "evaluations": (lambda s: s.update(evaluations=[3]), "evaluations: expected numbers for step"),
    "tokenizer": (lambda s: s.update(tokenizer={"name": "bpe"}), "tokenizer: expected bytes, or"),
    "no values": (
        lambda s: s["model"].pop("blocks.0.mlp.up.row_offsets"),
        "blocks.0.mlp.up: expected row_offsets",
    ),
    "pattern": (
        lambda s: s["model"]["blocks.0.mlp.up.col_indices"].fill_(99),
        "blocks.0.mlp.up: col_indices: expected",
    ),
    "int8 values": (
        lambda s: s["model"].update(
            {"blocks.0.mlp.up.values": s["model"]["blocks.0.mlp.up.values"].char()}
        ),
        "blocks.0.mlp.up: values: expected torch.float32, got torch.int8",
    ),
    "another name": (
        lambda s: s["model"].update({"norm.x": s["model"].pop("norm.weight")}),
        "model: Error.s. in loading state_dict for GPT: Missing key.s.",
    ),
    "short moments": (
        set_optimizer("exp_avg", torch.zeros(3)),
        "optimizer: state of parameter 0: exp_avg: expected floats of shape \\[256, 32\\], got",
    ),
    "no moments": (lambda s: optimizer_of(s, 0).pop("exp_avg"), "optimizer: state of parameter 0"),
    "int moments": (
        set_optimizer("exp_avg_sq", torch.zeros(256, 32, dtype=torch.int64)),
        "exp_avg_sq: expected floats",
    ),
    "another parameter": (
        lambda s: s["optimizer"]["state"].update({99: {}}),
        "optimizer: expected .* parameters, got 99",
    ),
    "groups": (lambda s: s["optimizer"]["param_groups"].pop(), "optimizer: expected groups of"),
    "sparsity": (lambda s: s.update(sparsity={"x": 1}), "sparsity"),
    "algorithm": (lambda s: s.update(algorithm={}), "no 'steps'"),
}


@pytest.fixture(scope="module")
def good_state(tmp_path_factory) -> dict:
    folder = tmp_path_factory.mktemp("good")
    config = tiny_config(folder, steps=2, sparsity=0.5)
    train.train(config)
    return load_checkpoint(config.out)


@pytest.mark.parametrize("name", DAMAGED_STATES)
def test_a_damaged_checkpoint_is_one_error_that_names_it(good_state, tmp_path, name):
    """Of the format before, that has no digests."""
    change, message = DAMAGED_STATES[name]
    state = copy.deepcopy(good_state)
    change(state)
    path = tmp_path / CHECKPOINT
    torch.save(state | {"format": FORMATS[0]}, path)

    def use() -> None:
        load_model(path)
        begin(resumed_config({"out": str(tmp_path)}))

    with pytest.raises(ValueError, match=message) as caught:
        use()
    assert str(path) in str(caught.value)


def test_a_checkpoint_of_the_format_before_still_loads(good_state, tmp_path):
    torch.save(good_state | {"format": FORMATS[0]}, tmp_path / CHECKPOINT)
    assert begin(resumed_config({"out": str(tmp_path)})).step == 2
    # Also with settings that did nothing.
    config = good_state["config"] | {"sparsity": 0.0, "algorithm": "set", "optimizer_state": "keep"}
    torch.save(good_state | {"format": FORMATS[0], "config": config}, tmp_path / CHECKPOINT)
    assert resumed_config({"out": str(tmp_path)}).algorithm == "static"


@pytest.mark.parametrize(
    "error", [MemoryError(), PermissionError(13, "no"), RuntimeError("can't allocate memory")]
)
def test_not_every_failure_is_the_files(good_state, tmp_path, monkeypatch, error):
    save_checkpoint(tmp_path / CHECKPOINT, good_state)

    def fail(*args, **kwargs):
        raise error

    monkeypatch.setattr(torch, "load", fail)
    with pytest.raises(PermissionError if isinstance(error, OSError) else MemoryError):
        load_checkpoint(tmp_path)
