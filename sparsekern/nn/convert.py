"""sparsify_ and densify_ swap SparseLinear in and out of a model."""

from collections import Counter
from collections.abc import Callable

from torch import Tensor, nn
from torch.optim import Optimizer

from ..kernels.derived import forget_captures
from ..tensor import SparseTensor
from . import replaced
from .adapters import without_adapters
from .linear import SparseLinear, refuse_meta

__all__ = ["densify_", "forget_graphs_", "replace_modules", "sparsifiable", "sparsify_"]

HEAD_NAMES = ("head", "lm_head")


def sparsify_(
    model: nn.Module, algorithm, filter_fn: Callable[[nn.Module, str], bool] | None = None
) -> nn.Module:
    """Replace the nn.Linear modules of `model` by SparseLinear, in place, and return the model.

    Args:
        algorithm: has `mask(name, weight)` -> bool [N, K], True where a weight is kept.
        filter_fn: filter_fn(module, name) says which nn.Linear to replace. By default all but
            those named `head` or `lm_head`.

    A weight that another module uses too (tied to an embedding) stays dense, and so does one with
    the attribute `requires_dense`. So do subclasses of nn.Linear: they compute something of their
    own; and adapters (LoRA's, by the marks of peft). Make the optimizer afterwards, or give one
    that was there before to `adopt_values_`: it must see the new Parameters. If an algorithm fails
    the model is unchanged. ValueError where there is nothing to replace, unless filter_fn said so.
    """
    chosen = sparsifiable(model, filter_fn)
    if not chosen and not (filter_fn and sparsifiable(model, lambda module, name: True)):
        raise ValueError(f"sparsify_: {_nothing_in(model)}")
    for name, module in chosen.items():
        refuse_meta(f"{name}.weight" if name else "weight", module)

    def replace(name: str, module: nn.Module) -> nn.Module | None:
        if name not in chosen or isinstance(module, SparseLinear):
            return None
        assert isinstance(module, nn.Linear)  # says sparsifiable
        layer = SparseLinear.from_linear(module, algorithm.mask(name, module.weight.detach()))
        return replaced.note(module.weight, layer)

    return replace_modules(model, replace)


def sparsifiable(
    model: nn.Module, filter_fn: Callable[[nn.Module, str], bool] | None = None
) -> dict[str, nn.Linear | SparseLinear]:
    """The layers that `sparsify_` would replace, and those that are a SparseLinear already."""
    uses = Counter(id(p) for module in model.modules() for p in module._parameters.values())

    def chosen(name: str, module: nn.Module) -> bool:
        if not isinstance(module, SparseLinear):
            if uses[id(module.weight)] > 1 or getattr(module.weight, "requires_dense", False):
                return False
        return filter_fn(module, name) if filter_fn else name.split(".")[-1] not in HEAD_NAMES

    return {
        name: module
        for name, module in without_adapters(model)
        if type(module) is nn.Linear or isinstance(module, SparseLinear)
        if chosen(name, module)
    }


def densify_(model: nn.Module, optimizer: Optimizer | None = None) -> nn.Module:
    """Replace every SparseLinear of `model` by its nn.Linear, in place, and return the model.

    With an optimizer, the dense weights take the place of the values in its groups and its state
    becomes dense too: zero where nothing was stored. ValueError, and an unchanged model, for state
    of another shape than the values.
    """
    if optimizer:
        for layer in (m for m in model.modules() if isinstance(m, SparseLinear)):
            for key, t in optimizer.state.get(layer.values, {}).items():
                if isinstance(t, Tensor) and t.numel() != 1 and t.shape != layer.values.shape:
                    raise ValueError(
                        f"densify_: the optimizer keeps {key!r} of shape {tuple(t.shape)} for the "
                        f"{layer.values.shape[0]} values of {layer}, expected as many"
                    )
    dense: dict[nn.Parameter, tuple[Tensor, SparseLinear]] = {}

    def replace(name: str, module: nn.Module) -> nn.Module | None:
        if not isinstance(module, SparseLinear):
            return None
        linear = module.to_linear()
        dense[module.values] = linear.weight, module
        return linear

    model = replace_modules(model, replace)
    if optimizer:
        for group in optimizer.param_groups:
            group["params"] = [dense[p][0] if p in dense else p for p in group["params"]]
        for values, (weight, module) in dense.items():
            if values in optimizer.state:
                state = optimizer.state.pop(values)
                optimizer.state[weight] = {k: _densified(t, module) for k, t in state.items()}
    return model


def _densified(state, module: SparseLinear):
    """A part of the optimizer state of the module's values; `step` and the like stay."""
    if not isinstance(state, Tensor) or state.shape != module.values.shape:
        return state
    n, k = module.out_features, module.in_features
    return SparseTensor._trusted(module.row_offsets, module.col_indices, state, n, k).to_dense()


def forget_graphs_(model: nn.Module) -> nn.Module:
    """Say that no CUDA graph that was captured with this model is replayed any more, so that its
    patterns may change; returns the model. Nobody else can tell when a graph is gone."""
    for module in model.modules():
        if isinstance(module, SparseLinear):
            forget_captures(module.col_indices)
    return model


def replace_modules(
    model: nn.Module, replace: Callable[[str, nn.Module], nn.Module | None]
) -> nn.Module:
    """Put replace(name, module) in the place of each module for which it is not None."""
    swaps = {module: replace(name, module) for name, module in model.named_modules()}
    # A module may sit in several places.
    for name, module in list(model.named_modules(remove_duplicate=False)):
        new = swaps[module]
        if new is None:
            continue
        if module is model:
            return new
        parent, _, child = name.rpartition(".")
        setattr(model.get_submodule(parent), child, new)
    return model


def _nothing_in(model: nn.Module) -> str:
    def has_matrix(module: nn.Module) -> bool:
        return any(p is not None and p.ndim > 1 for p in module._parameters.values())

    kinds = Counter(type(m).__name__ for m in model.modules() if has_matrix(m))
    there = ", ".join(f"{count} {kind}" for kind, count in sorted(kinds.items())) or "none"
    return (
        f"no nn.Linear to replace; modules with a matrix: {there}. Its subclasses stay dense, and "
        "tied weights, those that are marked requires_dense, and without a filter_fn the layers "
        f"named {' or '.join(HEAD_NAMES)}"
    )
