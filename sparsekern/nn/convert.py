"""sparsify_ puts SparseLinear into a model; densify.py takes it out."""

import warnings
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import is_traceable_wrapper_subclass as is_wrapper

from ..indices import VALUE_DTYPES
from ..kernels.cuda.float8 import captured as captured_factors
from ..kernels.derived import forget_captures
from . import replaced
from .adapters import without_adapters
from .checks import check_model, refuse_sharded, refuse_wrapped
from .heads import HEAD_NAMES, ROUTER_NAMES, heads, routers
from .kinds import (
    has_own_forward,
    is_conv1d,
    is_experts,
    parameter_of,
    renew_weight,
    uses_of_parameters,
)
from .linear import SparseLinear, refuse_meta
from .stand_ins import SparseConv1D
from .warned import warn_of_hooks, warn_of_matrices, warn_of_others

KEEPS = "{} are sparse already and keep their pattern; densify_(model) comes before another one"
MANY_ZEROS = 0.2  # share of the weights from which on a model counts as pruned


def sparsify_(
    model: nn.Module,
    algorithm,
    filter_fn: Callable[[nn.Module, str], bool] | None = None,
    *,
    prune_again: bool = False,
) -> nn.Module:
    """Replace the nn.Linear modules of `model` by SparseLinear, in place, and return the model;
    also the Conv1D of transformers.

    Args:
        algorithm: has `mask(name, weight)` -> bool [N, K], True where a weight is kept. Of those in
            sparsekern.sparsity one that keeps its pattern: the others want apply(model), and
            apply(optimizer). Where it has a `param_filter` this says which layers to replace.
        filter_fn: filter_fn(module, name) says which nn.Linear to replace. By default all but the
            model's heads: those named `head` or `lm_head`, what get_output_embeddings() gives, and
            what comes after the last block (classifiers, poolers): of a list of them, or the one
            that holds attention; and the routers of mixtures: what is in a `router`, or in a `gate`
            beside `experts`.
        prune_again: that weights of which many are zero already may lose more.

    A model that is one nn.Linear itself cannot become another module in place: it stays dense, and
    the SparseLinear is returned. A weight that another module uses too (tied to an embedding) stays
    dense, and so does one with the attribute `requires_dense`. So do subclasses of nn.Linear, and
    layers that were given a forward of their own, with a warning; and adapters (LoRA's, by the
    marks of peft). Hooks of layers are not taken over, with a warning. Make the optimizer
    afterwards, or give one that was there before to `adopt_values_`: it must see the new
    Parameters. If an algorithm fails the model is unchanged. ValueError where there is nothing to
    replace, unless filter_fn said so, where more than 20 % of the weights are zero already and a
    mask would remove others, and for init_method from_zeros where none is zero. TypeError for a
    DistributedDataParallel, and for weights of other types than float32, bfloat16, float16 and
    float64.
    """
    refuse_wrapped("sparsify_", model)
    filter_fn = _filter_of(algorithm, model, filter_fn)
    chosen = _replaceable(model, filter_fn)
    if not chosen and not (filter_fn and _replaceable(model, lambda module, name: True)):
        raise ValueError(f"sparsify_: {nothing_in(model)}")
    linears = {n: m for n, m in chosen.items() if not isinstance(m, SparseLinear)}
    refuse_sharded("sparsify_", model, linears)
    refuse_unserved(chosen)
    dense = {name: _matrix(module) for name, module in linears.items()}
    if dense and not callable(getattr(algorithm, "mask", None)):
        raise TypeError(
            "algorithm: expected one that has mask(name, weight), as Static(0.75), "
            f"got {algorithm if isinstance(algorithm, int | float) else type(algorithm).__name__}"
        )
    if chosen and not dense:
        warnings.warn("sparsify_: " + KEEPS.format("all layers"), stacklevel=2)
    warn_of_hooks("sparsify_", linears)
    if filter_fn is None:
        warn_of_others("sparsify_", model, is_experts)
        warn_of_matrices("sparsify_", model)
    has_asked = prune_again or getattr(algorithm, "has_asked", False)
    zeros = 0.0 if has_asked else share_of_zeros(dense.values())
    if getattr(algorithm, "init_method", None) == "from_zeros":
        refuse_unpruned("sparsify_", dense.values())
    made: list[tuple[Tensor, SparseLinear]] = []

    def replace(name: str, module: nn.Module) -> nn.Module | None:
        if name not in dense:
            return None
        mask = algorithm.mask(name, dense[name])
        if mask is None:
            by = type(algorithm).__name__
            raise TypeError(f"{name}: expected a mask, bool [N, K], from {by}, got None")
        new = _with_mask(module, mask)
        if zeros > MANY_ZEROS and new.values.count_nonzero() < dense[name].count_nonzero():
            refuse_pruned("sparsify_", [*dense.values()])
        made.append((parameter_of(module), new))
        return new

    model = replace_modules(model, replace)
    for weight, layer in made:
        replaced.note(weight, layer)
    return model


def refuse_unserved(layers: Mapping[str, nn.Module]) -> None:
    """NotImplementedError for dense weights on meta, TypeError for those of types or layouts that
    sparse ones have not."""
    for name, module in layers.items():
        full = f"{name}.weight" if name else "weight"
        refuse_meta(full, module)
        w = module.weight
        if not isinstance(w, Tensor):  # sparse already
            continue
        if w.dtype not in VALUE_DTYPES or w.layout != torch.strided or is_wrapper(w):
            kind = type(w).__name__ if is_wrapper(w) else f"{w.dtype}, {w.layout}"
            raise TypeError(
                f"{full}: expected float32, bfloat16, float16 or float64 with its elements, got "
                f"{kind}: convert it first, or leave it out by a filter_fn or param_filter"
            )


def _filter_of(
    algorithm, model: nn.Module, filter_fn: Callable[[nn.Module, str], bool] | None
) -> Callable[[nn.Module, str], bool] | None:
    """filter_fn, or that of the algorithm. ValueError for an algorithm that wants more than a
    model, and where there are two filters."""
    if isinstance(algorithm, type):
        raise TypeError(
            f"algorithm: expected an instance, as Static(0.75), got the class {algorithm.__name__}"
        )
    by = type(algorithm).__name__
    if getattr(algorithm, "moves", False):
        raise ValueError(
            f"algorithm: expected one that keeps its pattern, got {by}, which changes it in "
            f"training: use {by}(...).apply(model), then apply(optimizer)"
        )
    if getattr(algorithm, "param_filter", None) is None:
        return filter_fn
    if filter_fn is not None:
        raise ValueError(f"filter_fn: expected none beside the param_filter of {by}")
    names = algorithm.chosen_in(model)
    return lambda module, name: name in names


def _matrix(module: nn.Module) -> Tensor:
    """W [N, K], a view."""
    assert isinstance(module.weight, Tensor)
    weight = module.weight.detach()
    return weight.t() if is_conv1d(module) else weight


def _with_mask(module: nn.Module, mask: Tensor) -> SparseLinear:
    if is_conv1d(module):
        return SparseConv1D.from_dense(module, mask.t())
    assert isinstance(module, nn.Linear)
    return SparseLinear.from_linear(module, mask)


def share_of_zeros(weights: Iterable[Tensor]) -> float:
    """Of all these weights; those that are zero all over were never trained and do not count."""
    sizes = [(int(w.count_nonzero()), w.numel()) for w in weights if not w.is_meta]
    used = [(nnz, size) for nnz, size in sizes if nnz]
    return 1 - sum(nnz for nnz, _ in used) / max(1, sum(size for _, size in used)) if used else 0.0


def refuse_pruned(caller: str, weights: Sequence[Tensor]) -> None:
    """ValueError where many of the weights that are about to be pruned are zero already."""
    if (zeros := share_of_zeros(weights)) > MANY_ZEROS:
        raise ValueError(
            f"{caller}: {zeros:.0%} of the weights are zero already, and others would go; "
            "sparsekern.accelerate_(model, example) takes the zeros that are there; to prune all "
            "the same give prune_again=True"
        )


def refuse_unpruned(caller: str, weights: Iterable[Tensor]) -> None:
    """ValueError where zeros are to be kept as they are, and there is none."""
    sizes = [(int(w.count_nonzero()), w.numel()) for w in weights if not w.is_meta]
    if sizes and all(nnz == size for nnz, size in sizes):
        raise ValueError(
            f"{caller}: init_method from_zeros keeps the zeros that are there, and none of the "
            f"{len(sizes)} layers has one: prune the model first, or give another init_method"
        )


def sparsifiable(
    model: nn.Module, filter_fn: Callable[[nn.Module, str], bool] | None = None
) -> dict[str, nn.Linear | SparseLinear]:
    """The nn.Linear that `sparsify_` would replace, and those that are a SparseLinear already."""
    check_model(model)
    chosen = _replaceable(model, filter_fn)
    return {n: m for n, m in chosen.items() if isinstance(m, nn.Linear | SparseLinear)}


def _replaceable(
    model: nn.Module, filter_fn: Callable[[nn.Module, str], bool] | None
) -> dict[str, nn.Module]:
    """With the Conv1D."""
    uses = uses_of_parameters(model)
    spared = set() if filter_fn else heads(model) | routers(model)

    def chosen(name: str, module: nn.Module) -> bool:
        if not isinstance(module, SparseLinear):
            weight = parameter_of(module)
            if uses[id(weight)] > 1 or getattr(weight, "requires_dense", False):
                return False
            if has_own_forward(module):
                return False
        return filter_fn(module, name) if filter_fn else name not in spared

    found = {
        name: module
        for name, module in without_adapters(model)
        if type(module) is nn.Linear or isinstance(module, SparseLinear) or is_conv1d(module)
        if chosen(name, module)
    }
    for module in found.values():
        if not isinstance(module, SparseLinear):
            renew_weight(module)
    return found


def forget_graphs_(model: nn.Module) -> nn.Module:
    """Say that no CUDA graph that was captured with this model is replayed any more, so that its
    patterns may change, and factors of products in float8; returns the model. Nobody else can tell
    when a graph is gone."""
    check_model(model)
    for module in model.modules():
        if isinstance(module, SparseLinear):
            forget_captures(module.col_indices)
        if (noted := module._buffers.get("float8_noted")) is not None:
            captured_factors.discard(noted.data_ptr())
    return model


def replace_modules(
    model: nn.Module, replace: Callable[[str, nn.Module], nn.Module | None]
) -> nn.Module:
    """Put replace(name, module) in the place of each module for which it is not None. What a
    replaced module held is not looked at. TypeError, and an unchanged model, where it is neither
    None nor a module."""
    check_model(model)
    if not callable(replace):
        got = type(replace).__name__
        raise TypeError(f"replace: expected a function of a name and a module, got {got}")
    swaps: dict[nn.Module, nn.Module | None] = {}
    # A loop: a function that calls itself would keep what was replaced until garbage is collected.
    waiting = [("", model)]
    while waiting:
        name, module = waiting.pop()
        if module in swaps:
            continue
        new = swaps[module] = replace(name, module)
        if new is None:
            children = [
                (f"{name}.{child_name}" if name else child_name, child)
                for child_name, child in module.named_children()
            ]
            waiting += reversed(children)
        elif not isinstance(new, nn.Module):
            where, got = name or "the model", type(new).__name__
            raise TypeError(f"replace: expected a module or None for {where}, got {got}")
    if (root := swaps[model]) is not None:
        return root
    # A module may sit in several places.
    for parent in [module for module, new in swaps.items() if new is None]:
        for name, child in list(parent._modules.items()):
            if child is not None and swaps[child] is not None:
                setattr(parent, name, swaps[child])
    return model


def nothing_in(model: nn.Module) -> str:
    """Why no layer of the model can become a SparseLinear."""

    def has_matrix(module: nn.Module) -> bool:
        return any(p is not None and p.ndim > 1 for p in module._parameters.values())

    kinds = Counter(type(m).__name__ for m in model.modules() if has_matrix(m))
    there = ", ".join(f"{count} {kind}" for kind, count in sorted(kinds.items())) or "none"
    return (
        f"no nn.Linear to replace; modules with a matrix: {there}. Its subclasses stay dense, and "
        "tied weights, those that are marked requires_dense, and without a filter_fn the model's "
        f"heads: layers named {' or '.join(HEAD_NAMES)}, and those after the last of its blocks; "
        f"and routers: those in a {ROUTER_NAMES[0]}, or in a {ROUTER_NAMES[1]} beside experts"
    )
