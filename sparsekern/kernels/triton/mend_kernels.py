"""What the Triton products leave infinite or NaN, computed anew from the stored values alone: a
product over a tile multiplies x by a zero where nothing is stored. Imports triton, as the other
kernels do.

A finite result is right, since 0 times an infinity or NaN is NaN, and NaN stays. Others are rare
and need not be fast.
"""

import triton
import triton.language as tl

ROWS = 1024  # of W that a program looks at
ENTRIES = tl.constexpr(128)  # of a row, at a time


@triton.jit
def _is_finite(value):
    value = value.to(tl.float32)
    return value - value == 0


@triton.jit(do_not_specialize=["N", "K", "nnz"])
def mend_kernel(
    row_offsets,  # int32 [N + 1], the caller's, who may write to them: held to their bounds here
    col_indices,  # int32 [nnz], likewise
    values,
    x,  # [M, K]
    bias,  # [N]
    y,  # [M, N]
    N,
    K,
    nnz,
    HAS_BIAS: tl.constexpr,
    ROWS: tl.constexpr,
):
    """y = x W^T + bias. Program (token and ROWS rows of W): one warp, all of which reads a result
    before any of it is written."""
    blocks = tl.cdiv(N, ROWS)
    token = (tl.program_id(0) // blocks).to(tl.int64)
    first = tl.program_id(0) % blocks * ROWS
    offs_n = first + tl.arange(0, ROWS)
    found = tl.load(y + token * N + offs_n, mask=offs_n < N, other=0.0)
    if tl.min(_is_finite(found).to(tl.int32), 0) == 0:
        for row in range(first, tl.minimum(first + ROWS, N)):
            at = y + token * N + row
            if not _is_finite(tl.load(at)):
                begin = tl.minimum(tl.maximum(tl.load(row_offsets + row), 0), nnz).to(tl.int64)
                end = tl.minimum(tl.load(row_offsets + row + 1), nnz).to(tl.int64)
                sums = tl.zeros((ENTRIES,), tl.float32)
                for entry in range(begin, end, ENTRIES):
                    entries = entry + tl.arange(0, ENTRIES)
                    cols = tl.load(col_indices + entries, mask=entries < end, other=-1)
                    mask = (cols >= 0) & (cols < K)
                    w = tl.load(values + entries, mask=mask, other=0.0).to(tl.float32)
                    b = tl.load(x + token * K + cols, mask=mask, other=0.0).to(tl.float32)
                    sums += tl.where(mask, w * b, 0.0)
                result = tl.sum(sums, 0)
                if HAS_BIAS:
                    result += tl.load(bias + row).to(tl.float32)
                tl.store(at, result.to(y.dtype.element_ty))


@triton.jit(do_not_specialize=["N", "K", "tiles"])
def mend_t_kernel(
    lanes,  # of a bitmap, with `starts`
    starts,
    values,
    dy,  # [M, N]
    bias,  # [K]
    dx,  # [M, K]
    N,
    K,
    tiles,
    HAS_BIAS: tl.constexpr,
):
    """dx = dy W + bias. Program (token and 256 columns of W)."""
    token = (tl.program_id(0) // tiles).to(tl.int64)
    tile = tl.program_id(0) % tiles
    column = tl.arange(0, 256)
    offs_k = tile * 256 + column
    at = dx + token * K + offs_k
    found = tl.load(at, mask=offs_k < K, other=0.0)
    if tl.min(_is_finite(found).to(tl.int32), 0) == 0:
        bit = (column % 8).to(tl.int64)
        acc = tl.zeros((256,), tl.float32)
        wide = token * 0  # the interpreter counts rows in Python
        for row in range(0, N):
            unit = (wide + row // 4) * tiles + tile
            word = tl.load(lanes + unit * 32 + column // 8)
            shift = wide + row % 4 * 8
            places = (word >> shift) & 255
            is_stored = ((places >> bit) & 1) != 0
            # The values before that of this place: of the lanes before, then of this one.
            before = places & ((1 << bit) - 1)
            before = before - ((before >> 1) & 0x55)
            before = (before & 0x33) + ((before >> 2) & 0x33)
            before = ((before + (before >> 4)) & 0x0F) + ((word >> (32 + shift)) & 255)
            start = tl.load(starts + unit * 2 + row % 4 // 2) >> (wide + row % 2 * 32)
            entry = (start & 0xFFFFFFFF) + before
            w = tl.load(values + entry, mask=is_stored, other=0.0).to(tl.float32)
            g = tl.load(dy + token * N + row).to(tl.float32)
            acc += tl.where(is_stored, w * g, 0.0)
        if HAS_BIAS:
            acc += tl.load(bias + offs_k, mask=offs_k < K, other=0.0).to(tl.float32)
        tl.store(at, acc.to(dx.dtype.element_ty), mask=(offs_k < K) & (_is_finite(found) == 0))
