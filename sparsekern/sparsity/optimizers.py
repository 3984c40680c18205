"""Checks before an optimizer step: state that fits the values, and an algorithm that follows.

Both are looked at before every step of any optimizer, by torch's global hook: a fused AdamW writes
past the end of state that is too short (of a damaged checkpoint, or of one with another pattern),
and an algorithm that follows no optimizer, or that nobody has kept, would never change a pattern,
without a word. It costs well below a microsecond for each parameter.
"""

import weakref
from collections.abc import Mapping
from typing import NamedTuple
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn
from torch.optim import Optimizer
from torch.optim.optimizer import register_optimizer_step_pre_hook

from ..nn import copies, replaced
from ..nn.alive import alive
from ..nn.linear import SparseLinear, layer_of, value_parameters
from ..nn.optimizers import holders
from .pattern import whole
from .schedules import When

# What the optimizers of torch keep for each element. LBFGS has vectors for all parameters together,
# and those with 8 bits have a scale for each block: of these nothing can be said.
ELEMENTWISE = frozenset(
    (
        "acc_delta",
        "ax",
        "exp_avg",
        "exp_avg_sq",
        "exp_inf",
        "grad_avg",
        "max_exp_avg_sq",
        "momentum_buffer",
        "prev",
        "square_avg",
        "step_size",
        "sum",
    )
)
NEVER = -1  # in the place of a step: no update is to come
LOOK_AHEAD = 10_000  # steps, to tell whether an algorithm has an update before it

_algorithms: dict[int, weakref.ref] = {}  # that have a model, by their ids; they have no hash
_known: weakref.WeakSet[Optimizer] = weakref.WeakSet()  # that have made a step, or are followed


class _Waiting(NamedTuple):
    """The algorithm that is to move the pattern of a layer, and follows no optimizer yet."""

    algorithm: weakref.ref  # layers that kept it would wait for the garbage collector
    kind: str
    name: str  # of the layer


_waiting: WeakKeyDictionary[SparseLinear, _Waiting] = WeakKeyDictionary()


def held_layers(optimizer: Optimizer, layers: Mapping[str, SparseLinear]) -> list[str]:
    held = {id(p) for group in optimizer.param_groups for p in group["params"]}
    parts = {name: value_parameters(layer) for name, layer in layers.items()}
    return [name for name, of_layer in parts.items() if any(id(p) in held for p in of_layer)]


def note_known(optimizer: Optimizer) -> None:
    _known.add(optimizer)


def known_holders(layers: Mapping[str, nn.Module]) -> list[Optimizer]:
    """The optimizers that step values of these layers."""
    sparse = {name: layer for name, layer in layers.items() if isinstance(layer, SparseLinear)}
    return [optimizer for optimizer in alive(_known) if held_layers(optimizer, sparse)]


def makes_state_alone(optimizer: Optimizer) -> bool:
    """Whether the step changes no weight, for its rate and the gradients that there are are 0:
    get_state_dict and get_optimizer_state_dict of torch take such a one where there is no state."""
    rates = [group.get("lr") for group in optimizer.param_groups]
    if any(r is None or (isinstance(r, Tensor) and r.device.type != "cpu") or r for r in rates):
        return False
    held = [p.grad for group in optimizer.param_groups for p in group["params"]]
    gradients = [g.detach() for g in held if g is not None]
    if any(g.is_cuda for g in gradients) and torch.cuda.is_current_stream_capturing():
        return False  # a CUDA graph cannot be waited for, and its replays have other gradients
    # Of shards all ranks must say the same.
    return bool(gradients) and not any(
        g.layout != torch.strided or whole(g.abs().sum()) for g in gradients
    )


def take_over(algorithm) -> None:
    """Its layers are no other's any more, which would change their patterns as well."""
    mine = {id(layer) for layer in algorithm.layers.values()}
    for other in (ref() for ref in list(_algorithms.values())):
        if other is not None and other is not algorithm:
            if gone := [n for n, layer in other.layers.items() if id(layer) in mine]:
                other._give_up(gone)
    note_waiting(algorithm)


def note_waiting(algorithm) -> None:
    """To be called when the algorithm has got its layers, and when it is at another step."""
    is_waiting = algorithm.moves and not algorithm._is_begun
    if is_waiting and not isinstance(algorithm._update_steps, When):  # a function of the user's
        is_waiting = _is_update_to_come(algorithm)
    for name, layer in algorithm.layers.items():
        if is_waiting:
            _waiting[layer] = _Waiting(weakref.ref(algorithm), type(algorithm).__name__, name)
        else:
            _waiting.pop(layer, None)


def note_model_of(algorithm) -> None:
    """To be called when the algorithm has got its layers."""
    key = id(algorithm)
    _algorithms[key] = weakref.ref(algorithm, lambda _: _algorithms.pop(key, None))


def check_optimizer_state(optimizer: Optimizer) -> None:
    """RuntimeError if state of the values of a SparseLinear does not have their number of elements.

    It is called before every step; call it yourself to know right after load_state_dict.
    """
    for group in optimizer.param_groups:
        for p in group["params"]:
            if p.ndim != 1:
                continue
            for key, t in optimizer.state.get(p, {}).items():
                if key in ELEMENTWISE and isinstance(t, Tensor):
                    if t.shape != p.shape and t.numel() != 1:
                        _refuse_state(key, t, p)


def _refuse_state(key: str, t: Tensor, values: Tensor) -> None:
    layer = layer_of(values)
    if layer is not None:
        raise RuntimeError(
            f"sparsity: the optimizer's {key!r} has shape {tuple(t.shape)}, but there are "
            f"{values.shape[0]} values in {_name_of(layer)}: its state is that of another pattern "
            "(or damaged); load a matching one, or start with a new optimizer"
        )


def _name_of(layer: SparseLinear) -> str:
    for ref in list(_algorithms.values()):
        for name, other in getattr(ref(), "layers", {}).items():
            if other is layer:
                return name
    return str(layer)


def _is_followed(optimizer: Optimizer, algorithm) -> bool:
    """Whether the algorithm was applied to it, or to one that wraps it."""
    return any(optimizer is o for o in holders(algorithm._hooked))


def _check_is_followed(optimizer: Optimizer) -> None:
    for ref in list(_algorithms.values()):
        algorithm = ref()
        if algorithm is None or not algorithm.moves or _is_followed(optimizer, algorithm):
            continue
        last = algorithm._unfollowed.get(optimizer)
        if last == NEVER:
            continue
        names = held_layers(optimizer, algorithm.layers)
        # Whoever counts the steps by hand may do so: an error comes where none was counted.
        algorithm._unfollowed[optimizer] = algorithm.steps
        if not names or last != algorithm.steps:
            continue
        if not _is_update_to_come(algorithm):
            algorithm._unfollowed[optimizer] = NEVER
        else:
            raise RuntimeError(
                f"{type(algorithm).__name__}: an optimizer steps the values of {', '.join(names)}, "
                "but the algorithm does not follow it, and would never change their patterns: call "
                "algorithm.apply(optimizer) after apply(model)"
            )


def _is_update_to_come(algorithm) -> bool:
    return any(algorithm._updates(algorithm.steps + i) for i in range(1, LOOK_AHEAD))


def _check_was_kept(optimizer: Optimizer) -> None:
    """RuntimeError where nobody has kept the algorithm that was to move a pattern."""
    waiting = [(layer, w) for layer in alive(_waiting) if (w := _waiting.get(layer)) is not None]
    gone = [(layer, w) for layer, w in waiting if w.algorithm() is None]
    if not gone:
        return
    held = {id(p) for group in optimizer.param_groups for p in group["params"] if p.requires_grad}
    found = [w for layer, w in gone if any(id(p) in held for p in value_parameters(layer))]
    if found:
        kind = found[0].kind
        raise RuntimeError(
            f"{kind}: an optimizer steps the values of "
            f"{', '.join(w.name for w in found if w.kind == kind)}, but the algorithm is no longer "
            "there, and followed none: their patterns would never change. Keep it, as in algorithm "
            f"= {kind}(...), and call algorithm.apply(model), then algorithm.apply(optimizer); or "
            "take Static for patterns that stay"
        )


def _before_any_step(optimizer: Optimizer, args: tuple, kwargs: dict) -> None:
    if torch.compiler.is_compiling():  # inside of a compiled step there is nothing to read yet
        return
    note_known(optimizer)
    copies.forget(p for group in optimizer.param_groups for p in group["params"])
    check_optimizer_state(optimizer)
    replaced.check_are_held(optimizer)
    if makes_state_alone(optimizer):
        return
    _check_is_followed(optimizer)
    if _waiting:
        _check_was_kept(optimizer)


register_optimizer_step_pre_hook(_before_any_step)
