"""Packed layers that share their input, run as one product: q, k and v; gate and up.

Rows of W are independent, so the matrices stand in one pack, on top of each other. The first layer
that is called runs the product of all; each of the others takes its columns of the result, once, if
it gets the very same tensor, and runs all anew if not. So they may be called in any order, and a
layer called alone is right, only slower.

The same tensor means: the same object, and of the same version, so that one that was written to in
between counts as another. Inside of torch.compile and of inference_mode torch counts no versions:
there nothing between the layers of a group may write to their input. A CUDA graph replays what was
run at its capture, and nothing goes from outside a capture into it. Nothing is kept once all have
taken theirs.
"""

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from ..tensor import SparseTensor
from .linear import SparseLinear

MOST_NNZ = 2**31  # of indices in 32 bits


class SharedInput(nn.Module):
    """The product of all layers of a group, `whole`, and its result until all have taken theirs."""

    def __init__(self, whole: nn.Module):
        super().__init__()
        self.whole = whole
        self._forget()

    def _forget(self) -> None:
        self._x: Tensor | None = None
        self._y: Tensor | None = None
        self._stamp: object = None
        self._taken: tuple[int, ...] = ()

    def take(self, x: Tensor, part: "PackedPart") -> Tensor:
        """The columns of `part` of whole(x)."""
        stamp = _stamp(x)
        y = self._y
        is_same = self._x is x and self._stamp == stamp and part.first not in self._taken
        if y is None or not is_same:
            self._forget()
            y = self.whole(x)
            self._x, self._y, self._stamp = x, y, stamp
        self._taken = (*self._taken, part.first)
        if len(self._taken) == part.parts:
            self._forget()
        return y.narrow(-1, part.first, part.out_features)


def _stamp(x: Tensor) -> object:
    """What changes with x's contents, as far as torch counts that, and with a capture."""
    if torch.compiler.is_compiling():
        return None
    version = None if x.is_inference() else x._version
    return version, x.is_cuda and torch.cuda.is_current_stream_capturing()


class PackedPart(nn.Module):
    """One layer of a group: rows `first` and following of the matrix of all `parts` of them.

    As PackedLinear; its result is a view, whose last dimension alone is contiguous.
    """

    def __init__(self, shared: SharedInput, first: int, out_features: int, parts: int):
        super().__init__()
        self.shared = shared
        self.in_features, self.out_features = shared.whole.in_features, out_features
        self.first, self.parts = first, parts

    def forward(self, x: Tensor) -> Tensor:
        return self.shared.take(x, self)

    def extra_repr(self) -> str:
        return f"in_features={self.in_features}, out_features={self.out_features}"


class Group:
    """Layers that are to become parts of one matrix, by name."""

    def __init__(self, layers: dict[str, SparseLinear]):
        self.layers = layers
        self.shared: SharedInput | None = None

    def part(self, layer: SparseLinear) -> PackedPart:
        assert self.shared is not None
        layers = list(self.layers.values())
        first = sum(each.out_features for each in layers[: layers.index(layer)])
        part = PackedPart(self.shared, first, layer.out_features, len(layers))
        return part.train(layer.training)

    def stacked(self) -> tuple[SparseTensor, Tensor | None]:
        """All matrices as one, and all biases: zeros where only some have one."""
        layers = list(self.layers.values())
        weights = [layer.weight.detach() for layer in layers]
        nnz, n = sum(W.nnz for W in weights), sum(W.n for W in weights)
        if nnz >= MOST_NNZ:
            raise ValueError(f"groups: {', '.join(self.layers)}: {nnz} values are too many for one")
        offsets, before = [weights[0].row_offsets[:1]], 0
        for W in weights:
            offsets.append(W.row_offsets[1:] + before)
            before += W.nnz
        columns = torch.cat([W.col_indices for W in weights])
        values = torch.cat([W.values for W in weights])
        whole = SparseTensor(torch.cat(offsets), columns, values, (n, weights[0].k))
        if all(layer.bias is None for layer in layers):
            return whole, None
        biases = [
            values.new_zeros(layer.out_features) if layer.bias is None else layer.bias.detach()
            for layer in layers
        ]
        return whole, torch.cat([bias.to(values.dtype) for bias in biases])


def shared_inputs(model: nn.Module, groups: Sequence[Sequence[str]]) -> dict[nn.Module, Group]:
    """The group of each sparse layer that has one. ValueError where a group is nowhere in the
    model, or cannot be one matrix."""
    found: dict[nn.Module, Group] = {}
    for names in groups:
        if isinstance(names, str) or len(names) < 2 or len(set(names)) < len(names):
            raise ValueError(
                f"groups: expected lists of two names or more, each another, got {names!r}"
            )
        count = len(found)
        for path, parent in model.named_modules():
            layers = {
                f"{path}.{name}" if path else name: layer
                for name in names
                if isinstance(layer := parent._modules.get(name), SparseLinear)
            }
            if len(layers) >= 2:
                _check(layers, found)
                found |= dict.fromkeys(layers.values(), Group(layers))
        if len(found) == count:
            raise ValueError(
                f"groups: nothing in the model has two SparseLinear of {', '.join(names)}"
            )
    return found


def _check(layers: dict[str, SparseLinear], found: dict[nn.Module, Group]) -> None:
    def kind(layer: SparseLinear) -> tuple:
        return layer.in_features, layer.values.dtype, layer.values.device

    (first, one), *others = layers.items()
    for name, layer in others:
        if kind(layer) != kind(one):
            raise ValueError(
                f"groups: expected {name} to have in_features, dtype and device of {first}, "
                f"{kind(one)}, got {kind(layer)}"
            )
    for name, layer in layers.items():
        if layer in found or [*layers.values()].count(layer) > 1:
            raise ValueError(f"groups: {name} is in two of them, or in one twice")
