"""Pruning of a transformers model from its folder: the function and the command."""

import json

import pytest
import torch

from sparsekern import cli
from sparsekern.commands.prune import is_pretrained
from sparsekern.models.prune import TABLE, prune_pretrained, read_texts


def test_texts_of_a_file(tmp_path):
    path = tmp_path / "texts.txt"
    path.write_text("one\ntwo\n")
    assert read_texts(path) == ["one", "two"]
    path.write_text("\none\ntwo\n\n\nthree\n")
    assert read_texts(path) == ["one\ntwo", "three"]
    path.write_text(" \n\n")
    with pytest.raises(ValueError, match="calibration: expected text, .*texts.txt has none"):
        read_texts(path)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"method": "best"}, "method: expected one of magnitude, wanda, sparsegpt, got 'best'"),
        ({"sparsity": 50}, "sparsity: expected a number above 0 and below 1, got 50"),
        ({"dtype": "int8"}, "dtype: expected one of float32, bfloat16, float16, got 'int8'"),
        ({"method": "wanda"}, "calibration: wanda expected texts, or a file of them, got None"),
        ({"calibration": ["a"]}, r"calibration: magnitude expected none, got \['a'\]"),
    ],
)
def test_wrong_settings(tmp_path, settings, message):
    given = {"source": tmp_path, "out": tmp_path / "out", "sparsity": 0.5} | settings
    with pytest.raises(ValueError, match=message):
        prune_pretrained(**given)


def test_a_folder_with_something_in_it_is_not_written_to(tmp_path):
    (tmp_path / "file").touch()
    with pytest.raises(ValueError, match="out: expected a new or an empty folder"):
        prune_pretrained(tmp_path, tmp_path, 0.5)


def test_the_command_sees_what_it_is_given(tmp_path, capsys):
    assert not is_pretrained(str(tmp_path)) and not is_pretrained("")
    (tmp_path / "config.json").write_text("{}")
    assert is_pretrained(str(tmp_path))
    source = ["prune", "--source", str(tmp_path)]
    assert cli.main([*source, "--rounds", "2"]) == 2
    assert "rounds: for runs of `sparsekern train`" in capsys.readouterr().err
    assert cli.main([*source, "--algorithm", "wanda", "--calibration", "4"]) == 2
    assert "calibration: a model expected a file of texts, got 4" in capsys.readouterr().err
    (tmp_path / "checkpoint.pt").touch()
    assert not is_pretrained(str(tmp_path))
    assert cli.main([*source, "--calibration", "file.txt"]) == 2
    assert "a training run expected a number of batches" in capsys.readouterr().err


@pytest.fixture
def folder(tmp_path):
    """A small Llama with a tokenizer of single words."""
    transformers = pytest.importorskip("transformers", reason="transformers is not installed")
    tokenizers = pytest.importorskip("tokenizers", reason="tokenizers is not installed")
    words = {word: i for i, word in enumerate(["<unk>", "one", "two", "three", "four"])}
    tokenizer = tokenizers.Tokenizer(tokenizers.models.WordLevel(words, unk_token="<unk>"))
    tokenizer.pre_tokenizer = tokenizers.pre_tokenizers.Whitespace()
    transformers.PreTrainedTokenizerFast(tokenizer_object=tokenizer).save_pretrained(tmp_path / "m")
    torch.manual_seed(0)
    sizes = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2}
    config = transformers.LlamaConfig(vocab_size=8, num_attention_heads=4, **sizes)
    transformers.LlamaForCausalLM(config).save_pretrained(tmp_path / "m")
    (tmp_path / "m" / "1_Pooling").mkdir()
    (tmp_path / "m" / "1_Pooling" / "config.json").write_text("{}")
    return tmp_path / "m"


@pytest.mark.parametrize("method", ["magnitude", "sparsegpt"])
def test_pruned_and_saved(folder, tmp_path, method, capsys):
    from transformers import AutoModelForCausalLM, AutoTokenizer

    out = tmp_path / "pruned"
    command = ["prune", "--source", str(folder), "--sparsity", "0.75", "--out", str(out)]
    command += ["--algorithm", method, "--family", "two-way"]
    if method != "magnitude":
        texts = tmp_path / "texts.txt"
        texts.write_text("one two three\nfour two one one\nthree\n" * 4)
        command += ["--calibration", str(texts)]
    assert cli.main(command) == 0
    assert "14 layers, 75.0% zeros" in capsys.readouterr().out
    model = AutoModelForCausalLM.from_pretrained(out)
    weight = model.model.layers[1].mlp.up_proj.weight
    assert (weight == 0).sum() == 0.75 * weight.numel()
    assert AutoTokenizer.from_pretrained(out)("one two").input_ids == [1, 2]
    assert (out / "1_Pooling" / "config.json").exists()
    about = json.loads((out / TABLE).read_text())
    assert about["method"] == method and len(about["layers"]) == 14


def test_a_failure_writes_nothing(folder, tmp_path, monkeypatch):
    from sparsekern.models import prune

    def failing(path, made):
        raise OSError("no space left")

    monkeypatch.setattr(prune, "_copy_beside", failing)
    with pytest.raises(OSError, match="no space"):
        prune_pretrained(folder, tmp_path / "new" / "out", 0.5)
    assert not any((tmp_path / "new").iterdir())


def test_the_conv1d_of_gpt2(tmp_path):
    transformers = pytest.importorskip("transformers", reason="transformers is not installed")
    torch.manual_seed(0)
    config = transformers.GPT2Config(vocab_size=16, n_embd=16, n_layer=2, n_head=2, n_positions=8)
    transformers.GPT2LMHeadModel(config).save_pretrained(tmp_path / "m")
    report = prune_pretrained(tmp_path / "m", tmp_path / "out", 0.75)
    dense, pruned = (
        transformers.GPT2LMHeadModel.from_pretrained(tmp_path / n) for n in ("m", "out")
    )
    assert len(report.layers) == 8 and "Embedding" in report.notes[0]
    for was, now in zip(dense.transformer.h, pruned.transformer.h, strict=True):
        for a, b in ((was.attn.c_attn, now.attn.c_attn), (was.mlp.c_fc, now.mlp.c_fc)):
            kept = a.weight.abs() >= a.weight.abs().flatten().topk(a.weight.numel() // 4).values[-1]
            assert type(b).__name__ == "Conv1D" and torch.equal(b.weight, a.weight * kept)
