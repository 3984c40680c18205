"""densify_ puts dense modules in the places of sparse ones."""

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from ..tensor import SparseTensor
from . import replaced
from .checks import check_optimizer, refuse_sharded, refuse_wrapped
from .convert import replace_modules
from .kinds import refuse_made_anew
from .linear import SparseLinear
from .optimizers import check_can_swap, first_number, holders, swap_
from .stand_ins import StandIn
from .warned import warn_of_hooks


def packed_name(model: nn.Module) -> str | None:
    """The name of the first layer that `pack_` made."""
    for name, module in model.named_modules():
        if hasattr(module, "packed_bytes"):  # in a group, `shared.whole` of its layers
            return name.removesuffix("shared.whole").removesuffix(".") or "the model"
    return None


def densify_(model: nn.Module, optimizer: Optimizer | None = None) -> nn.Module:
    """Replace every SparseLinear of `model` by its nn.Linear, in place, and return the model. What
    stands in for another module (Conv1D, a convolution, attention, experts) becomes that again. A
    model that is one SparseLinear itself stays so, and the nn.Linear is returned.

    Layers that share their values share the weight. Hooks of layers are not taken over, with a
    warning. With an optimizer, the dense weights take the place of the values in its groups and its
    state becomes dense too: where nothing was stored it is what torch starts with. Another one that
    holds the values would leave the weights untrained: its next step is an error. ValueError, and
    an unchanged model, for state of another shape than the values, for an optimizer that keeps
    parameters in ways of its own, for values that are parametrized or made anew in each forward
    pass, for shared ones at different places, and for layers that `pack_` made. TypeError for a
    DistributedDataParallel. NotImplementedError for what FSDP2 has cut into shards.
    """
    refuse_wrapped("densify_", model)
    if optimizer is not None:
        check_optimizer(optimizer)
    if (packed := packed_name(model)) is not None:
        raise ValueError(
            f"densify_: {packed} is packed, and from that there is no way back: keep "
            "the model as it was before pack_"
        )
    layers = {n or "the model": m for n, m in model.named_modules() if isinstance(m, SparseLinear)}
    refuse_sharded("densify_", model, layers)
    _refuse_without_values(layers)
    if optimizer:
        _check_can_densify(optimizer, list(layers.values()))
    sparse = {n: m for n, m in model.named_modules() if isinstance(m, SparseLinear | StandIn)}
    warn_of_hooks("densify_", sparse)
    dense: dict[nn.Parameter, tuple[Any, SparseLinear]] = {}
    becomes: list[tuple[SparseLinear, Tensor]] = []

    def replace(name: str, module: nn.Module) -> nn.Module | None:
        if isinstance(module, StandIn):
            _refuse_held(module, optimizer)
            new = module.to_dense()
            matrix = next(p for p in new.parameters() if p.ndim > 1)
            becomes.extend((m, matrix) for m in module.modules() if isinstance(m, SparseLinear))
            return new
        if not isinstance(module, SparseLinear):
            return None
        linear = module.to_linear()
        weight, first = dense.setdefault(module.values, (linear.weight, module))
        if first is not module:  # layers that share their values go on sharing them
            if weight.shape != linear.weight.shape or not _same_pattern(first, module):
                raise ValueError(
                    f"densify_: {name} shares its values with another layer, which has them at "
                    "other places: no dense weight is that of both"
                )
            linear.weight = weight
        becomes.append((module, weight))
        return linear

    model = replace_modules(model, replace)
    if optimizer:
        states = [(o, p) for o in holders([optimizer]) for p in dense if p in o.state]
        moved = [
            {
                key: _densified(t, dense[p][1], first_number(o, p, key))
                for key, t in o.state[p].items()
            }
            for o, p in states
        ]
        swap_(optimizer, {p: weight for p, (weight, _) in dense.items()})
        for (o, p), state in zip(states, moved, strict=True):
            o.state.pop(p, None)
            o.state[dense[p][0]] = state
    for layer, new in becomes:
        replaced.note_dense(layer, new)
    return model


def _refuse_without_values(layers: Mapping[str, SparseLinear]) -> None:
    """ValueError where the dense weight cannot come from the Parameters."""
    refuse_made_anew(layers)
    for name, layer in layers.items():
        for part in ("values", "bias"):
            if part not in layer._parameters:
                raise ValueError(
                    f"densify_: the {part} of {name} are parametrized, and would not be any more; "
                    "call torch.nn.utils.parametrize.remove_parametrizations first"
                )


def _check_can_densify(optimizer: Optimizer, layers: Sequence[SparseLinear]) -> None:
    check_can_swap(optimizer, [layer.values for layer in layers])
    for holder in holders([optimizer]):
        for layer in layers:
            state = holder.state.get(layer.values, {})
            if isinstance(holder, torch.optim.Adafactor) and state:
                raise ValueError(
                    "densify_: Adafactor keeps other state for a matrix than for values, which "
                    "cannot become it; make a new optimizer afterwards"
                )
            for key, t in state.items():
                if isinstance(t, Tensor) and t.numel() != 1 and t.shape != layer.values.shape:
                    raise ValueError(
                        f"densify_: the optimizer keeps {key!r} of shape {tuple(t.shape)} for the "
                        f"{layer.values.shape[0]} values of {layer}, expected as many"
                    )


def _same_pattern(a: SparseLinear, b: SparseLinear) -> bool:
    pairs = (a.row_offsets, b.row_offsets), (a.col_indices, b.col_indices)
    return a.stores_transpose == b.stores_transpose and all(torch.equal(*pair) for pair in pairs)


def _refuse_held(module: nn.Module, optimizer: Optimizer | None) -> None:
    held = {p for group in optimizer.param_groups for p in group["params"]} if optimizer else set()
    if not held.isdisjoint(module.parameters()):
        raise ValueError(
            f"densify_: the optimizer holds parameters of a {type(module).__name__}, which become "
            "parts of others: make a new optimizer afterwards"
        )


def _densified(state, module: SparseLinear, first: float):
    """A part of the optimizer state of the module's values, `first` where nothing was stored;
    `step` and the like stay."""
    if not isinstance(state, Tensor) or state.shape != module.values.shape:
        return state
    n, k = module.out_features, module.in_features

    def dense(t: Tensor) -> Tensor:
        return SparseTensor._trusted(module.row_offsets, module.col_indices, t, n, k).to_dense()

    result = dense(state)
    if first:
        result.masked_fill_(dense(torch.ones_like(state)) == 0, first)
    return module.as_stored(result)
