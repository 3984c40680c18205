"""Changes that are taken back where one of them fails."""

from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager

import torch
from torch import nn
from torch.optim import Optimizer

from ..nn import SparseLinear, replaced
from ..nn.loading import renew_
from ..nn.optimizers import holders


@contextmanager
def unchanged_on_failure(model: nn.Module, optimizers: Sequence[Optimizer] = ()) -> Iterator[None]:
    """Inside, linear layers of the model may be replaced and patterns changed: an exception puts
    the old ones back."""
    linears = [
        (name, module)
        for name, module in model.named_modules(remove_duplicate=False)
        if name and type(module) is nn.Linear
    ]
    layers = (module for module in model.modules() if isinstance(module, SparseLinear))
    with layers_unchanged_on_failure(list(layers), optimizers):
        try:
            yield
        except BaseException:
            for name, module in linears:
                parent, _, child = name.rpartition(".")
                setattr(model.get_submodule(parent), child, module)
                replaced.forget(module.weight)
            raise


@contextmanager
def layers_unchanged_on_failure(
    layers: Iterable[SparseLinear], optimizers: Sequence[Optimizer] = ()
) -> Iterator[None]:
    """The same for the patterns, values and optimizer state of SparseLinear layers."""
    saved = [_Saved(layer, optimizers) for layer in layers]
    try:
        yield
    except BaseException:
        for layer in saved:
            layer.restore()
        raise


class _Saved:
    def __init__(self, layer: SparseLinear, optimizers: Sequence[Optimizer]) -> None:
        self.layer, self.optimizers = layer, holders(optimizers)
        self.row_offsets, self.col_indices = layer.row_offsets, layer.col_indices
        # A change of equal size may write into the values; the state is replaced as a whole.
        self.values, self.grad = layer.values.detach(), layer.values.grad
        self.numbers = self.values.clone()
        self.state = [dict(o.state.get(layer.values, {})) for o in self.optimizers]

    @torch.no_grad()
    def restore(self) -> None:
        layer, values = self.layer, self.layer.values
        if not hasattr(values, "full_tensor"):
            renew_(values, self.values)
        values.copy_(self.numbers)
        values.grad = self.grad
        layer.row_offsets, layer.col_indices = self.row_offsets, self.col_indices
        for optimizer, state in zip(self.optimizers, self.state, strict=True):
            if state:
                optimizer.state[values] = state
