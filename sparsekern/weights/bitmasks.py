"""The `sparse-bitmask` layout of compressed-tensors, which stores the zeros of a matrix as bits."""

from collections.abc import Mapping

import torch
from torch import Tensor

from ..indices import INDEX_LIMIT, VALUE_DTYPES
from ..tensor import SparseTensor

PARTS = ("shape", "compressed", "bitmask")
EXTRA_PARTS = ("row_offsets",)  # what the others say already


def from_bitmasks(tensors: Mapping[str, Tensor]) -> dict[str, Tensor | SparseTensor]:
    """Weights from W.shape, W.compressed (values, row by row) and W.bitmask (uint8
    [N, ceil(K / 8)], lowest bit first). Tensors that have no bitmask pass through.

    ValueError names the tensor whose parts do not fit, or that is in another layout."""
    names = [name.removesuffix(".bitmask") for name in tensors if name.endswith(".bitmask")]
    taken = {f"{name}.{part}" for name in names for part in (*PARTS, *EXTRA_PARTS)}
    weights: dict[str, Tensor | SparseTensor] = {
        name: t for name, t in tensors.items() if name not in taken
    }
    for name in names:
        if name in weights:
            raise ValueError(f"weights: {name} is there twice, dense and with a bitmask")
        weights[name] = _decoded(name, tensors)
    return weights


def _decoded(name: str, tensors: Mapping[str, Tensor]) -> SparseTensor:
    try:
        shape, values, bits = (tensors[f"{name}.{part}"] for part in PARTS)
    except KeyError as error:
        raise ValueError(f"weights: {name} has a bitmask but lacks {error}") from error
    if values.ndim == 2:
        raise ValueError(
            f"weights: {name} is in the layout sparse-24-bitmask (2 of 4), expected "
            "sparse-bitmask; decompress it with compressed-tensors first"
        )
    if values.dtype not in VALUE_DTYPES:
        raise ValueError(
            f"weights: {name}: expected values of {', '.join(map(str, VALUE_DTYPES))}, got "
            f"{values.dtype}; quantized weights must be multiplied by their scales first"
        )
    n, k = _sizes(name, shape)
    wanted = (n, -(-k // 8))
    if bits.dtype != torch.uint8 or tuple(bits.shape) != wanted:
        raise ValueError(
            f"weights: {name}: expected a uint8 bitmask of shape {wanted} for {(n, k)}, "
            f"got {bits.dtype} of shape {tuple(bits.shape)}"
        )
    mask = ((bits[:, :, None] >> torch.arange(8, device=bits.device)) & 1).flatten(1).bool()
    if past := int(mask[:, k:].sum()):
        raise ValueError(f"weights: {name}: expected no bits past column {k}, got {past}")
    mask = mask[:, :k]
    if values.shape != (int(mask.sum()),):
        raise ValueError(
            f"weights: {name}: expected {int(mask.sum())} values and a bitmask of {(n, k)}, "
            f"got {tuple(values.shape)} and {tuple(mask.shape)}"
        )
    pattern = SparseTensor.from_dense(mask.to(values.dtype), mask)
    return SparseTensor(pattern.row_offsets, pattern.col_indices, values, (n, k))


def _sizes(name: str, shape: Tensor) -> tuple[int, int]:
    sizes = shape.tolist()
    is_list = isinstance(sizes, list) and len(sizes) == 2
    if not is_list or not all(type(s) is int and 0 <= s < INDEX_LIMIT for s in sizes):
        raise ValueError(
            f"weights: {name}: expected the shape [N, K] of a matrix, got {str(sizes)[:80]}"
        )
    return sizes[0], sizes[1]
