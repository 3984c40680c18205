"""Loading of a SparseLinear from a state_dict: all that is there for it, or nothing.

Its pattern and its values belong together: row_offsets and col_indices are loaded with their
values, and one or two of the three only where they fit the pattern that the layer has. What a file
of ours holds for it, weight [nnz] with weight_bitmask, is taken too: frameworks that resume a run
hand on the tensors of the file.
"""

from collections import OrderedDict
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from ..indices import check_values, counted, kind
from ..kernels import observed
from ..kernels.derived import is_captured
from ..tensor import SparseTensor
from . import bitmask, copies
from .stored import stored_shape, transposed

if TYPE_CHECKING:
    from .linear import SparseLinear

INDICES = ("row_offsets", "col_indices")
SHAPE, BITMASK = "_shape", "_bitmask"  # in a file, after the name of the weight
IN_FEATURES, TRANSPOSE = "in_features", "stores_transpose"  # in the metadata of a state_dict
CAPTURED = (
    "a captured CUDA graph reads the pattern of this layer and would not see another one: delete "
    "the graph, say so with sparsekern.nn.forget_graphs_(model), change the pattern, and capture "
    "again"
)


class _Refused(Exception):
    """Its text is what to tell the caller of load_state_dict."""


def load(
    layer: "SparseLinear",
    load_others: Callable,
    state_dict: dict,
    prefix: str,
    metadata: dict,
    strict: bool,
    missing_keys: list[str],
    unexpected_keys: list[str],
    error_msgs: list[str],
) -> None:
    """Module._load_from_state_dict of a SparseLinear; `load_others` is that of nn.Module."""
    lists = missing_keys, unexpected_keys, error_msgs
    hooks, layer._load_state_dict_pre_hooks = layer._load_state_dict_pre_hooks, OrderedDict()
    try:
        for hook in hooks.values():
            hook(state_dict, prefix, metadata, strict, *lists)
        try:
            _unpack(layer, state_dict, prefix)
            pattern = _checked(layer, state_dict, prefix, metadata.get(IN_FEATURES))
        except _Refused as error:
            error_msgs.append(str(error))
            return
        if strict:  # nn.Module says so of the others
            missing_keys += [prefix + n for n in INDICES if prefix + n not in state_dict]
        _apply(layer, load_others, pattern, state_dict, prefix, metadata, strict, lists)
    finally:
        layer._load_state_dict_pre_hooks = hooks


def _unpack(layer: "SparseLinear", state_dict: dict, prefix: str) -> None:
    """Put row_offsets, col_indices and values in the place of what a file has for them
    (weights/layouts.py). Raises _Refused."""
    name = f"{prefix}weight"
    parts = {
        part: state_dict[name + part]
        for part in ("", SHAPE, BITMASK, *(f"_{part}" for part in INDICES))
        if name + part in state_dict
    }
    values, shape = parts.get(""), stored_shape(layer)
    if not isinstance(values, Tensor) or parts.keys() <= {""}:
        return
    wanted = parts.get(SHAPE)
    if not isinstance(wanted, Tensor) or wanted.tolist() != list(shape):
        got = wanted.tolist() if isinstance(wanted, Tensor) else "none"
        raise _Refused(f"{name}{SHAPE}: expected {list(shape)}, got {got}")
    indices: tuple[Tensor | None, ...]
    try:
        if BITMASK in parts:
            indices = bitmask.unpack(parts[BITMASK], shape, values.numel())
        else:
            indices = tuple(parts.get(f"_{part}") for part in INDICES)
        if layer.stores_transpose:
            w = transposed(SparseTensor(*indices, values, shape))  # type: ignore[arg-type, call-arg]
            indices, values = (w.row_offsets, w.col_indices), w.values
    except (TypeError, ValueError) as error:
        raise _Refused(f"{name}: {error}") from error
    for part in parts:
        del state_dict[name + part]
    state_dict[f"{prefix}values"] = values
    for part, t in zip(INDICES, indices, strict=True):
        if t is not None:
            state_dict[prefix + part] = t


def _checked(
    layer: "SparseLinear", state_dict: dict, prefix: str, in_features: int | None
) -> tuple[Tensor, Tensor] | None:
    """The pattern to load, int32; None where the layer keeps its own. `in_features`: of the layer
    that was saved, where it is known. Raises _Refused."""
    given = {k: state_dict[prefix + k] for k in (*INDICES, "values") if prefix + k in state_dict}
    if "values" not in given and f"{prefix}weight" in state_dict:
        raise _Refused(dense_refused(f"{prefix}weight", layer))
    if layer.bias is not None:
        _check_bias(layer.bias, state_dict.get(f"{prefix}bias", layer.bias), prefix)
    for name, t in given.items():
        if not isinstance(t, Tensor):
            raise _Refused(f"{prefix}{name}: expected a tensor, got {type(t).__name__}")
        if t.is_meta:
            raise _Refused(f"{prefix}{name}: expected a tensor with data, got one on meta")
    if len(given) == 3:
        if in_features not in (None, layer.in_features):
            raise _Refused(
                f"size mismatch for {prefix}weight: copying a param with in_features "
                f"{in_features} from checkpoint, the in_features in current model is "
                f"{layer.in_features}"
            )
        return _checked_pattern(layer, given, state_dict, prefix)
    for name in given.keys() - {"values"}:
        own = getattr(layer, name)
        if not own.is_meta and given[name].shape == own.shape:
            if torch.equal(given[name].to(own.device), own.to(given[name].dtype)):
                continue
        raise _Refused(
            f"{prefix}{name}: expected the layer's own, for not all of row_offsets, col_indices "
            "and values are there; a pattern is loaded together with its values"
        )
    if "values" in given:
        try:
            check_values(f"{prefix}values", given["values"], ndim=1)
        except (TypeError, ValueError) as error:
            raise _Refused(str(error)) from error
        if given["values"].shape != layer.values.shape:
            raise _Refused(
                f"{prefix}values: expected {layer.col_indices.shape[0]} elements, those of the "
                f"layer's own pattern, got {given['values'].shape[0]} and no other pattern"
            )
    return None


def dense_refused(name: str, layer: nn.Module) -> str:
    """What to say of a weight in a state_dict that is dense, for a layer that is not."""
    return (
        f"{name}: a dense weight, but the layer is a {type(layer).__name__}: give the model "
        "these weights with sparsekern.weights.set_weights_(model, weights), or call "
        "densify_(model) before loading"
    )


def _check_bias(own: Tensor, bias: object, prefix: str) -> None:
    """nn.Module would say so too, but after it has loaded the values."""
    if not isinstance(bias, Tensor) or bias.layout != torch.strided:
        raise _Refused(f"{prefix}bias: expected a dense tensor, got {kind(bias)}")
    if bias.is_meta and not own.is_meta:
        raise _Refused(f"{prefix}bias: expected a tensor with data, got one on meta")
    if bias.shape != own.shape:
        raise _Refused(
            f"size mismatch for {prefix}bias: expected {tuple(own.shape)}, got {tuple(bias.shape)}"
        )


def _checked_pattern(
    layer: "SparseLinear", given: dict[str, Tensor], state_dict: dict, prefix: str
) -> tuple[Tensor, Tensor] | None:
    shape = (layer.out_features, layer.in_features)
    try:
        weight = SparseTensor(given["row_offsets"], given["col_indices"], given["values"], shape)
    except (TypeError, ValueError) as error:
        raise _Refused(f"{prefix}{error}") from error
    state_dict[f"{prefix}values"] = weight.values  # in the order of the columns
    if _is_own(layer, weight):
        return None
    if is_captured(layer.col_indices):
        raise _Refused(f"{prefix}col_indices: {CAPTURED}")
    if weight.nnz != layer.values.shape[0] and hasattr(layer.values, "full_tensor"):
        raise _Refused(
            f"{prefix}values: FSDP2 keeps the size of its shards, {layer.values.shape[0]}, got "
            f"{weight.nnz}: load before fully_shard"
        )
    return weight.row_offsets, weight.col_indices


def _is_own(layer: "SparseLinear", weight: SparseTensor) -> bool:
    own = layer.row_offsets, layer.col_indices
    if own[0].is_meta or own[1].shape != weight.col_indices.shape:
        return False
    theirs = weight.row_offsets, weight.col_indices
    return all(torch.equal(a, b.to(a.device)) for a, b in zip(own, theirs, strict=True))


def _apply(
    layer: "SparseLinear",
    load_others: Callable,
    pattern: tuple[Tensor, Tensor] | None,
    state_dict: dict,
    prefix: str,
    metadata: dict,
    strict: bool,
    lists: tuple[list, list, list],
) -> None:
    before = layer.row_offsets, layer.col_indices
    values: Any = layer._parameters.get("values")  # None where they are parametrized
    data: Any = None if values is None else values.data
    is_assigned = metadata.get("assign_to_params_buffers", False)
    if is_assigned and pattern is None and f"{prefix}values" in state_dict:
        pattern = before  # to the device of the new values
    if pattern is not None:
        nnz = pattern[1].shape[0]
        if nnz != layer.values.shape[0]:
            renew_(values, values.detach().new_empty(nnz))
        device = state_dict[f"{prefix}values"].device if is_assigned else before[1].device
        set_indices(layer, *(t.to(device, copy=not is_assigned) for t in pattern))
    # nn.Module would copy indices in place, into what kernels and CUDA graphs hold. It passes over
    # buffers that are not persistent; other threads may run forward meanwhile.
    passed_over = layer._non_persistent_buffers_set
    layer._non_persistent_buffers_set = passed_over | set(INDICES)
    errors = len(lists[2])
    try:
        rest = {k: t for k, t in state_dict.items() if k.removeprefix(prefix) not in INDICES}
        load_others(rest, prefix, metadata, strict, *lists)
        copies.forget(layer._parameters.values())
    finally:
        layer._non_persistent_buffers_set = passed_over
    if len(lists[2]) > errors and pattern is not None:
        set_indices(layer, *before)
        if values.shape != data.shape:
            renew_(values, data)
    elif pattern is not None:
        end_graphs(*before)


def set_indices(layer: "SparseLinear", row_offsets: Tensor, col_indices: Tensor) -> None:
    """Give the layer other index tensors; whoever observes its gradients goes on doing so."""
    before = layer._buffers.get("row_offsets")
    address = None if before is None else observed.address(before)
    layer.row_offsets, layer.col_indices = counted(row_offsets), counted(col_indices)
    observed.moved(address, layer.row_offsets)


def end_graphs(row_offsets: Tensor, col_indices: Tensor) -> None:
    """Graphs that were made with a pattern that is no more refuse their backward pass, as after a
    write: their gradients are those of other places."""
    tensors = [t for t in (row_offsets, col_indices) if not t.is_inference()]
    torch.autograd.graph.increment_version(tensors)


def renew_(values: nn.Parameter, data: Tensor) -> None:
    """Give the same Parameter other data, which may be of another size; its gradient goes."""
    values.grad = None
    if data.shape != values.shape:
        # A graph that is still alive (the loss of the step before) holds the parameter's node, with
        # the old size. torch replaces that node when the dtype changes, and then alone.
        other = torch.float64 if data.dtype != torch.float64 else torch.float32
        values.data = data.new_empty(0, dtype=other)
    values.data = data
    if not values.is_inference():
        torch.autograd.graph.increment_version(values)
