"""What an optimizer holds of a parameter, for when another one takes its place."""

from collections.abc import Callable, Collection, Iterable, Iterator, Mapping
from typing import Any

import torch
from torch import Tensor
from torch.optim import Optimizer

KEY = "sparsekern"  # of a parameter group: where SparsityCallback keeps an algorithm's state


def holders(optimizers: Iterable[Optimizer]) -> list[Optimizer]:
    """These optimizers and those that they wrap, each with state of its own."""
    found: dict[int, Optimizer] = {}
    waiting = list(optimizers)
    while waiting:
        optimizer = waiting.pop()
        if id(optimizer) not in found:
            found[id(optimizer)] = optimizer
            for part in vars(optimizer).values():
                inner = part if isinstance(part, (list, tuple)) else [part]
                waiting += [o for o in inner if isinstance(o, Optimizer)]
    return list(found.values())


def check_can_swap(optimizer: Optimizer, parameters: Collection[Tensor]) -> None:
    """ValueError where others cannot take the place of these parameters in the optimizer."""
    ids = {id(p) for p in parameters}
    for holder in holders([optimizer]):
        name = type(holder).__name__
        if not any(id(p) in ids for group in holder.param_groups for p in group["params"]):
            continue
        if isinstance(holder, torch.optim.LBFGS) and holder.state:
            raise ValueError(
                f"optimizer: {name} keeps the steps of all parameters in one vector, which cannot "
                "follow a change of one; make a new optimizer afterwards"
            )
        for attribute, kept in _others(holder):
            inside = [part for part in kept if _is_filled(part)] if type(kept) is list else kept
            if _has(inside, ids):
                raise ValueError(
                    f"optimizer: {name} keeps parameters in {attribute!r} too, where others cannot "
                    "take their place; make a new optimizer afterwards"
                )


def swap_(optimizer: Optimizer, others: Mapping[Any, Tensor]) -> None:
    """Put others[p] in the place of each parameter p, without the state: that is the caller's."""
    for holder in holders([optimizer]):
        lists = [group["params"] for group in holder.param_groups]
        lists += [kept for _, kept in _others(holder) if type(kept) is list]
        for parameters in lists:  # in place: LBFGS goes by the list itself
            if any(isinstance(p, Tensor) and p in others for p in parameters):
                parameters[:] = [others.get(p, p) for p in parameters]


def _others(optimizer: Optimizer) -> list[tuple[str, Any]]:
    known = ("param_groups", "state", "defaults")
    return [(name, kept) for name, kept in vars(optimizer).items() if name not in known]


def _is_filled(part: Any) -> bool:
    return isinstance(part, dict | list | tuple)


def _has(kept: Any, ids: set[int]) -> bool:
    if isinstance(kept, Tensor):
        return id(kept) in ids
    if isinstance(kept, dict):
        return any(_has(part, ids) for pair in kept.items() for part in pair)
    return isinstance(kept, list | tuple) and any(_has(part, ids) for part in kept)


def lies_in_others(parameter: Tensor, optimizers: Iterable[Optimizer]) -> bool:
    """Whether a parameter lies in a buffer of others, which are stepped or sent as one: whoever
    holds the buffer, as ZeroRedundancyOptimizer may, would not see another memory of it."""
    storage = parameter.untyped_storage()
    if storage.nbytes() != parameter.nbytes:
        return True
    kept = [part for o in holders(optimizers) for _, part in _others(o)]
    return _shares(kept, parameter, storage.data_ptr())


def _shares(kept: Any, parameter: Tensor, address: int) -> bool:
    """Whether another tensor in it has the memory of the parameter."""
    if isinstance(kept, Tensor):
        return kept is not parameter and _address(kept) == address
    if isinstance(kept, dict):
        return any(_shares(part, parameter, address) for pair in kept.items() for part in pair)
    return isinstance(kept, list | tuple) and any(_shares(t, parameter, address) for t in kept)


def _address(t: Tensor) -> int | None:
    is_plain = t.layout == torch.strided and type(t) in (Tensor, torch.nn.Parameter)
    return t.untyped_storage().data_ptr() if is_plain else None


def kept_beside_state(optimizer: Optimizer) -> dict[torch.Size, str]:
    """The shapes of tensors that it keeps elsewhere than in the state of its parameters, as in a
    list of momenta, and under which name; without a state_dict, which is a copy (of a
    ZeroRedundancyOptimizer that was saved), and what lies in the memory of these or of a state,
    which it may share with one that it wraps."""
    by_name: dict[Any, Any] = optimizer.state
    places = _others(optimizer)
    groups = [(k, kept) for group in optimizer.param_groups for k, kept in group.items()]
    places += [(k, kept) for k, kept in groups if k not in ("params", KEY)]
    places += [(key, kept) for key, kept in by_name.items() if isinstance(key, str)]
    found = [(name, t) for name, kept in places for t in tensors_in(kept, but=_is_state_dict)]
    if not found:
        return {}
    held = [p for group in optimizer.param_groups for p in group["params"]]
    known = {_address(t) for p in held for t in (p, p.grad) if t is not None}
    for holder in holders([optimizer]):
        states = [state for key, state in holder.state.items() if isinstance(key, Tensor)]
        known |= {_address(t) for t in tensors_in(states)}
    return {t.shape: name for name, t in found if _address(t) not in known}


def _is_state_dict(kept: Any) -> bool:
    return isinstance(kept, dict) and kept.keys() == {"state", "param_groups"}


def tensors_in(kept: Any, but: Callable[[Any], bool] = lambda kept: False) -> Iterator[Tensor]:
    """All but those in parts of which this is so."""
    if isinstance(kept, Tensor):
        yield kept
    elif isinstance(kept, dict | list | tuple) and not but(kept):
        for part in kept.values() if isinstance(kept, dict) else kept:
            yield from tensors_in(part, but)


def first_number(optimizer: Optimizer, parameter: Tensor, key: str) -> float:
    """What an element of the state `key` begins with: zero, but in two optimizers of torch."""
    setting = None
    if isinstance(optimizer, torch.optim.Rprop) and key == "step_size":
        setting = "lr"
    elif isinstance(optimizer, torch.optim.Adagrad) and key == "sum":
        setting = "initial_accumulator_value"
    if setting is None:
        return 0.0
    groups = optimizer.param_groups
    return next(float(g[setting]) for g in groups if any(p is parameter for p in g["params"]))
