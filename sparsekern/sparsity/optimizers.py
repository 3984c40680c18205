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
from ..nn.linear import SparseLinear, layer_of, value_parameters
from ..nn.optimizers import holders
from .pattern import check_same_on_all_ranks, local, whole
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

_algorithms: list[weakref.ref] = []  # that have a model; they have no hash
_known: weakref.WeakSet[Optimizer] = weakref.WeakSet()  # that have made a step, or are followed


class _Waiting(NamedTuple):
    """The algorithm that is to move the pattern of a layer, and follows no optimizer yet."""

    algorithm: weakref.ref  # layers that kept it would wait for the garbage collector
    kind: str
    name: str  # of the layer


_waiting: WeakKeyDictionary[SparseLinear, _Waiting] = WeakKeyDictionary()


def unwrapped(target) -> Optimizer | None:
    """The optimizer that `target` is or wraps (as accelerate's does); None if it is none.

    NotImplementedError for a wrapper with state of its own that calls no hooks."""
    if isinstance(target, Optimizer) and hasattr(target, "_optimizer_step_post_hooks"):
        return target
    inner = getattr(target, "optimizer", None)
    if not isinstance(inner, Optimizer) or isinstance(target, torch.nn.Module):
        return None
    state = getattr(target, "state", inner.state)
    if state is not inner.state and state:
        raise NotImplementedError(
            f"apply: {type(target).__name__} calls no step hooks and keeps state of its own, which "
            "cannot follow a pattern; use the optimizer inside of it"
        )
    return unwrapped(inner)


def held_layers(optimizer: Optimizer, layers: Mapping[str, SparseLinear]) -> list[str]:
    held = {id(p) for group in optimizer.param_groups for p in group["params"]}
    parts = {name: value_parameters(layer) for name, layer in layers.items()}
    return [name for name, of_layer in parts.items() if any(id(p) in held for p in of_layer)]


def known_holders(layers: Mapping[str, nn.Module]) -> list[Optimizer]:
    """The optimizers that step values of these layers."""
    sparse = {name: layer for name, layer in layers.items() if isinstance(layer, SparseLinear)}
    return [optimizer for optimizer in _known if held_layers(optimizer, sparse)]


def follow(algorithm, optimizer: Optimizer) -> None:
    """Let the algorithm count the steps that all its optimizers have made.

    Of those that hold the same values it waits for the one that was applied last. Another one rests
    until it makes a step: for ever, where it was replaced. Its state follows the patterns."""
    if any(optimizer is o for o in holders(algorithm.optimizers)):
        return
    _known.add(optimizer)
    for layer in algorithm.layers.values():
        _waiting.pop(layer, None)
    algorithm.optimizers.append(optimizer)
    _rest(algorithm, _rivals(algorithm, optimizer))
    algorithm._is_checked, algorithm._is_begun = False, True
    if optimizer not in algorithm._hooked:
        algorithm._hooked.add(optimizer)
        _hooks_of(optimizer).algorithms.append(algorithm)


class _Hooks:
    """What an optimizer calls before and after its steps, for the algorithms that follow it, which
    live as long as the optimizer."""

    def __init__(self, optimizer: Optimizer) -> None:
        self.algorithms: list = []
        # A compiled step leaves its graph for them: they look at numbers and change shapes.
        optimizer.register_step_pre_hook(torch.compiler.disable(self.before))
        optimizer.register_step_post_hook(torch.compiler.disable(self.after))

    def before(self, optimizer: Optimizer, *_) -> None:
        for algorithm in list(self.algorithms):  # those without layers leave it
            _before_step(algorithm, optimizer)

    def after(self, optimizer: Optimizer, *_) -> None:
        for algorithm in list(self.algorithms):
            _after_step(algorithm, optimizer)


_hooks: WeakKeyDictionary[Optimizer, weakref.ref[_Hooks]] = WeakKeyDictionary()


def _hooks_of(optimizer: Optimizer) -> _Hooks:
    ref = _hooks.get(optimizer)
    hooks = ref() if ref else None
    if hooks is None:
        hooks = _Hooks(optimizer)
        _hooks[optimizer] = weakref.ref(hooks)
    return hooks


def _before_step(algorithm, optimizer: Optimizer) -> None:
    if not any(optimizer is o for o in algorithm.optimizers):
        algorithm.optimizers.append(optimizer)  # it rests no more
    if replaced.is_any() and (gone := _replaced_by_now(algorithm)):
        algorithm._give_up(gone)
    if not algorithm.layers:
        return
    _check_is_of_pattern(algorithm, optimizer)
    if not algorithm._is_checked or algorithm.is_due:
        _check_are_shards(algorithm)
    if not algorithm._is_checked:
        _check_all_are_held(algorithm)
        check_same_on_all_ranks(algorithm.layers)
        algorithm._check_ranks()
        algorithm._is_checked = True
    if algorithm.is_due and not _makes_state_alone(optimizer):
        algorithm._check_can_update()


def _after_step(algorithm, optimizer: Optimizer) -> None:
    if not any(optimizer is o for o in algorithm.optimizers) or _makes_state_alone(optimizer):
        return
    if not _was_skipped(optimizer):
        _count(algorithm, optimizer)
    _note_patterns(algorithm, optimizer)


def _count(algorithm, optimizer: Optimizer) -> None:
    if id(optimizer) in algorithm._stepped:
        rivals = _rivals(algorithm, optimizer)
        _rest(algorithm, [o for o in rivals if id(o) not in algorithm._stepped])
    algorithm._stepped.add(id(optimizer))
    if len(algorithm._stepped) == len(algorithm.optimizers):
        algorithm._stepped.clear()
        algorithm._after_step()


def _was_skipped(optimizer: Optimizer) -> bool:
    """Whether a GradScaler had the optimizer make no step, since gradients overflowed: a fused one
    is called all the same."""
    found = getattr(optimizer, "found_inf", None)
    if not isinstance(found, Tensor):
        return False
    return not (found.is_cuda and torch.cuda.is_current_stream_capturing()) and bool(found.any())


def _makes_state_alone(optimizer: Optimizer) -> bool:
    """Whether the step changes no weight, for its rate and all gradients are 0: get_state_dict and
    get_optimizer_state_dict of torch take such a one where there is no state."""
    rates = [group.get("lr") for group in optimizer.param_groups]
    if any(r is None or (isinstance(r, Tensor) and r.device.type != "cpu") or r for r in rates):
        return False
    held = [p.grad for group in optimizer.param_groups for p in group["params"]]
    gradients = [g.detach() for g in held if g is not None]
    # Of shards all ranks must say the same.
    return not any(g.layout != torch.strided or whole(g.abs().sum()) for g in gradients)


def _note_patterns(algorithm, optimizer: Optimizer) -> None:
    """Remember the pattern of each layer that the optimizer has state for, and a tensor of that."""
    noted = algorithm._patterns[optimizer] = {}
    for name, layer in algorithm.layers.items():
        values = layer._parameters.get("values")
        for t in optimizer.state.get(values, {}).values():
            if isinstance(t, Tensor) and t.shape == values.shape:
                indices = layer._buffers["row_offsets"], layer._buffers["col_indices"]
                noted[name] = *indices, weakref.ref(t), _version(t)
                break


def _check_is_of_pattern(algorithm, optimizer: Optimizer) -> None:
    """RuntimeError where a layer has got another pattern since the last step, with as many weights,
    but the optimizer has the state of before: load_state_dict of a model moves none."""
    for name, noted in algorithm._patterns.get(optimizer, {}).items():
        row_offsets, col_indices, kept, version = noted
        layer = algorithm.layers.get(name)
        if layer is None or layer._buffers["col_indices"] is col_indices:
            continue
        state = optimizer.state.get(layer._parameters.get("values"), {})
        if not any(t is kept() for t in state.values() if isinstance(t, Tensor)):
            continue  # it was moved, or loaded
        if _version(kept()) != version:
            continue  # loaded in place, as torch.distributed.checkpoint does
        now = layer.row_offsets, layer.col_indices
        before = (t.to(col_indices.device) for t in now)
        if not all(map(torch.equal, before, (row_offsets, col_indices))):
            raise RuntimeError(
                f"sparsity: {name} has got another pattern since the last step, but the "
                "optimizer's state is that of the places of before: load the state that belongs "
                "to these weights, or start with a new optimizer"
            )


def _version(t: Tensor) -> int:
    """It moves with every write to t that torch counts; -1 where it counts none."""
    own = local(t)
    return -1 if own.is_inference() else own._version


def _rivals(algorithm, optimizer: Optimizer) -> list[Optimizer]:
    """The others that hold any of the values that this one holds."""
    held = set(held_layers(optimizer, algorithm.layers))
    others = [o for o in algorithm.optimizers if o is not optimizer]
    return [o for o in others if not held.isdisjoint(held_layers(o, algorithm.layers))]


def _rest(algorithm, optimizers: list[Optimizer]) -> None:
    for optimizer in optimizers:
        algorithm.optimizers = [o for o in algorithm.optimizers if o is not optimizer]
        algorithm._stepped.discard(id(optimizer))
        algorithm._patterns.pop(optimizer, None)  # it would keep what kernels made of them


def _replaced_by_now(algorithm) -> list[str]:
    """Its layers that others took the place of, also for one of its optimizers: dense ones, or
    sparse again."""
    now = {n: replaced.trained(replaced.now_for(m.values)) for n, m in algorithm.layers.items()}
    now = {name: p for name, p in now.items() if p is not None}
    gone: set[str] = set()
    for optimizer in algorithm._hooked if now else ():
        held = {id(p) for group in optimizer.param_groups for p in group["params"]}
        values = {name: id(algorithm.layers[name].values) for name in now}
        gone |= {n for n, p in now.items() if id(p) in held and values[n] not in held}
    return list(gone)


def let_go(algorithm) -> None:
    """It follows no optimizer any more that holds none of the layers that it still has."""
    for optimizer in list(algorithm._hooked):
        if held_layers(optimizer, algorithm.layers):
            continue
        algorithm._hooked.discard(optimizer)
        algorithm._stepped.discard(id(optimizer))
        algorithm._patterns.pop(optimizer, None)
        algorithm.optimizers = [o for o in algorithm.optimizers if o is not optimizer]
        hooks = _hooks_of(optimizer)
        hooks.algorithms = [a for a in hooks.algorithms if a is not algorithm]


def take_over(algorithm) -> None:
    """Its layers are no other's any more, which would change their patterns as well."""
    mine = {id(layer) for layer in algorithm.layers.values()}
    for other in (ref() for ref in _algorithms):
        if other is not None and other is not algorithm:
            if gone := [n for n, layer in other.layers.items() if id(layer) in mine]:
                other._give_up(gone)
    _note_waiting(algorithm)


def _note_waiting(algorithm) -> None:
    is_waiting = algorithm.moves and not algorithm._is_begun
    if is_waiting and not isinstance(algorithm._update_steps, When):  # a function of the user's
        is_waiting = _is_update_to_come(algorithm)
    for name, layer in algorithm.layers.items():
        if is_waiting:
            _waiting[layer] = _Waiting(weakref.ref(algorithm), type(algorithm).__name__, name)
        else:
            _waiting.pop(layer, None)


def _not_held(algorithm) -> list[str]:
    held = {n for o in algorithm.optimizers for n in held_layers(o, algorithm.layers)}
    layers = algorithm.layers.items()
    return [n for n, layer in layers if layer.values.requires_grad and n not in held]


def _check_are_shards(algorithm) -> None:
    """RuntimeError where optimizers step shards of FSDP2, but it has put layers together."""
    groups = [group for o in algorithm.optimizers for group in o.param_groups]
    if not any(hasattr(p, "full_tensor") for group in groups for p in group["params"]):
        return
    if missing := _not_held(algorithm):
        raise RuntimeError(
            f"sparsity: the values of {', '.join(missing)} are whole, as FSDP2 leaves those of its "
            "root after a forward pass, and it would lose what is written there: after an "
            "evaluation between backward and step call model.reshard()"
        )


def _check_all_are_held(algorithm) -> None:
    if missing := _not_held(algorithm):
        raise RuntimeError(
            f"sparsity: no optimizer that the algorithm follows holds the values of "
            f"{', '.join(missing)}; call algorithm.apply(optimizer) with each optimizer before "
            "the first step"
        )


def note_model_of(algorithm) -> None:
    """To be called when the algorithm has got its layers."""
    _algorithms[:] = [ref for ref in _algorithms if getattr(ref(), "layers", None)]
    _algorithms[:] = [ref for ref in _algorithms if ref() is not algorithm]
    _algorithms.append(weakref.ref(algorithm))


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
    for ref in _algorithms:
        for name, other in getattr(ref(), "layers", {}).items():
            if other is layer:
                return name
    return str(layer)


def _is_followed(optimizer: Optimizer, algorithm) -> bool:
    """Whether the algorithm was applied to it, or to one that wraps it."""
    return any(optimizer is o for o in holders(algorithm._hooked))


def _check_is_followed(optimizer: Optimizer) -> None:
    for ref in list(_algorithms):
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
    gone = [(layer, waiting) for layer, waiting in _waiting.items() if waiting.algorithm() is None]
    if not gone:
        return
    held = {id(p) for group in optimizer.param_groups for p in group["params"]}
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
    _known.add(optimizer)
    copies.forget(p for group in optimizer.param_groups for p in group["params"])
    check_optimizer_state(optimizer)
    replaced.check_are_held(optimizer)
    if _makes_state_alone(optimizer):
        return
    _check_is_followed(optimizer)
    if _waiting:
        _check_was_kept(optimizer)


register_optimizer_step_pre_hook(_before_any_step)
