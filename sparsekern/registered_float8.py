"""Products of training in E4M3 as torch ops, opaque to torch.compile. nn/float8.py calls them.

What is noted in `noted` is read between two steps, never inside one: so no schema says that it is
written to, and a product may be made in the backward pass of a compiled graph. `largest` is what
rows of the operand were measured to have where a compiled kernel has cast it; None where quantise()
has noted it itself.
"""

import torch
from torch import Tensor

from .flop_formulas import FLOAT8_FORMULAS, register_when_imported
from .kernels import observed
from .kernels.cuda import bitmap as bitmaps
from .kernels.cuda import float8

_library = torch.library.Library("sparsekern", "FRAGMENT")


def _define(name: str, arguments: str, results: str, run, fake, *tags: torch.Tag) -> None:
    tags = torch.Tag.pt2_compliant_tag, *tags
    _library.define(f"{name}({arguments}) -> {results}", tags=tags)
    _library.impl(name, run, "CPU")  # the emulator's
    _library.impl(name, run, "CUDA")
    torch.library.register_fake(f"sparsekern::{name}", fake, lib=_library)


def _each(inverses: Tensor) -> tuple[Tensor, ...]:
    return inverses[:, :1].unbind(0)


# x, dy or a dense W in E4M3: scale [1], noted [1].


def _fake_quantise(x, scale, noted):
    return x.new_empty(x.shape, dtype=float8.DTYPE)


_define(
    "float8_cast",
    "Tensor x, Tensor scale, Tensor noted",
    "Tensor",
    float8.quantise,
    _fake_quantise,
)


# States of a layer are of x, W and dY: scales and noted [3], inverses [3, 4], each on a multiple of
# 16 bytes. All gradients are of one op, that of the bias too: torch.compile would write dy8 once
# for each op that it goes to, and dy in float32 for a sum. dx is empty where nobody needs it.

_PATTERN = "Tensor row_offsets, Tensor col_indices, SymInt n, SymInt k"


def _noting(largest, noted, which):
    return None if largest is None else (largest, noted[which : which + 1])


def _spmm(
    x8, largest, values, scales, noted, row_offsets, col_indices, n, k, needs_dx, bias, is_final
):
    """y of x8 and a two-way W: + bias, bfloat16, if it is final, else without the scales. And the
    operand of W^T, for dx. It is empty where nobody needs it."""
    of_w, noting = (values, scales[1:2], noted[1:2]), _noting(largest, noted, 0)
    pattern = row_offsets, col_indices, n, k
    operand, operand_t = float8.operands(*of_w, *pattern, needs_dx, noting)
    exponent = float8.exponent_of(noted) if is_final else 0
    return float8.product(x8, operand, n, bias, exponent), operand_t


def _fake_spmm(
    x8, largest, values, scales, noted, row_offsets, col_indices, n, k, needs_dx, bias, is_final
):
    size = float8.operand_bytes(int(k), int(n), values.device) if needs_dx else 0
    y = x8.new_empty(x8.shape[0], n, dtype=torch.bfloat16)
    return y, x8.new_empty(size, dtype=torch.uint8)


_define(
    "float8_spmm",
    "Tensor x8, Tensor? largest, Tensor values, Tensor scales, Tensor noted, "
    f"{_PATTERN}, bool needs_dx, Tensor? bias, bool is_final",
    "(Tensor, Tensor)",
    _spmm,
    _fake_spmm,
    torch.Tag.cudagraph_unsafe,  # torch.compile's own graphs would keep the factor that they saw
)


def _spmm_gradients(
    dy8, largest, x8, operand_t, inverses, noted, row_offsets, col_indices, n, k, needs_dx
):
    """dx, without the scales of dy8 and W; the gradients of values and of the bias, with all."""
    of_x, _, of_dy = _each(inverses)
    if needs_dx:
        dx = float8.product(dy8, operand_t, k)
    else:
        dx = x8.new_empty(0, dtype=torch.bfloat16)
    if observed.is_observed(row_offsets):  # who looks on wants the values
        wide = ((t.float() * of).bfloat16() for t, of in ((dy8, of_dy), (x8, of_x)))
        observed.note(row_offsets, *wide)
    noting = _noting(largest, noted, 2)
    dw, dbias = float8.weight_gradient(dy8, x8, (of_dy, of_x), torch.bfloat16, noting)
    bitmap = bitmaps.bitmap_of(row_offsets, col_indices, n, k)
    return dx, bitmaps.collect(bitmap, dw, len(col_indices), torch.float32), dbias


def _fake_dbias(dy8):
    return dy8.new_empty(dy8.shape[1], dtype=torch.float32)


def _fake_spmm_gradients(
    dy8, largest, x8, operand_t, inverses, noted, row_offsets, col_indices, n, k, needs_dx
):
    dx = dy8.new_empty((dy8.shape[0], k) if needs_dx else (0,), dtype=torch.bfloat16)
    dvalues = dy8.new_empty(col_indices.shape[0], dtype=torch.float32)
    return dx, dvalues, _fake_dbias(dy8)


_define(
    "float8_spmm_gradients",
    "Tensor dy8, Tensor? largest, Tensor x8, Tensor operand_t, Tensor inverses, Tensor noted, "
    f"{_PATTERN}, bool needs_dx",
    "(Tensor, Tensor, Tensor)",
    _spmm_gradients,
    _fake_spmm_gradients,
)


# Dense W: w8 [N, K].


def _linear(x8, largest, w8, largest_w, inverses, noted, bias):
    if largest is not None:
        float8.note(largest, noted[:1], largest_w, noted[1:2])
    of_x, of_w, _ = _each(inverses)
    return float8.dense(x8, w8, (of_x, of_w), bias, torch.bfloat16)


def _fake_linear(x8, largest, w8, largest_w, inverses, noted, bias):
    return x8.new_empty(x8.shape[0], w8.shape[0], dtype=torch.bfloat16)


_define(
    "float8_linear",
    "Tensor x8, Tensor? largest, Tensor w8, Tensor? largest_w, Tensor inverses, Tensor noted, "
    "Tensor? bias",
    "Tensor",
    _linear,
    _fake_linear,
)


def _linear_gradients(dy8, largest, x8, w8, inverses, noted, needs_dx):
    of_x, of_w, of_dy = _each(inverses)
    if needs_dx:
        dx = float8.dense(dy8, float8.transpose(w8), (of_dy, of_w), None, torch.bfloat16)
    else:
        dx = x8.new_empty(0, dtype=torch.bfloat16)
    noting = _noting(largest, noted, 2)
    return dx, *float8.weight_gradient(dy8, x8, (of_dy, of_x), torch.float32, noting)


def _fake_linear_gradients(dy8, largest, x8, w8, inverses, noted, needs_dx):
    dx = dy8.new_empty((dy8.shape[0], w8.shape[1]) if needs_dx else (0,), dtype=torch.bfloat16)
    return dx, w8.new_empty(w8.shape, dtype=torch.float32), _fake_dbias(dy8)


_define(
    "float8_linear_gradients",
    "Tensor dy8, Tensor? largest, Tensor x8, Tensor w8, Tensor inverses, Tensor noted, "
    "bool needs_dx",
    "(Tensor, Tensor, Tensor)",
    _linear_gradients,
    _fake_linear_gradients,
)

register_when_imported(FLOAT8_FORMULAS)
