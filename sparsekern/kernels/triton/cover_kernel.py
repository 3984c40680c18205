"""y = x W^T + bias for few tokens, in Triton. Imports triton, so `rows.py` imports this file when
it first runs the kernel.

W is read as a cover (csrc/cuda/cover.cuh) with one value a group. A record is 32 rows x 32 slots:
8 groups of 4 slots, in each of which a row has at most one value, whose position (2 bits) says in
which slot. Lane 4 g + t holds the values of rows 16 b + 8 h + g in groups 4 u + t. With slots in
their order those are the places that tl.dot wants from this lane when four neighbours of operand A
lie in one (kWidth 4, which Triton chooses because of the joins). So W goes from memory into the
product without leaving its registers; x, feature-major, is gathered by the columns of the slots.

A place (row and slot) costs 4.0 instructions of a lane with 16 tokens, 4.8 with 32, 6.6 with 64. Of
those 2 decode it: a value is shifted to its half of a pair, then goes to one of two pairs, and so
makes four places. Addresses are carried along, and x comes in pairs of tokens: loaded as single
ones, each pair would be put together twice.

One warp is a program: 32 rows and a part of the windows of 256 columns. In slots without values x
is that of some other column of W times 0: NaN where that is not finite, which is mended afterwards
(mend_kernels.py).
"""

import triton
import triton.language as tl

from .bitmap_kernels import _dot

WORDS = tl.constexpr(152)  # of a record: 128 of values, 16 of positions, 8 of columns


@triton.jit
def _four(value, position):
    """The four places of a value: uint16 [32, 2 (low bit of the slot), 2]."""
    value = (value & 0xFFFF) << ((position & 1) * 16)
    high = tl.where(position & 2 != 0, value, 0)
    low = value ^ high
    low = tl.join(low.to(tl.uint16), (low >> 16).to(tl.uint16))
    high = tl.join(high.to(tl.uint16), (high >> 16).to(tl.uint16))
    return tl.join(low, high)


@triton.jit
def _sixteen_rows(words0, words1, positions):
    """Sixteen rows out of the words of groups t and t + 4: [32, 2, 2, 2 (h), 2 (u)]."""
    low = tl.join(_four(words0, positions), _four(words0 >> 16, positions >> 2))
    high = tl.join(_four(words1, positions >> 16), _four(words1 >> 16, positions >> 18))
    return tl.join(low, high)


@triton.jit
def _record(words, positions):
    """uint32 [128] and uint64 [32] of one record: [32, 2, 2, 2 (h), 2 (u), 2 (b)]."""
    words0, words1 = tl.split(tl.reshape(words, (32, 2, 2)))
    words00, words10 = tl.split(words0)
    words01, words11 = tl.split(words1)
    shift = (tl.arange(0, 32) % 4 * 4).to(tl.uint32)
    low = _sixteen_rows(words00, words01, positions.to(tl.uint32) >> shift)
    high = _sixteen_rows(words10, words11, (positions >> 32).to(tl.uint32) >> shift)
    return tl.join(low, high)


@triton.jit
def _load_records(words, positions, left):
    """Two records, zeros where fewer are left: uint32 [128, 2] and uint64 [32, 2]."""
    words0 = tl.load(words, mask=left > 0, other=0)
    words1 = tl.load(words + WORDS, mask=left > 1, other=0)
    positions0 = tl.load(positions, mask=left > 0, other=0)
    positions1 = tl.load(positions + WORDS // 2, mask=left > 1, other=0)
    return tl.join(words0, words1), tl.join(positions0, positions1)


@triton.jit
def _load_x(x_pairs, columns, bases, K, BLOCK_M: tl.constexpr):
    """Pairs of tokens, uint32 [64, BLOCK_M / 2], at the columns of W of 64 slots."""
    columns = (columns >> (tl.arange(0, 64) % 4 * 8).to(tl.uint32)) & 255
    # Windows may end beyond W, and slots without values may have any column.
    columns = tl.minimum(bases + columns.to(tl.int32), K - 1)
    rows = x_pairs + columns.to(tl.uint32)[:, None].to(tl.uint64) * (BLOCK_M // 2)
    return tl.load(rows + tl.arange(0, BLOCK_M // 2)[None, :])


@triton.jit
def _as_x(pairs, BLOCK_M: tl.constexpr, dtype: tl.constexpr):
    """x [64, BLOCK_M] of the pairs."""
    x = tl.join(pairs.to(tl.uint16), (pairs >> 16).to(tl.uint16))
    return tl.reshape(x, (64, BLOCK_M)).to(dtype, bitcast=True)


@triton.jit
def _as_tile(words, positions, dtype: tl.constexpr):
    """Two records as W [32, 64]."""
    words0, words1 = tl.split(words)
    positions0, positions1 = tl.split(positions)
    w = tl.join(_record(words0, positions0), _record(words1, positions1))
    # g, t, slot (low, high bit), h, u, b, record
    w = tl.permute(tl.reshape(w, (8, 4, 2, 2, 2, 2, 2, 2)), (6, 4, 0, 7, 5, 1, 3, 2))
    return tl.reshape(w, (32, 64)).to(dtype, bitcast=True)


@triton.jit(do_not_specialize=["M", "N", "K", "windows"])
def spmm_cover_kernel(
    records,  # int32 [steps, 152]
    bases,  # int32 [steps], the first column of each record's window
    steps,  # int32 [slices * windows + 1]
    row_order,  # int32 [slices * 32]
    x_fm,  # [K, BLOCK_M]
    bias,  # [N]
    y,  # [M, N]
    parts,  # float32 [SPLIT, slices, 32, BLOCK_M], where K is split
    arrived,  # int32 [slices], all 0 before and after, where K is split
    M,
    N,
    K,
    windows,
    HAS_BIAS: tl.constexpr,
    BLOCK_M: tl.constexpr,
    UPCAST: tl.constexpr,
):
    """y = x W^T + bias. Program (slice of 32 rows, part of the windows)."""
    slice, part = tl.program_id(0), tl.program_id(1)
    split = tl.num_programs(1)
    tile = slice * windows
    first = tl.load(steps + tile + part.to(tl.int64) * windows // split)
    end = tl.load(steps + tile + (part + 1).to(tl.int64) * windows // split)
    offs_m = tl.arange(0, BLOCK_M)
    acc = tl.zeros((32, BLOCK_M), tl.float32)
    dtype: tl.constexpr = x_fm.dtype.element_ty
    x_pairs = x_fm.to(tl.pointer_type(tl.uint32))
    # Addresses of two records, and of the bytes and windows of their 64 columns.
    slot = tl.arange(0, 64)
    record = records.to(tl.pointer_type(tl.uint32)) + first.to(tl.int64) * WORDS
    words_at = record + tl.arange(0, 128)
    positions_at = (record + 128).to(tl.pointer_type(tl.uint64)) + tl.arange(0, 32) // 4
    columns_at = record + 144 + slot // 32 * WORDS + slot // 4 % 8
    bases_at = bases + first + slot // 32
    left = end - first
    words, positions = _load_records(words_at, positions_at, left)
    columns = tl.load(columns_at, mask=slot // 32 < left, other=0)
    base = tl.load(bases_at, mask=slot // 32 < left, other=0)
    # Records are read one turn ahead. x of a turn is waited for, while other warps decode.
    for _ in range(first, end, 2):
        pairs = _load_x(x_pairs, columns, base, K, BLOCK_M)
        words_at += 2 * WORDS
        positions_at += WORDS
        columns_at += 2 * WORDS
        bases_at += 2
        left -= 2
        next_words, next_positions = _load_records(words_at, positions_at, left)
        columns = tl.load(columns_at, mask=slot // 32 < left, other=0)
        base = tl.load(bases_at, mask=slot // 32 < left, other=0)
        w = _as_tile(words, positions, dtype)
        acc = _dot(w, _as_x(pairs, BLOCK_M, dtype), acc, UPCAST, "ieee")
        words, positions = next_words, next_positions

    # The last program to arrive adds the parts of all, in the order of K.
    last = split == 1
    if split > 1:
        inside = tl.arange(0, 32)[:, None] * BLOCK_M + offs_m[None, :]
        mine = parts + slice.to(tl.int64) * 32 * BLOCK_M + inside
        stride = tl.num_programs(0).to(tl.int64) * 32 * BLOCK_M
        tl.store(mine + part * stride, acc)
        tl.debug_barrier()
        last = tl.atomic_add(arrived + slice, 1, sem="acq_rel") == split - 1
        if last:
            acc = tl.load(mine, cache_modifier=".cg")
            for other in range(1, split):
                acc += tl.load(mine + other * stride, cache_modifier=".cg")
            tl.store(arrived + slice, 0)
    if last:
        rows = tl.load(row_order + slice * 32 + tl.arange(0, 32))
        if HAS_BIAS:
            acc += tl.load(bias + rows, mask=rows >= 0, other=0.0).to(tl.float32)[:, None]
        at = y + offs_m.to(tl.int64)[None, :] * N + rows[:, None]
        mask = (rows >= 0)[:, None] & (offs_m < M)[None, :]
        tl.store(at, acc.to(y.dtype.element_ty), mask=mask)
