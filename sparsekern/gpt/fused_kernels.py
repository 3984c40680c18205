"""What stands between the products of a GPT that generates, in Triton. fused.py imports this file
when it first launches one.

Sums are float32, results rounded once. A launch may begin before the kernel ahead of it has ended
(EARLY, as those of packed weights' products do), and that one before its own: until it waits, it
reads only what no kernel of this pass writes: weights, the position, and the cache of positions
before. Those are there: a pass begins with torch's embedding, which waits for all that was before.
"""

import triton
import triton.language as tl
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait

MOST_E4M3 = tl.constexpr(464.0)  # which rounds to 448
LEAST = tl.constexpr(-1e30)  # below every score
LOG2_E = tl.constexpr(1.4426950408889634)


@triton.jit
def _let_next_start(EARLY: tl.constexpr):
    if EARLY:
        gdc_launch_dependents()


@triton.jit
def _wait_for_last(EARLY: tl.constexpr):
    if EARLY:
        gdc_wait()


@triton.jit
def _rounded(values, factor, dtype, IN_E4M3: tl.constexpr):
    """In E4M3 times a factor; what is then beyond its largest number becomes NaN."""
    if IN_E4M3:
        values *= factor
        values = tl.where(tl.abs(values) <= MOST_E4M3, values, float("nan"))
    return values.to(dtype)


@triton.jit
def add_norm_kernel(
    x,  # [rows, C], the residual stream; with HAS_ADDED x + added is written to it
    added,
    weight,  # [C]
    bias,
    y,  # [rows, C]
    C,
    eps,
    factor,
    HAS_ADDED: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    HAS_MEAN: tl.constexpr,  # LayerNorm, or else RMSNorm
    IN_E4M3: tl.constexpr,
    EARLY: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """y = norm(x + added). A program is a row."""
    _let_next_start(EARLY)
    columns = tl.arange(0, BLOCK)
    mask = columns < C
    at = tl.program_id(0).to(tl.int64) * C + columns
    scale = tl.load(weight + columns, mask=mask, other=0.0).to(tl.float32)
    if HAS_BIAS:
        shift = tl.load(bias + columns, mask=mask, other=0.0).to(tl.float32)
    _wait_for_last(EARLY)
    row = tl.load(x + at, mask=mask, other=0.0)
    if HAS_ADDED:
        more = tl.load(added + at, mask=mask, other=0.0)
        row = (row.to(tl.float32) + more.to(tl.float32)).to(x.dtype.element_ty)
        tl.store(x + at, row, mask=mask)
    values = row.to(tl.float32)
    if HAS_MEAN:
        values = tl.where(mask, values - tl.sum(values, 0) / C, 0.0)
    values *= tl.rsqrt(tl.sum(values * values, 0) / C + eps) * scale
    if HAS_BIAS:
        values += shift
    tl.store(y + at, _rounded(values, factor, y.dtype.element_ty, IN_E4M3), mask=mask)


@triton.jit
def activate_kernel(
    u,  # [rows, width], with GATED [rows, 2 width]: gates, then what they multiply
    y,  # [rows, width]
    width,
    size,  # rows * width
    factor,
    GATED: tl.constexpr,
    IN_E4M3: tl.constexpr,
    EARLY: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """y = silu(gate) * up, or gelu(u)."""
    _let_next_start(EARLY)
    at = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    mask = at < size
    _wait_for_last(EARLY)
    if GATED:
        place = u + at + at // width * width
        gate = tl.load(place, mask=mask, other=0.0).to(tl.float32)
        values = gate / (1 + tl.exp(-gate)) * tl.load(place + width, mask=mask, other=0.0)
    else:
        values = tl.load(u + at, mask=mask, other=0.0).to(tl.float32)
        values = 0.5 * values * (1 + tl.erf(values * 0.7071067811865476))
    tl.store(y + at, _rounded(values, factor, y.dtype.element_ty, IN_E4M3), mask=mask)


@triton.jit
def _turned(values, others, columns, cos, sin, row, D: tl.constexpr):
    """Values with their partners `others`: pairs (i, i + D / 2) turned by the angles of `row`."""
    place = row * (D // 2) + columns % (D // 2)
    c, s = tl.load(cos + place).to(tl.float32), tl.load(sin + place).to(tl.float32)
    s = tl.where(columns < D // 2, -s, s)
    return values.to(tl.float32) * c + others.to(tl.float32) * s


@triton.jit(do_not_specialize=["rows", "T"])
def remember_kernel(
    qkv,  # [B T, H + 2 G, D]: with TURNS q is turned in place
    keys,  # [B, G, S, D]
    values,
    cos,  # [block_size, D / 2]
    sin,
    rows,  # B T
    T,
    S,
    H,
    G,
    first,  # head of the grid's first column: H where q stays
    TURNS: tl.constexpr,
    EARLY: tl.constexpr,
    ROWS: tl.constexpr,
    D: tl.constexpr,
):
    """Keys and values of positions 0 to T - 1 into the cache. A program has some rows of a head."""
    _let_next_start(EARLY)
    here = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    head = tl.program_id(1) + first
    # Both halves by one thread: another may not read what this one has turned already.
    HALF: tl.constexpr = D // 2
    columns = tl.arange(0, HALF)[None, :]
    mask = (here < rows)[:, None]
    heads = H + 2 * G
    from_ = qkv + (here.to(tl.int64) * heads + head)[:, None] * D + columns
    _wait_for_last(EARLY)
    low = tl.load(from_, mask=mask, other=0.0)
    high = tl.load(from_ + HALF, mask=mask, other=0.0)
    place = here % T
    cached = ((here // T).to(tl.int64) * G * S + place)[:, None] * D + columns
    if TURNS:
        if head < H + G:
            angle = place[:, None] * HALF + columns
            c, s = tl.load(cos + angle).to(tl.float32), tl.load(sin + angle).to(tl.float32)
            a, b = low.to(tl.float32), high.to(tl.float32)
            low, high = (a * c - b * s).to(low.dtype), (b * c + a * s).to(high.dtype)
    if head < H:
        tl.store(from_, low, mask=mask)
        tl.store(from_ + HALF, high, mask=mask)
    else:
        if head < H + G:
            to = keys + cached + (head - H).to(tl.int64) * S * D
        else:
            to = values + cached + (head - H - G).to(tl.int64) * S * D
        tl.store(to, low, mask=mask)
        tl.store(to + HALF, high, mask=mask)


@triton.jit(do_not_specialize=["parts"])
def attend_kernel(
    qkv,  # [B, H + 2 G, D]
    keys,  # [B, G, S, D]
    values,
    position,  # int64 [1], of the new token
    cos,  # [block_size, D / 2]
    sin,
    y,  # [B, H, D]
    sums,  # float32 [B G, parts, R, D]
    weights,  # float32 [B G, parts, R, 2]: the largest score, and the sum of all weights
    S,
    G,
    parts,
    scale,  # of scores, times log2(e)
    R: tl.constexpr,  # heads of q that share a key
    TURNS: tl.constexpr,
    IS_WHOLE: tl.constexpr,  # parts is 1
    EARLY: tl.constexpr,
    BLOCK_R: tl.constexpr,
    BLOCK_S: tl.constexpr,
    D: tl.constexpr,
):
    """Attention of one new position of each text, whose key and value go into the cache. A program
    has a head of keys and a part of the positions; the last part has the new one."""
    _let_next_start(EARLY)
    group, part = tl.program_id(0), tl.program_id(1)
    head, text = group % G, group // G
    rows, columns = tl.arange(0, BLOCK_R)[:, None], tl.arange(0, D)[None, :]
    start = qkv + (text * (R * G + 2 * G)).to(tl.int64) * D
    at_q = start + (head * R + rows) * D
    at_k = start + (R * G + head) * D
    cached = group.to(tl.int64) * S * D
    new = tl.load(position).to(tl.int32)
    each = tl.cdiv(tl.cdiv(new, parts), BLOCK_S) * BLOCK_S
    begin = each * part
    end = tl.minimum(begin + each, new)
    places = begin + tl.arange(0, BLOCK_S)
    at = cached + places[:, None] * D + columns
    k = tl.load(keys + at, mask=(places < end)[:, None], other=0.0)
    v = tl.load(values + at, mask=(places < end)[:, None], other=0.0)
    _wait_for_last(EARLY)
    q = tl.load(at_q + columns, mask=rows < R, other=0.0)
    if TURNS:
        others = tl.load(at_q + (columns + D // 2) % D, mask=rows < R, other=0.0)
        q = _turned(q, others, columns, cos, sin, new, D).to(q.dtype)

    # With one head each place of a tile has sums of its own, which meet at the end: no warp waits
    # for another before.
    SUMS: tl.constexpr = BLOCK_S if BLOCK_R == 1 else BLOCK_R
    largest = tl.full((SUMS,), LEAST, tl.float32)
    total = tl.zeros((SUMS,), tl.float32)
    sum_of = tl.zeros((SUMS, D), tl.float32)
    for first in range(begin, end, BLOCK_S):
        here = first + tl.arange(0, BLOCK_S) < end
        places += BLOCK_S
        at = cached + places[:, None] * D + columns
        next_k = tl.load(keys + at, mask=(places < end)[:, None], other=0.0)
        next_v = tl.load(values + at, mask=(places < end)[:, None], other=0.0)
        if BLOCK_R == 1:
            scores = tl.sum(q.to(tl.float32) * k.to(tl.float32), 1) * scale
            larger = tl.maximum(largest, tl.where(here, scores, LEAST))
            shares = tl.where(here, tl.exp2(scores - larger), 0.0)
            kept = tl.exp2(largest - larger)
            total = total * kept + shares
            sum_of = sum_of * kept[:, None] + shares[:, None] * v.to(tl.float32)
        else:
            scores = tl.dot(q, tl.trans(k), input_precision="ieee") * scale
            scores = tl.where(here[None, :], scores, LEAST)
            larger = tl.maximum(largest, tl.max(scores, 1))
            shares = tl.where(here[None, :], tl.exp2(scores - larger[:, None]), 0.0)
            kept = tl.exp2(largest - larger)
            total = total * kept + tl.sum(shares, 1)
            sum_of = sum_of * kept[:, None]
            sum_of += tl.dot(shares.to(v.dtype), v, input_precision="ieee")
        largest, k, v = larger, next_k, next_v
    if BLOCK_R == 1:
        larger = tl.max(largest, 0)
        kept = tl.exp2(largest - larger)
        total = tl.sum(total * kept, 0)[None]
        sum_of = tl.sum(sum_of * kept[:, None], 0)[None, :]
        largest = larger[None]
    if part == parts - 1:
        new_k = tl.load(at_k + columns)
        new_v = tl.load(at_k + G * D + columns)
        if TURNS:
            partners = tl.load(at_k + (columns + D // 2) % D)
            new_k = _turned(new_k, partners, columns, cos, sin, new, D).to(new_k.dtype)
        to_cache = cached + new.to(tl.int64) * D + columns
        tl.store(keys + to_cache, new_k)
        tl.store(values + to_cache, new_v)
        score = tl.sum(q.to(tl.float32) * new_k.to(tl.float32), 1) * scale
        most = tl.maximum(largest, score)
        share, less = tl.exp2(score - most), tl.exp2(largest - most)
        total = total * less + share
        sum_of = sum_of * less[:, None] + share[:, None] * new_v.to(tl.float32)
        largest = most
    if IS_WHOLE:
        result = (sum_of / total[:, None]).to(y.dtype.element_ty)
        to = y + ((text * G + head) * R + rows).to(tl.int64) * D + columns
        tl.store(to, result, mask=rows < R)
    else:
        place = (group * parts + part).to(tl.int64) * R + tl.arange(0, BLOCK_R)
        is_row = tl.arange(0, BLOCK_R) < R
        tl.store(sums + place[:, None] * D + columns, sum_of, mask=rows < R)
        tl.store(weights + 2 * place, largest, mask=is_row)
        tl.store(weights + 2 * place + 1, total, mask=is_row)


@triton.jit(do_not_specialize=["parts"])
def combine_kernel(
    sums,  # as of attend_kernel
    weights,
    y,  # [B, H, D]
    parts,
    R: tl.constexpr,
    EARLY: tl.constexpr,
    PARTS: tl.constexpr,  # a power of two, parts or more
    D: tl.constexpr,
):
    """y of the sums of all parts. A program is a head."""
    _let_next_start(EARLY)
    head = tl.program_id(0)
    each = tl.arange(0, PARTS)
    mask = each < parts
    place = ((head // R) * parts + each).to(tl.int64) * R + head % R
    columns = tl.arange(0, D)[None, :]
    _wait_for_last(EARLY)
    largest = tl.load(weights + 2 * place, mask=mask, other=-float("inf"))
    total = tl.load(weights + 2 * place + 1, mask=mask, other=0.0)
    found = tl.load(sums + place[:, None] * D + columns, mask=mask[:, None], other=0.0)
    share = tl.exp2(largest - tl.max(largest, 0))
    result = tl.sum(found * share[:, None], 0) / tl.sum(total * share, 0)
    to = y + head.to(tl.int64) * D + tl.arange(0, D)
    tl.store(to, result.to(y.dtype.element_ty))
