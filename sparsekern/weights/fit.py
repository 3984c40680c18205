"""Weights into a model, in place: all of them, or an error and the model as it was."""

import warnings

import torch
from torch import Tensor, nn

from ..nn import SparseLinear, replace_modules
from ..tensor import SparseTensor
from .layouts import BUFFERS, Weights, join, weights_of
from .names import as_in, shared_names

__all__ = ["set_weights_"]


def set_weights_(model: nn.Module, weights: Weights) -> nn.Module:
    """Give a model these weights, in place. A layer becomes a SparseLinear where its weight is a
    SparseTensor, and an nn.Linear where it is dense. A SparseTensor for another module, an
    embedding for instance, is written out, with a warning.

    Names are those of the dense model, or of the state_dict of a sparse one. They must match, but
    for weights that the model ties to one that is there, for what torch.compile, DDP and FSDP add
    to them, and for a prefix of all of them.

    ValueError where something does not fit; the model is then as it was."""
    mine = weights_of(model)
    weights = _joined(mine, as_in(mine, weights))
    weights = _tied(model, weights)
    _check_fit(mine, weights)
    weights = _written_out(model, weights)

    def replace(name: str, module: nn.Module) -> nn.Module | None:
        weight = weights.get(join(name, "weight"))
        if type(module) is nn.Linear and isinstance(weight, SparseTensor):
            mine = weight.detach().to(module.weight.device, module.weight.dtype)
            values = nn.Parameter(mine.values, module.weight.requires_grad)
            layer = SparseLinear(
                weight.k, weight.n, mine.row_offsets, mine.col_indices, values, module.bias
            )
            return layer.train(module.training)
        if isinstance(module, SparseLinear) and isinstance(weight, Tensor):
            return module.to_linear()
        return None

    model = replace_modules(model, replace)
    state: dict[str, Tensor] = {}
    for name, t in weights.items():
        if isinstance(t, SparseTensor):
            parts = (t.row_offsets, t.col_indices, t.values.detach())
            layer = name.removesuffix("weight")
            state |= {layer + part: data for part, data in zip(BUFFERS, parts, strict=True)}
        else:
            state[name] = t
    try:
        model.load_state_dict(state)
    except RuntimeError as error:
        raise ValueError(f"weights: they do not fit the model: {error}") from error
    return model


def _joined(mine: Weights, weights: Weights) -> Weights:
    """With a SparseTensor for the three tensors that a SparseLinear has in its state_dict."""
    joined = dict(weights)
    for name, own in mine.items():
        stem = name.removesuffix("weight")
        rows, cols, values = (weights.get(stem + part) for part in BUFFERS)
        if name == stem or own.ndim != 2 or rows is None or cols is None or values is None:
            continue
        if name in weights:
            raise ValueError(f"weights: {name} is there twice, dense and sparse")
        try:
            joined[name] = SparseTensor(rows, cols, values, own.shape)  # type: ignore[arg-type]
        except (TypeError, ValueError) as error:
            raise ValueError(f"weights: {name}: {error}") from error
        for part in BUFFERS:
            del joined[stem + part]
    return joined


def _tied(model: nn.Module, weights: Weights) -> Weights:
    """With the names that files leave out since the model has their tensor under another one."""
    added: Weights = {}
    for group in shared_names(model):
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
        _check_can_be_copied(name, t, want)
        if t.shape != want.shape:
            raise ValueError(
                f"weights: expected {name} of shape {tuple(want.shape)}, got {tuple(t.shape)}"
            )
    missing, others = sorted(mine.keys() - weights.keys()), sorted(weights.keys() - mine.keys())
    if missing or others:
        raise ValueError(
            "weights: they do not fit the model"
            + f"; missing: {', '.join(missing)}" * bool(missing)
            + f"; unexpected: {', '.join(others)}" * bool(others)
        )


def _check_can_be_copied(name: str, t: object, to: Tensor | SparseTensor) -> None:
    """ValueError for what `load_state_dict` would refuse half-way, or copy as something else."""
    if isinstance(t, SparseTensor):
        if t.is_transposed:
            raise ValueError(f"weights: {name} is a transpose, expected W itself")
        t = t.values
    if isinstance(to, SparseTensor):
        to = to.values
    if not isinstance(t, Tensor) or not isinstance(to, Tensor):
        if type(t) is not type(to):
            raise ValueError(f"weights: expected a tensor for {name}, got {type(t).__name__}")
    elif t.layout != torch.strided or t.is_meta or (t.is_complex() and not to.is_complex()):
        kind = "on the meta device" if t.is_meta else f"{t.dtype}, {t.layout}"
        raise ValueError(f"weights: expected {name} as {to.dtype} with its elements, got {kind}")


def _written_out(model: nn.Module, weights: Weights) -> Weights:
    """With dense tensors for modules that hold no sparse weight, and where two hold the same."""
    modules = dict(model.named_modules(remove_duplicate=False))
    dense: dict[str, str] = {}
    for group in [*shared_names(model), *([name] for name in weights)]:
        owners = {modules[name.rpartition(".")[0]] for name in group}
        is_layer = all(type(m) is nn.Linear or isinstance(m, SparseLinear) for m in owners)
        if len(owners) > 1 or not is_layer or group[0].rpartition(".")[2] != "weight":
            why = "tied" if len(owners) > 1 else f"of {type(owners.pop()).__name__}"
            dense |= {name: why for name in group if isinstance(weights[name], SparseTensor)}
    if dense:
        which = ", ".join(f"{name} ({why})" for name, why in dense.items())
        warnings.warn(f"set_weights_: written out, for they stay dense: {which}", stacklevel=3)
    return weights | {name: weights[name].to_dense() for name in dense}
