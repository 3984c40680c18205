"""Models from files: the config.json of Hugging Face models, and shapes with unlike matrices."""

import json
from dataclasses import replace

import pytest

from sparsekern.cli import main
from sparsekern.wafer import GPT_SHAPES, GPTShape, gpt_shape, machine, model_shape, step_cost

GPT2 = {"model_type": "gpt2", "n_layer": 12, "n_embd": 768, "n_head": 12, "vocab_size": 50257}
GPT2 |= {"n_positions": 1024, "n_inner": None}
LLAMA = {"model_type": "llama", "num_hidden_layers": 32, "hidden_size": 4096}
LLAMA |= {"num_attention_heads": 32, "num_key_value_heads": 8, "intermediate_size": 14336}
LLAMA |= {"vocab_size": 128256, "max_position_embeddings": 8192, "tie_word_embeddings": False}
MIXTRAL = LLAMA | {"model_type": "mixtral", "num_local_experts": 8, "num_experts_per_tok": 2}


@pytest.fixture
def config(tmp_path):
    def write(given: object) -> str:
        folder = tmp_path / "a-model"
        folder.mkdir(exist_ok=True)
        (folder / "config.json").write_text(given if isinstance(given, str) else json.dumps(given))
        return str(folder / "config.json")

    return write


def test_a_gpt2_is_its_shape(config):
    found = model_shape(config(GPT2))
    assert found.matrices == GPT_SHAPES["gpt2-small"].matrices
    assert (found.name, found.sequence, found.is_tied) == ("a-model", 1024, True)
    # 124M: the published count is this and biases and norms.
    assert found.parameters() == pytest.approx(124.4e6, rel=0.002)


def test_a_llama_has_grouped_queries_and_a_gated_mlp(config):
    found = model_shape(config(LLAMA))
    assert replace(found, name="llama3-8b") == gpt_shape("llama3-8b")
    assert found.matrices == {
        "q": (4096, 4096),
        "k": (1024, 4096),
        "v": (1024, 4096),
        "proj": (4096, 4096),
        "gate": (14336, 4096),
        "up": (14336, 4096),
        "down": (4096, 14336),
    }
    assert found.parameters() == pytest.approx(8.03e9, rel=0.001)
    tied = model_shape(config(LLAMA | {"tie_word_embeddings": True}))
    assert found.parameters() - tied.parameters() == 128256 * 4096


def test_experts_hold_all_weights_and_do_their_share_of_the_work(config):
    found = model_shape(config(MIXTRAL))
    mlp = 3 * 14336 * 4096
    attention = 2 * 4096 * 4096 + 2 * 1024 * 4096
    assert found.linear_weights == 32 * (attention + 8 * mlp)
    assert found.linear_fma == 32 * (attention + 2 * mlp)
    wafer = machine("wse2")
    dense, sparse = (step_cost(wafer, found, d, 16) for d in (1.0, 0.25))
    assert dense.forward.io_in_s > 2 * 32 * 8 * mlp / wafer["io_bytes_per_s"]
    up = next(layer for layer in dense.layers if layer.matrix == "up")
    assert up.layers == 32 * 8
    assert dense.flop / sparse.flop == pytest.approx(found.flop_ratio(0.25))


def test_a_head_size_may_be_its_own(config):
    found = model_shape(config(LLAMA | {"model_type": "qwen3", "head_dim": 256}))
    assert found.matrices["q"] == (8192, 4096) and found.matrices["proj"] == (4096, 8192)
    assert found.matrices["k"] == (2048, 4096)


def test_a_folder_and_a_length(config):
    path = config(GPT2)
    assert model_shape(path.removesuffix("/config.json")) == model_shape(path)
    assert model_shape(path, 64).sequence == 64 == model_shape("gpt3-xl", 64).sequence


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ("{", r"config.json is not JSON"),
        ("[1]", "config.json: expected an object, got list"),
        (LLAMA | {"model_type": "unheard"}, "model_type: expected one of gemma, .*'unheard'"),
        (LLAMA | {"hidden_size": None}, "hidden_size or n_embd: expected a number, got None"),
        (LLAMA | {"hidden_size": -1}, "hidden_size: expected a whole number above 0, got -1"),
        (LLAMA | {"model_type": ["llama"]}, r"model_type: expected one of .*\['llama'\]"),
        (LLAMA | {"num_key_value_heads": 5}, "config.json: kv_heads: expected a divisor of the 32"),
        (
            LLAMA | {"num_attention_heads": 33},
            "config.json: heads: expected a divisor of the width",
        ),
        (LLAMA | {"tie_word_embeddings": "no"}, "embeddings: expected true or false, got 'no'"),
        (LLAMA | {"word_embed_proj_dim": 512}, "word_embed_proj_dim: expected the hidden_size"),
        (LLAMA | {"kv_lora_rank": 512}, "kv_lora_rank: expected none"),
        (MIXTRAL | {"num_experts_per_tok": 9}, "expected at most the 8 experts, got 9"),
        (MIXTRAL | {"decoder_sparse_step": 2}, "decoder_sparse_step: expected 1"),
    ],
)
def test_a_wrong_config_names_its_key(config, given, message):
    with pytest.raises(ValueError, match=message):
        model_shape(config(given))


def test_models_that_are_none(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"none.json does not exist"):
        model_shape(tmp_path / "none.json")
    with pytest.raises(FileNotFoundError, match=r"config.json does not exist"):
        model_shape(tmp_path)
    with pytest.raises(ValueError, match="model: expected one of gpt2-small, .* config.json"):
        model_shape("gpt9")


def test_predict_takes_a_config_and_flags(capsys, config):
    path = config(MIXTRAL)
    assert main(["wafer", "predict", f"--model={path}", "--sequence=2048", "--batch=8"]) == 0
    assert "a-model, changed on 1 x wse2" in capsys.readouterr().out
    flags = ("--heads=16", "--kv-heads=4", "--gated", "--experts=4", "--experts-per-token=2")
    assert main(["wafer", "predict", *flags, "--details", "--batch=8"]) == 0
    out = capsys.readouterr().out
    assert "| gate " in out and "|     96 |" in out  # 24 layers of 4 experts


def test_wrong_shapes_name_their_field():
    shape = gpt_shape("gpt3-xl")
    for changed, message in (
        ({"kv_heads": 3}, "kv_heads: expected a divisor of the 16 heads, got 3"),
        ({"experts": 0}, "experts: expected at least 1, got 0"),
        ({"heads": 15}, "heads: expected a divisor of the width of 2048, got 15"),
        ({"sequence": 1.5}, "sequence: expected a whole number, got 1.5"),
        ({"head_size": -1}, "head_size: expected at least 0, got -1"),
    ):
        with pytest.raises(ValueError, match=message):
            replace(shape, **changed)
    assert isinstance(shape, GPTShape)
