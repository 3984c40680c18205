"""Dense weights whose layers became sparse, and optimizers that still hold them."""

import weakref
from typing import Any, TypeVar

from torch import Tensor, nn
from torch.optim import Optimizer

from ..indices import expand_rows
from .checks import check_optimizer
from .linear import SparseLinear
from .optimizers import check_can_swap, holders, swap_

_Layer = TypeVar("_Layer", bound=SparseLinear)

# By the id of the dense Parameter.
_replaced: dict[int, tuple[weakref.ref, weakref.ref]] = {}


def note(weight: Any, layer: _Layer) -> _Layer:
    """The layer, which takes the place of one with this weight [N, K]."""
    key = id(weight)
    _replaced[key] = weakref.ref(weight, lambda _: _replaced.pop(key, None)), weakref.ref(layer)
    return layer


def layer_for(weight: Tensor) -> SparseLinear | None:
    """The layer that took the place of one with this weight."""
    ref, layer = _replaced.get(id(weight), (None, None))
    return layer() if ref and layer and ref() is weight else None


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


def check_is_held(weight: Tensor) -> None:
    """RuntimeError for a weight that an optimizer steps although its layer became sparse, is
    trained as such, and no gradient comes to the dense weight any more."""
    if not _replaced or weight.grad is not None:
        return
    layer = layer_for(weight)
    if layer is not None and layer.values.grad is not None:
        raise RuntimeError(
            f"optimizer: it holds the dense weight that {layer} had, and would not train the "
            "sparse one: call sparsekern.nn.adopt_values_(optimizer), or make the optimizer after "
            "the model became sparse"
        )
