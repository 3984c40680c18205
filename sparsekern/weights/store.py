"""Weights of a model in files: what they hold, whole or not there, every bit checked.

`weights` here is a dict from names as in the dense model's state_dict ("blocks.0.mlp.up.weight") to
a Tensor or a SparseTensor. A file holds a SparseTensor W as three safetensors parts and dense ones
as they are:

    W.crow_indices int32 [N+1], W.col_indices int32 [nnz], W.values [nnz]

and in the header's metadata, as JSON under "sparsekern", the format's version, the shapes of the
sparse tensors, the names that share one tensor, and what the writer wants to add.
"""

import errno
import json
import os
import re
from pathlib import Path

import torch
from torch import Tensor, nn

from ..extras import require
from ..files import atomic_path
from ..indices import INDEX_LIMIT
from ..nn import SparseLinear, replace_modules
from ..tensor import SparseTensor
from .bitmasks import from_bitmasks
from .digests import changed, digest_of_json, digests

__all__ = ["load_metadata", "load_weights", "save_weights", "set_weights_", "weights_of"]

FORMAT_VERSION = 1
FILE = "model.safetensors"
INDEX = f"{FILE}.index.json"
OF_TORCH = (".bin", ".ckpt", ".pt", ".pth")
PARTS = ("crow_indices", "col_indices", "values")
BUFFERS = ("row_offsets", "col_indices", "values")  # of a SparseLinear
PREFIXES = ("_orig_mod.", "module.")  # that torch.compile and DDP put before all names

Weights = dict[str, Tensor | SparseTensor]


def weights_of(model: nn.Module) -> Weights:
    """All parameters and persistent buffers of a model, sharing its memory."""
    layers = {n: m for n, m in model.named_modules() if isinstance(m, SparseLinear)}
    parts = {_join(name, part) for name in layers for part in BUFFERS}
    weights: Weights = {_join(name, "weight"): m.weight.detach() for name, m in layers.items()}
    return weights | {k: t for k, t in model.state_dict().items() if k not in parts}


def save_weights(weights: nn.Module | Weights, path: str | Path, **metadata: object) -> None:
    """Write a model or weights to a .safetensors file; `metadata` is anything that JSON can hold.

    The file is either whole or not there. It holds a digest of each tensor."""
    safetensors = require("safetensors", "gpt")
    save_file = require("safetensors.torch", "gpt").save_file
    weights = weights_of(weights) if isinstance(weights, nn.Module) else weights
    tensors: dict[str, Tensor] = {}
    sparse: dict[str, dict] = {}
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
        if isinstance(t, SparseTensor):
            if t.is_transposed:
                raise ValueError(f"weights: {name} is a transpose, expected W itself")
            sparse[name] = {"layout": "csr", "shape": [t.n, t.k]}
            for part, data in zip(PARTS, (t.row_offsets, t.col_indices, t.values), strict=True):
                put(f"{name}.{part}", data)
            continue
        key = (t.data_ptr(), t.shape, t.stride(), t.dtype)
        if t.numel() and key in first:
            aliases[name] = first[key]
        else:
            first[key] = name
            put(name, t)
    header = {
        "format_version": FORMAT_VERSION,
        "sparse": sparse,
        "aliases": aliases,
        "metadata": _as_json(metadata),
        "digests": digests(tensors),
    }
    header["digest"] = digest_of_json(header)
    about = {"format": "pt", "sparsekern": json.dumps(header)}
    with atomic_path(Path(path)) as file:
        try:
            save_file(tensors, file, about)
        except safetensors.SafetensorError as error:
            code = re.search(r"os error (\d+)", str(error))
            number = int(code[1]) if code else errno.EIO
            raise OSError(number, os.strerror(number), str(path)) from error
        _sort_metadata(file)


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


def load_weights(path: str | Path) -> Weights:
    """Weights from a .safetensors file: of `save_weights`, with bitmasks (the `sparse-bitmask`
    layout of compressed-tensors), or any dense one. Of several files, of which
    `model.safetensors.index.json` tells, their folder or that index will do.

    ValueError for another version of the format, a pattern that is not valid, or a tensor that is
    not what its digest says; files without digests are taken as they are."""
    path = Path(path)
    if path.is_dir():
        found = next((path / f for f in (FILE, INDEX) if (path / f).is_file()), None)
        if not found:
            raise FileNotFoundError(f"weights: {path} holds neither {FILE} nor {INDEX}")
        path = found
    if path.name.endswith(".index.json"):
        return from_bitmasks(_read_shards(path))
    header, tensors = _read(path)
    if header is None:
        if part := next((name for name in tensors if name.endswith(f".{PARTS[0]}")), None):
            raise ValueError(f"weights: {path}: expected sparsekern metadata beside {part}")
        return from_bitmasks(tensors)
    if name := "digests" in header and changed(tensors, header["digests"]):
        raise ValueError(f"weights: {path}: {name} is damaged, it does not have its digest")
    weights: Weights = {}
    for name, about in header["sparse"].items():
        rows, cols, values = (tensors.pop(f"{name}.{part}", None) for part in PARTS)
        if rows is None or cols is None or values is None:
            raise ValueError(f"weights: {path} lacks a part of {name}")
        try:
            weights[name] = SparseTensor(rows, cols, values, about["shape"])
        except (TypeError, ValueError) as error:
            raise ValueError(f"weights: {path}: {name}: {error}") from error
    if twice := sorted(weights.keys() & tensors.keys()):
        raise ValueError(f"weights: {path}: {twice[0]} is there twice, dense and sparse")
    weights |= tensors
    for name, of in header["aliases"].items():
        if name in weights or of not in weights:
            wrong = f"{name} itself" if name in weights else f"no {of}"
            raise ValueError(
                f"weights: {path}: aliases: expected {name} to stand for {of}, the file has {wrong}"
            )
    return weights | {name: weights[of] for name, of in header["aliases"].items()}


def load_metadata(path: str | Path) -> dict:
    """Metadata that was given to `save_weights` beside the weights; {} for files of others."""
    path = Path(path)
    header, _ = _read(path / FILE if path.is_dir() else path, with_tensors=False)
    return header["metadata"] if header else {}


def _read(path: Path, with_tensors: bool = True) -> tuple[dict | None, dict[str, Tensor]]:
    safetensors = require("safetensors", "gpt")
    require("safetensors.torch", "gpt")
    if not path.is_file():
        raise FileNotFoundError(f"weights: {path} does not exist")
    try:
        with safetensors.safe_open(path, "pt") as file:
            text = (file.metadata() or {}).get("sparsekern")
            tensors = {k: file.get_tensor(k) for k in file.keys()} if with_tensors else {}
    except safetensors.SafetensorError as error:
        hint = "; torch.load(FILE, weights_only=True) reads files of torch's own"
        raise ValueError(
            f"weights: {path} is truncated or not safetensors{hint * (path.suffix in OF_TORCH)}"
        ) from error
    return (None if text is None else _header(path, text)), tensors


def _header(path: Path, text: str) -> dict:
    """The metadata of a file of ours, checked."""

    def check(holds: bool, name: str, expected: str, got: object) -> None:
        if not holds:
            raise ValueError(f"weights: {path}: {name}: expected {expected}, got {str(got)[:80]!r}")

    try:
        header = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise ValueError(f"weights: {path}: its sparsekern metadata is not JSON") from error
    check(isinstance(header, dict), "sparsekern metadata", "an object", header)
    version = header.get("format_version")
    if version != FORMAT_VERSION:
        raise ValueError(
            f"weights: {path} has format version {version}, this sparsekern reads {FORMAT_VERSION}"
        )
    for name in ("sparse", "aliases", "metadata"):
        check(isinstance(header.get(name), dict), name, "an object", header.get(name))
    for name, of in header["aliases"].items():
        check(isinstance(of, str), f"aliases: {name}", "a name", of)
    for name, about in header["sparse"].items():
        check(isinstance(about, dict), name, "layout and shape", about)
        check(about.get("layout") == "csr", f"{name}: layout", "csr", about.get("layout"))
        shape = about.get("shape")
        is_shape = isinstance(shape, list) and len(shape) == 2
        is_shape = is_shape and all(type(s) is int and 0 <= s < INDEX_LIMIT for s in shape)
        check(is_shape, f"{name}: shape", f"[N, K], each in [0, {INDEX_LIMIT})", shape)
    rest = {name: value for name, value in header.items() if name != "digest"}
    if header.get("digest", digest_of_json(rest)) != digest_of_json(rest):
        raise ValueError(f"weights: {path}: its metadata is damaged, it does not have its digest")
    return header


def _read_shards(index: Path) -> dict[str, Tensor]:
    """All tensors of a model in several files, from its index."""
    if not index.is_file():
        raise FileNotFoundError(f"weights: {index} does not exist")
    try:
        places = json.loads(index.read_bytes())["weight_map"]
    except (ValueError, RecursionError, LookupError, TypeError) as error:
        raise ValueError(f"weights: {index}: expected JSON with a weight_map") from error
    is_map = isinstance(places, dict) and all(isinstance(f, str) for f in places.values())
    if not is_map:
        raise ValueError(f"weights: {index}: weight_map: expected the name of a file for each name")
    tensors: dict[str, Tensor] = {}
    for shard in dict.fromkeys(places.values()):
        if not shard or Path(shard).name != shard:
            raise ValueError(f"weights: {index}: expected files beside it, got {shard!r}")
        header, found = _read(index.with_name(shard))
        if header is not None:
            raise ValueError(
                f"weights: {index.with_name(shard)} is a whole file of sparsekern, load it alone"
            )
        wanted = {name for name, file in places.items() if file == shard}
        if missing := sorted(wanted - found.keys()):
            raise ValueError(f"weights: {index.with_name(shard)} lacks {missing[0]}")
        tensors |= {name: found[name] for name in wanted}
    return tensors


def set_weights_(model: nn.Module, weights: Weights) -> nn.Module:
    """Give a model these weights, in place. A layer becomes a SparseLinear where its weight is a
    SparseTensor, and an nn.Linear where it is dense. Names must match, but for weights that the
    model ties to one that is there.

    ValueError where something does not fit; the model is then as it was."""
    weights = _tied(model, weights)
    _check_fit(model, weights)

    def replace(name: str, module: nn.Module) -> nn.Module | None:
        weight = weights.get(_join(name, "weight"))
        if type(module) is nn.Linear and isinstance(weight, SparseTensor):
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
    state: dict[str, Tensor] = {}
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


def _tied(model: nn.Module, weights: Weights) -> Weights:
    """With the names that files leave out since the model has their tensor under another one."""
    names: dict[int, list[str]] = {}
    for name, parameter in model.named_parameters(remove_duplicate=False):
        names.setdefault(id(parameter), []).append(name)
    added: Weights = {}
    for group in names.values():
        if there := [name for name in group if name in weights]:
            for name in there[1:]:
                if not _same(weights[there[0]], weights[name]):
                    raise ValueError(
                        f"weights: the model has one tensor for {there[0]} and {name}, got two "
                        "that differ"
                    )
            added |= {name: weights[there[0]] for name in group if name not in weights}
    return weights | added


def _same(a: object, b: object) -> bool:
    """Whether two weights of one parameter may be taken for it: not of dense ones that differ."""
    if a is b or not isinstance(a, Tensor) or not isinstance(b, Tensor) or a.is_meta or b.is_meta:
        return True
    if a.shape != b.shape or a.layout != b.layout or a.dtype != b.dtype or a.device != b.device:
        return a.shape != b.shape  # the shape is refused elsewhere
    return torch.equal(a, b)


def _check_can_be_copied(name: str, t: object, to: Tensor | SparseTensor) -> None:
    """ValueError for what `load_state_dict` would refuse half-way, or copy as something else."""
    if isinstance(t, SparseTensor):
        if t.is_transposed:
            raise ValueError(f"weights: {name} is a transpose, expected W itself")
        t = t.values
    if isinstance(to, SparseTensor):
        to = to.values
    if not isinstance(t, Tensor) or not isinstance(to, Tensor):
        if type(t) is not type(to):
            raise ValueError(f"weights: expected a tensor for {name}, got {type(t).__name__}")
    elif t.layout != torch.strided or t.is_meta or (t.is_complex() and not to.is_complex()):
        kind = "on the meta device" if t.is_meta else f"{t.dtype}, {t.layout}"
        raise ValueError(f"weights: expected {name} as {to.dtype} with its elements, got {kind}")


def _check_fit(model: nn.Module, weights: Weights) -> None:
    mine = weights_of(model)
    modules = dict(model.named_modules())
    for name, t in weights.items():
        want = mine.get(name)
        if want is None:
            continue
        _check_can_be_copied(name, t, want)
        if t.shape != want.shape:
            raise ValueError(
                f"weights: expected {name} of shape {tuple(want.shape)}, got {tuple(t.shape)}"
            )
        layer = modules[name.rpartition(".")[0]]
        is_layer = type(layer) is nn.Linear or isinstance(layer, SparseLinear)
        if isinstance(t, SparseTensor) and not (is_layer and name.endswith("weight")):
            raise ValueError(
                f"weights: expected {name} dense, only an nn.Linear has sparse weights and this is "
                f"of {type(layer).__name__}; give its to_dense()"
            )
    missing, others = sorted(mine.keys() - weights.keys()), sorted(weights.keys() - mine.keys())
    if not missing and not others:
        return
    prefix = next((p for p in PREFIXES if weights and all(k.startswith(p) for k in weights)), None)
    raise ValueError(
        "weights: they do not fit the model"
        + f"; missing: {', '.join(missing)}" * bool(missing)
        + f"; unexpected: {', '.join(others)}" * bool(others)
        + f"; all their names begin with {prefix!r}, remove it" * bool(prefix)
    )


# Importers


def _join(module: str, name: str) -> str:
    return f"{module}.{name}" if module else name
