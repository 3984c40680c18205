"""Generation: the cache changes nothing, sampling, presets, the comparison and the command."""

import copy
import gc
import json
import re
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from sparsekern import SparseLinear, Static, cli, densify_, sparsify_
from sparsekern.commands.generate import random_models, trained_models
from sparsekern.gpt import speed
from sparsekern.gpt.build import load_model
from sparsekern.gpt.checkpoint import CHECKPOINT, load_checkpoint, save_checkpoint
from sparsekern.gpt.generate import Decoder, generate
from sparsekern.gpt.llama import make
from sparsekern.gpt.model import GPT, Cache, GPTConfig
from sparsekern.gpt.presets import PRESETS, UniformMask, for_inference, random_gpt

TINY = GPTConfig(n_layer=2, n_head=2, n_embd=32, block_size=16, vocab_size=256)


def tiny_model(sparsity: float = 0.0, **changes) -> GPT:
    model = GPT(replace(TINY, **changes))
    # A new GPT repeats its last token for ever. With a head of its own and larger weights the next
    # token depends on all tokens and their places.
    model.lm_head.weight = torch.nn.Parameter(torch.empty_like(model.lm_head.weight))
    for parameter in model.parameters():
        if parameter.ndim == 2:
            torch.nn.init.normal_(parameter, std=0.3)
    return sparsify_(model, Static(sparsity)) if sparsity else model


def prompt(batch: int, length: int) -> torch.Tensor:
    return torch.randint(256, (batch, length), generator=torch.Generator().manual_seed(1))


@torch.no_grad()
def uncached(model: GPT, idx: torch.Tensor, count: int) -> torch.Tensor:
    """The most likely tokens, each from a pass over the last block_size ones."""
    for _ in range(count):
        logits = model(idx[:, -model.config.block_size :])[0][:, -1]
        idx = torch.cat([idx, logits.argmax(-1, keepdim=True)], dim=1)
    return idx


# The cache


@pytest.mark.parametrize("sparsity", [0.0, 0.75])
@pytest.mark.parametrize(
    ("length", "count"),
    [(1, 1), (1, 10), (5, 11), (5, 30), (15, 2), (16, 1), (16, 4), (30, 5)],
)
def test_the_cache_changes_no_token(sparsity: float, length: int, count: int):
    model, start = tiny_model(sparsity), prompt(3, length)
    want = uncached(model, start, count)
    assert len(want[:, length:].unique()) > count // 2
    assert torch.equal(generate(model, start, count, temperature=0), want)


def test_logits_through_the_cache_are_those_of_one_pass():
    model, idx = tiny_model().eval(), prompt(2, 12)
    cache, places = Cache(model, 2, 64), torch.arange(12)
    want = model(idx)[0]
    for start, end in ((0, 5), (5, 6), (6, 9), (9, 12)):
        got = model(idx[:, start:end], cache=cache, position=places[start:end])[0]
        torch.testing.assert_close(got, want[:, end - 1 : end], rtol=1e-4, atol=1e-4)


def test_a_batch_is_its_sequences_one_by_one():
    model, start = tiny_model(0.75), prompt(4, 6)
    together = generate(model, start, 20, temperature=0)
    alone = [generate(model, row[None], 20, temperature=0) for row in start]
    assert torch.equal(together, torch.cat(alone))


def test_a_decoder_starts_again():
    decoder = Decoder(tiny_model(), prompt(2, 3), 25, seed=5)
    runs = []
    for _ in range(2):
        decoder.start()
        for _ in range(24):
            decoder.step()
        runs.append(decoder.tokens.clone())
    assert torch.equal(*runs)
    with pytest.raises(ValueError, match="all 28 tokens are there"):
        decoder.step()


# Sampling


def test_generation_is_seeded_and_crops_its_context():
    model, start = tiny_model(), prompt(1, 1)
    tokens = generate(model, start, 40, seed=3)
    assert tokens.shape == (1, 41) and torch.equal(tokens[:, :1], start)
    assert torch.equal(tokens, generate(model, start, 40, seed=3))
    assert not torch.equal(tokens, generate(model, start, 40, seed=4))
    greedy = generate(model, start, 5, temperature=0)
    assert torch.equal(greedy, generate(model, start, 5, top_k=1, seed=9))
    assert torch.equal(generate(model, start, 0), start)


def test_tokens_come_as_often_as_the_model_says():
    model, draws, k = tiny_model().eval(), 20_000, 5
    start = prompt(1, 4)
    best, choices = model(start)[0][0, -1].topk(k)
    want = torch.softmax(best / 1.5, dim=0)
    drawn = generate(model, start.expand(draws, -1), 1, temperature=1.5, top_k=k)[:, -1]
    counts = torch.bincount(drawn, minlength=256)
    assert counts[choices].sum() == draws
    deviation = (want * (1 - want) / draws).sqrt()
    assert ((counts[choices] / draws - want).abs() < 5 * deviation).all()


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"temperature": -1.0}, "temperature: expected 0 or more, got -1.0"),
        ({"temperature": float("nan")}, "temperature: expected 0 or more, got nan"),
        ({"temperature": -1.0, "count": 0}, "temperature: expected 0 or more, got -1.0"),
        ({"top_k": 0}, "top_k: expected a whole number, 1 or more, got 0"),
        ({"top_k": 2.5}, "top_k: expected a whole number, 1 or more, got 2.5"),
        ({"count": -1}, "count: expected a whole number, 1 or more, got -1"),
        ({"idx": torch.zeros(1, 0).long()}, r"idx: expected int64 \[B, T\], .* got .*\[1, 0\]"),
        ({"idx": torch.zeros(0, 2).long()}, r"idx: expected int64 \[B, T\], .* got .*\[0, 2\]"),
        ({"idx": torch.zeros(2).long()}, r"idx: expected int64 \[B, T\], .* got .*\[2\]"),
        ({"idx": torch.zeros(1, 2).int()}, r"idx: expected int64 \[B, T\], .* got torch.int32"),
        ({"idx": torch.tensor([[3, 256]])}, "idx: expected tokens from 0 to 255, got 3 to 256"),
        ({"idx": torch.tensor([[-1]])}, "idx: expected tokens from 0 to 255, got -1 to -1"),
        ({"idx": torch.empty(1, 2, device="meta").long()}, "idx: expected tokens on cpu, .* meta"),
    ],
)
def test_generation_errors(settings: dict, message: str):
    model = tiny_model().train()
    with pytest.raises(ValueError, match=message):
        generate(model, **{"idx": prompt(1, 1), "count": 1, **settings})
    assert all(part.training for part in model.modules())


# Presets


def test_presets_have_the_shapes_they_are_named_for():
    parameters, linears = {}, {}
    for name, config in PRESETS.items():
        with torch.device("meta"):
            model = make(config)
        parameters[name] = sum(p.numel() for p in model.parameters())
        mlp = model.blocks[0].mlp.down.weight
        linears[name] = tuple(mlp.shape)
        inner = [m for m in model.blocks[0].modules() if isinstance(m, torch.nn.Linear)]
        assert [tuple(m.weight.shape) for m in inner] == config.linears
    assert parameters["gpt2-small"] == 124_439_808 + (50304 - 50257) * 768
    assert parameters["gpt3-xl"] == pytest.approx(1.3e9, rel=0.02)
    assert parameters["gpt3-6.7b"] == pytest.approx(6.7e9, rel=0.01)
    assert linears["gpt3-6.7b"] == (4096, 16384) and linears["llama-like"] == (8192, 28672)
    # LLaMA 70B has 80 blocks, and a head of its own.
    blocks = parameters["llama-like"] - 32000 * 8192 - 8192
    assert 10 * blocks + 2 * 32000 * 8192 + 8192 == 68_976_648_192


def test_random_models_have_exact_sparsity_and_masks_of_their_own():
    model = random_gpt(TINY, 0.75, dtype=torch.bfloat16, seed=3)
    layers = [m for m in model.modules() if isinstance(m, SparseLinear)]
    assert len(layers) == 8
    assert all(layer.weight.sparsity == 0.75 for layer in layers)
    assert all(p.dtype == torch.bfloat16 and not p.requires_grad for p in model.parameters())
    first, second = (block.mlp.up for block in model.blocks)
    assert not torch.equal(first.col_indices, second.col_indices)
    assert model.lm_head.weight is model.wte.weight and not model.training
    again = random_gpt(TINY, 0.75, dtype=torch.bfloat16, seed=3)
    pairs = zip(model.parameters(), again.parameters(), strict=True)
    assert all(torch.equal(a, b) for a, b in pairs)
    dense = random_gpt(TINY)
    assert dense.norm.weight.eq(1).all() and dense.blocks[0].mlp.up.bias.eq(0).all()
    assert dense.blocks[1].mlp.up.weight.std().item() == pytest.approx(0.02, rel=0.1)


# Dense against sparse


def check_comparison(result: dict, batch: int) -> None:
    assert result["batch"] == batch and result["steps"] == 9 and result["rounds"] == 3
    for side in ("dense", "sparse"):
        of_best = result[side]["ways"][result[side]["best"]]
        assert all(len(seconds) == 3 for seconds in of_best.values())
        assert result[side]["tokens_per_s"] == batch / sorted(of_best["step_s"])[1]
    ratio = result["sparse"]["tokens_per_s"] / result["dense"]["tokens_per_s"]
    assert result["speedup"] == ratio
    assert 0 < result["block_bytes_ratio"] < result["weight_bytes_ratio"] < 1


def test_compare_counts_time_and_memory():
    sparse = tiny_model(0.9)
    models = {"dense": tiny_model(), "sparse": sparse}
    result = speed.compare(models, prompt(2, 4), 10, rounds=3, temperature=0)
    check_comparison(result, batch=2)
    blocks = sum(p.numel() for p in models["dense"].blocks.parameters())
    assert result["dense"]["block_bytes"] == 4 * blocks
    values = sum(m.values.numel() for m in sparse.modules() if isinstance(m, SparseLinear))
    assert result["sparse"]["block_bytes"] > 8 * values
    json.dumps(result)
    for count, rounds in ((1, 5), (2, 0)):
        message = f"at least 2 tokens and 1 round, got {count} and {rounds}"
        with pytest.raises(ValueError, match=message):
            speed.compare(models, prompt(1, 1), count, rounds)


def test_blocks_of_any_sparsity_share_their_compilations(monkeypatch):
    counts = torch._dynamo.utils.counters
    # monkeypatch would delete recompile_limit afterwards: it is an alias.
    with torch._dynamo.config.patch(
        force_parameter_static_shapes=True,
        force_nn_module_property_static_shapes=True,
        allow_unspec_int_on_nn_module=False,
        recompile_limit=8,
    ):
        check_compilations(monkeypatch, counts)


def check_compilations(monkeypatch, counts):
    compiler = torch.compile
    monkeypatch.setattr(torch, "compile", lambda *a, **k: compiler(*a, backend="eager", **k))
    torch.compiler.reset()
    counts.clear()
    model = tiny_model(n_layer=10)
    for i, block in enumerate(model.blocks):
        sparsify_(block, Static(0.5 + 0.02 * i))
    start = prompt(2, 3)
    twin = speed.compiled_blocks(model)
    assert list(twin.parameters())[0] is list(model.parameters())[0]
    decoder = Decoder(model, start, 10, temperature=0, stepper=twin)
    decoder.start()
    for _ in range(9):
        decoder.step()
    assert torch.equal(decoder.tokens, uncached(model, start, 10))
    assert counts["stats"]["unique_graphs"] == 1  # nnz is dynamic from the first block on


# The command


@pytest.fixture
def run(capsys, monkeypatch):
    """`generate` with these arguments -> what it prints, or the line of its error."""
    monkeypatch.setitem(PRESETS, "gpt2-small", TINY)

    def run(*arguments: str) -> str:
        try:
            code = cli.main(["generate", *arguments])
        except SystemExit as stop:
            code = stop.code
        printed = capsys.readouterr()
        if code == 0:
            return printed.out
        assert code == 2 and printed.out == "" and printed.err.count("\n") == 1
        return printed.err

    return run


@pytest.fixture
def checkpoint(tmp_path: Path, capsys) -> str:
    text = tmp_path / "text.txt"
    text.write_text("".join(f"{i} bottles of beer on the wall.\n" for i in range(99)))
    small = "--layers=1 --heads=2 --width=32 --context=16 --batch=2 --steps=2 --threads=1"
    out = tmp_path / "run"
    train = ["train", *small.split(), "--sparsity=0.75", f"--data={text}", f"--out={out}"]
    assert cli.main(train) == 0
    capsys.readouterr()
    return f"--checkpoint={out / CHECKPOINT}"


PRESET = ("--preset=gpt2-small", "--random-weights")


def test_a_checkpoint_writes_text(run, checkpoint):
    settings = ("--prompt=beer", "--tokens=30", "--batch=2", "--device=cpu")
    out = run(checkpoint, *settings)
    texts = out.split("\n\nbeer")
    assert out.startswith("beer") and len(texts) == 2 and texts[0] != "beer" + texts[1]
    assert run(checkpoint, *settings) == out
    assert run(checkpoint, *settings, "--seed=1") != out
    assert run(checkpoint, *settings, "--dtype=bfloat16").startswith("beer")
    greedy = run(checkpoint, *settings, "--temperature=0").split("\n\nbeer")
    assert greedy[0].rstrip() == "beer" + greedy[1].rstrip()
    assert run(checkpoint, *settings, "--top-k=1").split("\n\nbeer") == greedy


def test_random_weights_write_numbers(run):
    out = run(*PRESET, "--sparsity=0.5", "--prompt=AB", "--tokens=5", "--device=cpu")
    assert re.fullmatch(r"65 66( \d+){5}\n\n", out)


@pytest.mark.parametrize("is_trained", [False, True])
def test_bench_compares_with_dense(run, checkpoint, is_trained):
    model = [checkpoint] if is_trained else [*PRESET, "--sparsity=0.75"]
    out = run(*model, "--bench", "--tokens=6", "--batch=2", "--device=cpu")
    assert "2 x 1 tokens, then 5 steps, medians of 5 interleaved rounds" in out
    assert re.search(r"dense  \| eager .* tokens/s|dense  \| eager +\| +[\d,.]+ \| ", out)
    assert re.search(r"sparse \| eager +\| +[\d,.]+ \| +[\d.]+ ms \|", out)
    assert re.search(r"generates \d+\.\d\dx as fast as the best dense one", out)


def test_mistakes(run, checkpoint, tmp_path):
    for arguments, message in {
        (): "one of the arguments --checkpoint --preset is required",
        (checkpoint, *PRESET): "not allowed with argument",
        ("--preset=gpt5",): "invalid choice: 'gpt5'",
        ("--preset=gpt2-small",): "gpt2-small has no trained weights here, add --random-weights",
        (checkpoint, "--random-weights"): "its weights and zeros stay",
        (checkpoint, "--sparsity=0.5"): "its weights and zeros stay",
        (f"--checkpoint={tmp_path / 'none.pt'}",): "none.pt does not exist",
        (*PRESET, "--sparsity=1"): "sparsity: expected at least 0 and below 1, got 1.0",
        (*PRESET, "--temperature=-1"): "temperature: expected 0 or more, got -1.0",
        (*PRESET, "--bench"): "expected a sparse model, give a sparsity above 0",
        (*PRESET, "--sparsity=0.5", "--bench", "--tokens=1"): "at least 2 tokens, got 1",
        (*PRESET, "--tokens=0"): "tokens >= 1 and batch >= 1, got .* tokens 0",
        (*PRESET, "--batch=0"): "got .* batch 0",
        (*PRESET, "--prompt="): "expected a prompt",
        (*PRESET, "--prompt=\udcff"): r"prompt: expected text in UTF-8, got .\\udcff",
        (*PRESET, "--top-k=0"): "top_k: expected a whole number, 1 or more",
        (*PRESET, "--device=cpu", "--keep-dense"): "keep_dense: expected a GPU",
        (*PRESET, "--device=tpu"): "device: expected (one of )?cpu, .*, got 'tpu'",
        (*PRESET, "--device=cuda:99"): "got 'cuda:99'",
        (*PRESET, "--dtype=int8"): "invalid choice: 'int8'",
    }.items():
        assert re.search(message, run(*arguments)), arguments


def test_dense_copies_are_of_sparse_layers(run, checkpoint):
    cpu, no_zeros = torch.device("cpu"), "keep_dense: expected a sparse model, "
    with pytest.raises(ValueError, match=no_zeros + "give a sparsity above 0"):
        random_models("gpt2-small", 0.0, cpu, torch.float32, 0, 1, False, True)
    path = Path(checkpoint.partition("=")[2])
    state = load_checkpoint(path)
    state["config"]["sparsity"] = 0.0
    state["model"] = densify_(load_model(path)[0]).state_dict()
    save_checkpoint(path, state)
    with pytest.raises(ValueError, match=no_zeros + ".* is dense"):
        trained_models(path, cpu, torch.float32, 1, False, True)
    assert run(checkpoint, "--prompt=beer", "--tokens=3", "--device=cpu").startswith("beer")
    assert "bench: expected a sparse model" in run(checkpoint, "--bench")


# On a GPU


@pytest.mark.gpu
@pytest.mark.parametrize(("length", "count"), [(1, 2), (5, 30), (15, 2), (16, 4), (30, 5)])
def test_a_graph_changes_no_token(length, count):
    model, start = tiny_model().cuda(), prompt(3, length).cuda()
    want = uncached(model, start, count)
    assert torch.equal(generate(model, start, count, temperature=0), want)


@pytest.mark.gpu
def test_a_graph_samples_by_the_seed():
    model, start = tiny_model(block_size=64).cuda(), prompt(64, 4).cuda()
    first = generate(model, start, 40, seed=1)
    assert torch.equal(first, generate(model, start, 40, seed=1))
    assert not torch.equal(first, generate(model, start, 40, seed=2))
    # Each replay draws anew: equal rows part, and none repeats the other's draws a step later.
    rows = generate(model, start[:1].expand(64, -1), 40, temperature=3.0)
    assert len(rows.unique(dim=0)) == 64


@pytest.mark.gpu
@pytest.mark.parametrize("batch", [1, 16, 70])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_packed_models_generate(dtype, batch):
    config = replace(TINY, n_embd=128, n_inner=344)
    dense = random_gpt(config, device="cuda", dtype=dtype)
    twin = densify_(copy.deepcopy(sparsify_(dense, UniformMask(0.75))))
    packed, exact = for_inference(dense), copy.deepcopy(twin).double()
    assert speed.memory_bytes(packed.blocks) < 0.5 * speed.memory_bytes(twin.blocks)
    idx, places = prompt(batch, 9).cuda(), torch.arange(9, device="cuda")
    errors, logits = [], {}
    for model in (exact, twin, packed):
        cache = Cache(model, batch, 64)
        with torch.no_grad():
            model(idx[:, :8], cache=cache, position=places[:8])
            logits[model] = model(idx[:, 8:], cache=cache, position=places[8:])[0].double()
    errors = [(logits[m] - logits[exact]).norm() / logits[exact].norm() for m in (packed, twin)]
    assert errors[0] <= 2 * errors[1]
    tokens = generate(packed, idx, 12, seed=1)
    assert tokens.shape == (batch, 21) and torch.equal(tokens, generate(packed, idx, 12, seed=1))


@pytest.mark.gpu
def test_a_captured_prompt_is_read_as_another():
    model, start = random_gpt(TINY, 0.75, "cuda", torch.bfloat16), prompt(3, 9).cuda()
    runs = []
    for captures_prompt in (False, True, True):
        decoder = Decoder(model, start, 6, seed=5, captures_prompt=captures_prompt)
        for _ in range(2):
            decoder.start()
            for _ in range(5):
                decoder.step()
            runs.append(decoder.tokens.clone())
    assert all(torch.equal(run, runs[0]) for run in runs)


@pytest.mark.gpu
def test_dense_copies_serve_prompts():
    config = replace(TINY, n_embd=128, block_size=256)
    model = random_gpt(config, 0.75, "cuda", torch.bfloat16, tokens=(1, 256), keeps_dense=True)
    held = {m.layout for m in model.modules() if hasattr(m, "packed_bytes")}
    assert all("dense" in layout for layout in held)
    tokens = generate(model, prompt(1, 200).cuda(), 5, temperature=0)
    assert tokens.shape == (1, 205)


@pytest.mark.gpu
def test_compare_takes_the_best_of_graphs_and_compiled_graphs():
    config = replace(TINY, n_embd=128, block_size=64)
    models = {
        "dense": random_gpt(config, 0.0, "cuda", torch.bfloat16),
        "sparse": random_gpt(config, 0.75, "cuda", torch.bfloat16),
    }
    result = speed.compare(models, prompt(2, 4).cuda(), 10, rounds=3)
    check_comparison(result, batch=2)
    for side in models:
        assert result[side]["ways"].keys() == {"CUDA graph", "CUDA graph, compiled"}


@pytest.mark.gpu
def test_a_random_model_is_made_block_by_block():
    config = GPTConfig(n_layer=24, n_head=4, n_embd=512, block_size=16, vocab_size=256)
    random_gpt(replace(config, n_layer=1), 0.9, "cuda", torch.bfloat16)  # libraries' workspaces
    gc.collect()  # what other tests have left
    torch.cuda.reset_peak_memory_stats()

    def requested_bytes(which: str) -> int:
        """What was asked for, however large the pieces are that the allocator's cache has left."""
        return torch.cuda.memory_stats()[f"requested_bytes.all.{which}"]

    before = requested_bytes("current")
    model = random_gpt(config, 0.9, "cuda", torch.bfloat16)
    one_dense_block = 2 * 12 * 512**2
    assert speed.memory_bytes(model) < 8 * one_dense_block  # of 24
    assert requested_bytes("peak") - before < 20 * one_dense_block
