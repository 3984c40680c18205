"""save_pretrained and from_pretrained of transformers with SparseLinear layers."""

import copy
import json
import math
import shutil
import sys
import types
from pathlib import Path

import pytest
import torch
from torch import nn

from sparsekern import SparseLinear, Static, densify_, sparsify_, weights
from sparsekern import nn as sparse_nn
from sparsekern.nn import linear
from sparsekern.nn.experts import SparseExperts
from sparsekern.nn.kinds import is_conv1d, is_experts
from sparsekern.nn.stand_ins import SparseConv1D, SparseMultiheadAttention

WHY = ""
try:
    import transformers
    from transformers import AutoModel, AutoModelForCausalLM, BertConfig, LlamaConfig

    import sparsekern.hf
except ImportError as error:
    transformers, WHY = None, str(error)

needs_transformers = pytest.mark.skipif(transformers is None, reason=WHY)
IDS = torch.arange(34).view(2, 17) * 7 % 128
X = "model.layers.1.mlp.up_proj"


def llama(tied: bool = True, dtype: torch.dtype = torch.float32) -> nn.Module:
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=128,
        hidden_size=32,
        intermediate_size=80,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        tie_word_embeddings=tied,
    )
    return AutoModelForCausalLM.from_config(config, dtype=dtype).eval()


def sparse_llama(*args, sparsity: float = 0.75) -> nn.Module:
    return sparsify_(llama(*args), Static(sparsity, init_method="magnitude"))


def load(folder: Path, **kwargs) -> nn.Module:
    return AutoModelForCausalLM.from_pretrained(folder, dtype="auto", **kwargs)


@torch.no_grad()
def same(a: nn.Module, b: nn.Module) -> bool:
    """Kinds, every tensor to the bit, and what they compute."""
    mine, other = a.state_dict(), b.state_dict()
    return (
        [type(m) for m in a.modules()] == [type(m) for m in b.modules()]
        and mine.keys() == other.keys()
        and all(
            torch.equal(t, other[name]) and t.dtype == other[name].dtype for name, t in mine.items()
        )
        and torch.equal(a(IDS).logits, b(IDS).logits)
    )


@pytest.fixture(scope="module")
def saved(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("sparse")
    sparse_llama().save_pretrained(folder)
    return folder


@needs_transformers
@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("shard", ["5GB", "20KB"])
def test_a_model_comes_back_and_is_saved_again(tmp_path, tied, dtype, shard):
    model = sparse_llama(tied, dtype)
    model.save_pretrained(tmp_path / "a", max_shard_size=shard)
    assert (tmp_path / "a/model.safetensors.index.json").exists() == (shard == "20KB")
    loaded, about = load(tmp_path / "a", output_loading_info=True)
    assert same(model, loaded) and not about["missing_keys"] and not about["unexpected_keys"]
    assert (loaded.lm_head.weight is loaded.model.embed_tokens.weight) == tied
    loaded.save_pretrained(tmp_path / "b", max_shard_size=shard)
    assert same(model, load(tmp_path / "b"))
    base = AutoModel.from_pretrained(tmp_path / "a", dtype="auto")
    assert torch.equal(base(IDS)[0], loaded.model(IDS)[0])
    by_hand = weights.set_weights_(llama(tied, dtype), weights.load_weights(tmp_path / "a"))
    assert same(model, by_hand)


@needs_transformers
def test_numbers_that_compare_as_equal_stay_apart(tmp_path):
    model = sparse_llama()
    odd = torch.tensor([math.nan, -0.0, 0.0, math.inf])
    with torch.no_grad():
        model.get_submodule(X).values[:4] = odd
    model.save_pretrained(tmp_path)
    values = load(tmp_path).get_submodule(X).values.detach()
    assert torch.equal(values[:4].view(torch.int32), odd.view(torch.int32))


def _header(folder: Path) -> bytes:
    return (folder / "model.safetensors").read_bytes().partition(b"}}")[0]


@needs_transformers
def test_a_layer_that_was_put_in_by_hand_is_saved(tmp_path):
    model = llama()
    mlp = model.model.layers[0].mlp
    mlp.down_proj = SparseLinear.from_linear(mlp.down_proj, torch.rand(32, 80) < 0.01)  # as CSR
    model.save_pretrained(tmp_path)
    assert b"layers.0.mlp.down_proj.weight_col_indices" in _header(tmp_path)
    assert same(model, load(tmp_path))
    classifier = transformers.BertForSequenceClassification(
        BertConfig(
            vocab_size=32, hidden_size=16, num_hidden_layers=2, num_attention_heads=2, num_labels=3
        )
    )
    sparsify_(classifier.eval(), Static(0.8)).save_pretrained(tmp_path)
    other = transformers.BertForSequenceClassification.from_pretrained(tmp_path)
    assert torch.equal(other(IDS % 32).logits, classifier(IDS % 32).logits)


KINDS = {
    "GPT2": dict(n_embd=16, n_layer=2, n_head=2, n_positions=32),  # Conv1D
    "GptOss": dict(num_local_experts=3, num_experts_per_tok=2, head_dim=8),  # biases, [E, K, N]
    "HrmText": dict(head_dim=8),  # gate and up are one matrix in files of dense models
    "Llama4Text": dict(num_local_experts=3, head_dim=8, interleave_moe_layer_step=1),
    "Mixtral": dict(num_local_experts=3),  # stacked experts, and other names in files
    "Qwen3Moe": dict(num_experts=3, moe_intermediate_size=24, head_dim=8, num_experts_per_tok=2),
}


@needs_transformers
@pytest.mark.parametrize("kind", KINDS)
def test_layers_that_are_no_linear(tmp_path, kind):
    sizes = dict(hidden_size=16, intermediate_size=24, num_hidden_layers=2, num_attention_heads=2)
    sizes = {} if kind == "GPT2" else sizes | {"num_key_value_heads": 1}
    if not hasattr(transformers, f"{kind}Config"):
        pytest.skip(f"this transformers has no {kind}")
    ids = dict(vocab_size=128, bos_token_id=0, eos_token_id=0)
    config = getattr(transformers, f"{kind}Config")(**sizes, **ids, **KINDS[kind])
    dense = AutoModelForCausalLM.from_config(config).eval()
    with torch.no_grad():
        for p in dense.parameters():
            p *= torch.rand_like(p) < 0.5

    def replace(name: str, module: nn.Module):
        if type(module) is nn.Linear and "head" not in name:
            return SparseLinear.from_linear(module)
        kind = SparseConv1D if is_conv1d(module) else SparseExperts if is_experts(module) else None
        return kind and kind.from_dense(module)

    model = sparse_nn.replace_modules(copy.deepcopy(dense), replace)
    model.save_pretrained(tmp_path / "a")
    loaded, about = load(tmp_path / "a", output_loading_info=True)
    assert same(model, loaded) and not about["missing_keys"] and not about["unexpected_keys"]
    loaded.save_pretrained(tmp_path / "b")
    assert same(model, load(tmp_path / "b"))
    densify_(loaded).save_pretrained(tmp_path / "c")
    assert same(dense, load(tmp_path / "c"))
    if kind == "Mixtral":
        third = "layers.0.block_sparse_moe.experts.sparse_gate_up_proj.2.weight"
        folder = broken(tmp_path / "a", tmp_path / "d", lambda state: _drop(state, third))
        lacks = "layers.0.mlp.experts: expected .* the file lacks sparse_gate_up_proj.2"
        with pytest.raises(ValueError, match=lacks) as caught:
            load(folder)
        assert str(folder / "model.safetensors") in str(caught.value)


@needs_transformers
def test_attention_of_torch(tmp_path):
    """Whose module is initialized by what it is held by."""
    config = transformers.SiglipVisionConfig(
        hidden_size=16,
        intermediate_size=24,
        num_hidden_layers=1,
        num_attention_heads=2,
        image_size=16,
        patch_size=8,
    )
    model = transformers.SiglipVisionModel(config).eval()
    model.head.attention = SparseMultiheadAttention.from_dense(model.head.attention)
    model.save_pretrained(tmp_path)
    other = transformers.SiglipVisionModel.from_pretrained(tmp_path).eval()
    x = torch.randn(2, 3, 16, 16)
    assert torch.equal(model(x).pooler_output, other(x).pooler_output)


@needs_transformers
@pytest.mark.parametrize("how", ["densify_", "dequantize"])
def test_a_model_made_dense_is_saved_as_any_other(saved, tmp_path, how):
    model = load(saved)
    model = densify_(model) if how == "densify_" else model.dequantize()
    model.save_pretrained(tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    assert "quantization_config" not in config and same(model, load(tmp_path))
    assert sum(isinstance(m, SparseLinear) for m in model.modules()) == 0
    mlp = model.model.layers[0].mlp
    mlp.up_proj = SparseLinear.from_linear(mlp.up_proj)
    model.save_pretrained(tmp_path)
    assert same(model, load(tmp_path))


@needs_transformers
def test_dtypes_devices_and_copies(saved, tmp_path):
    model = load(saved)
    assert {p.dtype for p in load(saved).half().parameters()} == {torch.float16}
    asked = AutoModelForCausalLM.from_pretrained(saved, dtype=torch.bfloat16)
    assert {p.dtype for p in asked.parameters()} == {torch.bfloat16}
    assert all(p.requires_grad for p in model.parameters())
    copy.deepcopy(model).save_pretrained(tmp_path)
    assert same(model, load(tmp_path))
    with torch.inference_mode():
        assert not load(saved).get_submodule(X).values.is_inference()


@needs_transformers
def test_a_run_is_resumed_from_the_tensors_of_the_file(saved):
    """Trainer loads them with load_state_dict, without the plug-in."""
    from safetensors.torch import load_file

    model = sparse_llama(sparsity=0.5)
    found = model.load_state_dict(load_file(saved / "model.safetensors"), strict=False)
    assert found.missing_keys == ["lm_head.weight"] and not found.unexpected_keys
    assert same(model, load(saved))


@needs_transformers
@pytest.mark.gpu
def test_a_model_on_a_gpu(saved, tmp_path):
    model = load(saved, device_map="cuda")
    assert all(t.is_cuda for t in model.get_submodule(X).state_dict().values())
    model.save_pretrained(tmp_path)
    assert same(load(saved), load(tmp_path))


@needs_transformers
def test_a_state_dict_that_is_given_is_what_is_saved(saved, tmp_path):
    """As Trainer hands on what it has gathered from several processes."""
    model, other = load(saved), load(saved)
    with torch.no_grad():
        for p in other.parameters():
            p.add_(1)
    model.save_pretrained(tmp_path / "a", state_dict=other.state_dict())
    assert same(load(tmp_path / "a"), other)
    model.save_pretrained(tmp_path / "b")
    assert same(load(tmp_path / "b"), model)
    state = dict(other.state_dict())
    state[f"{X}.values"] = state[f"{X}.values"][:0]  # a shard, say
    with pytest.raises(ValueError, match=f"{X}.weight: values: expected 640 elements, got 0"):
        model.save_pretrained(tmp_path / "c", state_dict=state)
    del state[f"{X}.values"]
    with pytest.raises(ValueError, match=f"state_dict: it lacks {X}.values"):
        model.save_pretrained(tmp_path / "c", state_dict=state)


def broken(saved: Path, folder: Path, change) -> Path:
    from safetensors.torch import load_file, save_file

    shutil.copytree(saved, folder, dirs_exist_ok=True)
    state = load_file(folder / "model.safetensors")
    change(state)
    save_file(state, folder / "model.safetensors", {"format": "pt"})
    return folder


def _drop(state: dict, part: str) -> None:
    for name in [name for name in state if part in name]:
        del state[name]


DAMAGED = {
    "no values": (lambda s: s.pop(f"{X}.weight"), "expected weight, weight_shape, weight_bitmask"),
    "no bits": (lambda s: s.pop(f"{X}.weight_bitmask"), "expected weight, weight_shape, weight_bi"),
    "no shape": (lambda s: s.pop(f"{X}.weight_shape"), "expected weight, weight_shape, weight_bi"),
    "dense": (lambda s: s.update({f"{X}.weight": torch.ones(80, 32)}), "expected weight, weight_s"),
    "shape": (
        lambda s: s.update({f"{X}.weight_shape": torch.tensor([80, 31])}),
        r"expected a weight \[80, 32\], got \[80, 31\]",
    ),
    "norm": (
        lambda s: s.update({"model.norm.weight_shape": torch.tensor([80, 31])}),
        "model.norm: the model has a LlamaRMSNorm there, which takes no such weight",
    ),
    "no such layer": (
        lambda s: s.update({"model.norm.sparse.weight_shape": torch.tensor([80, 31])}),
        "model.norm.sparse: the model has a LlamaRMSNorm there",
    ),
}


@needs_transformers
@pytest.mark.parametrize("name", DAMAGED)
def test_a_file_that_lacks_a_part_is_named(saved, tmp_path, name):
    change, message = DAMAGED[name]
    with pytest.raises(ValueError, match=message) as caught:
        load(broken(saved, tmp_path, change))
    assert str(tmp_path / "model.safetensors") in str(caught.value)


@needs_transformers
@pytest.mark.parametrize(
    "change",
    [
        lambda s: s[f"{X}.weight_bitmask"].view(-1)[:1].bitwise_xor_(1),
        lambda s: s.update({f"{X}.weight": torch.ones(7)}),
    ],
)
def test_damaged_parts_are_an_error_of_transformers_with_ours_in_its_report(
    saved, tmp_path, change, caplog
):
    folder = broken(saved, tmp_path, change)
    transformers.logging.get_logger().addHandler(caplog.handler)
    try:
        with pytest.raises(RuntimeError, match="conversion of the weights"):
            load(folder)
    finally:
        transformers.logging.get_logger().removeHandler(caplog.handler)
    assert f"{X}.weight: expected" in caplog.text and "values, as many as bits" in caplog.text


@needs_transformers
def test_other_refusals(saved, tmp_path):
    path = tmp_path / "model.safetensors"
    shutil.copytree(saved, tmp_path, dirs_exist_ok=True)
    path.write_bytes(path.read_bytes()[:-7])
    with pytest.raises(ValueError, match=f"{path} is truncated or not safetensors"):
        load(tmp_path)
    config = json.loads((saved / "config.json").read_text())
    assert config["quantization_config"] == {"quant_method": "sparsekern", "format_version": 2}
    config["quantization_config"]["format_version"] = 3
    (tmp_path / "config.json").write_text(json.dumps(config))
    with pytest.raises(ValueError, match="format_version: this sparsekern reads 2, got 3"):
        load(tmp_path)
    llama().save_pretrained(tmp_path)
    with pytest.raises(ValueError, match="a SparseConfig belongs to a model that was saved sparse"):
        load(tmp_path, quantization_config=sparsekern.hf.SparseConfig())
    model = sparse_llama()
    model.hf_quantizer = object()
    with pytest.raises(ValueError, match="was quantized by object, whose files hold none"):
        model.save_pretrained(tmp_path / "x")
    model = sparse_llama()
    mlp = model.model.layers[0].mlp
    mlp.up_proj = nn.ModuleDict({"base_layer": mlp.up_proj})
    model.save_pretrained(tmp_path / "own")  # a name that anybody may use
    mlp.up_proj.adapter_layer_names = ()
    with pytest.raises(ValueError, match="mlp.up_proj.base_layer is under an adapter of peft"):
        model.save_pretrained(tmp_path / "x")
    assert not (tmp_path / "x").exists()


@needs_transformers
def test_a_layer_in_two_places_comes_back_in_both(tmp_path):
    """Of a model that ties the weights by name, since its modules are one."""

    class Model(transformers.PreTrainedModel):
        config_class = transformers.PreTrainedConfig
        _tied_weights_keys = {"head.weight": "first.weight", "head.bias": "first.bias"}

        def __init__(self, config):
            super().__init__(config)
            self.first = self.head = nn.Linear(16, 16)
            self.post_init()

        def forward(self, x):
            return self.head(self.first(x))

    model = sparsify_(Model(transformers.PreTrainedConfig()), Static(0.5), lambda m, name: True)
    model.save_pretrained(tmp_path)
    loaded, about = Model.from_pretrained(tmp_path, output_loading_info=True)
    assert loaded.first is loaded.head and not about["missing_keys"] | about["unexpected_keys"]
    x = torch.randn(3, 16)
    assert torch.equal(loaded(x), model(x))


@needs_transformers
@pytest.mark.parametrize(
    ("dtype", "is_told"), [("float16", True), ("bfloat16", False), ("float32", False)]
)
def test_layers_that_a_dense_model_keeps_in_float32_are_told(tmp_path, dtype, is_told, recwarn):
    sizes = dict(vocab_size=32, d_model=16, d_kv=8, d_ff=32, num_layers=1, num_heads=2)
    model = transformers.T5EncoderModel(transformers.T5Config(**sizes))
    sparsify_(model, Static(0.5)).save_pretrained(tmp_path)
    loaded = transformers.T5EncoderModel.from_pretrained(tmp_path, dtype=dtype)
    told = [str(w.message) for w in recwarn if "keeps float32" in str(w.message)]
    assert len(told) == is_told and all("DenseReluDense.wo hold torch.float16" in x for x in told)
    assert loaded(torch.arange(8)[None]).last_hidden_state.isfinite().all()


@needs_transformers
def test_models_that_share_a_config(saved, tmp_path):
    """Each file says of itself whether it is sparse."""
    sparse, dense = sparse_llama(), llama()
    dense.config = sparse.config
    for model in (sparse, dense, sparse):
        model.save_pretrained(tmp_path)
        config = json.loads((tmp_path / "config.json").read_text())
        assert ("quantization_config" in config) == (model is sparse)
        assert same(load(tmp_path), model)
    assert same(load(saved, config=sparse.config), sparse)
    assert same(load(saved, config=load(saved).config), sparse)
    fresh = AutoModelForCausalLM.from_config(transformers.AutoConfig.from_pretrained(saved)).eval()
    fresh.save_pretrained(tmp_path)
    assert "quantization_config" not in json.loads((tmp_path / "config.json").read_text())
    with pytest.raises(ValueError, match="state_dict: expected the files of a sparse model"):
        type(sparse).from_pretrained(None, config=sparse.config, state_dict=sparse.state_dict())


@needs_transformers
def test_a_sparse_head_is_not_tied(tmp_path):
    model = llama(tied=True)
    model.lm_head = SparseLinear.from_linear(
        model.lm_head, torch.arange(128 * 32).view(128, -1) % 3 > 0
    )
    with pytest.raises(ValueError, match="lm_head is sparse, and config.tie_word_embeddings would"):
        model.save_pretrained(tmp_path)
    assert not list(tmp_path.iterdir())
    model.config.tie_word_embeddings = False
    model.save_pretrained(tmp_path)
    assert same(load(tmp_path), model)
    with pytest.raises(ValueError, match="from_pretrained: lm_head is sparse, and config.tie_word"):
        load(tmp_path, tie_word_embeddings=True)


# Without transformers, or with an old one: a stand-in


class Old(nn.Sequential):
    """A model of a transformers that has no such plug-ins."""

    saved = 0

    def save_pretrained(self, folder):
        self.saved += 1


@pytest.fixture
def old_transformers(monkeypatch):
    for name in [n for n in sys.modules if n.split(".")[0] == "transformers"]:
        monkeypatch.delitem(sys.modules, name)
    for name in ("sparsekern.hf", "sparsekern.hf.quantizer"):
        monkeypatch.delitem(sys.modules, name, raising=False)
    package = types.ModuleType("transformers")
    package.modeling_utils = types.ModuleType("transformers.modeling_utils")
    kind = type("PreTrainedModel", (Old,), {"save_pretrained": Old.save_pretrained})
    package.PreTrainedModel = package.modeling_utils.PreTrainedModel = kind
    monkeypatch.setitem(sys.modules, "transformers", package)
    monkeypatch.setitem(sys.modules, "transformers.modeling_utils", package.modeling_utils)
    monkeypatch.setattr(linear, "plug_ins", [sparse_plug_in()])
    return kind


def sparse_plug_in():
    from sparsekern import public

    return public._meet_transformers


def test_a_transformers_without_plug_ins_saves_no_sparse_layer(old_transformers):
    """The first SparseLinear puts the guard in."""
    model = old_transformers(nn.Linear(4, 3))
    model.save_pretrained("x")
    model[0] = SparseLinear.from_linear(model[0])
    assert not linear.plug_ins
    with pytest.raises(ImportError, match=r"needs transformers 5.10 or later: .*densify_\(model\)"):
        model.save_pretrained("x")
    densify_(model).save_pretrained("x")
    assert model.saved == 2


def test_a_packed_model_is_not_saved(old_transformers, monkeypatch):
    model = old_transformers(nn.Linear(4, 3))
    SparseLinear.from_linear(model[0])
    packed = sparse_nn.PackedLinear.__new__(sparse_nn.PackedLinear)
    nn.Module.__init__(packed)
    model.append(packed)
    with pytest.raises(ValueError, match="save_pretrained: 1 is packed for inference"):
        model.save_pretrained("x")
    assert model.saved == 0


def test_programs_without_transformers_do_not_meet_it(monkeypatch):
    for name in [n for n in sys.modules if n.split(".")[0] == "transformers"]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setattr(linear, "plug_ins", [sparse_plug_in()])
    SparseLinear.from_linear(nn.Linear(4, 3))
    assert len(linear.plug_ins) == 1 and "transformers" not in sys.modules
