"""A pruned model is fine-tuned with LoRA adapters of peft, which are then merged both ways.

    python examples/lora_on_sparse.py

prints something like

    trained: 8,064 of 15,454 weights
    loss 1.011 -> 0.008
    merged exactly: loss 0.008, sparse layers 0
    merged within the pattern: loss 0.988, sparse layers 2

An adapter's change B A is dense. Exactly merged, the layers become dense; within the pattern, what
lies where nothing is stored is dropped, and the function is another one.
"""

import copy
import warnings

import torch
from peft import LoraConfig, get_peft_model
from torch import nn

from sparsekern import SparseLinear
from sparsekern.models.lora import merge_  # teaches peft what a SparseLinear is
from sparsekern.sparsity import Magnitude

torch.manual_seed(0)
model = nn.Sequential(nn.Linear(64, 512), nn.GELU(), nn.Linear(512, 64), nn.Linear(64, 4))
Magnitude(0.9, param_filter=["0", "2"]).apply(model)
x = torch.randn(2048, 64)
y = torch.stack([x[:, i] * x[:, i + 1] for i in range(4)], 1)

adapted = get_peft_model(model, LoraConfig(r=7, lora_alpha=14, target_modules=["0", "2"]))
trained = [p for p in adapted.parameters() if p.requires_grad]  # the sparse base is frozen
count, total = sum(p.numel() for p in trained), sum(p.numel() for p in adapted.parameters())
print(f"trained: {count:,} of {total:,} weights")


def loss_of(model):
    return nn.functional.mse_loss(model(x), y)


first, optimizer = loss_of(adapted).item(), torch.optim.AdamW(trained, 5e-3)
for _ in range(150):
    loss_of(adapted).backward()
    optimizer.step()
    optimizer.zero_grad()
print(f"loss {first:.3f} -> {loss_of(adapted).item():.3f}")

warnings.simplefilter("ignore")  # they say how much of B A is dropped
for text, keep_pattern in (("exactly", False), ("within the pattern", True)):
    merged = merge_(copy.deepcopy(adapted), keep_pattern=keep_pattern)
    layers = sum(isinstance(module, SparseLinear) for module in merged.modules())
    print(f"merged {text}: loss {loss_of(merged).item():.3f}, sparse layers {layers}")
