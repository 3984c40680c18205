"""fused.py in Triton's interpreter, on a CPU. Run by test_fused.py in a process of its own:
TRITON_INTERPRET must be set before triton is imported."""

import pytest
import torch

from sparsekern.gpt import fused
from sparsekern.gpt.llama import LlamaConfig, make
from sparsekern.gpt.model import Cache, GPTConfig

CONFIGS = {
    "GPT": GPTConfig(2, 2, 32, 256, 64),
    "no biases": GPTConfig(1, 3, 48, 256, 64, bias=False),
    "grouped heads": LlamaConfig(2, 4, 64, 256, 64, n_inner=72, n_kv_head=2),
    "one head of keys": LlamaConfig(1, 3, 48, 256, 64, n_kv_head=1),
}


@pytest.mark.parametrize("length", [1, 2, 70, 230])
@pytest.mark.parametrize("name", CONFIGS)
def test_logits_are_those_of_the_model(name, length):
    torch.manual_seed(0)
    model = make(CONFIGS[name]).eval()
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.3 if parameter.ndim == 2 else 1.0)
    run, batch, steps = fused.Fused(model, starts_early=False), 2, 3
    idx = torch.randint(64, (batch, length + steps))
    want = model(idx)[0]
    cache = Cache(model, batch, 64 if length < 60 else 256)  # in one part, and in several
    for tensor in sum(cache.layers, ()):
        tensor.fill_(torch.nan)  # nothing is read before it is written
    got = [run(idx[:, :length], cache)]
    for place in range(length, length + steps):
        got.append(run(idx[:, place : place + 1], cache, torch.tensor([place])))
    torch.testing.assert_close(torch.cat(got, 1), want[:, length - 1 :], rtol=1e-4, atol=1e-4)
