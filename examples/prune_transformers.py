"""A model of transformers is pruned with calibration batches, block by block, and saved.

    python examples/prune_transformers.py

prints, beside what it did to each layer, something like

    28 layers, 50.0% zeros
    worst layer: ...self_attn.v_proj, error of its output 0.26
    read back, zeros: 50%, outputs equal: True

Weights are random here, so nothing is downloaded. For a model that you have there is the command
`sparsekern prune --source FOLDER --sparsity 0.5 --algorithm sparsegpt --calibration texts.txt`.
"""

import tempfile

import torch
from transformers import LlamaConfig, LlamaForCausalLM
from transformers.utils import logging

from sparsekern.models.prune import prune_
from sparsekern.sparsity import SparseGPT

logging.disable_progress_bar()
torch.manual_seed(0)
shape = {"hidden_size": 128, "intermediate_size": 256, "num_hidden_layers": 4}
model = LlamaForCausalLM(LlamaConfig(vocab_size=512, num_attention_heads=4, **shape)).eval()

# 1. Calibration: what a tokenizer gives, with padding=True. What is masked does not count.
batches = []
for _ in range(4):
    batch = {"input_ids": torch.randint(512, (8, 64)), "attention_mask": torch.ones(8, 64).long()}
    batch["attention_mask"][:4, 48:] = 0
    batches.append(batch)

# 2. Prune: zeros in the dense weights, as every tool reads them. SparseGPT(...).apply(model) would
# make the layers sparse at once.
report = prune_(model, SparseGPT(0.5, calibration=batches))
print(report)
worst = max(report.layers, key=lambda layer: layer.output_error)
print(f"worst layer: {worst.name}, error of its output {worst.output_error:.2f}")

# 3. Save, and read back.
with tempfile.TemporaryDirectory() as folder, torch.no_grad():
    model.save_pretrained(folder)
    again = LlamaForCausalLM.from_pretrained(folder)
    weight = again.model.layers[0].mlp.up_proj.weight
    same = torch.equal(again(**batches[0]).logits, model(**batches[0]).logits)
    zeros = (weight == 0).float().mean().item()
    print(f"read back, zeros: {zeros:.0%}, outputs equal: {same}")
