"""Parameters whose layers became sparse or dense, and optimizers that still hold them."""

import weakref
from collections.abc import Iterable
from typing import Any, NamedTuple, TypeVar

from torch import Tensor, nn
from torch.optim import Optimizer

from ..indices import expand_rows
from .checks import check_optimizer
from .linear import SparseLinear
from .optimizers import check_can_swap, holders, swap_

_Layer = TypeVar("_Layer", bound=SparseLinear)


class _Replaced(NamedTuple):
    parameter: weakref.ref
    new: weakref.ref  # the SparseLinear with the values, or the dense weight, in its place
    gradient: Tensor | None  # that it had then
    version: int | None  # of this

    def has_new_gradient(self, gradient: Tensor | None) -> bool:
        """Whether one came since. The old one may stay, or be filled with zeros."""
        if gradient is None or gradient is not self.gradient:
            return gradient is not None
        return gradient._version != self.version and bool(gradient.any())


_replaced: dict[int, _Replaced] = {}  # by the id of the Parameter


def note(weight: Any, layer: _Layer) -> _Layer:
    """The layer, which takes the place of one with this weight [N, K]."""
    _note(weight, layer)
    return layer


def note_dense(values: nn.Parameter, weight: nn.Parameter) -> None:
    """The dense weight takes the place of these values."""
    _note(values, weight)


def _note(parameter: Any, new: nn.Module | Tensor) -> None:
    key, gradient = id(parameter), parameter.grad
    version = None if gradient is None else gradient._version
    ref = weakref.ref(parameter, lambda _: _replaced.pop(key, None))
    _replaced[key] = _Replaced(ref, weakref.ref(new), gradient, version)


def layer_for(weight: Tensor) -> SparseLinear | None:
    """The layer that took the place of one with this weight."""
    found = _replaced.get(id(weight))
    new = found.new() if found and found.parameter() is weight else None
    return new if isinstance(new, SparseLinear) else None


def adopt_values_(optimizer: Optimizer) -> Optimizer:
    """Give an optimizer that was made before `sparsify_` the values of the sparse layers, in the
    place of the dense weights that it holds, and return it. Its state for the weights that are
    stored moves along.

    `algorithm.apply(optimizer)` does so too. ValueError, and nothing has changed, for state that
    has neither the weight's shape nor a single number, and for an optimizer that keeps parameters
    in ways of its own.
    """
    check_optimizer(optimizer)
    held = [p for group in optimizer.param_groups for p in group["params"]]
    layers = {p: layer for p in held if (layer := layer_for(p)) is not None}
    layers = {p: layer for p, layer in layers.items() if not any(layer.values is q for q in held)}
    check_can_swap(optimizer, layers)
    states = [
        (o, p, {key: _at_places(key, t, p, layer) for key, t in o.state[p].items()})
        for o in holders([optimizer])
        for p, layer in layers.items()
        if p in o.state
    ]
    swap_(optimizer, {p: layer.values for p, layer in layers.items()})
    for o, p, state in states:
        o.state.pop(p, None)
        o.state[layers[p].values] = state
    return optimizer


def _at_places(key: str, t: object, weight: nn.Parameter, layer: SparseLinear) -> object:
    if not isinstance(t, Tensor) or (t.numel() == 1 and t.shape != weight.shape):
        return t
    if t.shape != weight.shape:
        raise ValueError(
            f"optimizer: keeps {key!r} of shape {tuple(t.shape)} for a weight of shape "
            f"{tuple(weight.shape)}, which cannot become sparse; make it after sparsify_"
        )
    rows = expand_rows(layer.row_offsets, layer.col_indices.shape[0])
    t = layer.as_stored(t)  # to store it as the weight is and back is the same: transposed, or not
    return t[rows, layer.col_indices.long()].contiguous()


def check_are_held(parameters: Iterable[Tensor]) -> None:
    """RuntimeError for one of an optimizer's parameters whose layer became sparse, or dense, if
    what took its place is trained, no gradient comes to it any more, and they do not hold that."""
    if not _replaced:
        return
    held = list(parameters)
    for parameter in held:
        found = _replaced.get(id(parameter))
        if found is None or found.parameter() is not parameter:
            continue
        new: Any = found.new()
        is_sparse = isinstance(new, SparseLinear)
        trained = new._parameters.get("values") if is_sparse else new
        if trained is None or trained.grad is None or any(trained is p for p in held):
            continue
        if found.has_new_gradient(parameter.grad):
            continue
        if is_sparse:
            raise RuntimeError(
                f"optimizer: it holds the dense weight that {new} had, and would not train the "
                "sparse one: call sparsekern.nn.adopt_values_(optimizer), or make the optimizer "
                "after the model became sparse"
            )
        raise RuntimeError(
            f"optimizer: it holds the {len(parameter)} values of a layer that is dense now, and "
            f"would not train its weight {tuple(trained.shape)}: make a new one, or give it to "
            "densify_(model, optimizer) when the model becomes dense"
        )
