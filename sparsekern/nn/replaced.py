"""Weights whose layers became sparse, values whose layers became dense, and optimizers that still
hold them."""

import weakref
from typing import Any, TypeVar

from torch import Tensor, nn
from torch.optim import Optimizer

from ..indices import expand_rows
from .checks import check_optimizer
from .linear import SparseLinear
from .optimizers import check_can_swap, holders, swap_

_Layer = TypeVar("_Layer", bound=SparseLinear)

# By the id of the Parameter that was there before.
_replaced: dict[int, tuple[weakref.ref, weakref.ref]] = {}
_densified: dict[int, tuple[weakref.ref, weakref.ref]] = {}


def note(weight: Any, layer: _Layer) -> _Layer:
    """The layer, which takes the place of one with this weight [N, K]."""
    _note(_replaced, weight, layer)
    return layer


def note_dense(layer: SparseLinear, weight: Tensor) -> None:
    """The weight [N, K] takes the place of the layer's values, and of the weight before them."""
    before = [ref() for ref, of in _replaced.values() if of() is layer]
    for old in (layer.values, *before):
        if old is not None:
            _note(_densified, old, weight)


def layer_for(weight: Tensor) -> SparseLinear | None:
    """The layer that took the place of one with this weight."""
    return _successor(_replaced, weight)


def dense_for(old: Tensor) -> Tensor | None:
    """The weight that took the place of these values, or of the weight before them."""
    return _successor(_densified, old)


def any_dense() -> bool:
    """Whether values that densify_ replaced are still somewhere."""
    return bool(_densified)


def _note(table: dict, old: Any, new: Any) -> None:
    key = id(old)
    table[key] = weakref.ref(old, lambda _: table.pop(key, None)), weakref.ref(new)


def _successor(table: dict, old: Tensor) -> Any:
    ref, new = table.get(id(old), (None, None))
    return new() if ref and new and ref() is old else None


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


def check_is_held(optimizer: Optimizer) -> None:
    """RuntimeError where it steps a weight whose layer became sparse, or values whose layer became
    dense, and does not hold what took their place: that is trained, and no gradient comes to the
    old ones any more."""
    if not _replaced and not _densified:
        return
    held = {id(p) for group in optimizer.param_groups for p in group["params"]}
    for p in (p for group in optimizer.param_groups for p in group["params"] if p.grad is None):
        layer, weight = layer_for(p), dense_for(p)
        if layer is not None and _is_missed(layer.values, held):
            raise RuntimeError(
                f"optimizer: it holds the dense weight that {layer} had, and would not train the "
                "sparse one: call sparsekern.nn.adopt_values_(optimizer), or make the optimizer "
                "after the model became sparse"
            )
        if weight is not None and _is_missed(weight, held):
            raise RuntimeError(
                f"optimizer: it holds what a weight of shape {list(weight.shape)} was before "
                "densify_, and would not train the dense one: give it to densify_(model, "
                "optimizer), or make the optimizer after the model became dense"
            )


def _is_missed(new: Tensor, held: set[int]) -> bool:
    return new.grad is not None and id(new) not in held
