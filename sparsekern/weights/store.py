"""Weights of a model in files: what they hold, whole or not there, every bit checked.

`weights` here is a dict from names as in the dense model's state_dict ("blocks.0.mlp.up.weight") to
a Tensor or a SparseTensor. A file holds dense tensors as they are and sparse ones as layouts.py
says, and in the header's metadata, as JSON under "sparsekern", the format's version, the names that
share one tensor, digests, and what the writer wants to add.
"""

import json
import os
import re
from pathlib import Path

import torch
from torch import Tensor, nn

from ..extras import require
from ..files import as_path, atomic_path
from ..indices import kind
from ..nn import SparseLinear
from ..nn.stand_ins import StandIn
from ..tensor import SparseTensor
from . import layouts
from .bitmasks import stems_in
from .digests import digest_of_json, digests
from .layouts import MODEL_OR_STATE, Weights, check_named, join, refuse_packed, weights_in
from .read import FILE, FORMAT_VERSIONS, HEADER, INDEX, OF_TORCH

__all__ = ["save_weights", "to_zeros"]


def to_zeros(weights: nn.Module | Weights) -> dict[str, Tensor]:
    """Weights, or those of a model, as dense tensors with zeros, which every library reads: the
    state_dict of the dense model. For `save_weights`, or for load_state_dict."""
    if not isinstance(weights, nn.Module):
        check_named(weights, expected=MODEL_OR_STATE)
        items = weights.items()
        return {name: w.to_dense() if isinstance(w, SparseTensor) else w for name, w in items}
    refuse_packed(weights)
    state = dict(weights.state_dict())
    dense: dict[nn.Module, dict[str, Tensor]] = {}
    for name, module in weights.named_modules(remove_duplicate=False):
        is_sparse = isinstance(module, SparseLinear) and join(name, "values") in state
        if not (is_sparse or isinstance(module, StandIn)):
            continue
        if module not in dense:
            dense[module] = dict(module.to_dense().state_dict())
        for part in module.state_dict():
            del state[join(name, part)]
        state |= {join(name, part): t for part, t in dense[module].items()}
    return state


def save_weights(weights: nn.Module | Weights, path: str | Path, **metadata: object) -> None:
    """Write a model or weights to a .safetensors file; `metadata` is anything that JSON can hold.

    With 16-bit values a matrix takes 0.56 of its dense bytes at 50 % zeros, 0.31 at 75 %. The file
    is either whole or not there. It holds a digest of each tensor. NotImplementedError for a model
    that FSDP2 has cut into shards."""
    safetensors = require("safetensors", "gpt")
    save_file = require("safetensors.torch", "gpt").save_file
    path = as_path("path", path)
    weights = weights_in(weights)
    tensors: dict[str, Tensor] = {}
    aliases: dict[str, str] = {}
    first: dict[tuple, str] = {}  # the name of each memory: safetensors holds nothing twice
    storages: set[int] = set()

    def put(name: str, t: Tensor) -> None:
        if name in tensors:
            raise ValueError(f"weights: two of them would have the name {name} in the file")
        data = t.detach().resolve_conj().resolve_neg().contiguous()
        storage = data.untyped_storage().data_ptr()
        # Other parts of the same memory, as of two weights that share their pattern.
        tensors[name] = data.clone() if storage in storages else data
        storages.add(storage)

    if path.suffix in OF_TORCH or path.name.endswith(INDEX):
        raise ValueError(
            f"path: expected a name such as {FILE}, for load_weights would take {path.name} for "
            "another kind of file"
        )
    for name, t in weights.items():
        _check_can_be_written(name, t)
        key = _memory(t)
        if key in first:
            aliases[name] = first[key]
            continue
        if key:
            first[key] = name
        parts = layouts.parts_of(name, t) if isinstance(t, SparseTensor) else {name: t}
        for part, data in parts.items():
            put(part, data)
    _check_can_be_read(weights, tensors)
    header = {
        "format_version": FORMAT_VERSIONS[-1],
        "aliases": aliases,
        "metadata": _as_json(metadata),
        "digests": digests(tensors),
    }
    header["digest"] = digest_of_json(header)
    about = {"format": "pt", HEADER: json.dumps(header)}
    with atomic_path(path) as file:
        try:
            save_file(tensors, file, about)
        except KeyError as error:
            raise ValueError(f"weights: safetensors files hold no {error.args[0]}") from error
        except safetensors.SafetensorError as error:
            if not (code := re.search(r"os error (\d+)", str(error))):
                raise ValueError(f"weights: {path}: {error}") from error
            raise OSError(int(code[1]), os.strerror(int(code[1])), str(path)) from error
        _sort_metadata(file)


def _check_can_be_written(name: str, t: object) -> None:
    if name == "__metadata__":
        raise ValueError(f"weights: expected names of tensors, got {name!r}")
    data = t.values if isinstance(t, SparseTensor) else t
    if not isinstance(data, Tensor) or data.layout != torch.strided or data.is_nested:
        raise ValueError(f"weights: {name}: expected a Tensor or a SparseTensor, got {kind(t)}")
    if data.is_meta:
        raise ValueError(f"weights: {name}: expected a tensor with data, got one on meta")


def _check_can_be_read(weights: Weights, tensors: dict[str, Tensor]) -> None:
    """ValueError for names by which a reader would take dense tensors for parts of a sparse one."""
    stems_in(tensors)
    for name in layouts.names_in(tensors):
        if not isinstance(weights.get(name), SparseTensor):
            try:
                layouts.take(name, dict(tensors))
            except (TypeError, ValueError) as error:
                raise ValueError(f"weights: {name}: {error}") from error


def _memory(t: Tensor | SparseTensor) -> tuple:
    """Equal ones are one tensor; () where nothing tells."""
    if isinstance(t, SparseTensor):
        parts = _memory(t.row_offsets), _memory(t.col_indices), _memory(t.values)
        return (*parts, t.shape) if all(parts) else ()
    return (t.data_ptr(), t.shape, t.stride(), t.dtype) if t.numel() else ()


def _as_json(metadata: dict) -> dict:
    """As it will come back: lists for tuples, texts for keys."""
    try:
        return json.loads(json.dumps(metadata))
    except (TypeError, ValueError) as error:
        raise ValueError(f"metadata: expected what JSON can hold: {error}") from error


def _sort_metadata(path: Path) -> None:
    """safetensors writes its metadata in any order; the same weights shall be the same bytes."""
    with open(path, "r+b") as file:
        size = int.from_bytes(file.read(8), "little")
        header = json.loads(file.read(size))
        header["__metadata__"] = dict(sorted(header["__metadata__"].items()))
        text = json.dumps(header, ensure_ascii=False, separators=(",", ":")).encode()
        if len(text) <= size:
            file.seek(8)
            file.write(text.ljust(size))
