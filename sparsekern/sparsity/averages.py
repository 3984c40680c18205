"""Averages of weights (EMA, SWA) beside a pattern that changes.

An average of `values` is one of numbers side by side, so both sides must have the same pattern.
torch's AveragedModel sees to that itself, by way of this file: before each update the averaged
layers take the pattern of the model. What stays stored keeps its average, what is new starts at
zero, as the dense weight did: the result is the average of the dense weight at the stored places,
counted from when each was last stored. Whoever averages by hand calls `match_patterns_` before.
"""

import functools
import weakref
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim.swa_utils import AveragedModel

from ..kernels.derived import versions
from ..nn import SparseLinear, copies
from ..nn.checks import check_model
from .pattern import places_of, set_pattern

INDICES = ("row_offsets", "col_indices")

# What was found equal last: the index tensors of the average and of the model, with versions.
_equal: "weakref.WeakKeyDictionary[SparseLinear, tuple]" = weakref.WeakKeyDictionary()


def match_patterns_(average: nn.Module, model: nn.Module) -> nn.Module:
    """Give the sparse layers of an averaged copy the patterns that the model has now, in place, and
    return it. Layers are paired in their order.

    torch.optim.swa_utils.AveragedModel does so in update_parameters. An average made by hand needs
    it before every update, for without it numbers of different places are added up:

        match_patterns_(ema, model)
        for a, p in zip(ema.parameters(), model.parameters()):
            a.lerp_(p, 0.001)
    """
    for mine, theirs in _pairs(average, model):
        _match(mine, theirs)
    return average


def _pairs(average: nn.Module, model: nn.Module) -> list[tuple[SparseLinear, SparseLinear]]:
    for each in (average, model):
        check_model(each)
    layers = [[m for m in x.modules() if isinstance(m, SparseLinear)] for x in (average, model)]
    shapes = [[(m.out_features, m.in_features) for m in of] for of in layers]
    if shapes[0] != shapes[1]:
        raise ValueError(
            f"average: expected sparse layers of the shapes {shapes[1]}, got {shapes[0]}; make the "
            "average of the model after it became sparse"
        )
    return list(zip(*layers, strict=True))


def _match(mine: SparseLinear, theirs: SparseLinear) -> None:
    refs, counts = _equal.get(mine, ((), ()))
    now, counts_now = _indices_and_versions(mine, theirs)
    is_known = counts == counts_now and all(r() is t for r, t in zip(refs, now, strict=True))
    if mine is theirs or is_known:
        return
    places = places_of(theirs).to(mine.col_indices.device)
    own = places_of(mine)
    if own.shape != places.shape or not torch.equal(own, places):
        set_pattern(mine, places)
    copies.forget(mine.parameters())
    now, counts = _indices_and_versions(mine, theirs)
    _equal[mine] = tuple(weakref.ref(t) for t in now), counts


def _indices_and_versions(*layers: SparseLinear) -> tuple[list[Tensor], tuple]:
    pairs = [(layer.row_offsets, layer.col_indices) for layer in layers]
    return [t for pair in pairs for t in pair], tuple(versions(*pair) for pair in pairs)


@contextmanager
def _indices_kept(layers: list[SparseLinear]) -> Iterator[None]:
    """Whatever happens to the index buffers is undone: AveragedModel writes to all buffers, and
    with use_buffers=True takes the average of indices, rounded down."""
    kept: list[dict[str, Any]]
    kept = [{name: layer._buffers[name] for name in INDICES} for layer in layers]
    try:
        for layer, indices in zip(layers, kept, strict=True):
            layer._buffers.update({name: t.clone() for name, t in indices.items()})
        yield
    finally:
        for layer, indices in zip(layers, kept, strict=True):
            layer._buffers.update(indices)


_update_parameters = AveragedModel.update_parameters


@functools.wraps(_update_parameters)
def _update_with_patterns(self: AveragedModel, model: nn.Module) -> None:
    layers = [mine for mine, _ in _pairs(self.module, model)]
    match_patterns_(self.module, model)
    with _indices_kept(layers):
        _update_parameters(self, model)


# AveragedModel has no hook, and offers nothing that could tell an average from another copy: a
# wrong average could only be guessed at. Models without a SparseLinear are not touched.
AveragedModel.update_parameters = _update_with_patterns  # type: ignore[method-assign]
