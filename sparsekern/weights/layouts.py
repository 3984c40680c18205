"""The tensors that hold a SparseTensor W [N, K] in a file, and W from them.

    W          values [nnz], row by row
    W_shape    int64 [2], N and K
    W_bitmask  uint8 [N, ceil(K / 8)], a bit for each place, lowest first
  or, where that takes fewer bytes (above about 97 % zeros),
    W_row_offsets  int32 [N + 1]
    W_col_indices  int32 [nnz]

The pattern stands apart from the values, so stored zeros, -0.0 and NaN stay what they are. Values
have the name of the dense weight and not its shape: who does not know the layout meets an error,
not a model without them. With 16-bit values, W with 50 % zeros takes 0.56 of its dense bytes.
"""

import os
from collections.abc import Mapping

import torch
from torch import Tensor, nn

from ..indices import INDEX_LIMIT
from ..nn import SparseLinear, bitmask
from ..nn.checks import check_model, refuse_sharded
from ..nn.densify import packed_name
from ..nn.loading import BITMASK, IN_FEATURES, INDICES, SHAPE, TRANSPOSE
from ..nn.stored import stored_weight, transposed
from ..tensor import SparseTensor

Weights = dict[str, Tensor | SparseTensor]

PATTERNS = ((BITMASK,), tuple(f"_{part}" for part in INDICES))  # what follows the name
MODEL_OR_STATE = "a model or a state_dict"
BUFFERS = (*INDICES, "values")  # of a SparseLinear, in its state_dict


def weights_of(model: nn.Module) -> Weights:
    """All parameters and persistent buffers of a model, sharing its memory where it can. A sparse
    weight has the shape that its dense module stores, [K, N] in the Conv1D of transformers.
    ValueError for a model with layers that `pack_` made, NotImplementedError for one that FSDP2
    has cut into shards."""
    check_model(model)
    refuse_sharded("weights", model, dict(model.named_modules()))
    refuse_packed(model)
    modules = model.named_modules(remove_duplicate=False)
    layers = {n: m for n, m in modules if isinstance(m, SparseLinear)}
    parts = {join(name, part) for name in layers for part in BUFFERS}
    weights: Weights = {join(name, "weight"): stored_weight(m) for name, m in layers.items()}
    return weights | {k: t for k, t in model.state_dict().items() if k not in parts}


def check_named(weights: object, argument: str = "weights", expected: str = "a state_dict") -> None:
    """TypeError or ValueError unless it has tensors by their names, as a state_dict."""
    if not isinstance(weights, Mapping):
        hint = ""
        if isinstance(weights, nn.Module):
            hint = ": give its state_dict()"
        elif isinstance(weights, str | os.PathLike):
            hint = ": sparsekern.weights.load_weights reads a file"
        got = type(weights).__name__
        raise TypeError(f"{argument}: expected {expected}, got {got}{hint}")
    for name in weights:
        if not isinstance(name, str):
            raise ValueError(f"{argument}: expected names of tensors, got {name!r}")


def weights_in(source: nn.Module | Weights) -> Weights:
    """Those of a model, or these themselves."""
    if isinstance(source, nn.Module):
        return weights_of(source)
    check_named(source, expected=MODEL_OR_STATE)
    return source


def with_widths(weights: Weights) -> Weights:
    """With a SparseTensor for the three tensors of each SparseLinear of which a state_dict says how
    wide it is. ValueError where they do not fit."""
    joined = dict(weights)
    for module, known in getattr(weights, "_metadata", {}).items():
        names = [join(module, part) for part in BUFFERS]
        if IN_FEATURES not in known or not joined.keys() >= {*names}:
            continue
        rows, columns, values = (joined.pop(name) for name in names)
        name = join(module, "weight")
        try:
            shape = (rows.shape[0] - 1, known[IN_FEATURES])
            w = SparseTensor(rows, columns, values, shape)  # type: ignore[arg-type]
        except (TypeError, ValueError) as error:
            raise ValueError(f"{name}: {error}") from error
        joined[name] = transposed(w) if known.get(TRANSPOSE) else w
    return joined


def refuse_packed(model: nn.Module) -> None:
    """ValueError for layers whose weights are in no state_dict: a file would lack them."""
    if (packed := packed_name(model)) is not None:
        raise ValueError(
            f"weights: {packed} is packed for inference, and its weight can be neither saved nor "
            "set: do so before pack_"
        )


def join(module: str, name: str) -> str:
    """Name of a parameter of a module, which is "" at the root."""
    return f"{module}.{name}" if module else name


def parts_of(name: str, w: SparseTensor) -> dict[str, Tensor]:
    """The tensors of a weight in a file, in the smaller layout."""
    check(name, w)
    n, width = bitmask.packed_shape(w.n, w.k)
    parts = {name: w.values.detach(), name + SHAPE: torch.tensor([w.n, w.k], device="cpu")}
    if 0 < n * width <= w.row_offsets.nbytes + w.col_indices.nbytes:
        return parts | {name + BITMASK: bitmask.pack(w.row_offsets, w.col_indices, w.k)}
    indices = zip(INDICES, (w.row_offsets, w.col_indices), strict=True)
    return parts | {f"{name}_{part}": t for part, t in indices}


def check(name: str, w: SparseTensor) -> None:
    """ValueError for a transpose, or what somebody has written over since it was made."""
    if w.is_transposed:
        raise ValueError(f"weights: {name} is a transpose, expected W itself")
    try:
        w._checked()
    except (TypeError, ValueError) as error:
        raise ValueError(f"weights: {name}: {error}") from error


def names_in(tensors: Mapping[str, object]) -> list[str]:
    """Names of the weights that are in this layout."""
    endings = [part for pattern in PATTERNS for part in pattern]
    found = {name.removesuffix(e) for name in tensors for e in endings if name.endswith(e)}
    return sorted(name for name in found if name + SHAPE in tensors)


def take(name: str, tensors: dict[str, Tensor]) -> SparseTensor:
    """The weight of that name; its parts are taken out of `tensors`. ValueError or TypeError
    without its name."""
    endings = ("", SHAPE, *(part for pattern in PATTERNS for part in pattern))
    parts = {part: tensors.pop(name + part) for part in endings if name + part in tensors}
    values, pattern = parts.pop("", None), tuple(part for part in parts if part != SHAPE)
    if values is None or pattern not in PATTERNS:
        raise ValueError(
            f"expected values and {' or '.join(' and '.join(p) for p in PATTERNS)} beside "
            f"{SHAPE}, got {'values and ' * (values is not None)}{' and '.join(pattern)}"
        )
    if values.ndim != 1:
        raise ValueError(f"expected values [nnz] beside its pattern, got {tuple(values.shape)}")
    shape = sizes(parts[SHAPE])
    if pattern == (BITMASK,):
        indices = bitmask.unpack(parts[BITMASK], shape, values.shape[0])
    else:
        indices = parts[pattern[0]], parts[pattern[1]]
    return SparseTensor(*indices, values, shape)


def sizes(shape: Tensor) -> tuple[int, int]:
    """N and K from a tensor that holds them."""
    found = shape.tolist() if shape.shape == (2,) else []
    if not found or not all(type(s) is int and 0 <= s < INDEX_LIMIT for s in found):
        got = found or f"{shape.dtype} of shape {tuple(shape.shape)}"
        raise ValueError(f"expected the shape [N, K] of a matrix, got {got}")
    return found[0], found[1]
