"""LLaMA's block in the minimal GPT, held to transformers'."""

import copy
from dataclasses import replace

import pytest
import torch

from sparsekern import densify_, sparsify_
from sparsekern.gpt.flops import multiply_adds
from sparsekern.gpt.generate import Decoder, generate
from sparsekern.gpt.llama import Llama, LlamaConfig, make
from sparsekern.gpt.model import GPT, Cache, GPTConfig
from sparsekern.gpt.presets import UniformMask, for_inference, random_gpt
from sparsekern.gpt.speed import compiled_blocks

TINY = LlamaConfig(2, 4, 32, 64, 96, n_inner=48, n_kv_head=2)


def llama(config: LlamaConfig = TINY) -> Llama:
    torch.manual_seed(0)
    model = Llama(config)
    for parameter in model.parameters():
        if parameter.ndim == 2:
            torch.nn.init.normal_(parameter, std=0.3)
    return model.eval()


def tokens(batch: int, length: int) -> torch.Tensor:
    return torch.randint(96, (batch, length), generator=torch.Generator().manual_seed(1))


def test_logits_are_those_of_transformers():
    transformers = pytest.importorskip("transformers")
    config = transformers.LlamaConfig(
        vocab_size=96,
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=64,
        rms_norm_eps=1e-5,
        tie_word_embeddings=True,
    )
    other, model, idx = transformers.LlamaForCausalLM(config).eval(), llama(), tokens(2, 20)
    names = {"input_layernorm": "norm1", "post_attention_layernorm": "norm2"}
    with torch.no_grad():
        other.model.embed_tokens.weight.copy_(model.wte.weight)
        for theirs, ours in zip(other.model.layers, model.blocks, strict=True):
            attention, mlp = theirs.self_attn, theirs.mlp
            q, k, v = ours.attention.qkv.weight.split((32, 16, 16))
            gate, up = ours.mlp.up.weight.chunk(2)
            for to, weight in (
                (attention.q_proj, q),
                (attention.k_proj, k),
                (attention.v_proj, v),
                (attention.o_proj, ours.attention.proj.weight),
                (mlp.gate_proj, gate),
                (mlp.up_proj, up),
                (mlp.down_proj, ours.mlp.down.weight),
            ):
                to.weight.copy_(weight)
            for name, mine in names.items():
                norm = torch.rand(32)
                getattr(theirs, name).weight.copy_(norm)
                getattr(ours, mine).weight.copy_(norm)
        torch.testing.assert_close(model(idx)[0], other(idx).logits, rtol=1e-4, atol=1e-4)


def test_each_config_has_its_model():
    assert type(make(TINY)) is Llama and type(make(GPTConfig(1, 1, 8, 8, 8))) is GPT


@pytest.mark.parametrize("kv_heads", [1, 2, 4])
def test_the_cache_changes_no_logit(kv_heads):
    model, idx = llama(replace(TINY, n_kv_head=kv_heads)), tokens(2, 12)
    cache, places = Cache(model, 2, 64), torch.arange(12)
    with torch.no_grad():
        want = model(idx)[0]
        for start, end in ((0, 5), (5, 6), (6, 9), (9, 12)):
            got = model(idx[:, start:end], cache=cache, position=places[start:end])[0]
            torch.testing.assert_close(got, want[:, end - 1 : end], rtol=1e-4, atol=1e-4)


def test_a_sparse_one_generates_what_its_dense_twin_does():
    sparse = sparsify_(llama(), UniformMask(0.5))
    dense = densify_(copy.deepcopy(sparse))
    want = generate(dense, tokens(2, 5), 70, temperature=0)  # past the window
    assert torch.equal(generate(sparse, tokens(2, 5), 70, temperature=0), want)
    twin = compiled_blocks(dense)
    assert type(twin) is Llama and twin.blocks[0].mlp.up.weight is dense.blocks[0].mlp.up.weight


def test_counts_of_its_matrices():
    macs = multiply_adds(TINY)
    model = Llama(TINY)
    assert macs.linear == sum(p.numel() for p in model.blocks.parameters() if p.ndim == 2)
    assert TINY.embedding_rows == len(model.wte.weight)


def test_random_weights():
    model = random_gpt(TINY, 0.75, dtype=torch.bfloat16, seed=3)
    assert isinstance(model, Llama) and model.norm.weight.eq(1).all()
    assert all(p.dtype == torch.bfloat16 and not p.is_meta for p in model.parameters())
    decoder = Decoder(model, tokens(1, 3), 4)
    decoder.start()
    decoder.step()


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"n_kv_head": 3}, "n_head: expected a multiple of n_kv_head, got 4 and 3"),
        ({"n_kv_head": 0}, "n_head: expected a multiple of n_kv_head, got 4 and 0"),
        ({"bias": True}, "expected no bias, no dropout"),
        ({"dropout": 0.1}, "expected no bias, no dropout"),
        ({"n_embd": 36}, "heads of an even width, got .* width 9"),
    ],
)
def test_configs_that_are_none(changes, message):
    with pytest.raises(ValueError, match=message):
        replace(TINY, **changes)


@pytest.mark.gpu
def test_packed_ones_generate_on_a_gpu():
    config = replace(TINY, n_embd=128, n_inner=344)
    dense = random_gpt(config, device="cuda", dtype=torch.bfloat16)
    twin = densify_(copy.deepcopy(sparsify_(dense, UniformMask(0.75))))
    packed = for_inference(dense, (1, 64), keeps_dense=True)
    idx, places = tokens(2, 9).cuda(), torch.arange(9, device="cuda")
    logits = {}
    for name, model in {"exact": twin.double(), "packed": packed}.items():
        cache = Cache(model, 2, 64)
        with torch.no_grad():
            model(idx[:, :8], cache=cache, position=places[:8])
            logits[name] = model(idx[:, 8:], cache=cache, position=places[8:])[0].double()
    error = logits["packed"] - logits["exact"]
    assert error.norm() < 0.05 * logits["exact"].norm()
    decoder = Decoder(packed, idx, 12, temperature=0, captures_prompt=True)
    decoder.start()
    for _ in range(11):
        decoder.step()
    assert torch.equal(decoder.tokens, generate(packed, idx, 12, temperature=0))
