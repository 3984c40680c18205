"""W packed for inference on a CPU: 16 rows in the lanes of a register (csrc/cpu/lanes_layout.h).

Values are kept in the order in which they are read, a byte of column beside each. x of 63 columns
stays in registers, so a non-zero costs neither a load of x nor a row of sums: the fastest form for
up to 4 tokens. It is padded to the longest of 16 rows: 5 bytes a non-zero in float32 and 3 in
bfloat16 times 1.2, 1.4, 1.7 and 2.1 at densities of 0.5, 0.25, 0.1 and 0.05.
"""

from collections.abc import Callable
from functools import cache
from typing import NamedTuple

import torch
from torch import Tensor

from ...tensor import SparseTensor
from ..operands import check_memory
from ..reference import mm, skip_missing
from .machine import NO_LIBRARY
from .panel import _C, type_of

DTYPES = (torch.float32, torch.bfloat16)
_type_of = cache(type_of)
GROUP, COLS, PART_ROWS = 16, 63, 512


class Lanes(NamedTuple):
    """One frozen W [N, K]: sizes as in csrc/cpu/lanes_layout.h."""

    n: int
    k: int
    part_steps: Tensor  # int64 [parts + 1]
    heads: Tensor  # uint8 [blocks * groups, 2]
    cols: Tensor  # uint8 [steps, 16]
    values: Tensor  # [steps, 16]

    def check(self) -> None:
        """ValueError or TypeError that names what the kernel cannot count on: types and shapes.
        What stands in the tensors the kernel checks itself."""
        values, steps = self.values, self.cols.shape[0]
        if values.dtype not in DTYPES:
            raise TypeError(f"values: expected float32 or bfloat16, got {values.dtype}")
        parts, groups, blocks = -(-self.n // PART_ROWS), -(-self.n // GROUP), -(-self.k // COLS)
        for name, t, dtype, shape in (
            ("part_steps", self.part_steps, torch.int64, (parts + 1,)),
            ("heads", self.heads, torch.uint8, (blocks * groups, 2)),
            ("cols", self.cols, torch.uint8, (steps, GROUP)),
            ("values", values, values.dtype, (steps, GROUP)),
        ):
            if not (t.shape == shape and t.dtype is dtype and t.is_cpu and t.is_contiguous()):
                raise ValueError(
                    f"{name}: expected contiguous {dtype} {shape} on a CPU, "
                    f"got {t.dtype} {tuple(t.shape)} on {t.device}"
                )
            if not t.data_ptr() or t.storage_offset():
                check_memory("spmm_lanes", **{name: t})


def pack(weight: SparseTensor) -> Lanes:
    """`weight` in lanes. TypeError unless its values are float32 or bfloat16; ValueError if its
    indices are not valid any more, or of a transpose; RuntimeError without the C++ library."""
    if weight.values.dtype not in DTYPES:
        raise TypeError(f"weight: expected float32 or bfloat16 values, got {weight.values.dtype}")
    if weight.is_transposed:
        raise ValueError("weight: expected W [N, K] as it is stored, got a transpose")
    if _C is None:
        raise RuntimeError(f"weight: packing for a CPU takes a library, and {NO_LIBRARY}")
    n, k = weight.shape
    row_offsets, col_indices = weight.row_offsets.contiguous(), weight.col_indices.contiguous()
    nnz = col_indices.numel()
    made = _C.Lanes(row_offsets.data_ptr(), col_indices.data_ptr(), n, k, nnz)
    packed = Lanes(
        n,
        k,
        col_indices.new_empty(-(-n // PART_ROWS) + 1, dtype=torch.int64),
        col_indices.new_empty(-(-k // COLS) * -(-n // GROUP), 2, dtype=torch.uint8),
        col_indices.new_empty(made.steps, GROUP, dtype=torch.uint8),
        weight.values.new_zeros(made.steps, GROUP),
    )
    places = col_indices.new_empty(nnz, dtype=torch.int64)
    made.write(*(t.data_ptr() for t in (*packed[2:5], places)))
    packed.values.view(-1)[places] = weight.values
    return packed


def spmm_lanes(x: Tensor, packed: Lanes, bias: Tensor | None = None) -> Tensor:
    """y [M, N] = x [M, K] @ W.T + bias [N] of operands that were checked. W is written out for many
    tokens."""
    return bind(x.shape[0], packed, bias)(x)


def bind(m: int, packed: Lanes, bias: Tensor | None) -> Callable[[Tensor], Tensor]:
    """spmm_lanes() of any x [M, K], as long as the packed tensors and the bias are where they are:
    a small product takes no longer than to ask each of them for its address."""
    product = _bound(m, packed, bias)
    if not writes_out(m, packed):
        return product

    def run(x: Tensor) -> Tensor:
        y = mm(x, _to_dense(packed).t(), bias)
        return skip_missing(y, x, lambda few: _bound(few.shape[0], packed, bias)(few))

    return run


def writes_out(tokens: int, packed: Lanes) -> bool:
    """Whether W is written out for so many tokens: from 16 on, and the later the sparser it is,
    since a product of the dense W costs the same for any W."""
    density = packed.values.numel() / max(1, packed.n * packed.k)  # with padding
    return tokens * density > 16


def _bound(m: int, packed: Lanes, bias: Tensor | None) -> Callable[[Tensor], Tensor]:
    n, get_num_threads = packed.n, torch.get_num_threads
    operands = (
        n,
        packed.k,
        packed.part_steps.data_ptr(),
        packed.heads.data_ptr(),
        packed.cols.shape[0],
        packed.cols.data_ptr(),
        _type_of(packed.values.dtype),
        packed.values.data_ptr(),
        0 if bias is None else bias.data_ptr(),
    )
    owners = packed, bias  # whose memory that is

    def run(x: Tensor, _owners=owners) -> Tensor:
        y = x.new_empty(m, n)
        _C.spmm_lanes(*operands, x.data_ptr(), y.data_ptr(), m, get_num_threads())
        return y

    return run


def _to_dense(packed: Lanes) -> Tensor:
    """W [N, K]."""
    w = packed.values.new_zeros(packed.n, packed.k)
    _C.lanes_to_dense(
        packed.n,
        packed.k,
        packed.part_steps.data_ptr(),
        packed.heads.data_ptr(),
        packed.cols.shape[0],
        packed.cols.data_ptr(),
        packed.values.element_size(),
        packed.values.data_ptr(),
        w.data_ptr(),
        torch.get_num_threads(),
    )
    return w
