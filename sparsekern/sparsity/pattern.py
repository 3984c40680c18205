"""Changing the pattern of a SparseLinear in place, its optimizer state with it.

A place is row * K + column: the pattern of a layer is its ascending places, int64 [nnz].
"""

import functools
import warnings
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.optim import Optimizer

from ..indices import expand_rows
from ..kernels.derived import is_captured
from ..nn import SparseLinear, copies
from ..nn.checks import check_model
from ..nn.loading import CAPTURED, end_graphs, renew_, set_indices
from ..nn.optimizers import (
    first_number,
    holders,
    kept_beside_state,
    lies_in_others,
    tensors_in,
)


def places_of(layer: SparseLinear) -> Tensor:
    rows = expand_rows(layer.row_offsets, layer.col_indices.shape[0])
    return rows * layer.in_features + layer.col_indices


@torch.no_grad()
def set_pattern(
    layer: SparseLinear, places: Tensor, optimizers: Sequence[Optimizer] = ()
) -> Callable[[Tensor], Tensor]:
    """Give the layer another pattern. Stored weights that stay keep their value and optimizer
    state; new ones start at zero, and in the state with what torch starts with. The Parameter
    remains the same object.

    Returns the map of any [nnz] tensor from the old pattern to the new one. RuntimeError, and
    nothing has changed, where something that belongs to the pattern cannot follow.
    """
    check_can_change({"this layer": layer}, optimizers)
    old = places_of(layer)
    at = torch.searchsorted(old, places).clamp_(max=max(0, old.shape[0] - 1))
    stays = old[at] == places if old.shape[0] else torch.zeros_like(places, dtype=torch.bool)

    def follow(t: Tensor, first: float = 0.0) -> Tensor:
        if not t.shape[0]:
            return t.new_full((places.shape[0],), first)
        return torch.where(stays, t[at], t.new_full((), first))

    for written in copies.written_copies(layer):
        warnings.warn(
            f"a copy of {written} was written to, by no optimizer, and keeps its pattern while "
            "that of the original changes: if it is an average of the weights, numbers of "
            "different places are added up from now on; call sparsekern.sparsity.match_patterns_("
            "average, model) before each update",
            stacklevel=3,
        )
    # New tensors: a state_dict that was taken before holds those of its pattern.
    values, shape = layer.values, layer.values.shape
    copies.forget([values])
    for holding, state in _states(values, optimizers):
        moved_state = dict(state)
        for key, t in state.items():
            if isinstance(t, Tensor) and t.shape == shape:
                first = first_number(holding[-1], values, key)  # of the wrapped one
                moved_state[key] = _replaced(t, functools.partial(follow, first=first))
        for optimizer in holding:
            optimizer.state[values] = moved_state
    own: Any = values.detach()
    moved: Any = _replaced(own, follow)
    if hasattr(own, "full_tensor"):
        own.to_local().copy_(moved.to_local())
        values.grad = None
    elif moved.shape == shape and lies_in_others(values, optimizers):
        own.copy_(moved)
        values.grad = None
    else:
        renew_(values, moved)
    # New tensors: kernels remember what they packed by the old ones.
    ends = torch.arange(layer.out_features + 1, device=places.device) * layer.in_features
    end_graphs(layer.row_offsets, layer.col_indices)
    set_indices(layer, torch.searchsorted(places, ends).int(), (places % layer.in_features).int())
    return follow


def check_can_change(
    layers: Mapping[str, SparseLinear],
    optimizers: Iterable[Optimizer],
    will_step: bool = False,
) -> None:
    """RuntimeError unless all that belongs to the patterns of these layers can follow a change;
    with `will_step`, after a step of the optimizers."""
    for optimizer in holders(optimizers):
        if isinstance(optimizer, torch.optim.LBFGS) and (optimizer.state or will_step):
            raise RuntimeError(
                "sparsity: LBFGS keeps the steps of all parameters in one vector, which cannot "
                "follow a change of the pattern; use another optimizer"
            )
    beside = [(o, kept) for o in holders(optimizers) if (kept := kept_beside_state(o))]
    holder: dict[int, str] = {}
    for name, layer in layers.items():
        other = holder.setdefault(id(layer.values), name)
        if other != name:
            raise RuntimeError(
                f"sparsity: {other} and {name} share their values, which cannot follow the change "
                "of two patterns; use one module in both places"
            )
        if is_captured(layer.col_indices):
            raise RuntimeError(f"sparsity: {name}: {CAPTURED}")
        values = layer._parameters.get("values")
        if values is None:
            raise RuntimeError(
                f"sparsity: the values of {name} are parametrized, and cannot follow a change of "
                "the pattern; call torch.nn.utils.parametrize.remove_parametrizations first"
            )
        for optimizer, kept in beside:
            if (key := kept.get(values.shape)) and _steps(optimizer, values):
                raise RuntimeError(
                    f"sparsity: {type(optimizer).__name__} keeps numbers of its own for each of "
                    f"the {values.shape[0]} values of {name} in {key!r}, which cannot follow a "
                    "change of the pattern; use an optimizer that keeps them in its state"
                )
        for _, state in _states(values, optimizers):
            for key, part in state.items():
                if not (isinstance(part, Tensor) and part.shape == values.shape):
                    for t in tensors_in(part):
                        _check_is_a_number(name, key, t, values)


def _steps(optimizer: Optimizer, values: Tensor) -> bool:
    return any(p is values for group in optimizer.param_groups for p in group["params"])


def _check_is_a_number(name: str, key: str, t: Tensor, values: Tensor) -> None:
    if t.numel() > 1:
        raise RuntimeError(
            f"sparsity: the optimizer keeps {key!r} of shape {tuple(t.shape)} for the "
            f"{values.shape[0]} values of {name}, and nothing says which weight is where in it: it "
            "cannot follow a change of the pattern; use an optimizer whose state has the shape of "
            "the parameter"
        )


def _states(values: Tensor, optimizers: Iterable[Optimizer]) -> list[tuple[list[Optimizer], dict]]:
    """The states for these values, each with the optimizers that hold it: a wrapper may share its
    state with the wrapped."""
    states: dict[int, tuple[list[Optimizer], dict]] = {}
    for optimizer in holders(optimizers):
        if values in optimizer.state:
            state = optimizer.state[values]
            states.setdefault(id(state), ([], state))[0].append(optimizer)
    return list(states.values())


def whole(t: Tensor) -> Tensor:
    """All of a tensor that FSDP2 may have cut into shards."""
    return t.full_tensor() if hasattr(t, "full_tensor") else t


def local(t: Any) -> Tensor:
    """What this rank has of it."""
    return t.to_local() if hasattr(t, "to_local") else t


def _replaced(t: Tensor, follow: Callable[[Tensor], Tensor]) -> Tensor:
    """follow(t), cut into the same shards as t."""
    if not hasattr(t, "full_tensor"):
        return follow(t)
    from torch.distributed.tensor import DTensor, distribute_tensor

    assert isinstance(t, DTensor)
    moved = follow(t.full_tensor())
    if moved.shape != t.shape:
        raise NotImplementedError(
            f"sparsity: FSDP2 keeps the size of its shards, but nnz goes from {t.shape[0]} to "
            f"{moved.shape[0]}; use DDP with algorithms that change the number of weights"
        )
    return distribute_tensor(moved, t.device_mesh, t.placements, src_data_rank=None)


def is_distributed() -> bool:
    return dist.is_available() and dist.is_initialized() and dist.get_world_size() > 1


def check_same_patterns(model: nn.Module) -> None:
    """RuntimeError on every rank if a SparseLinear of the model has different patterns on them.

    All ranks must call it together. Algorithms that follow an optimizer do, before its first step
    and after each update; without one, call it after fully_shard: FSDP2 cuts up and averages values
    whatever their places are. (DDP gives all ranks the patterns of the first, unless it was made
    with broadcast_buffers=False: then it gives them values alone.)
    """
    check_model(model)
    modules = model.named_modules()
    check_same_on_all_ranks({n: m for n, m in modules if isinstance(m, SparseLinear)})


def check_same_on_all_ranks(layers: Mapping[str, SparseLinear]) -> None:
    """The same for these layers. Those that another rank does not have are not compared."""
    if not is_distributed():
        return
    of_ranks = of_all_ranks(dict(zip(layers, hashes_of(layers.values()), strict=True)))
    found: dict[str, set[int]] = {}
    for name, one in ((n, h) for of_rank in of_ranks for n, h in of_rank.items()):
        found.setdefault(name, set()).add(one)
    differ = [name for name, its in found.items() if len(its) > 1]
    if differ:
        raise RuntimeError(f"sparsity: the ranks have different patterns in {', '.join(differ)}")


def of_all_ranks(mine: Any) -> list:
    """The same of each rank, in their order."""
    found = [None] * dist.get_world_size()
    dist.all_gather_object(found, mine)
    return found


MIX = 0x3F58476D1CE4E5B9, 0x14D049BB133111EB  # odd, without order in their bits


def hashes_of(layers: Iterable[SparseLinear]) -> list[int]:
    """A number of 64 bits for the pattern of each, made where it is: the sum over its places, mixed
    so that those of two patterns are alike by chance alone."""
    sums = []
    for layer in layers:
        mixed = places_of(layer)
        for factor in MIX:
            mixed = mixed * factor  # int64 wraps around
            mixed ^= mixed >> 29
        sums.append(mixed.sum())
    return [int(each) for each in sums]  # read when all are on their way
