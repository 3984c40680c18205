"""How many weights each layer keeps.

uniform   every layer the same sparsity
erk       density of a layer in proportion to (N + K) / (N K), up to what it has room for: small
          layers stay denser (Erdos-Renyi, Mocanu et al. 2018, as RigL uses it); the total is exact
global    one threshold for all layers, over scores: decided in masks.py, not here
"""

from collections.abc import Mapping

DISTRIBUTIONS = ("uniform", "erk", "global")


def budgets(
    shapes: Mapping[str, tuple[int, int]],
    sparsity: float,
    kind: str,
    most: Mapping[str, int] | None = None,
) -> dict[str, int]:
    """Stored weights of each layer, from its shape (N, K). It has room for `most`, by default for
    all; and for as many as the sparsity asks of it alone."""
    sizes = {name: n * k for name, (n, k) in shapes.items()}
    most = sizes if most is None else most
    if kind == "uniform":
        return {name: round((1 - sparsity) * size) for name, size in sizes.items()}
    total = round((1 - sparsity) * sum(sizes.values()))
    # Layers that would pass what they have room for are full; the others share what is left.
    full: set[str] = set()
    while True:
        share = {name: sum(shapes[name]) for name in shapes if name not in full}
        left = total - sum(most[name] for name in full)
        scale = left / max(1, sum(share.values()))
        over = {name for name in share if scale * share[name] > most[name]}
        if not over:
            break
        full |= over
    wanted = {n: float(most[n]) if n in full else scale * share[n] for n in shapes}
    counts = {name: int(want) for name, want in wanted.items()}
    # Largest remainders get the weights that rounding down left over.
    by_remainder = sorted(wanted, key=lambda name: counts[name] - wanted[name])
    for name in by_remainder[: total - sum(counts.values())]:
        counts[name] += 1
    return counts
