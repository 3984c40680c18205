"""fused.py in Triton's interpreter, on a CPU. Run by test_fused.py in a process of its own:
TRITON_INTERPRET must be set before triton is imported."""

from dataclasses import replace

import pytest
import torch
from interpreted import patched_once  # noqa: F401  (a fixture)

from sparsekern.gpt import fused, generate
from sparsekern.gpt.llama import LlamaConfig, make
from sparsekern.gpt.model import Cache, GPTConfig

CONFIGS = {
    "GPT": GPTConfig(1, 2, 32, 64, 64),
    "no biases": GPTConfig(1, 3, 48, 64, 64, bias=False),
    "grouped heads": LlamaConfig(2, 4, 64, 64, 64, n_inner=72, n_kv_head=2),
    "one head of keys": LlamaConfig(1, 3, 48, 64, 64, n_kv_head=1),
}


@pytest.mark.parametrize("length, few", [(1, 64), (37, 16)])
@pytest.mark.parametrize("name", CONFIGS)
def test_logits_are_those_of_the_model(name, length, few, monkeypatch):
    """Attention in one part, and in four, of which some have nothing to look at."""
    monkeypatch.setattr(fused, "FEW_POSITIONS", few)
    monkeypatch.setattr(fused, "POSITIONS", 16)
    monkeypatch.setattr(fused, "SHARED_TILE", 16)
    torch.manual_seed(0)
    model = make(CONFIGS[name]).eval()
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.3 if parameter.ndim == 2 else 1.0)
    run, steps = fused.Fused(model, starts_early=False), 2
    idx = torch.randint(64, (2, length + steps))
    cache = Cache(model, 2, 64)
    for tensor in sum(cache.layers, ()):
        tensor.fill_(torch.nan)  # nothing is read before it is written
    got = [run(idx[:, :length], cache)]
    for place in range(length, length + steps):
        got.append(run(idx[:, place : place + 1], cache, torch.tensor([place])))
    want = model(idx)[0][:, length - 1 :]
    torch.testing.assert_close(torch.cat(got, 1), want, rtol=1e-4, atol=1e-4)


def test_windows_are_read_as_prompts(monkeypatch):
    """Past block_size, with what the steps before have left in the cache."""
    torch.manual_seed(0)
    model = make(replace(CONFIGS["grouped heads"], block_size=4, n_layer=1)).eval()
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.3 if parameter.ndim == 2 else 1.0)
    idx = torch.randint(64, (2, 3))
    want = generate.generate(model, idx, 3, temperature=0)

    def fused_pass(model, fuses):
        return fused.Fused(model, starts_early=False)

    monkeypatch.setattr(generate, "pass_of", fused_pass)
    assert torch.equal(generate.generate(model, idx, 3, temperature=0), want)
