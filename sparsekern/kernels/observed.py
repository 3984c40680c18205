"""Who looks on while the gradients of values are computed (RigL, on its update steps).

The op sddmm reports here when it runs, so it does not matter how it was reached: by a module or
not, in eager mode, under torch.compile, activation checkpointing or functorch. A CUDA graph that is
replayed runs no Python, and nobody sees it.
"""

import weakref

from torch import Tensor

# By the address of row_offsets, which every pattern has to itself: also an empty one has N + 1.
_observations: dict[int, weakref.ref] = {}


class Observation:
    """x [M, K] and dy [M, N] of all products dy.T @ x at one pattern since it was made."""

    def __init__(self, row_offsets: Tensor) -> None:
        self.pairs: list[tuple[Tensor, Tensor]] = []
        self._watch(row_offsets)

    def _watch(self, row_offsets: Tensor) -> None:
        key = row_offsets.data_ptr()
        self._row_offsets = row_offsets  # so that no other tensor gets its address
        _observations[key] = weakref.ref(self, lambda ref: _forget(key, ref))


def _forget(key: int, ref: weakref.ref) -> None:
    if _observations.get(key) is ref:
        del _observations[key]


def is_observed(row_offsets: Tensor) -> bool:
    return row_offsets.data_ptr() in _observations


def note(row_offsets: Tensor, dy: Tensor, x: Tensor) -> None:
    """To be called with the operands of each sddmm."""
    if not _observations:
        return
    ref = _observations.get(row_offsets.data_ptr())
    if ref is not None and (observation := ref()) is not None:
        # Copies: compiled code writes other things into this memory once it has no use for it.
        observation.pairs.append((x.clone(), dy.clone()))


def moved(before: Tensor, after: Tensor) -> None:
    """The pattern that had `before` as its row_offsets has `after` now."""
    if _observations and before.data_ptr() != after.data_ptr():
        ref = _observations.pop(before.data_ptr(), None)
        if ref is not None and (observation := ref()) is not None:
            observation._watch(after)
