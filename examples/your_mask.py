"""A mask of your own, on one layer or on a whole model.

    python examples/your_mask.py

prints

    a banded layer: 7,214 of 65,536 weights kept
    layer 0: 8,192 kept, each row has 32
    layer 2: 8,192 kept, each row has 32
    pruned weights have no place in memory: values [8192], gradient [8192]
    torch.nn.utils.prune: 90% zeros taken over, outputs equal: True
"""

import torch
from torch import nn
from torch.nn.utils import prune

from sparsekern import SparseLinear, sparsify_
from sparsekern.weights import from_masks, set_weights_

torch.manual_seed(0)

# One layer. The mask has the shape of the weight [out_features, in_features]; True is kept.
linear = nn.Linear(256, 256)
distance = (torch.arange(256)[:, None] - torch.arange(256)).abs()
banded = SparseLinear.from_linear(linear, distance <= 14)
print(f"a banded layer: {banded.values.numel():,} of {linear.weight.numel():,} weights kept")


# A model. Whatever has `mask(name, weight)` is an algorithm: this one keeps the 32 largest
# weights of each row.
class LargestOfEachRow:
    def mask(self, name: str, weight: torch.Tensor) -> torch.Tensor:
        kept = weight.abs().topk(32, dim=1).indices
        return torch.zeros_like(weight, dtype=torch.bool).scatter_(1, kept, True)


model = nn.Sequential(nn.Linear(256, 256), nn.ReLU(), nn.Linear(256, 256))
sparsify_(model, LargestOfEachRow())
for name in (0, 2):
    rows = model[name].row_offsets.diff().unique().tolist()
    print(f"layer {name}: {model[name].values.numel():,} kept, each row has {rows[0]}")

model(torch.randn(8, 256)).square().sum().backward()
values = model[0].values
shapes = f"values {list(values.shape)}, gradient {list(values.grad.shape)}"
print(f"pruned weights have no place in memory: {shapes}")

# Masks that torch.nn.utils.prune has made.
pruned = nn.Sequential(nn.Linear(256, 256), nn.ReLU(), nn.Linear(256, 256))
for layer in (pruned[0], pruned[2]):
    prune.l1_unstructured(layer, "weight", amount=0.9)
sparse = nn.Sequential(nn.Linear(256, 256), nn.ReLU(), nn.Linear(256, 256))
set_weights_(sparse, from_masks(pruned))
x = torch.randn(8, 256)
same = torch.allclose(sparse(x), pruned(x), atol=1e-6)
zeros = sparse[0].weight.sparsity
print(f"torch.nn.utils.prune: {zeros:.0%} zeros taken over, outputs equal: {same}")
