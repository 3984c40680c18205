"""Weights from the ways in which others mark what is pruned: masks, parametrizations, zeros."""

from collections.abc import Iterable, Mapping

import torch
from torch import Tensor, nn

from ..tensor import SparseTensor
from .layouts import MODEL_OR_STATE, Weights, check_named

__all__ = ["from_masks", "from_zeros"]


def from_masks(source: nn.Module | Mapping[str, Tensor]) -> Weights:
    """Weights under masks: torch.nn.utils.prune (`weight_orig`, `weight_mask`), or parametrizations
    that have a `mask` (torch.ao.pruning among them), of a model or of its state_dict.

    The pattern is the mask, also where a kept weight is zero. Only matrices become sparse.
    ValueError where there are no masks, or one holds other numbers than 0 and 1.
    """
    if not isinstance(source, nn.Module):
        check_named(source, "source", MODEL_OR_STATE)
    tensors = dict(source.state_dict() if isinstance(source, nn.Module) else source)
    if isinstance(source, nn.Module):
        # torch.ao.pruning leaves its masks out of the state_dict.
        for name, module in source.named_modules():
            if hasattr(module, "mask") and ".parametrizations." in f".{name}":
                tensors[f"{name}.mask"] = module.mask
    weights: Weights = {}
    for name, t in tensors.items():
        if name.endswith("_orig") and f"{name[:-5]}_mask" in tensors:
            weights[name[:-5]] = _masked(name[:-5], t, [tensors[f"{name[:-5]}_mask"]])
        elif name.endswith(".original") and "parametrizations." in name:
            stem = name.removesuffix("original")
            masks = [m for k, m in tensors.items() if k.startswith(stem) and k.endswith(".mask")]
            if not masks:
                raise ValueError(f"weights: {name} has no mask beside it; give the model itself")
            own = stem.replace("parametrizations.", "").removesuffix(".")
            weights[own] = _masked(own, t, masks)
        elif name.endswith("_mask") and f"{name[:-5]}_orig" in tensors:
            continue
        elif (
            name.endswith("_mask") and name[:-5] in tensors and tensors[name[:-5]].shape == t.shape
        ):
            raise ValueError(
                f"weights: {name} is a mask beside {name[:-5]}, expected {name[:-5]}_orig as "
                "torch.nn.utils.prune has it; rename it, or use SparseTensor.from_dense"
            )
        elif "parametrizations." not in name:
            weights[name] = t
    if weights.keys() == tensors.keys():
        raise ValueError(
            "source: expected masks, as torch.nn.utils.prune (weight_orig and weight_mask) or "
            "parametrizations have them, got none; from_zeros takes the zeros of a state_dict"
        )
    return weights


def _masked(name: str, weight: Tensor, masks: list[Tensor]) -> Tensor | SparseTensor:
    for t in (weight, *masks):
        if not isinstance(t, Tensor):
            raise TypeError(
                f"weights: expected tensors as {name} and its mask, got {type(t).__name__}"
            )
    for mask in masks:
        if mask.shape != weight.shape:
            raise ValueError(
                f"weights: expected a mask of {name} of shape {tuple(weight.shape)}, "
                f"got {tuple(mask.shape)}"
            )
        if not mask.is_meta and ((mask != 0) & (mask != 1)).any():
            raise ValueError(f"weights: expected 0 and 1 in the mask of {name}, got other numbers")
    kept = torch.stack([mask.bool() for mask in masks]).all(0)
    if weight.ndim != 2:
        return weight.detach() * kept
    return SparseTensor.from_dense(weight.detach(), kept)


def from_zeros(
    weights: Mapping[str, Tensor | SparseTensor], names: Iterable[str] | None = None
) -> Weights:
    """Matrices with zeros as SparseTensors: those named, or all that are at least half zeros, and
    all of torch.sparse. A matrix of zeros alone is new (of LoRA, say), and stays dense unless it is
    named.

    ValueError where one holds NaN, by which some mark what is pruned."""
    check_named(weights)
    if isinstance(names, str) or not isinstance(names, Iterable | None):
        raise TypeError(f"names: expected a list of names, got {names!r}")
    chosen = None if names is None else set(names)
    if chosen and (unknown := chosen - weights.keys()):
        raise ValueError(f"names: {sorted(unknown, key=str)} are not among the weights")
    for name in sorted(chosen or ()):
        t = weights[name]
        if isinstance(t, Tensor) and not (t.ndim == 2 and t.is_floating_point()):
            raise ValueError(
                f"names: expected matrices of floating-point numbers, {name} is {t.dtype} of shape "
                f"{tuple(t.shape)}"
            )
    result: Weights = {}
    for name, t in weights.items():
        result[name] = t
        if isinstance(t, Tensor) and t.layout != torch.strided:
            try:
                result[name] = SparseTensor.from_torch(t.detach())
            except (TypeError, ValueError) as error:
                raise ValueError(f"weights: {name}: {error}") from error
            continue
        if not (isinstance(t, Tensor) and t.ndim == 2 and t.is_floating_point()):
            continue
        wanted = name in chosen if chosen is not None else _is_pruned(t)
        is_asked = chosen is None or name in chosen
        if is_asked and (count := int(t.isnan().sum())):
            raise ValueError(
                f"weights: {name}: expected numbers, {count} of {t.numel()} are NaN; where NaN "
                "marks pruned weights, give nan_to_num(0) of it"
            )
        if wanted:
            result[name] = SparseTensor.from_dense(t.detach())
    return result


def _is_pruned(t: Tensor) -> bool:
    zeros = int((t == 0).sum())
    return zeros < t.numel() <= 2 * zeros
