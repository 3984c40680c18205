"""Parameters whose layers became sparse or dense, and optimizers that still hold them."""

import weakref
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


# By the id of the Parameter that was there before.
_sparse: dict[int, _Replaced] = {}
_dense: dict[int, _Replaced] = {}


def note(weight: Any, layer: _Layer) -> _Layer:
    """The layer, which takes the place of one with this weight [N, K]."""
    _note(_sparse, weight, layer)
    return layer


def note_dense(values: nn.Parameter, weight: nn.Parameter) -> None:
    """The weight [N, K] takes the place of these values, and of the weight before them."""
    before = [r.parameter() for r in _sparse.values() if _trained(r.new()) is values]
    for old in (values, *before):
        if old is not None:
            _note(_dense, old, weight)


def layer_for(weight: Tensor) -> SparseLinear | None:
    """The layer that took the place of one with this weight."""
    found = _found(_sparse, weight)
    return found.new() if found else None


def dense_for(old: Tensor) -> Tensor | None:
    """The weight that took the place of these values, or of the weight before them."""
    found = _found(_dense, old)
    return found.new() if found else None


def any_dense() -> bool:
    """Whether values that densify_ replaced are still somewhere."""
    return bool(_dense)


def _note(table: dict[int, _Replaced], old: Any, new: nn.Module | Tensor) -> None:
    key, gradient = id(old), old.grad
    version = None if gradient is None else gradient._version
    ref = weakref.ref(old, lambda _: table.pop(key, None))
    table[key] = _Replaced(ref, weakref.ref(new), gradient, version)


def _found(table: dict[int, _Replaced], old: Tensor) -> _Replaced | None:
    found = table.get(id(old))
    return found if found and found.parameter() is old else None


def _trained(new: Any) -> Tensor | None:
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


def check_are_held(optimizer: Optimizer) -> None:
    """RuntimeError for one of its parameters whose layer became sparse, or dense, if what took its
    place is trained, no gradient comes to it any more, and the optimizer does not hold that."""
    if not _sparse and not _dense:
        return
    parameters = [p for group in optimizer.param_groups for p in group["params"]]
    held = set(map(id, parameters))
    for parameter in parameters:
        found = _found(_dense, parameter) or _found(_sparse, parameter)
        if found is None or found.has_new_gradient(parameter.grad):
            continue
        new: Any = found.new()
        trained = _trained(new)
        if trained is None or trained.grad is None or id(trained) in held:
            continue
        if isinstance(new, SparseLinear):
            raise RuntimeError(
                f"optimizer: it holds the dense weight that {new} had, and would not train the "
                "sparse one: call sparsekern.nn.adopt_values_(optimizer), or make the optimizer "
                "after the model became sparse"
            )
        raise RuntimeError(
            f"optimizer: it holds what a weight of shape {list(new.shape)} was before densify_, "
            "and would not train the dense one: give it to densify_(model, optimizer), or make the "
            "optimizer after the model became dense"
        )
