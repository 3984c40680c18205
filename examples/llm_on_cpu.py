"""A pruned language model of transformers on a CPU: faster at its prompts and tokens, then used.

    python examples/llm_on_cpu.py

prints something like

    ... of 28 layers with zeros are sparse now; 2 other modules with a matrix were left as they ...
    | layer | N x K | zeros | tokens | sparse is | ms before | after | MB before | after | now | ...
    tokens as of the dense model: True

Weights are random here, so nothing is downloaded; yours come from `from_pretrained(FOLDER)`, with
the zeros that are in the file. Compiling gains nothing for a token on a CPU.
"""

import copy

import torch
from transformers import LlamaConfig, LlamaForCausalLM

import sparsekern

SPARSITY, PROMPT, NEW = 0.9, 64, 16

torch.manual_seed(0)
torch.set_num_threads(1)
shape = {"hidden_size": 256, "intermediate_size": 768, "num_hidden_layers": 4}
model = LlamaForCausalLM(LlamaConfig(vocab_size=512, num_attention_heads=4, **shape)).eval()
with torch.no_grad():  # the zeros of a pruned model: the smallest weights of each layer
    for module in model.model.layers.modules():
        if isinstance(module, torch.nn.Linear):
            size = module.weight.abs()
            module.weight *= size > size.quantile(SPARSITY)
dense = copy.deepcopy(model)

# Reading the prompt and generating are weighed together, with the calls that generate() makes: one
# with all tokens of the prompt, and one for each token after it, whose past is in the cache.
prompt = {"input_ids": torch.randint(512, (1, PROMPT)), "attention_mask": torch.ones(1, PROMPT)}
print(sparsekern.accelerate_(model, prompt, new_tokens=NEW))

settings = {"max_new_tokens": NEW, "do_sample": False, "pad_token_id": 0}
tokens, want = (m.generate(**prompt, **settings) for m in (model, dense))
print(f"tokens as of the dense model: {torch.equal(tokens, want)}")
