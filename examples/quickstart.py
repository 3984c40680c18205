"""A matrix with zeros behind torch.matmul, and a model whose linear layers are sparse.

    python examples/quickstart.py

prints something like

    one matrix: 1024 x 1024, 90% zeros, 0.8 MB instead of 4.0 MB
    largest difference from the dense product: 1e-05
    forward: spmm M=256 N=1024 K=1024 ... -> panel (...)
    a model: 268,810 weights, 75% zeros in its hidden layers
    step  1  loss 2.30
    step 30  loss 0.02
    zeros after training: 75% and 75%
"""

import torch
from torch import nn

import sparsekern
from sparsekern import SparseTensor, Static, sparsify_

torch.manual_seed(0)

# 1. One matrix. A mask says which weights are kept: any mask will do.
weight = torch.randn(1024, 1024)
mask = torch.rand(1024, 1024) > 0.9
W = SparseTensor.from_dense(weight, mask)
x = torch.randn(256, 1024)
y = x @ W.T  # as with a tensor; torch.matmul(x, W.T) and F.linear(x, W) are the same
stored = sum(t.nbytes for t in (W.values, W.col_indices, W.row_offsets))
print(
    f"one matrix: {W.n} x {W.k}, {W.sparsity:.0%} zeros, {stored / 2**20:.1f} MB "
    f"instead of {weight.nbytes / 2**20:.1f} MB"
)
difference = (y - x @ (weight * mask).T).abs().max()
print(f"largest difference from the dense product: {difference:.0e}")
print(sparsekern.explain(x, W).splitlines()[0])  # which kernel ran, and why no other

# 2. A model. Every nn.Linear becomes sparse, but for heads: here the one that is named `head`.
model = nn.Sequential()
model.add_module("up", nn.Linear(512, 1024))
model.add_module("act", nn.GELU())
model.add_module("down", nn.Linear(1024, 512))
model.add_module("head", nn.Linear(512, 10))
sparsify_(model, Static(0.75))
count = sum(p.numel() for p in model.parameters())
print(f"a model: {count:,} weights, {model.up.weight.sparsity:.0%} zeros in its hidden layers")

# 3. Training, as always. The optimizer is made after sparsify_: it must see the new parameters.
optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
inputs, labels = torch.randn(256, 512), torch.randint(10, (256,))
for step in range(1, 31):
    optimizer.zero_grad()
    loss = nn.functional.cross_entropy(model(inputs), labels)
    loss.backward()
    optimizer.step()
    if step in (1, 30):
        print(f"step {step:2}  loss {loss.item():.2f}")
print(f"zeros after training: {model.up.weight.sparsity:.0%} and {model.down.weight.sparsity:.0%}")
