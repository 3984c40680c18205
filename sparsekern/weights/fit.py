"""Weights into a model, in place: all of them, or an error and the model as it was."""

import warnings
from collections.abc import Iterable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from ..nn import SparseLinear, replace_modules
from ..nn.kinds import is_conv1d
from ..nn.stand_ins import StandIn
from ..nn.stored import own_weight, transposed
from ..nn.substitutes import sizes_of_layers, substitute
from ..tensor import SparseTensor
from .layouts import BUFFERS, Weights, check_named, join, weights_of, with_widths
from .names import as_in, shared_names

__all__ = ["set_weights_"]


def set_weights_(model: nn.Module, weights: Weights) -> nn.Module:
    """Give a model these weights, in place. A layer becomes sparse where its weight is a
    SparseTensor: nn.Linear, transformers' Conv1D, and what `accelerate_` makes sparse beside them.
    It becomes dense where its weight is. A SparseTensor for another module, an embedding for
    instance, is written out, with a warning.

    Names are those of the dense model, or of the state_dict of a sparse one. They must match, but
    for weights that the model ties to one that is there, for what torch.compile, DDP and FSDP add
    to them, and for a prefix of all of them.

    ValueError where something does not fit; the model is then as it was."""
    check_named(weights)
    mine, modules = weights_of(model), dict(model.named_modules(remove_duplicate=False))
    sizes = {name: sizes_of_layers(module) for name, module in modules.items()}
    try:
        weights = with_widths(weights)
    except ValueError as error:
        raise ValueError(f"weights: {error}") from error
    weights = _joined(modules, mine, sizes, weights)
    shared = shared_names(model)
    weights = _tied(shared, weights)
    for name, t in weights.items():
        _check_can_be_copied(name, t, mine.get(name))
    tied = [group for group in shared if len({modules[_module(name)] for name in group}) > 1]
    dense = {name: "tied" for group in tied for name in group if _is_sparse(weights.get(name))}
    weights = _written_out(weights, dense)

    swaps = _swaps(modules, sizes, weights)
    filled: set[str] = set()  # what has its weight already
    for name, new in swaps.items():
        mine = {n: t for n, t in mine.items() if not n.startswith(join(name, ""))}
        added = {join(name, n): t for n, t in weights_of(new).items()}
        mine, filled = mine | added, filled | added.keys()
    dense |= {
        name: f"of {type(modules[_module(name)]).__name__}"
        for name, t in weights.items()
        if _is_sparse(t) and isinstance(mine.get(name), Tensor)
    }
    weights = _written_out(weights, dense)
    _check_fit(mine, weights)
    if dense:
        which = ", ".join(f"{name} ({why})" for name, why in sorted(dense.items()))
        warnings.warn(f"set_weights_: written out, for they stay dense: {which}", stacklevel=2)

    new_modules = {modules[name]: new for name, new in swaps.items()}
    model = replace_modules(model, lambda name, module: new_modules.get(module))
    state: dict[str, Tensor] = {}
    for name, t in weights.items():
        if isinstance(t, SparseTensor):
            layer: Any = model.get_submodule(_module(name))
            own = layer.weight if name in filled else own_weight(layer, t)
            parts = (own.row_offsets, own.col_indices, own.values.detach())
            stem = name.removesuffix("weight")
            state |= {stem + part: data for part, data in zip(BUFFERS, parts, strict=True)}
        else:
            state[name] = t
    try:
        model.load_state_dict(state)
    except RuntimeError as error:
        raise ValueError(f"weights: they do not fit the model: {error}") from error
    return model


def _stores_transpose(module: nn.Module) -> bool:
    return is_conv1d(module) or getattr(module, "stores_transpose", False)


def _is_sparse(w: object) -> bool:
    return isinstance(w, SparseTensor)


def _module(name: str) -> str:
    """The name of the module that has this weight."""
    return name.rpartition(".")[0]


def _weight(*names: str) -> str:
    """The name of the weight of a layer in a module."""
    return ".".join([*filter(None, names), "weight"])


def _swaps(
    modules: dict[str, nn.Module], sizes: dict[str, dict[str, tuple[int, int]]], weights: Weights
) -> dict[str, nn.Module]:
    """What takes the place of which module for these weights, none of them inside of another."""
    swaps: dict[str, nn.Module] = {}
    made: dict[nn.Module, nn.Module | None] = {}  # a module may sit in several places
    for name, module in modules.items():  # those that hold others come before them
        parts = name.split(".") if name else []
        if any(".".join(parts[:i]) in swaps for i in range(len(parts))):
            continue
        if module not in made:
            made[module] = _swap(name, module, sizes[name], weights)
        new = made[module]
        if new is not None:
            swaps[name] = new
    return swaps


def _swap(
    name: str, module: nn.Module, sizes: dict[str, tuple[int, int]], weights: Weights
) -> nn.Module | None:
    """What takes a module's place for these weights, with those that are sparse in it; None where
    it stays."""
    if isinstance(module, SparseLinear):
        is_dense = isinstance(weights.get(join(name, "weight")), Tensor)
        return module.to_dense() if is_dense else None
    if isinstance(module, StandIn):
        own = [n for n, w in weights_of(module).items() if isinstance(w, SparseTensor)]
        return None if all(join(name, n) in weights for n in own) else module.to_dense()
    found = {inner: weights.get(_weight(name, inner)) for inner in sizes}
    if not found or not all(isinstance(w, SparseTensor) for w in found.values()):
        return None

    def make(
        kind: type[SparseLinear],
        inner: str,
        shape: Sequence[int],
        bias: nn.Parameter | None,
        parameter: nn.Parameter,
    ) -> SparseLinear:
        w = found[inner]
        assert isinstance(w, SparseTensor)
        if tuple(w.shape) != sizes[inner]:
            full = _weight(name, inner)
            raise ValueError(
                f"weights: expected {full} of shape {sizes[inner]}, got {tuple(w.shape)}"
            )
        w = w.detach().to(parameter.device, parameter.dtype)
        w = transposed(w) if kind.stores_transpose else w
        values = nn.Parameter(w.values, parameter.requires_grad)
        return kind(shape[1], shape[0], w.row_offsets, w.col_indices, values, bias)

    return substitute(module, make)


def _joined(
    modules: dict[str, nn.Module],
    mine: Weights,
    sizes: dict[str, dict[str, tuple[int, int]]],
    weights: Weights,
) -> Weights:
    """Under the names of the model, and with a SparseTensor for the three tensors that a
    SparseLinear has in its state_dict."""
    shapes: dict[str, tuple[int, ...]] = {n: w.shape for n, w in mine.items() if _is_sparse(w)}
    for name, layers in sizes.items():
        shapes |= {_weight(name, inner): shape for inner, shape in layers.items()}
    weights = as_in({*mine, *shapes}, weights)
    joined = dict(weights)
    for name, shape in shapes.items():
        stem = name.removesuffix("weight")
        rows, cols, values = (weights.get(stem + part) for part in BUFFERS)
        if rows is None or cols is None or values is None:
            continue
        if name in weights:
            raise ValueError(f"weights: {name} is there twice, dense and sparse")
        module = modules.get(_module(name))
        is_turned = module is not None and _stores_transpose(module)
        shape = shape[::-1] if is_turned else shape
        try:
            w = SparseTensor(rows, cols, values, shape)  # type: ignore[arg-type]
        except (TypeError, ValueError) as error:
            raise ValueError(f"weights: {name}: {error}") from error
        joined[name] = transposed(w) if is_turned else w
        for part in BUFFERS:
            del joined[stem + part]
    return joined


def _tied(shared: list[list[str]], weights: Weights) -> Weights:
    """With the names that files leave out since the model has their tensor under another one."""
    added: Weights = {}
    for group in shared:
        if there := [name for name in group if name in weights]:
            for name in there[1:]:
                if not _same(weights[there[0]], weights[name]):
                    raise ValueError(
                        f"weights: the model has one tensor for {there[0]} and {name}, got two "
                        "that differ"
                    )
            added |= {name: weights[there[0]] for name in group if name not in weights}
    return weights | added


def _same(a: object, b: object) -> bool:
    """Whether two weights of one parameter are one; what is no weight is refused elsewhere."""
    if a is b:
        return True
    a, b = (w.to_dense() if isinstance(w, SparseTensor) else w for w in (a, b))
    if not isinstance(a, Tensor) or not isinstance(b, Tensor) or a.is_meta or b.is_meta:
        return True
    if a.shape != b.shape or a.layout != b.layout or a.dtype != b.dtype or a.device != b.device:
        return a.shape != b.shape
    return torch.equal(a, b)


def _check_fit(mine: Weights, weights: Weights) -> None:
    for name, t in weights.items():
        want = mine.get(name)
        if want is None:
            continue
        if t.shape != want.shape:
            raise ValueError(
                f"weights: expected {name} of shape {tuple(want.shape)}, got {tuple(t.shape)}"
            )
        if t.dtype == torch.bool and want.dtype != torch.bool:
            raise ValueError(
                f"weights: expected numbers for {name}, got a mask; "
                "SparseTensor.from_dense(weight, mask) makes a weight of both"
            )
    missing, others = sorted(mine.keys() - weights.keys()), sorted(weights.keys() - mine.keys())
    if missing or others:
        raise ValueError(
            "weights: they do not fit the model"
            + f"; missing: {', '.join(missing)}" * bool(missing)
            + f"; unexpected: {', '.join(others)}" * bool(others)
        )


def _check_can_be_copied(name: str, t: Any, to: Any) -> None:
    """ValueError for what `load_state_dict` would refuse half-way, or copy as something else."""
    if isinstance(t, SparseTensor):
        if t.is_transposed:
            raise ValueError(f"weights: {name} is a transpose, expected W itself")
        t = t.values
    if isinstance(to, SparseTensor):
        to = to.values
    if isinstance(to, Tensor) and to.is_meta:
        raise ValueError(
            f"model: expected {name} in memory, got it on the meta device, where no weight stays: "
            "call to_empty(device=...) before, or load it before accelerate offloads the model"
        )
    to = t if to is None else to  # a name that the model lacks, so far
    if not isinstance(t, Tensor) or not isinstance(to, Tensor):
        if type(t) is not type(to):
            raise ValueError(f"weights: expected a tensor for {name}, got {type(t).__name__}")
    elif t.layout != torch.strided or t.is_meta or (t.is_complex() and not to.is_complex()):
        kind = "on the meta device" if t.is_meta else f"{t.dtype}, {t.layout}"
        is_torchs = not t.is_meta and t.layout != torch.strided
        hint = "; sparsekern.weights.from_zeros takes those of torch.sparse" * is_torchs
        raise ValueError(
            f"weights: expected {name} as {to.dtype} with its elements, got {kind}{hint}"
        )


def _written_out(weights: Weights, names: Iterable[str]) -> Weights:
    """With dense tensors for those of these that are sparse."""
    sparse = {name: w for name in names if isinstance(w := weights.get(name), SparseTensor)}
    return weights | {name: w.to_dense() for name, w in sparse.items()}
