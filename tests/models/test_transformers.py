"""accelerate_ on small random models of transformers."""

import copy
from statistics import median

import pytest
import torch
from pruned_models import sparse_is_faster
from torch import nn

from sparsekern import accelerate_, densify_
from sparsekern.models import generation
from sparsekern.models.prune import prune_
from sparsekern.nn.convert import sparsifiable
from sparsekern.sparsity import Wanda

transformers = pytest.importorskip("transformers")

SMALL = {
    "vocab_size": 256,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
}
IDS = torch.arange(38).view(2, 19)


def gpt2():
    config = transformers.GPT2Config(vocab_size=256, n_embd=64, n_layer=2, n_head=4)
    return transformers.AutoModelForCausalLM.from_config(config)


def llama():
    config = transformers.LlamaConfig(**SMALL, num_key_value_heads=2, tie_word_embeddings=True)
    return transformers.AutoModelForCausalLM.from_config(config)


def mixtral():
    config = transformers.MixtralConfig(**SMALL, num_key_value_heads=2)
    return transformers.AutoModelForCausalLM.from_config(config)


def gpt_oss():
    heads = {"num_key_value_heads": 2, "head_dim": 16}
    config = transformers.GptOssConfig(**SMALL, **heads, num_local_experts=4)
    return transformers.AutoModelForCausalLM.from_config(config)


def falcon():
    """Its linear layers are a subclass of nn.Linear with a forward of its own."""
    sizes = {"hidden_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4}
    config = transformers.FalconConfig(vocab_size=256, **sizes, bias=True)
    return transformers.AutoModelForCausalLM.from_config(config)


def llama4():
    """Each expert gets a row for each token, of zeros for tokens of others."""
    heads = {"num_key_value_heads": 2, "head_dim": 16, "intermediate_size_mlp": 96}
    config = transformers.Llama4TextConfig(
        **SMALL, **heads, num_local_experts=4, interleave_moe_layer_step=1
    )
    return transformers.AutoModelForCausalLM.from_config(config)


def nemotron():
    """Experts without a gate."""
    config = transformers.NemotronHConfig(
        **SMALL,
        num_key_value_heads=2,
        head_dim=16,
        layers_block_type=["moe", "attention"],
        n_routed_experts=4,
        num_experts_per_tok=2,
        moe_intermediate_size=96,
        moe_shared_expert_intermediate_size=96,
    )
    return transformers.AutoModelForCausalLM.from_config(config)


def jetmoe():
    config = transformers.JetMoeConfig(
        **SMALL, num_key_value_heads=2, kv_channels=16, num_local_experts=4
    )
    return transformers.AutoModelForCausalLM.from_config(config)


def bert():
    config = transformers.BertConfig(**SMALL, num_labels=3)
    return transformers.AutoModelForSequenceClassification.from_config(config)


# that become sparse; with grouped heads k_proj and v_proj have under 4096 weights
LAYERS = [(gpt2, 8), (llama, 10), (mixtral, 7), (gpt_oss, 7), (bert, 13)]
LAYERS += [(falcon, 8), (llama4, 13), (nemotron, 6), (jetmoe, 2)]


@pytest.mark.parametrize(("make", "count"), LAYERS)
def test_models_of_transformers(make, count, monkeypatch):
    sparse_is_faster(monkeypatch)
    model = make().eval()
    with torch.no_grad():
        for p in model.parameters():
            if p.ndim > 1:
                p.normal_(0.0, 0.02).mul_(torch.rand_like(p) > 0.75)
    twin = copy.deepcopy(model)
    report = accelerate_(model, {"input_ids": IDS}, new_tokens=0 if make is bert else 3)
    assert len(report.sparse) == count, str(report)
    if make is jetmoe:
        assert "a JetMoeParallelExperts uses its stack of matrices in a way" in str(report)
    with torch.no_grad():
        got, want = model(input_ids=IDS).logits, twin(input_ids=IDS).logits
    torch.testing.assert_close(got, want)
    assert report.output_error < 1e-5
    densify_(model)
    state, before = model.state_dict(), twin.state_dict()
    assert state.keys() == before.keys() and all(torch.equal(state[k], before[k]) for k in state)


def test_experts_of_llama4_are_trained(monkeypatch):
    sparse_is_faster(monkeypatch)
    model = llama4().eval()
    with torch.no_grad():
        for p in model.parameters():
            if p.ndim > 1:
                p.normal_(0.0, 0.02).mul_(torch.rand_like(p) > 0.75)
    twin = copy.deepcopy(model)
    accelerate_(model, {"input_ids": IDS})
    for each in (model, twin):
        each(input_ids=IDS, labels=IDS).loss.backward()
    experts = model.model.layers[0].feed_forward.experts
    want = twin.model.layers[0].feed_forward.experts.down_proj.grad
    for layer, grad in zip(experts.layers("down_proj"), want, strict=True):
        rows, columns = layer.weight.detach().to_dense().nonzero(as_tuple=True)
        torch.testing.assert_close(layer.values.grad, grad.t()[rows, columns])


@pytest.mark.parametrize(("make", "count"), [(falcon, 8), (llama4, 30), (nemotron, 14)])
def test_their_layers_are_pruned(make, count):
    model = make().eval()
    with torch.no_grad():
        for p in model.parameters():  # some are made of zeros
            if p.ndim > 1:
                p.normal_(0.0, 0.02)
    modules = list(model.modules())
    report = prune_(model, Wanda(0.5, calibration=[IDS]))
    assert list(model.modules()) == modules and len(report.layers) == count
    assert all(abs(x.sparsity - 0.5) < 0.02 for x in report.layers)


def test_experts_with_biases_are_pruned():
    model = gpt_oss().eval()
    with torch.no_grad():
        for name, p in model.named_parameters():
            if name.endswith("proj_bias"):
                p.normal_()
    twin = copy.deepcopy(model)
    report = prune_(model, Wanda(0.5, calibration=[IDS]))
    experts, before = model.model.layers[0].mlp.experts, twin.model.layers[0].mlp.experts
    assert sum("experts" in layer.name for layer in report.layers) == 2 * 2 * 4
    for name in ("gate_up_proj", "down_proj"):
        now, old = getattr(experts, name), getattr(before, name)
        assert 0.45 < (now == 0).float().mean() < 0.55 and torch.equal(now[now != 0], old[now != 0])
        assert torch.equal(getattr(experts, f"{name}_bias"), getattr(before, f"{name}_bias"))


def albert():
    config = transformers.AlbertConfig(**SMALL, embedding_size=32, num_labels=3)
    return transformers.AutoModelForSequenceClassification.from_config(config)


@pytest.mark.parametrize("make", [bert, albert, mixtral])
def test_classifiers_of_one_block_stay_dense(make, monkeypatch):
    monkeypatch.setitem(SMALL, "num_hidden_layers", 1)  # albert has one for any number
    model = make()
    if make is mixtral:
        model = transformers.AutoModelForSequenceClassification.from_config(model.config)
    linears = {name for name, m in model.named_modules() if type(m) is nn.Linear}
    spared = {bert: {"bert.pooler.dense"}, albert: {"albert.pooler"}, mixtral: {"score"}}[make]
    spared |= {"classifier"} & linears
    assert linears - sparsifiable(model).keys() == spared


def t5():
    config = transformers.T5Config(
        vocab_size=256, d_model=64, d_ff=96, num_layers=2, num_heads=4, decoder_start_token_id=0
    )
    return transformers.AutoModelForSeq2SeqLM.from_config(config)


@pytest.mark.parametrize(
    ("make", "example"),
    [(llama, {"input_ids": IDS}), (llama, (IDS, torch.ones_like(IDS))), (t5, {"input_ids": IDS})],
)
def test_new_tokens_are_called_as_generate_does(make, example, monkeypatch):
    sparse_is_faster(monkeypatch)
    model = make().eval()
    with torch.no_grad():
        for p in model.parameters():
            if p.ndim > 1:
                p *= torch.rand_like(p) > 0.75
    lengths = set()

    def look(module, args, kwargs):
        past = kwargs["cache"] if "cache" in kwargs else kwargs["past_key_values"]
        lengths.add((kwargs["hidden_states"].shape[1], int(past.get_seq_length())))

    if make is llama:
        model.model.layers[0].self_attn.register_forward_pre_hook(look, with_kwargs=True)
    if make is t5:
        model.generation_config.num_beams = 2
    ticks = iter(range(10**6))  # between two calls of the model passes one
    monkeypatch.setattr(generation, "clock", lambda is_gpu: (lambda: next(ticks), median))
    report = accelerate_(model, example, new_tokens=3)
    assert report.output_error is not None
    # A call takes 9 s, each sparse layer in it 1 s of 2; the prompt gives the first token.
    assert report.before_s == report.after_s == 9 + 2 * (9 + 1)
    assert report.expected_after_s == report.before_s - 3 * (2 - 1) * len(report.sparse)
    rows = {layer.name: layer.tokens for layer in report.layers}
    if make is llama:
        assert lengths == {(19, 0), *((1, 19 + i) for i in range(2))}
        assert rows["model.layers.1.mlp.up_proj"] == {38: 1, 2: 2}
    else:
        # of T5 the encoder reads the prompt once, and both beams begin with one token
        assert rows["encoder.block.1.layer.0.SelfAttention.q"] == {38: 1}
        assert rows["decoder.block.1.layer.0.SelfAttention.q"] == {4: 3}


@pytest.mark.parametrize("is_adapted", [False, True])
def test_new_tokens_of_a_classifier(is_adapted):
    model: nn.Module = bert()
    if is_adapted:
        peft = pytest.importorskip("peft")
        model = peft.get_peft_model(model, peft.LoraConfig(task_type="SEQ_CLS"))
    text = (
        r"^new_tokens: expected 0 .* no tokens, got 3: can_generate\(\) of \w+ForSeq\w+ is False; "
    )
    with pytest.raises(ValueError, match=text):
        accelerate_(model, {"input_ids": IDS}, new_tokens=3)


@pytest.mark.parametrize("new_tokens", [1, 2])
def test_a_prompt_that_nearly_fills_the_context(new_tokens):
    config = transformers.GPT2Config(
        vocab_size=256, n_positions=IDS.shape[1] + new_tokens - 1, n_embd=64, n_layer=1, n_head=4
    )
    model = transformers.AutoModelForCausalLM.from_config(config).eval()
    with torch.no_grad():
        model.transformer.h[0].mlp.c_fc.weight *= torch.rand(64, 256) > 0.75
    report = accelerate_(model, {"input_ids": IDS}, new_tokens=new_tokens)
    assert report.layers[0].tokens == {38: 1} | ({2: 1} if new_tokens == 2 else {})


def test_an_example_that_generate_refuses(monkeypatch):
    model = llama()
    with torch.no_grad():
        model.model.layers[0].mlp.up_proj.weight.mul_(0).fill_diagonal_(1.0)
    with pytest.raises(ValueError, match=r"new_tokens: .* generate\(\) .*strange"):
        accelerate_(model, {"input_ids": IDS, "strange": IDS}, new_tokens=2)
    monkeypatch.setattr(model, "generate", lambda **given: model(input_ids=given["input_ids"]))
    with pytest.raises(ValueError, match="called LlamaForCausalLM 1 times for 2 tokens: give a"):
        accelerate_(model, {"input_ids": IDS}, new_tokens=2)
