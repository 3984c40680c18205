"""Sparse weights in files: small, exact, and readable by others.

    python examples/save_and_share.py

prints

    50% zeros in bfloat16: 0.56 of the dense file
    75% zeros in bfloat16: 0.32 of the dense file
    read into a new model, equal to the bit: True
    read by nn.Linear, with zeros, equal to the bit: True
    bits of compressed-tensors, read again: True
    a matrix of the Deep Learning Matrix Collection: 3 of 8 places
"""

from pathlib import Path

import torch
from torch import nn

from sparsekern import Static, sparsify_, weights

torch.manual_seed(0)


def make() -> nn.Sequential:
    return nn.Sequential(nn.Linear(256, 1024), nn.GELU(), nn.Linear(1024, 256)).bfloat16()


def file_bytes(name: str) -> int:
    return Path(name).stat().st_size


weights.save_weights(make(), "dense.safetensors")
for sparsity in (0.5, 0.75):
    model = sparsify_(make(), Static(sparsity, init_method="magnitude"))
    weights.save_weights(model, "model.safetensors")
    share = file_bytes("model.safetensors") / file_bytes("dense.safetensors")
    print(f"{sparsity:.0%} zeros in bfloat16: {share:.2f} of the dense file")

x = torch.randn(8, 256, dtype=torch.bfloat16)
again = weights.set_weights_(make(), weights.load_weights("model.safetensors"))
print("read into a new model, equal to the bit:", torch.equal(again(x), model(x)))

plain = make()
plain.load_state_dict(weights.to_zeros(model))
equal = torch.equal(plain[0].weight, model[0].weight.to_dense())
print("read by nn.Linear, with zeros, equal to the bit:", equal)

weights.save_weights(weights.to_bitmasks(model), "bitmask.safetensors")
again = weights.set_weights_(make(), weights.load_weights("bitmask.safetensors"))
print("bits of compressed-tensors, read again:", torch.equal(again(x), model(x)))

Path("small.smtx").write_text("2, 4, 3\n0 2 3\n0 3 1\n")
w = weights.load_matrix("small.smtx")
print(f"a matrix of the Deep Learning Matrix Collection: {w.nnz} of {w.n * w.k} places")
