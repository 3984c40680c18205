"""Packed layers that share their input, run as one product: q, k and v; gate and up.

Rows of W are independent, so the matrices stand in one pack, on top of each other. The first layer
that is called runs the product of all; each of the others takes its columns of the result, once, if
it gets the very same tensor, and runs all anew if not. So they may be called in any order, and a
layer called alone is right, only slower.

The same tensor means: the same object, and of the same version, so that one that was written to in
between counts as another. While torch.compile traces, the versions of its fake tensors count, and
what one graph began no other ends. Tensors that inference_mode made have no version: they are
refused. A write that torch does not count (x.data, a kernel that got x's address) is not seen. A
CUDA graph replays what was run at its capture, and nothing goes from outside a capture into it, nor
from one capture into another. Nothing is kept once all have taken theirs, and no copy or pickle
takes it along.
"""

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from ..casts import is_any_autocast_enabled, wanted_dtype
from ..kernels.cuda.capture import capture_of
from ..registered import written
from ..tensor import SparseTensor
from .linear import SparseLinear

MOST_NNZ = 2**31  # of indices in 32 bits


class _Pass(NamedTuple):
    """The product y of all layers of a group, and who has taken his part of it."""

    x: Tensor
    stamp: tuple
    y: Tensor
    taken: tuple[int, ...]


class SharedInput(nn.Module):
    """The product of all layers of a group, `whole`, and its result until all have taken theirs."""

    def __init__(self, whole: nn.Module):
        super().__init__()
        self.whole = whole
        # One attribute, so that a thread sees all of a pass or nothing; in a tuple, since a module
        # registers an x that is a Parameter.
        self._pass: _Pass | None = None

    def __getstate__(self) -> dict:
        return {**self.__dict__, "_pass": None}

    def take(self, x: Tensor, part: "PackedPart") -> Tensor:
        """The columns of `part` of whole(x)."""
        last, stamp = self._pass, _stamp(x)
        if last is None or last.x is not x or last.stamp != stamp or part.first in last.taken:
            self._pass = last = None  # frees its memory
            last = _Pass(x, stamp, self.whole(x), ())
        y, taken = last.y, (*last.taken, part.first)
        # Not by _replace, which torch.compile of torch 2.11 cannot take.
        self._pass = None if len(taken) == part.parts else _Pass(x, stamp, y, taken)
        return y.narrow(-1, part.first, part.out_features)


def _stamp(x: Tensor) -> tuple:
    """What changes with x's contents, as far as torch counts that, and with what is done with
    the product: by a capture, autograd or autocast. RuntimeError where torch counts nothing."""
    needs_grad = torch.is_grad_enabled() and x.requires_grad
    if torch.compiler.is_dynamo_compiling():
        return "traced", *written(x).shape, needs_grad, wanted_dtype(x)
    if x.is_inference():
        raise RuntimeError(
            "groups: expected x of another mode than torch.inference_mode, in which torch does not "
            "count writes to x: call the model under torch.no_grad, or pack_ it without groups"
        )
    dtype = wanted_dtype(x) if is_any_autocast_enabled() else None
    return x._version, needs_grad, dtype, capture_of(x)


class PackedPart(nn.Module):
    """One layer of a group: rows `first` and following of the matrix of all `parts` of them.

    As PackedLinear; its result is a view, whose last dimension alone is contiguous.
    """

    def __init__(self, shared: SharedInput, first: int, out_features: int, parts: int):
        super().__init__()
        self.shared = shared
        whole: Any = shared.whole
        self.in_features: int = whole.in_features
        self.out_features = out_features
        self.first, self.parts = first, parts

    @property
    def weight(self) -> Any:
        """Its shape [out_features, in_features], dtype and device, as of a PackedLinear."""
        shape = torch.Size([self.out_features, self.in_features])
        whole: Any = self.shared.whole
        return whole.weight._replace(shape=shape)

    def forward(self, input: Tensor) -> Tensor:
        return self.shared.take(input, self)

    def _load_from_state_dict(self, state_dict, prefix, *others):
        refuse_weights(state_dict, prefix, others[-1])

    def extra_repr(self) -> str:
        return f"in_features={self.in_features}, out_features={self.out_features}"


def refuse_weights(state_dict: Mapping, prefix: str, error_msgs: list[str]) -> None:
    """An error of load_state_dict, strict or not, for weights of a layer that is packed."""
    if any(key.startswith(prefix) for key in state_dict):
        error_msgs.append(
            f"{prefix.removesuffix('.') or 'the model'} is packed and takes no weights: load them "
            "before pack_"
        )


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
    children = {name for module in model.modules() for name, _ in module.named_children()}
    for names in _checked(groups):
        if unknown := [name for name in names if name not in children]:
            raise ValueError(f"groups: nothing in the model is called {unknown[0]}")
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


def _checked(groups: Any) -> Sequence[Sequence[str]]:
    """ValueError unless they are sequences of names."""

    def is_list(value: Any) -> bool:
        return isinstance(value, Sequence) and not isinstance(value, str)

    for names in groups if is_list(groups) else [groups]:
        is_group = is_list(names) and all(isinstance(name, str) for name in names)
        if not is_group or len(names) < 2 or len(set(names)) < len(names):
            raise ValueError(
                f"groups: expected lists of two names or more, each another, got {names!r}"
            )
    return groups


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
