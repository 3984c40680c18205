"""Products with W written out: the table rows `expand`, where W is too full for `panel` to win.

A part of W is written out by its bitmap (csrc/cpu/expand.h), multiplied by the machine's fastest
dense product while it is in L2, and written over by the next part. torch.mm takes a part of the
outputs, with sums of any length; oneDNN sums of LONGEST_SUM terms, and so such a part of the
inputs. All of W never stands in memory.
"""

import torch
from torch import Tensor

from ..derived import versions
from ..problem import Kernel, Problem, problem_of
from ..reference import skip_missing
from .dense_product import LONGEST_SUM, add_product, library, product, write_product
from .machine import machine
from .panel import SLOWER, bind_spmm, pattern_of, refuse_dtype

LEAST_WIDTH = 256  # outputs of a part: a product of fewer is slower
OF_L2 = 3 / 2  # that a part takes: it is read once, in order, and a further part costs a call


def _width(outputs: int, inputs: int, itemsize: int) -> int:
    """Outputs of a part: of equal parts, in whole words of a bitmap."""
    bytes_ = int(OF_L2 * (machine().l2_bytes or 2**20))
    most = max(LEAST_WIDTH, bytes_ // max(1, inputs * itemsize)) * torch.get_num_threads()
    parts = max(1, -(-outputs // most))
    return max(64, -(-outputs // (64 * parts)) * 64)


def _parts(size: int, width: int):
    return ((first, min(width, size - first)) for first in range(0, size, width))


def _multiply(op: str, row_offsets, col_indices, values, n, k, x, bias) -> Tensor:
    """x @ W^T + bias, for spmm_t x @ W + bias: what is not stored multiplies as zero."""
    pattern = pattern_of(row_offsets, col_indices, n, k)
    outputs, inputs = (n, k) if op == "spmm" else (k, n)

    def write(buffer: Tensor, first: int, count: int, from_: int, size: int) -> Tensor:
        """W of `count` outputs and `size` inputs, as the right operand of a product."""
        rows, cols = (first, count), (from_, size)
        if op == "spmm_t":
            rows, cols = cols, rows
        w = buffer[: count * size].view(rows[1], cols[1])
        pattern.to_dense(
            row_offsets.data_ptr(),
            col_indices.data_ptr(),
            *versions(row_offsets, col_indices),
            values.element_size(),
            values.data_ptr(),
            *rows,
            *cols,
            w.data_ptr(),
            torch.get_num_threads(),
        )
        return w.t() if op == "spmm" else w

    y = x.new_empty(x.shape[0], outputs)
    if y.numel() == 0 or inputs == 0 or library(x.dtype) == "torch.mm":
        width = _width(outputs, inputs, x.element_size())
        buffer = values.new_empty(width * inputs)
        for first, count in _parts(outputs, width):
            part = slice(first, first + count)
            w = write(buffer, first, count, 0, inputs)
            write_product(y[:, part], x, w, None if bias is None else bias[part])
        return y
    buffer = values.new_empty(LONGEST_SUM * outputs)
    for first, count in _parts(inputs, LONGEST_SUM):
        w = write(buffer, 0, outputs, first, count)
        add_product(y, x[:, first : first + count], w, bias, is_first=first == 0)
    return y


def _spmm(row_offsets, col_indices, values, n, k, x, bias=None):
    w = row_offsets, col_indices, values, n, k
    y = _multiply("spmm", *w, x, bias)
    return skip_missing(y, x, lambda few: _by_panel("spmm", *w, few, bias))


def _spmm_t(row_offsets, col_indices, values, n, k, dy, bias=None):
    w = row_offsets, col_indices, values, n, k
    dx = _multiply("spmm_t", *w, dy, bias)
    return skip_missing(dx, dy, lambda few: _by_panel("spmm_t", *w, few, bias))


def _by_panel(op, *operands):
    return bind_spmm(problem_of(op, *operands))(*operands)


def _sddmm(row_offsets, col_indices, n, k, dy, x):
    pattern = pattern_of(row_offsets, col_indices, n, k)
    dvalues = x.new_empty(col_indices.shape[0])
    for first, count in _parts(n, _width(n, k, x.element_size())):
        dw = product(dy[:, first : first + count].t(), x)
        pattern.from_dense(
            row_offsets.data_ptr(),
            col_indices.data_ptr(),
            *versions(row_offsets, col_indices),
            dw.element_size(),
            dw.data_ptr(),
            first,
            count,
            dvalues.data_ptr(),
            torch.get_num_threads(),
        )
    return dvalues


def _describe(p: Problem) -> str:
    by = library(p.dtype)
    return f"W written out, {by}{SLOWER * (by == 'torch.mm')}"


KERNELS = (
    Kernel("expand", "spmm", "cpu", refuse_dtype, _spmm, _describe),
    Kernel("expand", "spmm_t", "cpu", refuse_dtype, _spmm_t, _describe),
    Kernel("expand", "sddmm", "cpu", refuse_dtype, _sddmm, _describe),
)
