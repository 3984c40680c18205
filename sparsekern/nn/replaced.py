"""Parameters whose layers became sparse or dense, and optimizers that still hold them."""

import weakref
from typing import Any, NamedTuple

from torch import Tensor, nn
from torch.optim import Optimizer

from ..indices import expand_rows
from .checks import check_optimizer
from .linear import SparseLinear
from .optimizers import check_can_swap, holders, swap_


class _Place:
    """Where layers or weights came one after the other: what stands there by now."""

    new: weakref.ref  # a SparseLinear, or a dense weight


class _Replaced(NamedTuple):
    parameter: weakref.ref
    place: _Place  # where it was
    gradient: Tensor | None  # that it had then
    version: int | None  # of this

    def has_new_gradient(self, gradient: Tensor | None) -> bool:
        """Whether one came since. The old one may stay, or be filled with zeros."""
        if gradient is None or gradient is not self.gradient:
            return gradient is not None
        return gradient._version != self.version and bool(gradient.any())


_replaced: dict[int, _Replaced] = {}  # by the id of the Parameter that was there before
_places: dict[int, tuple[weakref.ref, _Place]] = {}  # by the id of what stands there by now


def note(weight: Tensor, layer: SparseLinear) -> None:
    """The layer takes the place of one with this weight [N, K]."""
    _note(weight, weight, layer)


def note_dense(layer: SparseLinear, weight: Tensor) -> None:
    """The weight [N, K] takes the place of this layer."""
    _note(layer, layer.values, weight)


def _note(old: nn.Module | Tensor, parameter: Any, new: nn.Module | Tensor) -> None:
    _, place = _places.pop(id(old), (None, _Place()))
    key, gradient = id(parameter), parameter.grad
    version = None if gradient is None else gradient._version
    ref = weakref.ref(parameter, lambda _: _replaced.pop(key, None))
    _replaced[key] = _Replaced(ref, place, gradient, version)
    _stand(place, new)


def _stand(place: _Place, new: nn.Module | Tensor) -> None:
    key = id(new)
    place.new = weakref.ref(new, lambda _: _places.pop(key, None))
    _places[key] = place.new, place


def forget(weight: Tensor) -> None:
    """This weight is in its place again."""
    if found := _replaced.pop(id(weight), None):
        _stand(found.place, weight)


def is_any() -> bool:
    """Whether anything that was replaced is still somewhere."""
    return bool(_replaced)


def now_for(parameter: Any) -> Any:
    """The SparseLinear or the dense weight that stands where this parameter was; None where it was
    not replaced, or nothing stands there any more."""
    found = _replaced.get(id(parameter))
    return found.place.new() if found else None


def trained(new: Any) -> Tensor | None:
    """Of what took a place: its Parameter."""
    return new._parameters.get("values") if isinstance(new, SparseLinear) else new


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
    found = {now: p for p in held if isinstance(now := now_for(p), SparseLinear)}
    layers = {p: layer for layer, p in found.items() if not any(layer.values is q for q in held)}
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
    if weight.ndim == 1:
        raise ValueError(
            f"optimizer: keeps {key!r} for the values that a layer had before it became dense, "
            f"and sparse again as {layer}; make it after sparsify_"
        )
    rows = expand_rows(layer.row_offsets, layer.col_indices.shape[0])
    t = layer.as_stored(t)  # to store it as the weight is and back is the same: transposed, or not
    return t[rows, layer.col_indices.long()].contiguous()


def check_are_held(optimizer: Optimizer) -> None:
    """RuntimeError for one of its parameters whose layer became sparse, or dense, if what took its
    place is trained, no gradient comes to it any more, and the optimizer does not hold that."""
    if not _replaced:
        return
    parameters = [p for group in optimizer.param_groups for p in group["params"]]
    held = set(map(id, parameters))
    for parameter in parameters:
        found = _replaced.get(id(parameter))
        if found is None or found.has_new_gradient(parameter.grad):
            continue
        new: Any = found.place.new()
        becomes = trained(new)
        if becomes is None or becomes.grad is None or id(becomes) in held:
            continue
        if isinstance(new, SparseLinear):
            what = "dense weight" if parameter.ndim > 1 else "former values"
            raise RuntimeError(
                f"optimizer: it holds the {what} that {new} had, and would not train the "
                "sparse one: call sparsekern.nn.adopt_values_(optimizer), or make the optimizer "
                "after the model became sparse"
            )
        raise RuntimeError(
            f"optimizer: it holds what a weight of shape {list(new.shape)} was before densify_, "
            "and would not train the dense one: give it to densify_(model, optimizer), where it is "
            "older than the sparse model to adopt_values_ first, or make the optimizer after the "
            "model became dense"
        )
