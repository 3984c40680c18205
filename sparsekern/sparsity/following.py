"""What an algorithm does at the steps of the optimizers that it was applied to.

It counts a step when all of them have made it; before, it is looked at whether they hold what they
should, and after it patterns may move.
"""

import weakref
from weakref import WeakKeyDictionary

import torch
from torch import Tensor
from torch.optim import Optimizer

from ..nn import replaced
from ..nn.alive import alive
from ..nn.optimizers import holders
from .optimizers import held_layers, makes_state_alone, note_known, note_waiting
from .pattern import check_same_on_all_ranks, local
from .uneven import check_all_take_part


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


def follow(algorithm, optimizer: Optimizer) -> None:
    """Let the algorithm count the steps that all its optimizers have made.

    Of those that hold the same values it waits for the one that was applied last. Another one rests
    until it makes a step: for ever, where it was replaced. Its state follows the patterns."""
    if any(optimizer is o for o in holders(algorithm.optimizers)):
        return
    note_known(optimizer)
    algorithm.optimizers.append(optimizer)
    _rest(algorithm, _rivals(algorithm, optimizer))
    algorithm._is_checked, algorithm._is_begun = False, True
    note_waiting(algorithm)
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
    will_update = algorithm.is_due and not makes_state_alone(optimizer)
    if not algorithm._is_checked or will_update:
        check_all_take_part(algorithm.layers.values())
    if not algorithm._is_checked or algorithm.is_due:
        _check_are_shards(algorithm)
        resting = alive(algorithm._hooked) if algorithm._is_checked else []  # may step again
        _check_all_are_held(algorithm, [*algorithm.optimizers, *resting])
    if not algorithm._is_checked:
        check_same_on_all_ranks(algorithm.layers)
        algorithm._check_ranks()
        algorithm._is_checked = True
    if will_update:
        algorithm._check_can_update()


def _after_step(algorithm, optimizer: Optimizer) -> None:
    if not any(optimizer is o for o in algorithm.optimizers) or makes_state_alone(optimizer):
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


def _not_held(algorithm, optimizers: list[Optimizer]) -> list[str]:
    held = {n for o in optimizers for n in held_layers(o, algorithm.layers)}
    layers = algorithm.layers.items()
    return [n for n, layer in layers if layer.values.requires_grad and n not in held]


def _check_are_shards(algorithm) -> None:
    """RuntimeError where optimizers step shards of FSDP2, but it has put layers together."""
    groups = [group for o in algorithm.optimizers for group in o.param_groups]
    if not any(hasattr(p, "full_tensor") for group in groups for p in group["params"]):
        return
    if missing := _not_held(algorithm, algorithm.optimizers):
        raise RuntimeError(
            f"sparsity: the values of {', '.join(missing)} are whole, as FSDP2 leaves those of its "
            "root after a forward pass, and it would lose what is written there: after an "
            "evaluation between backward and step call model.reshard()"
        )


def _check_all_are_held(algorithm, optimizers: list[Optimizer]) -> None:
    if missing := _not_held(algorithm, optimizers):
        raise RuntimeError(
            f"sparsity: no optimizer that the algorithm follows holds the values of "
            f"{', '.join(missing)}; call algorithm.apply(optimizer) with each optimizer before "
            "the first step, or freeze what is not trained any more"
        )
