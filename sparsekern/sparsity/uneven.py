"""Updates inside of DDP's join(), where a rank that has no batches left would be waited for.

Its protocol, of torch.distributed.algorithms.join: each rank that has batches says so before a
forward pass, by a 1 that is summed over all; one that has none adds 0 until nobody has any. Between
two forward passes that is what it waits for, so an update may ask the same question.
"""

import weakref
from collections.abc import Iterable

import torch
import torch.distributed as dist
from torch import nn
from torch.nn.modules.module import register_module_module_registration_hook
from torch.nn.parallel import DistributedDataParallel

from ..nn.alive import alive

AT_UPDATE = 2  # what a rank adds that is at an update, not at a forward pass

_wrappers: weakref.WeakSet[DistributedDataParallel] = weakref.WeakSet()
_is_watching = False


def watch() -> None:
    """To be called before a model is wrapped: torch does not say which DDP has it."""
    global _is_watching
    if not _is_watching:
        _is_watching = True
        register_module_module_registration_hook(_note)


def _note(module: nn.Module, name: str, child: nn.Module | None) -> None:
    if isinstance(module, DistributedDataParallel):
        _wrappers.add(module)


def check_all_take_part(layers: Iterable[nn.Module]) -> None:
    """RuntimeError where another rank is not at this step, on each rank that is."""
    wrapper = next((w for w in alive(_wrappers) if _is_joined(w, layers)), None)
    if wrapper is None:
        return
    group: dist.ProcessGroup = wrapper.join_process_group
    # As torch's: of another type or size it would not meet theirs.
    count = torch.full((1,), float(AT_UPDATE), device=wrapper.join_device)
    dist.all_reduce(count, group=group)
    if count.item() != AT_UPDATE * dist.get_world_size(group):
        raise RuntimeError(
            "sparsity: all ranks change, or compare, their patterns in one step, but inside of "
            "join() some have no batches left, or have made fewer steps before: give all ranks the "
            "same number of batches, or let the last update (`update`: stop) come before"
        )


def _is_joined(wrapper: DistributedDataParallel, layers: Iterable[nn.Module]) -> bool:
    """Whether it tells a join() of its forward passes, of some of these layers."""
    config = wrapper._join_config
    if not (config.enable and config.is_first_joinable):
        return False
    of_layers = {id(layer) for layer in layers}
    return any(id(module) in of_layers for module in wrapper.modules())
