"""The layers of a model that a sparse one might serve, and the matrices that none will."""

import math
from collections.abc import Collection
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy
import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize

from ..indices import VALUE_DTYPES, has_nan
from ..nn import PackedLinear, SparseLinear
from ..nn.experts import SparseExperts
from ..nn.kinds import (
    is_conv1d,
    is_experts,
    is_transposed,
    pruning_masks,
    stacks_of,
    uses_of_parameters,
    why_not,
    why_not_weight,
)
from ..nn.linear import refuse_meta
from ..nn.stand_ins import (
    SparseConv,
    SparseConv1D,
    SparseMultiheadAttention,
    StandIn,
)
from .report import Skipped

LEAST_SPARSITY = 0.3  # below, no kernel is near a dense product
LEAST_WEIGHTS = 4096  # below, a call costs more than its product
ALIKE = 6  # steps of density to a factor of e: layers of the same step are timed as one

Shape = tuple[int, ...]


@dataclass(eq=False)
class Candidate:
    """A module whose weights have zeros."""

    name: str
    module: nn.Module
    shapes: tuple[Shape, ...]  # [N, K] of its matrices, or [E, N, K]
    nnz: int
    weights: tuple[str, ...]  # names of its matrices, from the module on
    is_masked: bool  # torch.nn.utils.prune multiplies weight and mask at each call

    def make(self) -> nn.Module:
        """Its sparse twin; the bias is shared."""
        return to_sparse(self.module)

    @property
    def size(self) -> int:
        return sum(map(math.prod, self.shapes))

    @property
    def sparsity(self) -> float:
        return 1 - self.nnz / max(1, self.size)

    @property
    def weight(self) -> nn.Parameter:
        return self.module.get_parameter(self.weights[0])

    @cached_property
    def key(self) -> tuple:
        """Equal for layers that take as long as each other. Also after its weight has gone."""
        step = round(ALIKE * math.log(max(self.nnz, 1) / max(self.size, 1)))
        attributes = ("num_heads", "batch_first", "kernel_size", "stride", "padding", "dilation")
        details = tuple(getattr(self.module, name, None) for name in attributes)
        w, bias = self.weight, getattr(self.module, "bias", None) is not None
        kind = type(self.module)
        return kind, self.shapes, step, bias, w.dtype, w.device, self.is_masked, details

    def plain(self) -> nn.Module:
        """The module without what torch.nn.utils.prune put there: its mask is multiplied in."""
        if not self.is_masked:
            return self.module
        weight = self.weight.detach() * pruning_masks(self.module)["weight"]
        linear = nn.Linear(weight.shape[1], weight.shape[0], bias=False, device="meta")
        linear.weight = nn.Parameter(weight, self.weight.requires_grad)
        linear.register_parameter("bias", self.module.bias)
        return linear.train(self.module.training)


def scan(model: nn.Module) -> tuple[list[Candidate], list[Skipped]]:
    """ValueError for weights that are NaN: some mark by it what is pruned."""
    uses = uses_of_parameters(model)
    # peft takes it out of a dense weight again.
    merged = [m.base_layer for m in model.modules() if getattr(m, "merged_adapters", None)]
    found: list[Candidate] = []
    skipped: list[Skipped] = []
    inside: tuple[str, ...] = ()  # how names begin in a module taken or skipped as a whole
    for name, module in model.named_modules():
        prefix = f"{name}." if name else ""
        if any(name.startswith(outer) for outer in inside):
            continue
        if isinstance(module, SparseLinear | StandIn | PackedLinear):
            skipped.append(_sparse(name, module))
            inside = (prefix,)
            continue
        if isinstance(module, torch.jit.ScriptModule):
            skipped.append(_scripted(name, module))
            inside = (prefix,)
            continue
        if (quantized := _quantized(name, module)) is not None:
            skipped.append(quantized)
            continue
        held: dict[str, Any] = {n: p for n, p in module._parameters.items() if p is not None}
        if parametrize.is_parametrized(module):
            held |= {n: getattr(module, n).detach() for n in module.parametrizations}  # type: ignore
            inside = (f"{prefix}parametrizations",)
        stacks = stacks_of(module) or held  # biases of experts are stacked, too
        weights = {n: p for n, p in held.items() if p.ndim > 1 and n in stacks}
        if not weights:
            skipped += _buffered(name, module)
            continue
        reason = why_not(module)
        if any(module is base for base in merged):
            reason = "an adapter is merged into it: unmerge it, or merge_and_unload, first"
        if reason is None and isinstance(module, nn.MultiheadAttention):
            weights |= {"out_proj.weight": module.out_proj.weight}
            inside = (prefix,)
        for p in weights.values():
            reason = reason or why_not_weight(p, uses[id(p)])
        candidate = _candidate(name, module, weights)
        if reason is None and candidate.sparsity < LEAST_SPARSITY:
            reason = f"too dense: {LEAST_SPARSITY:.0%} zeros are the least that can pay"
        elif reason is None and candidate.size < LEAST_WEIGHTS:
            reason = f"too small: {candidate.size} weights"
        elif reason is None and not candidate.nnz and not candidate.is_masked:
            reason = "all its weights are zero"
        if reason is None:
            found.append(candidate)
        else:
            kind = type(module).__name__
            skipped.append(Skipped(name, kind, candidate.shapes, candidate.sparsity, reason))
    return found, skipped


def _candidate(name: str, module: nn.Module, weights: dict[str, nn.Parameter]) -> Candidate:
    masks = pruning_masks(module)
    nnz = 0
    for key, weight in weights.items():
        full = f"{name}.{key}" if name else key
        if weight.is_meta and hasattr(module, "_hf_hook"):
            raise NotImplementedError(
                f"{full}: accelerate has taken it to another place until its layer is called: load "
                "the model whole on one device (no offloading by device_map)"
            )
        refuse_meta(full, weight)
        _refuse_nan(full, weight)
        mask = masks.get(key.removesuffix("_orig"))
        nnz += _count(weight) if mask is None else int(mask.count_nonzero())
    shapes = tuple(_as_matrix(module, weight) for weight in weights.values())
    return Candidate(name, module, shapes, nnz, tuple(weights), "weight" in masks)


def _count(weight: Tensor) -> int:
    """Of weights that are not zero; all, of a type that torch cannot count."""
    try:
        return int((weight.to_dense() != 0).count_nonzero())  # of bool it is much faster
    except (RuntimeError, NotImplementedError):
        return weight.numel()


def _zeros(weights: Collection[Tensor]) -> float:
    """The share of weights that are zero."""
    return 1 - sum(map(_count, weights)) / max(1, sum(map(Tensor.numel, weights)))


def _refuse_nan(name: str, weight: Tensor) -> None:
    if _may_be_nan(weight) and has_nan(weight):
        raise ValueError(
            f"{name}: {int(weight.isnan().sum())} of {weight.numel()} weights are NaN; where NaN "
            "marks what is pruned give nan_is_pruned=True"
        )


def _may_be_nan(weight: Tensor) -> bool:
    return weight.dtype in VALUE_DTYPES and weight.layout == torch.strided


def _as_matrix(module: nn.Module, weight: Tensor) -> Shape:
    shape = tuple(weight.shape)
    if is_conv1d(module):
        return shape[::-1]
    if is_experts(module) and is_transposed(module):
        return shape[0], shape[2], shape[1]
    return (shape[0], math.prod(shape[1:])) if _is_convolution(module) else shape


def _is_convolution(module: nn.Module) -> bool:
    return isinstance(module, nn.modules.conv._ConvNd)


def _sparse(name: str, module: nn.Module) -> Skipped:
    kinds = SparseLinear | PackedLinear
    layers = [m for m in module.modules() if isinstance(m, kinds)]
    shapes = tuple((m.out_features, m.in_features) for m in layers)
    nnz = sum(m.nnz if isinstance(m, PackedLinear) else m.col_indices.shape[0] for m in layers)
    sparsity = 1 - nnz / max(1, sum(map(math.prod, shapes)))
    return Skipped(name, type(module).__name__, shapes, sparsity, "sparse already")


def _scripted(name: str, module: nn.Module) -> Skipped:
    weights = [p for p in module.parameters() if p.ndim > 1]
    zeros = _zeros(weights)
    reason = "a module of torch.jit, in which nothing can be replaced"
    shapes = tuple(tuple(p.shape) for p in weights)
    return Skipped(name, type(module).__name__, shapes, zeros, reason)


def _quantized(name: str, module: nn.Module) -> Skipped | None:
    """Of a module of torch's quantization, which has no Parameters."""
    weight: Any = getattr(module, "weight", None)
    if not callable(weight) or "quantized" not in type(module).__module__:
        return None
    dense = weight().dequantize()
    zeros = _zeros([dense])
    kind = type(module).__name__
    return Skipped(name, kind, (tuple(dense.shape),), zeros, "its weights are quantized")


def _buffered(name: str, module: nn.Module) -> list[Skipped]:
    """Of a module whose weights are buffers, as those of some quantizers."""
    buffers = {n: t for n, t in module._buffers.items() if t is not None and t.ndim > 1}
    weights = {n: t for n, t in buffers.items() if "weight" in n}
    if not weights:
        return []
    zeros = _zeros(weights.values())
    shapes = tuple(tuple(t.shape) for t in weights.values())
    reason = f"its {', '.join(weights)} is a buffer, no Parameter"
    return [Skipped(name, type(module).__name__, shapes, zeros, reason)]


def to_sparse(module: nn.Module) -> nn.Module:
    """The sparse module of the same function, of one that kinds.why_not() says nothing against."""
    mask = pruning_masks(module).get("weight")
    if mask is not None:
        layer = SparseLinear.from_weight(module.weight_orig, module.bias, mask.bool())  # type: ignore[arg-type]
        return layer.train(module.training)
    if is_conv1d(module):
        return SparseConv1D.from_dense(module)
    if isinstance(module, nn.MultiheadAttention):
        return SparseMultiheadAttention.from_dense(module)
    if is_experts(module):
        return SparseExperts.from_dense(module)
    if _is_convolution(module):
        return SparseConv.from_dense(module)
    assert isinstance(module, nn.Linear)
    return SparseLinear.from_linear(module)


class Marks:
    """NaN that marks pruned weights, exchanged for zeros; `undo` puts it back.

    Kept meanwhile is one bit for each weight of a tensor that has any."""

    def __init__(self) -> None:
        self._marked: list[tuple[Tensor, Any]] = []

    def remove(self, model: nn.Module) -> None:
        for p in model.parameters():
            if _may_be_nan(p) and p.ndim > 1 and not p.is_meta:
                if has_nan(p.detach()):
                    nan = p.detach().isnan()
                    self._marked.append((p.detach(), _packed(nan)))
                    p.detach().masked_fill_(nan, 0.0)

    def undo(self) -> None:
        for weight, bits in self._marked:
            weight.masked_fill_(_unpacked(bits, weight), torch.nan)
        self._marked.clear()


def _packed(mask: Tensor) -> Any:
    return numpy.packbits(mask.flatten().cpu().numpy())


def _unpacked(bits: Any, like: Tensor) -> Tensor:
    mask = torch.from_numpy(numpy.unpackbits(bits, count=like.numel()).astype(bool))
    return mask.view(like.shape).to(like.device)
