"""Weights of a model in files: what they hold, whole or not there, every bit checked.

`weights` here is a dict from names as in the dense model's state_dict ("blocks.0.mlp.up.weight") to
a Tensor or a SparseTensor. A file holds dense tensors as they are and sparse ones as layouts.py
says, and in the header's metadata, as JSON under "sparsekern", the format's version, the names that
share one tensor, digests, and what the writer wants to add.
"""

import errno
import json
import os
import re
from pathlib import Path

from torch import Tensor, nn

from ..extras import require
from ..files import atomic_path
from ..nn import SparseLinear
from ..nn.stand_ins import StandIn
from ..nn.substitutes import to_dense
from ..tensor import SparseTensor
from . import layouts
from .digests import digest_of_json, digests
from .layouts import Weights, join, weights_of
from .read import FORMAT_VERSIONS, HEADER

__all__ = ["save_weights", "to_zeros"]


def to_zeros(weights: nn.Module | Weights) -> dict[str, Tensor]:
    """Weights, or those of a model, as dense tensors with zeros, which every library reads: the
    state_dict of the dense model. For `save_weights`, or for load_state_dict."""
    if not isinstance(weights, nn.Module):
        items = weights.items()
        return {name: w.to_dense() if isinstance(w, SparseTensor) else w for name, w in items}
    state = dict(weights.state_dict())
    dense: dict[nn.Module, dict[str, Tensor]] = {}
    for name, module in weights.named_modules(remove_duplicate=False):
        is_sparse = isinstance(module, SparseLinear) and join(name, "values") in state
        if not (is_sparse or isinstance(module, StandIn)):
            continue
        if module not in dense:
            dense[module] = dict(to_dense(module).state_dict())
        for part in module.state_dict():
            del state[join(name, part)]
        state |= {join(name, part): t for part, t in dense[module].items()}
    return state


def save_weights(weights: nn.Module | Weights, path: str | Path, **metadata: object) -> None:
    """Write a model or weights to a .safetensors file; `metadata` is anything that JSON can hold.

    With 16-bit values a matrix takes 0.56 of its dense bytes at 50 % zeros, 0.31 at 75 %. The file
    is either whole or not there. It holds a digest of each tensor."""
    safetensors = require("safetensors", "gpt")
    save_file = require("safetensors.torch", "gpt").save_file
    weights = weights_of(weights) if isinstance(weights, nn.Module) else weights
    tensors: dict[str, Tensor] = {}
    aliases: dict[str, str] = {}
    first: dict[tuple, str] = {}  # the name of each memory: safetensors holds nothing twice
    storages: set[int] = set()

    def put(name: str, t: Tensor) -> None:
        if name in tensors:
            raise ValueError(f"weights: two of them would have the name {name} in the file")
        data = t.detach().contiguous()
        storage = data.untyped_storage().data_ptr()
        # Other parts of the same memory, as of two weights that share their pattern.
        tensors[name] = data.clone() if storage in storages else data
        storages.add(storage)

    for name, t in weights.items():
        key = _memory(t)
        if key in first:
            aliases[name] = first[key]
            continue
        if key:
            first[key] = name
        parts = layouts.parts_of(name, t) if isinstance(t, SparseTensor) else {name: t}
        for part, data in parts.items():
            put(part, data)
    header = {
        "format_version": FORMAT_VERSIONS[-1],
        "aliases": aliases,
        "metadata": _as_json(metadata),
        "digests": digests(tensors),
    }
    header["digest"] = digest_of_json(header)
    about = {"format": "pt", HEADER: json.dumps(header)}
    with atomic_path(Path(path)) as file:
        try:
            save_file(tensors, file, about)
        except safetensors.SafetensorError as error:
            code = re.search(r"os error (\d+)", str(error))
            number = int(code[1]) if code else errno.EIO
            raise OSError(number, os.strerror(number), str(path)) from error
        _sort_metadata(file)


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
