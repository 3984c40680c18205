"""How much faster is sparse on this machine? Both are timed in turn, and the median of the ratios
counts: whatever else the machine does then disturbs both alike.

    python examples/compare_to_dense.py

prints a table like this one, which tells you nothing about your machine:

    1024 x 1024, float32, 1 thread: times faster than torch's dense product
     tokens    50%    75%    90%    95%
          1   0.54   0.68   1.43   2.19
         16   2.13   3.88   7.53  11.96
        256   2.29   3.63   6.53   9.77
    Below 1.00 is a loss. Quartiles of the last cell: 9.42 to 10.06.

Here dense is torch.mm alone. `python -m sparsekern bench` asks other dense libraries too, which
are faster than torch's on some machines.
"""

import statistics
import time

import torch

from sparsekern import SparseTensor

SIZE, ROUNDS = 1024, 21


def seconds(product, repeats: int) -> float:
    began = time.perf_counter()
    for _ in range(repeats):
        product()
    return (time.perf_counter() - began) / repeats


def ratios(sparse, dense) -> list[float]:
    """Dense time over sparse time, of rounds that take turns."""
    seconds(sparse, 3)  # the first calls prepare
    repeats = max(1, int(2e-3 / seconds(dense, 3)))  # a round takes some milliseconds
    return [seconds(dense, repeats) / seconds(sparse, repeats) for _ in range(ROUNDS)]


torch.manual_seed(0)
torch.set_num_threads(1)
sparsities = (0.5, 0.75, 0.9, 0.95)
print(f"{SIZE} x {SIZE}, float32, 1 thread: times faster than torch's dense product")
print(" tokens" + "".join(f"{s:>7.0%}" for s in sparsities))
with torch.no_grad():
    for tokens in (1, 16, 256):
        x, w = torch.randn(tokens, SIZE), torch.randn(SIZE, SIZE)
        row = []
        for sparsity in sparsities:
            W = SparseTensor.from_dense(w, torch.rand(SIZE, SIZE) >= sparsity)
            cell = ratios(lambda x=x, W=W: x @ W.T, lambda x=x, w=w: x @ w.T)
            row.append(statistics.median(cell))
        print(f"{tokens:7}" + "".join(f"{r:7.2f}" for r in row))
low, _, high = statistics.quantiles(cell, n=4)
print(f"Below 1.00 is a loss. Quartiles of the last cell: {low:.2f} to {high:.2f}.")
