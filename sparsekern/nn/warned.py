"""Warnings of what a conversion leaves dense, or does not take over."""

import warnings
from collections import Counter
from collections.abc import Callable, Iterable, Mapping

from torch import nn

from .kinds import CONVOLUTIONS, has_hooks, has_own_forward, is_conv1d, is_experts, why_not
from .linear import SparseLinear

OF_EXPERTS = "sparsekern.models.prune.prune_ prunes them, sparsekern.accelerate_ makes them sparse"
OF_FORWARDS = "they are subclasses or have a forward of their own, which no sparse layer would run"
OF_UNKNOWN = "no sparse layer takes their place"
OF_OTHERS = "sparsekern.accelerate_ takes the zeros of pruned convolutions and attention"


def warn_of_hooks(caller: str, layers: Mapping[str, nn.Module]) -> None:
    """A warning where layers that are about to be replaced have hooks."""
    if hooked := [name or "the model" for name, layer in layers.items() if has_hooks(layer)]:
        warnings.warn(
            f"{caller}: {', '.join(hooked[:3])}{', ...' * (len(hooked) > 3)} had hooks, which the "
            "new layers do not have: register them again",
            stacklevel=3,
        )


def warn_of_others(
    caller: str,
    model: nn.Module,
    *kinds: Callable[[nn.Module], bool],
    advice: str = OF_EXPERTS,
    least: float = 0.0,
    level: int = 3,
) -> None:
    """A warning where modules of these kinds, which nothing is done to, have this share of the
    model's weights or more."""

    def size(modules: Iterable[nn.Module]) -> int:
        held = {p for m in modules for p in m._parameters.values() if p is not None}
        return sum(p.numel() for p in held if p.ndim > 1)

    left = [m for m in model.modules() if size([m]) and any(is_kind(m) for is_kind in kinds)]
    share = size(left) / max(1, size(model.modules()))
    if left and share >= least:
        names = Counter(type(m).__name__ for m in left)
        warnings.warn(
            f"{caller}: {', '.join(f'{n} {name}' for name, n in names.items())} with "
            f"{share:.0%} of the weights stay dense; {advice}",
            stacklevel=level,
        )


def warn_of_matrices(caller: str, model: nn.Module) -> None:
    """The same of all other modules with matrices, where those of one sort hold a twentieth of the
    weights or more. Embeddings are never meant."""
    sorts = ((_can_be_sparse, OF_OTHERS), (_computes_more, OF_FORWARDS), (_is_unknown, OF_UNKNOWN))
    for is_sort, advice in sorts:
        warn_of_others(caller, model, is_sort, advice=advice, least=0.05, level=4)


def _can_be_sparse(module: nn.Module) -> bool:
    return isinstance(module, (*CONVOLUTIONS, nn.MultiheadAttention)) and why_not(module) is None


def _computes_more(module: nn.Module) -> bool:
    """Whether it is an nn.Linear or Conv1D that does not compute what its class says, or may not.
    That of attention is told of with it."""
    if isinstance(module, nn.modules.linear.NonDynamicallyQuantizableLinear):
        return False
    if isinstance(module, nn.Linear) and type(module) is not nn.Linear:
        return True
    return has_own_forward(module) and (isinstance(module, nn.Linear) or is_conv1d(module))


def _is_unknown(module: nn.Module) -> bool:
    is_linear = isinstance(module, nn.Linear | SparseLinear) or is_conv1d(module)
    is_known = is_linear or is_experts(module) or _can_be_sparse(module)
    return not is_known and not isinstance(module, nn.Embedding | nn.EmbeddingBag)
