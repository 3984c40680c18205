"""Sparsity algorithms: each says by `mask(name, weight)` which weights of a layer are kept."""

from .static import Static

ALGORITHMS = {"static": Static}


def get(name: str, **settings):
    """The algorithm of this name, made with `settings`. ValueError if there is none."""
    if name not in ALGORITHMS:
        known = ", ".join(sorted(ALGORITHMS))
        raise ValueError(f"algorithm: expected one of {known}, got {name!r}")
    return ALGORITHMS[name](**settings)
