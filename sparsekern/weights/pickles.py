"""Files of torch.save, read as nothing but tensors, numbers, texts, lists and dicts."""

import errno
from pathlib import Path

import torch
from torch import Tensor

from ..tensor import SparseTensor
from .layouts import Weights, with_widths

# What torch.load says of classes and functions that it does not call.
OF_OBJECTS = ("Unsupported global", "unsupported GLOBAL")


def read_pickle(path: Path, what: str) -> object:
    """What torch.save wrote to a file, on the CPU. ValueError that begins with `what` and names the
    file where it is not such a file, MemoryError where it does not fit into memory."""
    try:
        with open(path, "rb") as file:
            return torch.load(file, map_location="cpu", weights_only=True)
    except MemoryError as error:
        raise MemoryError(f"{what}: {path} does not fit into memory") from error
    except Exception as error:  # torch.load has a dozen ways to say that a file is not its own
        if isinstance(error, OSError) and error.errno not in (None, errno.EINVAL):
            raise
        if is_out_of_memory(error):
            raise MemoryError(f"{what}: {path} does not fit into memory") from error
        if any(words in str(error) for words in OF_OBJECTS):
            raise ValueError(
                f"{what}: {path} holds objects, which could run code: expected tensors, as "
                "torch.save(model.state_dict(), path) writes them"
            ) from error
        raise ValueError(f"{what}: {path} is truncated or not a checkpoint") from error


def is_out_of_memory(error: Exception) -> bool:
    return isinstance(error, torch.OutOfMemoryError) or "can't allocate memory" in str(error)


def has_its_elements(t: Tensor) -> bool:
    """Whether a tensor is dense and not a view that repeats its memory and pretends any size."""
    return t.layout == torch.strided and t.nbytes <= t.untyped_storage().nbytes()


def state_dict_in(path: Path) -> Weights:
    """The tensors of a model in a file of torch.save: its state_dict, or a checkpoint with one
    state_dict in it. Some may be SparseTensors."""
    content = read_pickle(path, "weights")
    if not isinstance(content, dict):
        raise ValueError(f"weights: {path}: expected a state_dict, got {type(content).__name__}")
    found = content
    if not _is_state_dict(content):
        inner = {key: t for key, t in content.items() if isinstance(t, dict) and t}
        inner = {key: t for key, t in inner.items() if _is_state_dict(t)}
        if len(inner) != 1:
            raise ValueError(
                f"weights: {path}: expected a dict of tensors, or one with such a dict in it, got "
                f"the keys {', '.join(map(str, content))[:200]}; dicts of tensors among them: "
                f"{', '.join(map(str, inner)) or 'none'}"
            )
        found = next(iter(inner.values()))
    for name, t in found.items():
        is_sparse = isinstance(t, SparseTensor)
        parts = (t.row_offsets, t.col_indices, t.values) if is_sparse else (t,)
        if not all(map(has_its_elements, parts)):
            hint = ""
            if not is_sparse and t.layout != torch.strided:
                hint = (
                    f", got {t.layout}: sparsekern.weights.from_zeros takes what torch.load reads"
                )
            text = f"weights: {path}: {name}: expected a tensor with all its elements{hint}"
            raise ValueError(text)
    try:
        return with_widths(found)
    except ValueError as error:
        raise ValueError(f"weights: {path}: {error}") from error


def _is_state_dict(value: object) -> bool:
    return isinstance(value, dict) and all(
        isinstance(name, str) and isinstance(t, Tensor | SparseTensor) for name, t in value.items()
    )
