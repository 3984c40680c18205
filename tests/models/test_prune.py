"""Pruning of a transformers model from its folder: the function and the command."""

import json
import os
import subprocess
import sys

import pytest
import torch
import torch.nn.utils.prune

from sparsekern import cli
from sparsekern.commands.prune import is_pretrained
from sparsekern.models.prune import TABLE, prune_, prune_pretrained, read_texts
from sparsekern.sparsity import Magnitude, SparseGPT, Static, Wanda


def test_texts_of_a_file(tmp_path):
    path = tmp_path / "texts.txt"
    path.write_text("one\ntwo\n")
    assert read_texts(path) == ["one", "two"]
    path.write_text("\none\ntwo\n\n\nthree\n")
    assert read_texts(path) == ["one\ntwo", "three"]
    path.write_text(" \n\n")
    with pytest.raises(ValueError, match="calibration: expected text, .*texts.txt has none"):
        read_texts(path)
    path.write_bytes(b"caf\xe9")
    for wrong in (path, tmp_path, tmp_path / "missing"):
        with pytest.raises(ValueError, match=f"file of texts in UTF-8, got {wrong} "):
            read_texts(wrong)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"method": "best"}, "method: expected one of magnitude, wanda, sparsegpt, got 'best'"),
        ({"sparsity": 50}, "sparsity: expected a number in .*, got 50; 50 percent is 0.5"),
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


def test_what_cannot_be_written_is_said_before_any_work(tmp_path):
    (tmp_path / "file").touch()
    for place in ("file", "file/deeper"):
        with pytest.raises(ValueError, match="out: expected a .*folder"):
            prune_pretrained(tmp_path / "missing", tmp_path / place, 0.5)


def test_the_command_sees_what_it_is_given(tmp_path, capsys):
    assert not is_pretrained(str(tmp_path)) and not is_pretrained("")
    assert cli.main(["prune", "--source", str(tmp_path)]) == 2
    assert "or a model of transformers (config.json)" in capsys.readouterr().err
    (tmp_path / "config.json").write_text("{}")
    assert is_pretrained(str(tmp_path))
    source = ["prune", "--source", str(tmp_path)]
    assert cli.main([*source, "--rounds", "2"]) == 2
    assert "rounds: for runs of `sparsekern train`" in capsys.readouterr().err
    assert cli.main([*source, "--algorithm", "wanda", "--calibration", "4"]) == 2
    assert "calibration: a model expected a file of texts, got 4" in capsys.readouterr().err
    assert cli.main(source) == 2
    assert "is a model of transformers, which expected one, as" in capsys.readouterr().err
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
    (tmp_path / "m" / "2_Dense").mkdir()
    (tmp_path / "m" / "2_Dense" / "model.safetensors").write_bytes(b"weights")
    modules = [{"path": path} for path in ("", "1_Pooling", "2_Dense")]
    (tmp_path / "m" / "modules.json").write_text(json.dumps(modules))
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
    assert (out / "2_Dense" / "model.safetensors").read_bytes() == b"weights"
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


def test_a_source_with_an_adapter_is_refused(folder, tmp_path):
    peft = pytest.importorskip("peft", reason="peft is not installed")
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(folder)
    peft.get_peft_model(model, peft.LoraConfig(target_modules=["q_proj"])).save_pretrained(folder)
    with pytest.raises(ValueError, match=f"source: {folder} has an adapter of peft"):
        prune_pretrained(folder, tmp_path / "out", 0.5)


@pytest.mark.parametrize("size", [None, 0, 5000])
def test_a_source_whose_weights_are_missing_or_damaged_is_named(folder, tmp_path, size):
    weights = folder / "model.safetensors"
    weights.unlink() if size is None else os.truncate(weights, size)
    with pytest.raises(ValueError, match=f"^source: cannot read the weights of {folder} "):
        prune_pretrained(folder, tmp_path / "out", 0.5)
    assert not (tmp_path / "out").exists()


def test_weights_that_its_file_lacks_are_not_pruned(folder, tmp_path):
    from safetensors.torch import load_file, save_file

    weights = load_file(folder / "model.safetensors")
    del weights["model.layers.1.mlp.up_proj.weight"]
    save_file(weights, folder / "model.safetensors", {"format": "pt"})
    with pytest.raises(ValueError, match="lacks 1 weights, .* model.layers.1.mlp.up_proj.weight"):
        prune_pretrained(folder, tmp_path / "out", 0.5)


def test_a_class_that_transformers_lacks_loses_no_head(folder, tmp_path):
    config = (folder / "config.json").read_text()
    (folder / "config.json").write_text(config.replace("LlamaFor", "LLaMAFor"))
    with pytest.raises(ValueError, match="got LLaMAForCausalLM; LlamaModel, .* for lm_head.weight"):
        prune_pretrained(folder, tmp_path / "out", 0.5)


def test_a_sparse_folder_becomes_dense_with_zeros(folder, tmp_path):
    from safetensors.torch import load_file
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(folder)
    Magnitude(0.5).apply(model).save_pretrained(tmp_path / "sparse")
    (tmp_path / "sparse" / "modules.json").write_text('{"of": "another tool"}')
    with pytest.raises(ValueError, match="50% of the weights are zero already"):
        prune_pretrained(tmp_path / "sparse", tmp_path / "out", 0.75)
    report = prune_pretrained(tmp_path / "sparse", tmp_path / "out", 0.75, prune_again=True)
    saved = load_file(tmp_path / "out" / "model.safetensors")
    assert saved.keys() == load_file(folder / "model.safetensors").keys()
    weight = saved["model.layers.0.mlp.up_proj.weight"]
    assert report.sparsity == 0.75 == (weight == 0).float().mean()
    assert "quantization_config" not in (tmp_path / "out" / "config.json").read_text()
    assert (tmp_path / "out" / "modules.json").exists()


def test_the_command_reads_a_sparse_folder_by_itself(folder, tmp_path):
    """In a new process: in this one sparsekern.hf may be there already."""
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(folder)
    Magnitude(0.5).apply(model).save_pretrained(tmp_path / "sparse")
    command = f"prune --source {tmp_path}/sparse --sparsity 0.75 --out {tmp_path}/out --prune-again"
    done = subprocess.run(
        [sys.executable, "-m", "sparsekern", *command.split()], capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    assert "14 layers, 75.0% zeros" in done.stdout


@pytest.mark.parametrize(
    "source", ["./nope", "../nope", "/nope", "runs/nope", "runs/of/nope", "nope/"]
)
def test_a_path_to_nothing_is_looked_for_nowhere_else(source, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "runs").mkdir()
    assert cli.main(["prune", "--source", source, "--sparsity", "0.5"]) == 2
    assert f"source: {source} does not exist" in capsys.readouterr().err
    with pytest.raises(FileNotFoundError, match="source: .*nope/? does not exist"):
        prune_pretrained(source, tmp_path / "out", 0.5)


@pytest.mark.parametrize("source", ["gpt2", "owner/a.name-1"])
def test_before_a_name_is_asked_for_it_is_said_that_no_folder_has_it(source, monkeypatch, capsys):
    pytest.importorskip("transformers", reason="transformers is not installed")

    def asked(**given):
        raise ValueError(f"asked for {given['source']}")

    monkeypatch.setattr("sparsekern.commands.prune.prune_pretrained", asked)
    assert cli.main(["prune", "--source", source, "--sparsity", "0.5"]) == 2
    told, error = capsys.readouterr().err.splitlines()
    assert told.startswith(f"source: {source} is no file here")
    assert error.endswith(f"asked for {source}")


@pytest.mark.parametrize("flag", [[], ["--sparsity=0.5", "--steps=5"]])
def test_a_misspelt_run_is_not_called_a_model(flag, monkeypatch, tmp_path, capsys):
    pytest.importorskip("transformers", reason="transformers is not installed")
    monkeypatch.chdir(tmp_path)
    assert cli.main(["prune", "--source=rnus/sparse", *flag]) == 2
    assert "rnus/sparse is no folder here, so it is taken for the name" in capsys.readouterr().err


@pytest.mark.parametrize("uneven", ["columns", "rows"])
@pytest.mark.parametrize("make", [Magnitude, Wanda, SparseGPT])
@pytest.mark.parametrize("is_sparse", [False, True])
def test_zeros_of_a_pruned_model_stay_and_count(make, uneven, is_sparse):
    torch.manual_seed(0)
    model = torch.nn.Sequential(torch.nn.Linear(160, 16))
    weight = model[0].weight.data
    likely = torch.linspace(0, 1, 160) if uneven == "columns" else torch.linspace(0, 1, 16)[:, None]
    weight *= torch.rand_like(weight) >= likely
    was_zero = weight == 0
    if is_sparse:
        Static(0.5, init_method="from_zeros").apply(model)
    calibration = {} if make is Magnitude else {"calibration": [torch.randn(320, 160)]}
    make(0.7, **calibration).apply(model, prune_again=True)
    layer = model[0]
    assert layer.weight.sparsity == pytest.approx(0.7, abs=1e-3)
    assert not (layer.weight.to_dense() != 0)[was_zero].any()
    assert (layer.values != 0).all()


def test_the_report_counts_the_zeros_that_were_there():
    model = torch.nn.Sequential(torch.nn.Linear(8, 8))
    prune_(model, Magnitude(0.5))
    assert prune_(model, Magnitude(0.25), prune_again=True).sparsity == 0.5


def test_the_algorithm_keeps_no_layers_that_are_in_no_model():
    model, algorithm = torch.nn.Sequential(torch.nn.Linear(8, 8)), Magnitude(0.5)
    prune_(model, algorithm)
    with pytest.raises(ValueError, match="expected the model before the optimizer"):
        algorithm.apply(torch.optim.SGD(model.parameters(), 0.1))


CALLS = (lambda m: prune_(m, Magnitude(0.75)), Wanda(0.75, calibration=[torch.ones(2, 8)]).apply)


@pytest.mark.parametrize("prune", CALLS)
def test_weights_that_are_made_anew_are_refused(prune):
    """By each forward pass, from what was never pruned: those there are of the last one."""
    model = torch.nn.Sequential(torch.nn.Linear(8, 8))
    torch.nn.utils.prune.l1_unstructured(model[0], "weight", 0.1)
    with pytest.raises(ValueError, match="nn.utils.prune masks those of .*: call its remove"):
        prune(model)
    torch.nn.utils.prune.remove(model[0], "weight")
    torch.nn.utils.weight_norm(model[0])
    with pytest.raises(ValueError, match="anew in each forward pass, from weight_g, weight_v: "):
        prune(model)
    assert type(model[0]) is torch.nn.Linear


def test_the_conv1d_of_gpt2(tmp_path):
    transformers = pytest.importorskip("transformers", reason="transformers is not installed")
    torch.manual_seed(0)
    config = transformers.GPT2Config(vocab_size=16, n_embd=16, n_layer=2, n_head=2, n_positions=8)
    transformers.GPT2LMHeadModel(config).save_pretrained(tmp_path / "m")
    (tmp_path / "out").mkdir()
    (tmp_path / "link").symlink_to(tmp_path / "out")
    report = prune_pretrained(tmp_path / "m", tmp_path / "link", 0.75)
    written = {path.name: path.stat().st_mode for path in (tmp_path / "out").iterdir()}
    assert written["model.safetensors"] == written["config.json"]
    dense, pruned = (
        transformers.GPT2LMHeadModel.from_pretrained(tmp_path / n) for n in ("m", "out")
    )
    assert len(report.layers) == 8 and "Embedding" in report.notes[0]
    for was, now in zip(dense.transformer.h, pruned.transformer.h, strict=True):
        for a, b in ((was.attn.c_attn, now.attn.c_attn), (was.mlp.c_fc, now.mlp.c_fc)):
            kept = a.weight.abs() >= a.weight.abs().flatten().topk(a.weight.numel() // 4).values[-1]
            assert type(b).__name__ == "Conv1D" and torch.equal(b.weight, a.weight * kept)
