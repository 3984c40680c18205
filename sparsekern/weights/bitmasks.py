"""The layouts `sparse-bitmask` and `sparse-24-bitmask` of compressed-tensors, both ways: a bit for
each place of a tensor, and the values of those that are set.

For X.weight there are X.shape, X.compressed and X.bitmask; early writers kept the whole name and
wrote X.weight.shape. Quantized values have their scales beside them, in X.weight_scale.
"""

import math
from collections.abc import Mapping

import torch
from torch import Tensor, nn

from ..indices import INDEX_LIMIT, VALUE_DTYPES, expand_rows
from ..nn import bitmask
from ..tensor import SparseTensor
from .layouts import Weights, check, check_named, weights_in

PARTS = ("shape", "compressed", "bitmask")
EXTRA_PARTS = ("row_offsets",)  # what the others say already
QUANTIZED = (torch.int8, torch.float8_e4m3fn, torch.float8_e5m2)
OF_QUANTIZED = ("_scale", "_zero_point", "_g_idx")  # after the name of the weight
OF_ACTIVATIONS = tuple(
    f"{x}_{part}" for x in ("input", "output") for part in ("scale", "zero_point")
)


def from_bitmasks(tensors: Mapping[str, Tensor]) -> Weights:
    """Weights from the layouts `sparse-bitmask` and `sparse-24-bitmask`: X.shape, X.compressed
    (values, row by row) and X.bitmask (uint8 [..., ceil(K / 8)], lowest bit first). Tensors that
    have no bitmask pass through.

    Matrices become SparseTensors, others (norms, biases) dense tensors. fp8 and int8 values are
    multiplied by X.weight_scale, of the tensor, of each row or of groups of columns, and get its
    dtype; the scales of activations are left out, since nothing here is quantized any more.

    ValueError names the tensor whose parts do not fit."""
    check_named(tensors, "tensors")
    stems = stems_in(tensors)
    taken = {f"{stem}.{part}" for stem in stems for part in (*PARTS, *EXTRA_PARTS)}
    decoded: Weights = {}
    for stem, name in stems.items():
        parts = [tensors[f"{stem}.{part}"] for part in PARTS]
        try:
            decoded[name] = _decoded(name, tensors, *parts)
        except (TypeError, ValueError) as error:
            raise ValueError(f"weights: {name}: {error}") from error
        if parts[1].dtype in QUANTIZED:
            layer = name.rpartition(".")[0]
            taken |= {name + part for part in OF_QUANTIZED}
            taken |= {f"{layer}.{part}" if layer else part for part in OF_ACTIVATIONS}
    return {name: t for name, t in tensors.items() if name not in taken} | decoded


def stems_in(tensors: Mapping[str, Tensor]) -> dict[str, str]:
    """Stem -> name of the weights in this layout, whose parts are all there."""
    stems = [name.removesuffix(".bitmask") for name in tensors if name.endswith(".bitmask")]
    has_whole_names = any(stem.rpartition(".")[2] in ("weight", "bias") for stem in stems)
    names = {stem: stem if has_whole_names else f"{stem}.weight" for stem in stems}
    for stem, name in names.items():
        if name in tensors:
            raise ValueError(f"weights: {name} is there twice, dense and with a bitmask")
        if lacking := [part for part in PARTS if f"{stem}.{part}" not in tensors]:
            raise ValueError(f"weights: {name} has a bitmask but lacks {', '.join(lacking)}")
    return names


def _decoded(
    name: str, tensors: Mapping[str, Tensor], shape: Tensor, values: Tensor, bits: Tensor
) -> Tensor | SparseTensor:
    for part, t in zip(PARTS, (shape, values, bits), strict=True):
        if not isinstance(t, Tensor):
            raise TypeError(f"expected a tensor as its {part}, got {type(t).__name__}")
    whole = _sizes(shape)
    n, k = math.prod(whole[:-1]), whole[-1]
    wanted = (*whole[:-1], -(-k // 8))
    if tuple(bits.shape) != wanted:
        raise ValueError(
            f"expected a uint8 bitmask of shape {wanted} for {whole}, got {bits.dtype} of shape "
            f"{tuple(bits.shape)}"
        )
    values = values.flatten()  # [N, K / 2] in the layout 2 of 4
    indices = bitmask.unpack(bits.reshape(n, wanted[-1]), (n, k), values.shape[0])
    if values.dtype in QUANTIZED:
        values = _dequantized(name, tensors, *indices, values, (n, k))
    elif values.dtype not in VALUE_DTYPES:
        raise ValueError(
            f"expected values of {', '.join(map(str, (*VALUE_DTYPES, *QUANTIZED)))}, "
            f"got {values.dtype}"
        )
    matrix = SparseTensor(*indices, values, (n, k))
    return matrix if len(whole) == 2 else matrix.to_dense().view(whole)


def _dequantized(
    name: str,
    tensors: Mapping[str, Tensor],
    row_offsets: Tensor,
    col_indices: Tensor,
    values: Tensor,
    shape: tuple[int, int],
) -> Tensor:
    scale, zero_point, groups = (tensors.get(name + part) for part in OF_QUANTIZED)
    if scale is None or scale.dtype not in VALUE_DTYPES:
        raise ValueError(
            f"expected floats in {name}_scale for its values of {values.dtype}, got "
            f"{'nothing' if scale is None else scale.dtype}"
        )
    if zero_point is not None and (zero_point.to(torch.float32) != 0).any():
        raise ValueError(
            f"expected zeros in {name}_zero_point: else what has no bit would not be zero"
        )
    if groups is not None and (groups >= 0).any():
        raise ValueError(f"expected groups of neighbouring columns, {name}_g_idx has others")
    n, k = shape
    scales = scale.reshape(1, 1) if scale.numel() == 1 else scale
    scales = scales[:, None] if scales.ndim == 1 else scales
    fits = scales.ndim == 2 and scales.shape[0] in (1, n) and scales.shape[1] > 0
    if not fits or k % scales.shape[1]:
        raise ValueError(
            f"expected {name}_scale for the tensor, its {n} rows, or groups of its {k} columns, "
            f"got shape {tuple(scale.shape)}"
        )
    rows, columns = expand_rows(row_offsets, values.shape[0]), col_indices.long()
    group = max(1, k // scales.shape[1])
    return values.to(scale.dtype) * scales.expand(n, -1)[rows, columns // group]


def _sizes(shape: Tensor) -> tuple[int, ...]:
    sizes = shape.flatten().tolist() if shape.numel() < 9 else []
    if not sizes or not all(type(s) is int and 0 <= s < INDEX_LIMIT for s in sizes):
        raise ValueError(f"expected its shape, such as [N, K], got {str(sizes or shape)[:80]}")
    return tuple(sizes)


def to_bitmasks(weights: nn.Module | Weights) -> dict[str, Tensor]:
    """Weights, or those of a model, in the layout `sparse-bitmask`, as compressed-tensors 0.9 to
    0.14 read it: X.shape, X.compressed, X.bitmask and X.row_offsets for a SparseTensor X.weight,
    dense tensors as they are. For `save_weights`.

    ValueError for a SparseTensor whose name does not end in .weight: they have no place for it."""
    found = weights_in(weights)
    tensors: dict[str, Tensor] = {}
    written: set[int] = set()
    for name, w in found.items():
        if not isinstance(w, SparseTensor):
            tensors[name] = w
            continue
        stem = name.removesuffix(".weight")
        if stem == name:
            raise ValueError(f"weights: {name}: expected a name that ends in .weight")
        check(name, w)
        if not w.k:  # no bits, which any number of rows would have
            tensors[name] = w.to_dense()
            continue
        values = w.values.detach()
        if values.data_ptr() in written:  # tied: a file has one of them, a reader wants both
            values = values.clone()
        written.add(values.data_ptr())
        tensors |= {
            f"{stem}.shape": torch.tensor([w.n, w.k], device="cpu"),
            f"{stem}.compressed": values,
            f"{stem}.bitmask": bitmask.pack(w.row_offsets, w.col_indices, w.k),
            f"{stem}.row_offsets": w.row_offsets[:-1].long(),
        }
    return tensors
