"""Calls whose every step is known beforehand: the host's part of a product on a GPU.

What a product does between its checks and its last launch depends on the pattern and the problem
alone. A row of the kernel table writes it down once, as Steps; csrc/prepared.h then runs it without
a line of Python, and csrc/calls.h keeps it for as long as both index tensors are what they were:
the same objects, at the same addresses, of the same versions. Values, x and the bias may be others
in each call, and are checked in each.
"""

from collections.abc import Callable
from math import prod
from typing import Any, NamedTuple

import torch
from torch import Tensor

from .cuda import library
from .operands import native
from .problem import Problem

# (t, shape): no view, as torch's own products give none. One that a Function of autograd has made,
# or a call without gradients, could not be written to in place.
unfolded = torch.ops.aten._unsafe_view.default


class Slot(NamedTuple):
    """An operand of a call, or the result of a step."""

    place: int


VALUES, A, B, ROW_OFFSETS, COL_INDICES = map(Slot, range(5))  # what each call gets


class Steps:
    """What a product does, in order.

    Its own tensors live as long as the pattern: it must hold neither of the index tensors.
    """

    def __init__(self, device: torch.device):
        self._device = device
        self._steps: list[tuple] = []
        self._scratch: tuple[Slot, int] | None = None
        self.sums: Slot | None = None  # those that were asked for

    def call(self, function: Callable, *arguments: Any, **named: Any) -> Slot:
        """function(*arguments, **named)."""
        return self.add(function, None, (*arguments, *named.values()), tuple(named) or None)

    def empty(self, like: Slot, *shape: int, **options: Any) -> Slot:
        """Memory for this shape, of the dtype of `like`."""
        return self.call(Tensor.new_empty, like, shape, **options)

    def scratch(self, like: Slot, elements: int) -> Slot:
        """Memory for so many, of the dtype of `like`, that an earlier product may have used."""
        if self._scratch is None or self._scratch[1] < elements:
            self._scratch = self.empty(like, elements), elements
        return self._scratch[0]

    def rows(self, t: Slot, tokens: tuple[int, ...], width: int) -> Slot:
        """t [.., width] as [M, width]."""
        return t if len(tokens) == 1 else self.call(Tensor.view, t, (prod(tokens), width))

    def unfolded(self, t: Slot, tokens: tuple[int, ...], width: int) -> Slot:
        """t [M, width] as [.., width]."""
        return t if len(tokens) == 1 else self.call(unfolded, t, (*tokens, width))

    def start(
        self, name: str, grid: int, block: int, smem_bytes: int, tensors: tuple, *sizes: int
    ) -> None:
        """What library.start() does."""
        launcher = library.function(name, self._device.index)
        self.add(launcher.start, (grid, 1, block, smem_bytes), (*tensors, *sizes))

    def add(
        self,
        function: Callable,
        sizes: tuple[int, int, int, int] | None,
        arguments: tuple,
        names: tuple[str, ...] | None = None,
    ) -> Slot:
        """function(*sizes, stream, *arguments), or without sizes function(*arguments), where the
        last arguments have names."""
        slots = tuple(a.place if isinstance(a, Slot) else -1 for a in arguments)
        fixed = tuple(None if isinstance(a, Slot) else a for a in arguments)
        self._steps.append((function, sizes, fixed, slots, names))
        return Slot(COL_INDICES.place + len(self._steps))

    def prepared(self, *results: Slot) -> object:
        """The call, for csrc/calls.h; its results in this order."""
        where: tuple = (False, None, None, None)
        if any(sizes is not None for _, sizes, *_ in self._steps):
            where = self._device.index, *library.surroundings()
        assert native
        return native.prepared(*where, tuple(self._steps), tuple(r.place for r in results))


class Asked(NamedTuple):
    """A product to prepare, with the operands of its first call."""

    problem: Problem
    row_offsets: Tensor
    col_indices: Tensor
    values: Tensor | None
    a: Tensor
    bias: Tensor | None
    wants_sums: bool = False  # of dy [.., N], beside the sddmm of it; a row may see to them

    @property
    def has_bias(self) -> bool:
        return self.bias is not None

    @property
    def tokens(self) -> tuple[int, ...]:
        """The shape of a without its last dimension."""
        return tuple(self.a.shape[:-1])


# Of a row (Kernel): writes the steps of a product of a, and of b, down: its result. None, and no
# step, where the row's own function has to do it.
Prepare = Callable[[Steps, Asked, Slot, Slot | None], Slot | None]
