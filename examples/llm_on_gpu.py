"""A pruned language model of transformers in bfloat16, with its layers packed for a GPU.

    python examples/llm_on_gpu.py

prints something like

    28 sparse layers on ...
    MB of their weights: ... dense, ... sparse
    logits differ by ...
    tokens: ...

For a few tokens at a time, as in generation, a packed layer reads fewer bytes. It has no way back,
so keep the file. Without a GPU the layers are sparse, and not packed.
"""

import copy

import torch
from transformers import LlamaConfig, LlamaForCausalLM

from sparsekern import SparseLinear, Static
from sparsekern.nn import PackedLinear, pack_

SPARSITY, BATCH, NEW = 0.9, 2, 8

torch.manual_seed(0)
device = "cuda" if torch.cuda.is_available() else "cpu"
shape = {"hidden_size": 256, "intermediate_size": 768, "num_hidden_layers": 4}
model = LlamaForCausalLM(LlamaConfig(vocab_size=512, num_attention_heads=4, **shape))
model = model.to(device, torch.bfloat16).eval()
with torch.no_grad():  # the zeros of a pruned model: yours come from from_pretrained(FOLDER)
    for module in model.model.layers.modules():
        if isinstance(module, torch.nn.Linear):
            size = module.weight.abs().float()
            module.weight *= size > size.quantile(SPARSITY)
dense = copy.deepcopy(model)

# 1. All layers of the blocks that have zeros become sparse; the head stays dense.
Static(SPARSITY, init_method="from_zeros").apply(model)

# 2. Packed for as many tokens as a step has texts.
if device == "cuda":
    pack_(model, tokens=BATCH)
layers = [m for m in model.modules() if isinstance(m, SparseLinear | PackedLinear)]
print(f"{len(layers)} sparse layers on {device}")
sizes = [sum(t.nbytes for t in (*m.parameters(), *m.buffers())) for m in (dense, model)]
head = model.lm_head.weight.nbytes + model.model.embed_tokens.weight.nbytes
print("MB of their weights: {:.2f} dense, {:.2f} sparse".format(*((s - head) / 1e6 for s in sizes)))

# 3. As before.
ids = {"input_ids": torch.randint(512, (BATCH, 16), device=device)}
with torch.no_grad():
    want = dense(**ids).logits
    print(f"logits differ by {(model(**ids).logits - want).norm() / want.norm():.0e}")
mask = torch.ones_like(ids["input_ids"])
tokens = model.generate(**ids, attention_mask=mask, max_new_tokens=NEW, pad_token_id=0)
print(f"tokens: {tokens[0, -NEW:].tolist()}")
