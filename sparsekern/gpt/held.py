"""What CUDA graphs of a model read: kept alive for them, and compared with what it is now."""

from torch import Tensor, nn


class Held:
    """All tensors of some modules as they are now, and the memory that they are in.

    A graph that was captured reads that memory, also after `.to()` has given the model another, or
    pack_ its layers. Writes that torch does not count (`x.data`) count as no change."""

    def __init__(self, *modules: nn.Module) -> None:
        self._members = [
            members
            for module in modules
            for part in module.modules()
            for members in (part._modules, part._parameters, part._buffers)
        ]
        self._objects = self._found()
        self._tensors = [found for found in self._objects if isinstance(found, Tensor)]
        self._memory = [tensor.detach() for tensor in self._tensors]  # .to() swaps a parameter's
        self._states = list(map(_state, self._tensors))

    def has_changed(self) -> bool:
        """Whether parts or tensors are others, or were moved, cast or written to."""
        found = self._found()
        return (
            len(found) != len(self._objects)
            or any(a is not b for a, b in zip(found, self._objects, strict=True))
            or list(map(_state, self._tensors)) != self._states
        )

    def _found(self) -> list[object]:
        return [found for members in self._members for found in members.values()]


def _state(tensor: Tensor) -> tuple[int, int]:
    return tensor.data_ptr(), -1 if tensor.is_inference() else tensor._version
