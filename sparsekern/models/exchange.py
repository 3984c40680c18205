"""Modules put in the places of others: all of them, or none."""

import weakref

from torch import nn

from ..nn import SparseLinear, replaced
from .candidates import Candidate


class Exchange:
    """What was replaced in a model, so that it can be taken back.

    A dense weight goes when its layer is replaced, unless somebody else holds it; `undo` makes it
    anew of the sparse one. A layer under a mask is kept whole: what the mask hides is nowhere else.
    """

    def __init__(self, model: nn.Module):
        self._places: dict[nn.Module, list[tuple[nn.Module, str]]] = {}
        for parent in model.modules():
            for name, child in parent._modules.items():
                if child is not None:
                    self._places.setdefault(child, []).append((parent, name))
        self._done: dict[Candidate, tuple[nn.Module, dict[str, weakref.ref]]] = {}

    @property
    def is_begun(self) -> bool:
        """Whether anything is replaced."""
        return bool(self._done)

    def now(self, candidate: Candidate) -> nn.Module:
        """What stands in the candidate's place."""
        return self._done[candidate][0] if candidate in self._done else candidate.module

    def replace(self, candidate: Candidate, new: nn.Module) -> None:
        gone: dict[str, weakref.ref] = {}
        self._done[candidate] = new, gone
        self._put(candidate, new)
        if isinstance(new, SparseLinear):  # an optimizer may hold the weight
            replaced.note(candidate.weight, new)
        if not candidate.is_masked:
            for path in candidate.weights:
                owner, leaf = _owner(candidate.module, path)
                gone[path] = weakref.ref(owner._parameters[leaf])
                owner._parameters[leaf] = None

    def undo(self) -> None:
        while self._done:
            self.take_back(next(reversed(self._done)))

    def take_back(self, candidate: Candidate) -> None:
        """The dense module again in the candidate's place."""
        new, gone = self._done[candidate]
        dense = None
        for path, ref in gone.items():
            parameter = ref()
            if parameter is None:
                dense = dense or new.to_dense()
                parameter = dense.get_parameter(path)
            owner, leaf = _owner(candidate.module, path)
            owner._parameters[leaf] = parameter
        replaced.forget(candidate.weight)
        self._put(candidate, candidate.module)
        del self._done[candidate]  # last: what is interrupted can be done again

    def _put(self, candidate: Candidate, module: nn.Module) -> None:
        for parent, name in self._places[candidate.module]:
            parent._modules[name] = module


def _owner(module: nn.Module, path: str) -> tuple[nn.Module, str]:
    name, _, leaf = path.rpartition(".")
    return module.get_submodule(name), leaf
