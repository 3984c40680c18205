"""Weights from files: those of `save_weights`, of transformers with its plug-in, and of others.

Everything that is read is checked. What a file says of its sizes is held to the bytes that are
there before memory is taken for it.
"""

import json
from collections.abc import Callable, Mapping
from pathlib import Path

from torch import Tensor

from ..extras import require
from ..files import as_path
from ..indices import INDEX_LIMIT
from ..tensor import SparseTensor
from . import layouts
from .bitmasks import from_bitmasks
from .digests import changed, digest_of_json
from .layouts import Weights
from .pickles import state_dict_in

__all__ = ["load_metadata", "load_weights"]

FORMAT_VERSIONS = (1, 2)  # 2 holds patterns as bits (layouts.py), 1 all of them as PARTS
PARTS = ("crow_indices", "col_indices", "values")
HEADER = "sparsekern"  # its name in the metadata of a safetensors file
FILE = "model.safetensors"
FILE_OF_TORCH = "pytorch_model.bin"
INDEX = ".index.json"
FILES = (FILE, FILE + INDEX, FILE_OF_TORCH, FILE_OF_TORCH + INDEX)  # the first one there is taken
OF_TORCH = (".bin", ".ckpt", ".pt", ".pth")


def load_weights(path: str | Path) -> Weights:
    """Weights from a .safetensors file, from a file of torch.save (.bin, .pt, .pth, .ckpt), from an
    .index.json of several, or from a folder that holds one of them, as transformers names them.

    Sparse ones come from files of `save_weights` and `save_pretrained`, and from the layouts
    `sparse-bitmask` and `sparse-24-bitmask` of compressed-tensors; all else is dense.

    ValueError that names file and tensor, for what is truncated, damaged or not valid: another
    version of the format, a pattern, a tensor that does not have its digest. Files of others have
    no digests."""
    path = _file(as_path("path", path))
    if path.name.endswith(INDEX):
        return _decoded(path, _read_shards(path))
    if path.suffix in OF_TORCH:
        return _decoded(path, state_dict_in(path))
    header, tensors = _read(path)
    if header is None:
        if part := next((name for name in tensors if name.endswith(f".{PARTS[0]}")), None):
            raise ValueError(f"weights: {path}: expected sparsekern metadata beside {part}")
        return _decoded(path, tensors)
    if name := "digests" in header and changed(tensors, header["digests"]):
        raise ValueError(f"weights: {path}: {name} is damaged, it does not have its digest")
    is_first = header["format_version"] == 1
    weights = _first_version(path, header, tensors) if is_first else _decoded(path, tensors)
    for name, of in header["aliases"].items():
        if name in weights or of not in weights:
            wrong = f"{name} itself" if name in weights else f"no {of}"
            raise ValueError(
                f"weights: {path}: aliases: expected {name} to stand for {of}, the file has {wrong}"
            )
    return weights | {name: weights[of] for name, of in header["aliases"].items()}


def load_metadata(path: str | Path) -> dict:
    """Metadata that was given to `save_weights` beside the weights; {} for files of others."""
    path = _file(as_path("path", path))
    if path.name.endswith(INDEX) or path.suffix in OF_TORCH:
        return {}
    header, _ = _read(path, with_tensors=False)
    return header["metadata"] if header else {}


def _file(path: Path) -> Path:
    if path.is_dir():
        found = next((path / name for name in FILES if (path / name).is_file()), None)
        if not found:
            raise FileNotFoundError(f"weights: {path} holds none of {', '.join(FILES)}")
        return found
    if not path.is_file():
        raise FileNotFoundError(f"weights: {path} does not exist")
    return path


def _decoded(path: Path, found: Mapping[str, Tensor | SparseTensor]) -> Weights:
    """What a file holds as the weights that it stands for."""
    tensors = {name: t for name, t in found.items() if isinstance(t, Tensor)}
    sparse: Weights = {name: w for name, w in found.items() if isinstance(w, SparseTensor)}
    for name in layouts.names_in(tensors):
        try:
            sparse[name] = layouts.take(name, tensors)
        except (TypeError, ValueError) as error:
            raise ValueError(f"weights: {path}: {name}: {error}") from error
    try:
        return from_bitmasks(tensors) | sparse
    except ValueError as error:
        raise ValueError(f"weights: {path}: {str(error).removeprefix('weights: ')}") from error


def _first_version(path: Path, header: dict, tensors: dict[str, Tensor]) -> Weights:
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
    return weights | tensors


def _read(path: Path, with_tensors: bool = True) -> tuple[dict | None, dict[str, Tensor]]:
    """The header of a safetensors file of ours, None for others, and its tensors."""
    safetensors = require("safetensors", "gpt")
    require("safetensors.torch", "gpt")
    try:
        with safetensors.safe_open(path, "pt") as file:
            about = file.metadata() or {}
            tensors = {k: file.get_tensor(k) for k in file.keys()} if with_tensors else {}
    except safetensors.SafetensorError as error:
        raise ValueError(f"weights: {path} is truncated or not safetensors") from error
    if HEADER in about:
        return _header(path, about[HEADER]), tensors
    if any(text.startswith('{"format_version"') for text in about.values()):
        raise ValueError(f"weights: {path}: its metadata is damaged, it has no {HEADER}")
    return None, tensors


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
    if version not in FORMAT_VERSIONS:
        raise ValueError(
            f"weights: {path} has format version {version}, this sparsekern reads "
            f"{' and '.join(map(str, FORMAT_VERSIONS))}"
        )
    for name in ("aliases", "metadata") if version > 1 else ("sparse", "aliases", "metadata"):
        check(isinstance(header.get(name), dict), name, "an object", header.get(name))
    for name, of in header["aliases"].items():
        check(isinstance(of, str), f"aliases: {name}", "a name", of)
    if version == 1:
        _check_shapes(header["sparse"], check)
    rest = {name: value for name, value in header.items() if name != "digest"}
    if header.get("digest", digest_of_json(rest)) != digest_of_json(rest):
        raise ValueError(f"weights: {path}: its metadata is damaged, it does not have its digest")
    return header


def _check_shapes(sparse: dict, check: Callable[[bool, str, str, object], None]) -> None:
    for name, about in sparse.items():
        check(isinstance(about, dict), name, "layout and shape", about)
        check(about.get("layout") == "csr", f"{name}: layout", "csr", about.get("layout"))
        shape = about.get("shape")
        is_shape = isinstance(shape, list) and len(shape) == 2
        is_shape = is_shape and all(type(s) is int and 0 <= s < INDEX_LIMIT for s in shape)
        check(is_shape, f"{name}: shape", f"[N, K], each in [0, {INDEX_LIMIT})", shape)


def _read_shards(index: Path) -> Weights:
    """All tensors of a model in several files, from its index."""
    try:
        places = json.loads(index.read_bytes())["weight_map"]
    except (ValueError, RecursionError, LookupError, TypeError) as error:
        raise ValueError(f"weights: {index}: expected JSON with a weight_map") from error
    is_map = isinstance(places, dict) and all(isinstance(f, str) for f in places.values())
    if not is_map:
        raise ValueError(f"weights: {index}: weight_map: expected the name of a file for each name")
    tensors: Weights = {}
    for shard in dict.fromkeys(places.values()):
        if not shard or Path(shard).name != shard:
            raise ValueError(f"weights: {index}: expected files beside it, got {shard!r}")
        path = _file(index.with_name(shard))
        found: Mapping[str, Tensor | SparseTensor]
        if path.suffix in OF_TORCH:
            found = state_dict_in(path)
        else:
            header, found = _read(path)
            if header is not None:
                raise ValueError(f"weights: {path} is a whole file of sparsekern, load it alone")
        wanted = {name for name, file in places.items() if file == shard}
        if missing := sorted(wanted - found.keys()):
            raise ValueError(f"weights: {path} lacks {missing[0]}")
        tensors |= {name: found[name] for name in wanted}
    return tensors
