"""Who looks on while the gradients of values are computed (RigL, on its update steps).

The op sddmm reports here when it runs, so it does not matter how it was reached: by a module or
not, in eager mode, under torch.compile, activation checkpointing or functorch. A CUDA graph that is
replayed runs no Python, and nobody sees it.
"""

import weakref

import torch
from torch import Tensor

# By the address of row_offsets, which every pattern has to itself: also an empty one has N + 1.
_observations: dict[int, weakref.ref] = {}

# Private in torch, so its absence must not break the import.
_current_pass = getattr(torch._C, "_current_graph_task_id", lambda: 0)


class Observation:
    """x [M, K] and dy [M, N] of the products dy.T @ x at one pattern since it was made that are in
    the gradient of `values`: not those of an autograd.grad beside it, of another tensor, and not
    those that zero_grad() threw away before another backward pass."""

    def __init__(self, row_offsets: Tensor, values: Tensor) -> None:
        self._noted: list[tuple[int, Tensor, Tensor]] = []  # with the number of a backward pass
        self._passes: set[int] = set()  # those that have added to values.grad
        self._values = values
        self._added: tuple[int, int] | None = None  # its gradient when the last one had
        self._watch(row_offsets)
        # FSDP2 puts gradients into shards when it likes.
        if values.is_leaf and values.requires_grad and not hasattr(values, "full_tensor"):
            me = weakref.ref(self)
            hook = values.register_post_accumulate_grad_hook(lambda values: _note_added(me()))
            weakref.finalize(self, hook.remove)

    @property
    def pairs(self) -> list[tuple[Tensor, Tensor]]:
        """(x, dy). All that there were where nothing was added to values.grad: functorch returns
        gradients."""
        seen, passes = self._noted, self._passes
        return [(x, dy) for number, x, dy in seen if number in passes or not passes]

    def add(self, x: Tensor, dy: Tensor) -> None:
        if self._added is not None and self._is_thrown_away(self._values.grad):
            self._noted, self._passes, self._added = [], set(), None
        # Copies: compiled code writes other things into this memory once it has no use for it.
        self._noted.append((_current_pass(), x.clone(), dy.clone()))

    def added(self) -> None:
        if self._values.grad is not None:
            self._passes.add(_current_pass())
            self._added = _state(self._values.grad)

    def _is_thrown_away(self, gradient: Tensor | None) -> bool:
        if gradient is None:
            return True
        return _state(gradient) != self._added and not gradient.any()

    def _watch(self, row_offsets: Tensor) -> None:
        key = row_offsets.data_ptr()
        self._row_offsets = row_offsets  # so that no other tensor gets its address
        _observations[key] = weakref.ref(self, lambda ref: _forget(key, ref))


def _state(gradient: Tensor) -> tuple[int, int]:
    return gradient.data_ptr(), gradient._version


def _note_added(observation: Observation | None) -> None:
    if observation is not None:
        observation.added()


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
        observation.add(x, dy)


def address(row_offsets: Tensor) -> int | None:
    """Of a pattern that may move; None while nobody looks on."""
    return row_offsets.data_ptr() if _observations else None


def moved(address: int | None, row_offsets: Tensor) -> None:
    """The pattern whose row_offsets were at this address has these now."""
    if address is not None and address != row_offsets.data_ptr():
        ref = _observations.pop(address, None)
        if ref is not None and (observation := ref()) is not None:
            observation._watch(row_offsets)
