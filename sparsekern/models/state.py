"""What a call of a model may change beside its output, and how it comes back."""

import random

import numpy
import torch
from torch import nn

from ..nn import SparseLinear
from ..nn.kinds import pruning_masks


class State:
    """The buffers of a model and the random numbers of torch, Python and NumPy, as they were when
    this was made.

    Without the masks of torch.nn.utils.prune and the patterns of sparse layers: these are as large
    as weights, and no call changes them."""

    def __init__(self, model: nn.Module):
        self._buffers = [
            (module, dict(module._buffers), _kept(module))
            for module in model.modules()
            if not isinstance(module, SparseLinear | torch.jit.ScriptModule)
        ]
        self._random = random.getstate(), numpy.random.get_state(), torch.get_rng_state()
        gpus = {t.device for t in model.parameters() if t.is_cuda}
        self._gpu_random = {gpu: torch.cuda.get_rng_state(gpu) for gpu in gpus}

    def put_back(self) -> None:
        """All of it: batch norm writes to its buffers without a trace in their version."""
        for module, buffers, kept in self._buffers:
            module._buffers.clear()  # of those that a call made, too
            module._buffers.update(buffers)
            for name, was in kept.items():
                t = buffers[name]
                with torch.inference_mode(t.is_inference()), torch.no_grad():
                    t.copy_(was)
        of_python, of_numpy, of_torch = self._random
        random.setstate(of_python)
        numpy.random.set_state(of_numpy)
        torch.set_rng_state(of_torch)
        for gpu, state in self._gpu_random.items():
            torch.cuda.set_rng_state(state, gpu)


def _kept(module: nn.Module) -> dict[str, torch.Tensor]:
    """Copies of the buffers that a call could write to."""
    masks = pruning_masks(module)
    return {
        name: t.detach().clone()
        for name, t in module._buffers.items()
        if t is not None and name.removesuffix("_mask") not in masks and _can_be_written(t)
    }


def _can_be_written(t: torch.Tensor) -> bool:
    """Not what was expanded: its places share memory, so that no call could write there."""
    if t.layout != torch.strided:
        return True
    return all(step or size <= 1 for size, step in zip(t.shape, t.stride(), strict=True))
