"""accelerate_ on small random models of transformers."""

import copy

import pytest
import torch
from pruned_models import sparse_is_faster

from sparsekern import accelerate_, densify_

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


def bert():
    config = transformers.BertConfig(**SMALL, num_labels=3)
    return transformers.AutoModelForSequenceClassification.from_config(config)


# layers that become sparse; k_proj and v_proj of llama and mixtral have under 4096 weights
@pytest.mark.parametrize(("make", "count"), [(gpt2, 8), (llama, 10), (mixtral, 7), (bert, 13)])
def test_models_of_transformers(make, count, monkeypatch):
    sparse_is_faster(monkeypatch)
    model = make().eval()
    with torch.no_grad():
        for p in model.parameters():
            if p.ndim > 1:
                p *= torch.rand_like(p) > 0.75
    twin = copy.deepcopy(model)
    report = accelerate_(model, {"input_ids": IDS}, new_tokens=0 if make is bert else 3)
    assert len(report.sparse) == count, str(report)
    with torch.no_grad():
        got, want = model(input_ids=IDS).logits, twin(input_ids=IDS).logits
    torch.testing.assert_close(got, want)
    assert report.output_error < 1e-5
    densify_(model)
    state, before = model.state_dict(), twin.state_dict()
    assert state.keys() == before.keys() and all(torch.equal(state[k], before[k]) for k in state)
