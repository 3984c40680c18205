"""Products of training in E4M3 as torch ops, opaque to torch.compile. nn/float8.py calls them.

What is noted in `noted` is read between two steps, never inside one: so no schema says that it is
written to, and a product may be made in the backward pass of a compiled graph. `largest` is what
rows of the operand were measured to have where a compiled kernel has cast it; None where quantise()
has noted it itself.
"""

import torch
from torch import Tensor

from .kernels import observed
from .kernels.cuda import bitmap as bitmaps
from .kernels.cuda import float8

_library = torch.library.Library("sparsekern", "FRAGMENT")


def _define(name: str, arguments: str, run, fake) -> None:
    _library.define(f"{name}({arguments}) -> Tensor", tags=(torch.Tag.pt2_compliant_tag,))
    _library.impl(name, run, "CPU")  # the emulator's
    _library.impl(name, run, "CUDA")
    torch.library.register_fake(f"sparsekern::{name}", fake, lib=_library)


def _note(largest: Tensor | None, noted: Tensor) -> None:
    if largest is not None:
        float8.note(largest, noted)


def _each(inverses: Tensor) -> tuple[Tensor, ...]:
    return inverses[:, :1].unbind(0)


# x or dy in E4M3: scale [1], noted [1].


def _fake_quantise(x, scale, noted):
    return x.new_empty(x.shape, dtype=float8.DTYPE)


_define("float8_cast", "Tensor x, Tensor scale, Tensor noted", float8.quantise, _fake_quantise)


# States of a layer are of x, W and dY: scales and noted [3], inverses [3, 4], each on a multiple of
# 16 bytes.


def _spmm(x8, largest, values, scales, noted, row_offsets, col_indices, n, k):
    _note(largest, noted[:1])
    return float8.product(
        "spmm", x8, values, scales[1:2], noted[1:2], row_offsets, col_indices, n, k
    )


def _spmm_t(dy8, largest, values, scales, noted, row_offsets, col_indices, n, k):
    _note(largest, noted[2:])
    return float8.product(
        "spmm_t", dy8, values, scales[1:2], noted[1:2], row_offsets, col_indices, n, k
    )


def _sddmm(dy8, largest, x8, inverses, noted, row_offsets, col_indices, n, k):
    _note(largest, noted[2:])
    of_x, _, of_dy = _each(inverses)
    if observed.is_observed(row_offsets):  # who looks on wants the values
        wide = ((t.float() * of).bfloat16() for t, of in ((dy8, of_dy), (x8, of_x)))
        observed.note(row_offsets, *wide)
    dw = float8.weight_gradient(dy8, x8, (of_dy, of_x), torch.bfloat16)
    bitmap = bitmaps.bitmap_of(row_offsets, col_indices, n, k)
    return bitmaps.collect(bitmap, dw, len(col_indices), torch.float32)


_W = "Tensor scales, Tensor noted, Tensor row_offsets, Tensor col_indices, SymInt n, SymInt k"
for _name, _run, _outputs in (("spmm", _spmm, 0), ("spmm_t", _spmm_t, 1)):

    def _fake(x8, largest, values, scales, noted, row_offsets, col_indices, n, k, at=_outputs):
        return x8.new_empty(x8.shape[0], (n, k)[at], dtype=torch.bfloat16)

    _define(f"float8_{_name}", f"Tensor x8, Tensor? largest, Tensor values, {_W}", _run, _fake)


def _fake_sddmm(dy8, largest, x8, inverses, noted, row_offsets, col_indices, n, k):
    return dy8.new_empty(col_indices.shape, dtype=torch.float32)


_define(
    "float8_sddmm",
    f"Tensor dy8, Tensor? largest, Tensor x8, {_W.replace('scales', 'inverses')}",
    _sddmm,
    _fake_sddmm,
)


# Dense W: w8 [N, K].


def _linear(x8, largest, w8, largest_w, inverses, noted, bias):
    _note(largest, noted[:1])
    _note(largest_w, noted[1:2])
    of_x, of_w, _ = _each(inverses)
    return float8.dense(x8, w8, (of_x, of_w), bias, torch.bfloat16)


def _linear_t(dy8, largest, w8, inverses, noted):
    _note(largest, noted[2:])
    _, of_w, of_dy = _each(inverses)
    return float8.dense(dy8, float8.transpose(w8), (of_dy, of_w), None, torch.bfloat16)


def _linear_w(dy8, largest, x8, inverses, noted):
    _note(largest, noted[2:])
    of_x, _, of_dy = _each(inverses)
    return float8.weight_gradient(dy8, x8, (of_dy, of_x), torch.float32)


def _fake_linear(x8, largest, w8, largest_w, inverses, noted, bias):
    return x8.new_empty(x8.shape[0], w8.shape[0], dtype=torch.bfloat16)


def _fake_linear_t(dy8, largest, w8, inverses, noted):
    return dy8.new_empty(dy8.shape[0], w8.shape[1], dtype=torch.bfloat16)


def _fake_linear_w(dy8, largest, x8, inverses, noted):
    return dy8.new_empty(dy8.shape[1], x8.shape[1], dtype=torch.float32)


_define(
    "float8_linear",
    "Tensor x8, Tensor? largest, Tensor w8, Tensor? largest_w, Tensor inverses, Tensor noted, "
    "Tensor? bias",
    _linear,
    _fake_linear,
)
_define(
    "float8_linear_t",
    "Tensor dy8, Tensor? largest, Tensor w8, Tensor inverses, Tensor noted",
    _linear_t,
    _fake_linear_t,
)
_define(
    "float8_linear_w",
    "Tensor dy8, Tensor? largest, Tensor x8, Tensor inverses, Tensor noted",
    _linear_w,
    _fake_linear_w,
)
