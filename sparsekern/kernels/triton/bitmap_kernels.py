"""Triton kernels. Imports triton, so `rows.py` imports this file when it first runs one.

W [N, K] is read as a bitmap of 4 x 256 places a unit, beside the values in CSR order where they
are (bitmap.py). One warp decodes one unit: lane l has columns 8 l .. 8 l + 7 of the 4 rows, 32
places, and reads the value of each place that is set. The 32 lanes read a row's 256 columns side by
side, so a load of the warp touches one or two cache lines. Nothing is kept that depends on the
values: they may change between calls.

A decoded tile is an ordinary operand of tl.dot. What bounds these kernels for few tokens is the
6.5 instructions that each *place* of W costs, set or not:

    shift, test and mask (one instruction), two for the address, zero, load, half a pack.

`one` is 0 and `size` the bytes of a value, both given at run time: were they known, LLVM would
extract each bit twice, once as a number and once as a predicate, and 64-bit additions would take
the place of a multiply-add: 8.5 instructions.

Tensors of T = 32 * WARPS elements are one element a thread. `join` and `split` by 2 stay inside a
thread, so a tile is built and taken apart with no traffic between threads.
"""

import triton
import triton.language as tl

INTERPRETED = triton.knobs.runtime.interpret
RUN_TIME = ["M", "tiles", "one", "size"]  # Triton compiles anew for 1 and for multiples of 16


@triton.jit
def _load_columns(p, word, one, size, values, COUNT: tl.constexpr):
    """The next COUNT columns: [T, 2, 2 ...] values, the next address, the word's remaining bits.

    p: int64 [T], where the next value of each thread lies.
    """
    if COUNT == 1:
        bit = word & 1
        result = tl.load(p.to(values.dtype), mask=bit != 0, other=0.0)
        p += bit.to(tl.int64) * size.to(tl.int64)
        word >>= one.to(tl.uint32)
    else:
        low, p, word = _load_columns(p, word, one, size, values, COUNT // 2)
        high, p, word = _load_columns(p, word, one, size, values, COUNT // 2)
        result = tl.join(low, high)
    return result, p, word


@triton.jit
def _store_columns(p, word, one, size, values, result, COUNT: tl.constexpr):
    """The reverse: stores those of COUNT columns of `result` whose bit is set."""
    if COUNT == 1:
        bit = word & 1
        tl.store(p.to(values.dtype), result, mask=bit != 0)
        p += bit.to(tl.int64) * size.to(tl.int64)
        word >>= one.to(tl.uint32)
    else:
        low, high = tl.split(result)
        p, word = _store_columns(p, word, one, size, values, low, COUNT // 2)
        p, word = _store_columns(p, word, one, size, values, high, COUNT // 2)
    return p, word


@triton.jit
def _load_bits(lanes, starts, unit, step, UNITS: tl.constexpr):
    """Places of W of the units `unit`, `unit + step` ...: three int64 [T, 2 x log2(UNITS)]."""
    if UNITS == 1:
        pairs = tl.load(lanes + unit * 32 + tl.arange(0, unit.shape[0]) % 32)
        s01 = tl.load(starts + unit * 2)
        s23 = tl.load(starts + unit * 2 + 1)
    else:
        half: tl.constexpr = UNITS // 2
        pairs0, s010, s230 = _load_bits(lanes, starts, unit, step, half)
        pairs1, s011, s231 = _load_bits(lanes, starts, unit + half * step, step, half)
        pairs, s01, s23 = tl.join(pairs0, pairs1), tl.join(s010, s011), tl.join(s230, s231)
    return pairs, s01, s23


@triton.jit
def _address(values, start, pairs, size, ROW: tl.constexpr):
    """int64 [T]: where the first value of each thread lies, in row ROW of its unit."""
    offset = (pairs >> (32 + 8 * ROW)).to(tl.int32) & 255
    return values.to(tl.int64) + (start.to(tl.int32) + offset) * size.to(tl.int64)


@triton.jit
def _load_unit(pairs, s01, s23, values, one, size):
    """[T, 2 x 3 (columns), 2 x 2 (rows)] of W."""
    word = pairs.to(tl.uint32)
    a0 = _address(values, s01, pairs, size, 0)
    a1 = _address(values, s01 >> 32, pairs, size, 1)
    a2 = _address(values, s23, pairs, size, 2)
    a3 = _address(values, s23 >> 32, pairs, size, 3)
    r0, _, word = _load_columns(a0, word, one, size, values, 8)
    r1, _, word = _load_columns(a1, word, one, size, values, 8)
    r2, _, word = _load_columns(a2, word, one, size, values, 8)
    r3, _, word = _load_columns(a3, word, one, size, values, 8)
    return tl.join(tl.join(r0, r1), tl.join(r2, r3))


@triton.jit
def _load_units(lanes, starts, unit, step, values, one, size, UNITS: tl.constexpr):
    """The same of units `unit`, `unit + step` ...: [T, 2 x 3, 2 x 2, 2 x log2(UNITS)]."""
    if UNITS == 1:
        pairs, s01, s23 = _load_bits(lanes, starts, unit, step, 1)
        result = _load_unit(pairs, s01, s23, values, one, size)
    else:
        half: tl.constexpr = UNITS // 2
        low = _load_units(lanes, starts, unit, step, values, one, size, half)
        high = _load_units(lanes, starts, unit + half * step, step, values, one, size, half)
        result = tl.join(low, high)
    return result


@triton.jit
def _load_units_ahead(pairs, s01, s23, values, one, size, UNITS: tl.constexpr):
    """The same where the bits are loaded."""
    if UNITS == 1:
        result = _load_unit(pairs, s01, s23, values, one, size)
    else:
        pairs0, pairs1 = tl.split(pairs)
        s010, s011 = tl.split(s01)
        s230, s231 = tl.split(s23)
        low = _load_units_ahead(pairs0, s010, s230, values, one, size, UNITS // 2)
        high = _load_units_ahead(pairs1, s011, s231, values, one, size, UNITS // 2)
        result = tl.join(low, high)
    return result


@triton.jit
def _store_units(pairs, s01, s23, values, one, size, result, UNITS: tl.constexpr):
    """The reverse: stores what `result` has at the places of W."""
    low, high = tl.split(result)
    if UNITS == 1:
        word = pairs.to(tl.uint32)
        r0, r1 = tl.split(low)
        r2, r3 = tl.split(high)
        a0 = _address(values, s01, pairs, size, 0)
        a1 = _address(values, s01 >> 32, pairs, size, 1)
        a2 = _address(values, s23, pairs, size, 2)
        a3 = _address(values, s23 >> 32, pairs, size, 3)
        _, word = _store_columns(a0, word, one, size, values, r0, 8)
        _, word = _store_columns(a1, word, one, size, values, r1, 8)
        _, word = _store_columns(a2, word, one, size, values, r2, 8)
        _, word = _store_columns(a3, word, one, size, values, r3, 8)
    else:
        pairs0, pairs1 = tl.split(pairs)
        s010, s011 = tl.split(s01)
        s230, s231 = tl.split(s23)
        _store_units(pairs0, s010, s230, values, one, size, low, UNITS // 2)
        _store_units(pairs1, s011, s231, values, one, size, high, UNITS // 2)


@triton.jit
def _first_unit(block, tile, tiles, WARPS: tl.constexpr, UNITS: tl.constexpr):
    """Each thread's first unit, in rows from block * 4 * UNITS * WARPS, columns from tile * 256."""
    return (block * WARPS + tl.arange(0, 32 * WARPS) // 32) * UNITS * tiles + tile


@triton.jit
def _as_tile(parts, WARPS: tl.constexpr, UNITS: tl.constexpr):
    """The result of _load_units() as a tile of W [4 * UNITS * WARPS, 256]."""
    # Warp, lane, 3 bits of the column, 2 of the row, those of the unit; low bits first.
    if UNITS == 1:
        parts = tl.reshape(parts, (WARPS, 32, 2, 2, 2, 2, 2))
        parts = tl.permute(parts, (0, 6, 5, 1, 4, 3, 2))
    elif UNITS == 2:
        parts = tl.reshape(parts, (WARPS, 32, 2, 2, 2, 2, 2, 2))
        parts = tl.permute(parts, (0, 7, 6, 5, 1, 4, 3, 2))
    else:
        parts = tl.reshape(parts, (WARPS, 32, 2, 2, 2, 2, 2, 2, 2))
        parts = tl.permute(parts, (0, 8, 7, 6, 5, 1, 4, 3, 2))
    return tl.reshape(parts, (4 * UNITS * WARPS, 256))


@triton.jit
def _dot(a, b, acc, UPCAST: tl.constexpr, PRECISION: tl.constexpr):
    if UPCAST:  # the interpreter's tl.dot is wrong in bfloat16
        a = a.to(tl.float32)
        b = b.to(tl.float32)
    return tl.dot(a, b, acc, input_precision=PRECISION)


@triton.jit(do_not_specialize=["N", *RUN_TIME])
def spmm_kernel(
    lanes,
    starts,
    values,
    x,  # [M, K]
    bias,  # [N]
    y,  # [M, N]
    parts,  # float32 [SPLIT, blocks of M and N, BLOCK_N, BLOCK_M], where K is split
    arrived,  # int32 [blocks of M and N], all 0 before and after, where K is split
    M,
    N,
    K,
    tiles,
    one,
    size,
    HAS_BIAS: tl.constexpr,
    BLOCK_M: tl.constexpr,
    WARPS: tl.constexpr,
    UNITS: tl.constexpr,
    AHEAD: tl.constexpr,
    UPCAST: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """y = x W^T + bias. Program (row block of W, token block, part of K)."""
    BLOCK_N: tl.constexpr = 4 * UNITS * WARPS
    block, m_block, part = tl.program_id(0), tl.program_id(1), tl.program_id(2)
    offs_n = block * BLOCK_N + tl.arange(0, BLOCK_N)
    offs_m = m_block * BLOCK_M + tl.arange(0, BLOCK_M)
    x_rows = x + offs_m.to(tl.int64)[None, :] * K
    acc = tl.zeros((BLOCK_N, BLOCK_M), tl.float32)
    split = tl.num_programs(2)
    first = part * tiles // split
    if AHEAD:
        unit = _first_unit(block, first, tiles, WARPS, UNITS)
        pairs, s01, s23 = _load_bits(lanes, starts, unit, tiles, UNITS)
    for tile in range(first, (part + 1) * tiles // split):
        offs_k = tile * 256 + tl.arange(0, 256)[:, None]
        mask = (offs_m[None, :] < M) & (offs_k < K)
        xt = tl.load(x_rows + offs_k, mask=mask, other=0.0)  # [256, BLOCK_M]
        if AHEAD:
            w = _load_units_ahead(pairs, s01, s23, values, one, size, UNITS)
            ahead = tl.minimum(tile + 1, tiles - 1)
            unit = _first_unit(block, ahead, tiles, WARPS, UNITS)
            pairs, s01, s23 = _load_bits(lanes, starts, unit, tiles, UNITS)
        else:
            unit = _first_unit(block, tile, tiles, WARPS, UNITS)
            w = _load_units(lanes, starts, unit, tiles, values, one, size, UNITS)
        w = _as_tile(w, WARPS, UNITS)
        acc = _dot(w, xt, acc, UPCAST, PRECISION)

    # The last program to arrive adds the parts of all, in the order of K.
    last = split == 1
    if split > 1:
        cell = m_block * tl.num_programs(0) + block
        cells = tl.num_programs(0) * tl.num_programs(1)
        inside = tl.arange(0, BLOCK_N)[:, None] * BLOCK_M + tl.arange(0, BLOCK_M)[None, :]
        mine = parts + cell.to(tl.int64) * BLOCK_N * BLOCK_M + inside
        stride = cells.to(tl.int64) * BLOCK_N * BLOCK_M
        tl.store(mine + part * stride, acc)
        tl.debug_barrier()
        last = tl.atomic_add(arrived + cell, 1, sem="acq_rel") == split - 1
        if last:
            acc = tl.load(mine, cache_modifier=".cg")
            for other in range(1, split):
                acc += tl.load(mine + other * stride, cache_modifier=".cg")
            tl.store(arrived + cell, 0)
    if last:
        mask_n = offs_n < N
        if HAS_BIAS:
            acc += tl.load(bias + offs_n, mask=mask_n, other=0.0).to(tl.float32)[:, None]
        at = y + offs_m.to(tl.int64)[None, :] * N + offs_n[:, None]
        mask = mask_n[:, None] & (offs_m[None, :] < M)
        tl.store(at, acc.to(y.dtype.element_ty), mask=mask)


@triton.jit(do_not_specialize=RUN_TIME)
def spmm_t_kernel(
    lanes,
    starts,
    values,
    dy,  # [M, N]
    bias,  # [K]
    dx,  # [M, K]
    M,
    N,
    K,
    tiles,
    one,
    size,
    HAS_BIAS: tl.constexpr,
    BLOCK_M: tl.constexpr,
    WARPS: tl.constexpr,
    UNITS: tl.constexpr,
    UPCAST: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """dx = dy W + bias. Program (256 columns of W, token block)."""
    BLOCK_N: tl.constexpr = 4 * UNITS * WARPS
    tile, m_block = tl.program_id(0), tl.program_id(1)
    offs_k = tile * 256 + tl.arange(0, 256)
    offs_m = m_block * BLOCK_M + tl.arange(0, BLOCK_M)
    dy_rows = dy + offs_m.to(tl.int64)[:, None] * N
    acc = tl.zeros((BLOCK_M, 256), tl.float32)
    for block in range(0, tl.cdiv(N, BLOCK_N)):
        offs_n = block * BLOCK_N + tl.arange(0, BLOCK_N)[None, :]
        mask = (offs_m[:, None] < M) & (offs_n < N)
        g = tl.load(dy_rows + offs_n, mask=mask, other=0.0)  # [BLOCK_M, BLOCK_N]
        unit = _first_unit(block, tile, tiles, WARPS, UNITS)
        w = _load_units(lanes, starts, unit, tiles, values, one, size, UNITS)
        acc = _dot(g, _as_tile(w, WARPS, UNITS), acc, UPCAST, PRECISION)
    mask_k = offs_k < K
    if HAS_BIAS:
        acc += tl.load(bias + offs_k, mask=mask_k, other=0.0).to(tl.float32)[None, :]
    at = dx + offs_m.to(tl.int64)[:, None] * K + offs_k[None, :]
    tl.store(at, acc.to(dx.dtype.element_ty), mask=(offs_m[:, None] < M) & mask_k[None, :])


@triton.jit(do_not_specialize=RUN_TIME)
def sddmm_kernel(
    lanes,
    starts,
    dy,  # [M, N]
    x,  # [M, K]
    dvalues,  # [nnz]
    M,
    N,
    K,
    tiles,
    one,
    size,
    BLOCK_M: tl.constexpr,
    WARPS: tl.constexpr,
    UNITS: tl.constexpr,
    UPCAST: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """dvalues = (dy^T x) at the pattern. Program (row block of W, 256 columns of W)."""
    BLOCK_N: tl.constexpr = 4 * UNITS * WARPS
    block, tile = tl.program_id(0), tl.program_id(1)
    offs_n = block * BLOCK_N + tl.arange(0, BLOCK_N)
    offs_k = tile * 256 + tl.arange(0, 256)
    acc = tl.zeros((BLOCK_N, 256), tl.float32)
    for first in range(0, M, BLOCK_M):
        offs_m = first + tl.arange(0, BLOCK_M)
        mask_m = offs_m < M
        rows = offs_m.to(tl.int64)
        mask = mask_m[None, :] & (offs_n < N)[:, None]
        g = tl.load(dy + rows[None, :] * N + offs_n[:, None], mask=mask, other=0.0)
        mask = mask_m[:, None] & (offs_k < K)[None, :]
        b = tl.load(x + rows[:, None] * K + offs_k[None, :], mask=mask, other=0.0)
        acc = _dot(g, b, acc, UPCAST, PRECISION)

    result = acc.to(dvalues.dtype.element_ty)
    if UNITS == 1:
        result = tl.reshape(result, (WARPS, 2, 2, 32, 2, 2, 2))
        result = tl.permute(result, (0, 3, 6, 5, 4, 2, 1))
        result = tl.reshape(result, (32 * WARPS, 2, 2, 2, 2, 2))
    elif UNITS == 2:
        result = tl.reshape(result, (WARPS, 2, 2, 2, 32, 2, 2, 2))
        result = tl.permute(result, (0, 4, 7, 6, 5, 3, 2, 1))
        result = tl.reshape(result, (32 * WARPS, 2, 2, 2, 2, 2, 2))
    else:
        result = tl.reshape(result, (WARPS, 2, 2, 2, 2, 32, 2, 2, 2))
        result = tl.permute(result, (0, 5, 8, 7, 6, 4, 3, 2, 1))
        result = tl.reshape(result, (32 * WARPS, 2, 2, 2, 2, 2, 2, 2))
    unit = _first_unit(block, tile, tiles, WARPS, UNITS)
    pairs, s01, s23 = _load_bits(lanes, starts, unit, tiles, UNITS)
    _store_units(pairs, s01, s23, dvalues, one, size, result, UNITS)
