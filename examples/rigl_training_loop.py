"""RigL in a training loop of your own: every 20 steps the smallest weights go, and as many grow
where the gradient of the dense weight is largest (arXiv 1911.11134).

    python examples/rigl_training_loop.py

prints something like

    step   20   loss 1.102   98.0% zeros   188 of 655 weights moved
    step   40   loss 0.898   98.0% zeros   148 of 655 weights moved
    ...
    step  200   loss 0.100   98.0% zeros   0 of 655 weights moved
    test loss of a fixed random pattern: 0.180, of RigL: 0.109
"""

import torch
from torch import Tensor, nn

from sparsekern import Static, parameter_groups
from sparsekern.sparsity import RigL


def data(count: int, seed: int) -> tuple[Tensor, Tensor]:
    """Inputs of which only the first 8 of 64 matter: a pattern has something to find."""
    x = torch.randn(count, 64, generator=torch.Generator().manual_seed(seed))
    return x, (x[:, :8].sin().sum(1, keepdim=True) + x[:, :1] * x[:, 1:2]) / 2


def places(layer) -> Tensor:
    """Where the weights of a SparseLinear stand, as row * in_features + column."""
    rows = torch.arange(layer.out_features).repeat_interleave(layer.row_offsets.diff())
    return rows * layer.in_features + layer.col_indices


def train(algorithm, is_shown: bool) -> float:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(64, 512), nn.ReLU(), nn.Linear(512, 64), nn.ReLU())
    model.add_module("head", nn.Linear(64, 1))  # stays dense
    algorithm.apply(model)  # 1. the layers become sparse
    optimizer = torch.optim.AdamW(parameter_groups(model, weight_decay=0.01), lr=3e-3)
    algorithm.apply(optimizer)  # 2. it counts the steps, and optimizer state moves with weights
    for step in range(1, 201):
        x, y = data(256, seed=step)
        before = places(model[0])
        optimizer.zero_grad()
        loss = nn.functional.mse_loss(model(x), y)
        loss.backward()
        optimizer.step()  # 3. at its update steps this changes the pattern
        if is_shown and step % 20 == 0:
            moved = int((~torch.isin(places(model[0]), before)).sum())
            line = f"step {step:4}   loss {loss.item():.3f}   {model[0].weight.sparsity:.1%} zeros"
            print(f"{line}   {moved:,} of {len(before):,} weights moved")
    x, y = data(4096, seed=0)
    return nn.functional.mse_loss(model(x), y).item()


drop = {"type": "cosine", "init": 0.3, "half_period": 150}  # the share that moves, falling to 0
rigl = train(RigL(0.98, drop_fraction=drop, update={"freq": 20, "stop": 150}), is_shown=True)
static = train(Static(0.98), is_shown=False)
print(f"test loss of a fixed random pattern: {static:.3f}, of RigL: {rigl:.3f}")
