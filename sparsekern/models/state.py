"""What a call of a model may change beside its output, and how it comes back."""

import torch
from torch import nn

from ..nn import SparseLinear
from ..nn.kinds import pruning_masks


class State:
    """The buffers of a model and torch's random numbers, as they were when this was made.

    Without the masks of torch.nn.utils.prune and the patterns of sparse layers: these are as large
    as weights, and no call changes them."""

    def __init__(self, model: nn.Module):
        self._buffers = [
            (module, name, t, None if t is None else t.detach().clone())
            for module in model.modules()
            if not isinstance(module, SparseLinear | torch.jit.ScriptModule)
            for name, t in module._buffers.items()
            if name.removesuffix("_mask") not in pruning_masks(module)
        ]
        self._random = torch.get_rng_state()
        gpus = {t.device for t in model.parameters() if t.is_cuda}
        self._gpu_random = {gpu: torch.cuda.get_rng_state(gpu) for gpu in gpus}

    def put_back(self) -> None:
        """All of it: batch norm writes to its buffers without a trace in their version."""
        for module, name, t, was in self._buffers:
            module._buffers[name] = t
            if t is not None and was is not None and _can_be_written(t):
                with torch.inference_mode(t.is_inference()), torch.no_grad():
                    t.copy_(was)
        torch.set_rng_state(self._random)
        for gpu, random in self._gpu_random.items():
            torch.cuda.set_rng_state(random, gpu)


def _can_be_written(t: torch.Tensor) -> bool:
    """Not what was expanded: its places share memory, so that no call could write there."""
    if t.layout != torch.strided:
        return True
    return all(step or size <= 1 for size, step in zip(t.shape, t.stride(), strict=True))
