"""Weights of a model in files, and from the ways in which others store sparse ones.

`weights` here is a dict from names as in the dense model's state_dict ("blocks.0.mlp.up.weight") to
a Tensor or a SparseTensor. A file holds a SparseTensor W as three safetensors parts and dense ones
as they are:

    W.crow_indices int32 [N+1], W.col_indices int32 [nnz], W.values [nnz]

and in the header's metadata, as JSON under "sparsekern", the format's version, the shapes of the
sparse tensors, the names that share one tensor, and what the writer wants to add.
"""

import json
import os
from collections.abc import Iterable, Mapping
from pathlib import Path

import torch
from torch import Tensor, nn

from .extras import require
from .nn import SparseLinear, replace_modules
from .tensor import SparseTensor

FORMAT_VERSION = 1
PARTS = ("crow_indices", "col_indices", "values")
BUFFERS = ("row_offsets", "col_indices", "values")  # of a SparseLinear

Weights = dict[str, Tensor | SparseTensor]


def weights_of(model: nn.Module) -> Weights:
    """All parameters and persistent buffers of a model, sharing its memory."""
    layers = {n: m for n, m in model.named_modules() if isinstance(m, SparseLinear)}
    parts = {_join(name, part) for name in layers for part in BUFFERS}
    weights: Weights = {_join(name, "weight"): m.weight.detach() for name, m in layers.items()}
    return weights | {k: t for k, t in model.state_dict().items() if k not in parts}


def save_weights(weights: nn.Module | Weights, path: str | Path, **metadata: object) -> None:
    """Write a model or weights to a .safetensors file; `metadata` is anything that JSON can hold.

    The file is either whole or not there."""
    save_file = require("safetensors.torch", "gpt").save_file
    weights = weights_of(weights) if isinstance(weights, nn.Module) else weights
    tensors: dict[str, Tensor] = {}
    sparse: dict[str, dict] = {}
    aliases: dict[str, str] = {}
    first: dict[tuple, str] = {}  # the name of each memory: safetensors holds nothing twice
    for name, t in weights.items():
        if isinstance(t, SparseTensor):
            if t.is_transposed:
                raise ValueError(f"weights: {name} is a transpose, expected W itself")
            sparse[name] = {"layout": "csr", "shape": [t.n, t.k]}
            for part, data in zip(
                PARTS, (t.row_offsets, t.col_indices, t.values.detach()), strict=True
            ):
                tensors[f"{name}.{part}"] = data.contiguous()
            continue
        key = (t.data_ptr(), t.shape, t.stride(), t.dtype)
        if t.numel() and key in first:
            aliases[name] = first[key]
        else:
            first[key] = name
            tensors[name] = t.detach().contiguous()
    header = {
        "format_version": FORMAT_VERSION,
        "sparse": sparse,
        "aliases": aliases,
        "metadata": metadata,
    }
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(path.name + ".tmp")
    try:
        save_file(tensors, temporary, {"format": "pt", "sparsekern": json.dumps(header)})
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


def load_weights(path: str | Path) -> Weights:
    """Weights from a .safetensors file: of `save_weights`, with bitmasks (the `sparse-bitmask`
    layout of compressed-tensors), or any dense one.

    ValueError for another version of the format, or a pattern that is not valid."""
    header, tensors = _read(path)
    if header is None:
        return from_bitmasks(tensors)
    weights: Weights = {}
    for name, about in header["sparse"].items():
        parts = [tensors.pop(f"{name}.{part}", None) for part in PARTS]
        if any(part is None for part in parts):
            raise ValueError(f"weights: {path} lacks a part of {name}")
        weights[name] = SparseTensor(*parts, about["shape"])
    weights |= tensors
    return weights | {name: weights[of] for name, of in header["aliases"].items()}


def load_metadata(path: str | Path) -> dict:
    """What was given to `save_weights` beside the weights; {} for files of others."""
    header, _ = _read(path, with_tensors=False)
    return header["metadata"] if header else {}


def _read(path: str | Path, with_tensors: bool = True) -> tuple[dict | None, dict[str, Tensor]]:
    safetensors = require("safetensors", "gpt")
    require("safetensors.torch", "gpt")
    if not Path(path).is_file():
        raise FileNotFoundError(f"weights: {path} does not exist")
    try:
        with safetensors.safe_open(path, "pt") as file:
            text = (file.metadata() or {}).get("sparsekern")
            tensors = {k: file.get_tensor(k) for k in file.keys()} if with_tensors else {}
    except safetensors.SafetensorError as error:
        raise ValueError(f"weights: {path} is truncated or not safetensors") from error
    header = json.loads(text) if text else None
    if header and header["format_version"] != FORMAT_VERSION:
        raise ValueError(
            f"weights: {path} has format version {header['format_version']}, "
            f"this sparsekern reads {FORMAT_VERSION}"
        )
    return header, tensors


def set_weights_(model: nn.Module, weights: Weights) -> nn.Module:
    """Give a model these weights, in place. A layer becomes a SparseLinear where its weight is a
    SparseTensor, and an nn.Linear where it is dense. Names must match; ValueError where not."""

    def replace(name: str, module: nn.Module) -> nn.Module | None:
        weight = weights.get(_join(name, "weight"))
        if type(module) is nn.Linear and isinstance(weight, SparseTensor):
            if weight.shape != module.weight.shape:
                raise ValueError(
                    f"weights: expected {name}.weight of shape {tuple(module.weight.shape)}, "
                    f"got {tuple(weight.shape)}"
                )
            mine = weight.detach().to(module.weight.device, module.weight.dtype)
            values = nn.Parameter(mine.values, module.weight.requires_grad)
            layer = SparseLinear(
                weight.k, weight.n, mine.row_offsets, mine.col_indices, values, module.bias
            )
            return layer.train(module.training)
        if isinstance(module, SparseLinear) and isinstance(weight, Tensor):
            return module.to_linear()
        return None

    model = replace_modules(model, replace)
    state = {}
    for name, t in weights.items():
        if isinstance(t, SparseTensor):
            parts = (t.row_offsets, t.col_indices, t.values.detach())
            layer = name.removesuffix("weight")
            state |= {layer + part: data for part, data in zip(BUFFERS, parts, strict=True)}
        else:
            state[name] = t
    try:
        model.load_state_dict(state)
    except RuntimeError as error:
        raise ValueError(f"weights: they do not fit the model: {error}") from error
    return model


# Importers


def from_masks(source: nn.Module | Mapping[str, Tensor]) -> Weights:
    """Weights under masks: torch.nn.utils.prune (`weight_orig`, `weight_mask`), or parametrizations
    that have a `mask` (torch.ao.pruning among them), of a model or of its state_dict.

    The pattern is the mask, also where a kept weight is zero. Only matrices become sparse.
    """
    tensors = dict(source.state_dict() if isinstance(source, nn.Module) else source)
    if isinstance(source, nn.Module):
        # torch.ao.pruning leaves its masks out of the state_dict.
        for name, module in source.named_modules():
            if hasattr(module, "mask") and ".parametrizations." in f".{name}":
                tensors[f"{name}.mask"] = module.mask
    weights: Weights = {}
    for name, t in tensors.items():
        if name.endswith("_orig") and f"{name[:-5]}_mask" in tensors:
            weights[name[:-5]] = _masked(t, [tensors[f"{name[:-5]}_mask"]])
        elif name.endswith(".original") and "parametrizations." in name:
            stem = name.removesuffix("original")
            masks = [m for k, m in tensors.items() if k.startswith(stem) and k.endswith(".mask")]
            if not masks:
                raise ValueError(f"weights: {name} has no mask beside it; give the model itself")
            weights[stem.replace("parametrizations.", "").removesuffix(".")] = _masked(t, masks)
        elif name.endswith("_mask") and f"{name[:-5]}_orig" in tensors:
            continue
        elif "parametrizations." not in name:
            weights[name] = t
    return weights


def _masked(weight: Tensor, masks: list[Tensor]) -> Tensor | SparseTensor:
    kept = torch.stack([mask.bool() for mask in masks]).all(0)
    if weight.ndim != 2:
        return weight.detach() * kept
    return SparseTensor.from_dense(weight.detach(), kept)


def from_zeros(
    weights: Mapping[str, Tensor | SparseTensor], names: Iterable[str] | None = None
) -> Weights:
    """Matrices with zeros as SparseTensors: those named, or all that are at least half zeros."""
    chosen = None if names is None else set(names)
    if chosen and not chosen <= weights.keys():
        raise ValueError(f"names: {sorted(chosen - weights.keys())} are not among the weights")
    result: Weights = {}
    for name, t in weights.items():
        is_matrix = isinstance(t, Tensor) and t.ndim == 2 and t.is_floating_point()
        wanted = (
            name in chosen if chosen is not None else is_matrix and 2 * (t == 0).sum() >= t.numel()
        )
        result[name] = SparseTensor.from_dense(t.detach()) if is_matrix and wanted else t
    return result


def from_bitmasks(tensors: Mapping[str, Tensor]) -> Weights:
    """The `sparse-bitmask` layout: W.shape, W.compressed (values, row by row), W.bitmask (uint8
    [N, ceil(K / 8)], lowest bit first). Tensors that have no bitmask pass through."""
    names = [name.removesuffix(".bitmask") for name in tensors if name.endswith(".bitmask")]
    parts = ("shape", "compressed", "bitmask", "row_offsets")
    skipped = {f"{name}.{part}" for name in names for part in parts}
    weights: Weights = {name: t for name, t in tensors.items() if name not in skipped}
    for name in names:
        try:
            n, k = tensors[f"{name}.shape"].tolist()
            values, bits = tensors[f"{name}.compressed"], tensors[f"{name}.bitmask"]
        except KeyError as error:
            raise ValueError(f"weights: {name} has a bitmask but lacks {error}") from error
        mask = (bits[:, :, None] >> torch.arange(8, device=bits.device)) & 1
        mask = mask.flatten(1)[:, :k].bool()
        if mask.shape != (n, k) or values.shape != (int(mask.sum()),):
            raise ValueError(
                f"weights: {name}: expected {int(mask.sum())} values and a bitmask of {(n, k)}, "
                f"got {tuple(values.shape)} and {tuple(mask.shape)}"
            )
        pattern = SparseTensor.from_dense(mask.to(values.dtype), mask)
        weights[name] = SparseTensor(pattern.row_offsets, pattern.col_indices, values, (n, k))
    return weights


def _join(module: str, name: str) -> str:
    return f"{module}.{name}" if module else name
