"""Copies of layers whose values were written to, by something that is no optimizer.

Such a copy is probably an average of the weights, made by hand. When the pattern of the original
changes the average goes wrong without an error: numbers of different places are added up. Nothing
in torch tells an average from another copy, so this is for a warning alone.
"""

import weakref
from collections.abc import Iterable
from dataclasses import dataclass

import torch
from torch import Tensor, nn


@dataclass(frozen=True)
class _Copy:
    layer: weakref.ref
    original: weakref.ref
    fingerprint: Tensor  # of the values that were copied,
    itemsize: int  # and the bytes of one


_copies: dict[int, _Copy] = {}  # by the id of their values, as optimizers know them


def note(layer: nn.Module, original: nn.Module) -> None:
    """`layer` is a deep copy of `original`."""
    values = layer._parameters.get("values")
    if values is None or values.is_meta or type(values) is not nn.Parameter:
        return
    key = id(values)
    ref = weakref.ref(layer, lambda _: _copies.pop(key, None))
    _copies[key] = _Copy(ref, weakref.ref(original), _fingerprint(values), values.itemsize)


def forget(parameters: Iterable[Tensor | None]) -> None:
    """These are trained, loaded, pruned or averaged with care."""
    if _copies:
        for p in parameters:
            _copies.pop(id(p), None)


def written_copies(original: nn.Module) -> list[nn.Module]:
    """The copies of a layer that were written to; each is named once."""
    found = []
    for key, copy in list(_copies.items()):
        layer = copy.layer()
        if layer is None or copy.original() is not original:
            continue
        values = layer._parameters.get("values")
        # An average is not of fewer bits, which round.
        if id(values) != key or values.itemsize < copy.itemsize:
            del _copies[key]
        elif not torch.equal(_fingerprint(values), copy.fingerprint.to(values.device)):
            found.append(layer)
            del _copies[key]
    return found


def _fingerprint(values: Tensor) -> Tensor:
    """Writes through .data count too, which no version counter sees."""
    return values.detach().double().abs().sum()
