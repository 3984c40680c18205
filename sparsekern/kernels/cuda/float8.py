"""Training in E4M3 on a GPU: operands made anew in each step, and their products.

Two-way patterns are multiplied through cuSPARSELt, forward and input gradient. Its operand of W is
filled from the stored values, and that of W^T with it, in one kernel, which rounds them too; the
tail, which says where the slots are, is made once a pattern. The library takes a factor from the
host alone. Scales are on the GPU, so those of x and W together are held to a power of two that the
host knows (nn/scaling.py); input gradients come without the scales: who reads one multiplies it.
The weight gradient is a dense product of both operands transposed, as tensor cores want 8-bit
operands, collected at the pattern.
"""

from dataclasses import dataclass
from functools import cache

import torch
from torch import Tensor

from ..derived import derived
from ..float8 import DTYPE
from . import bitmap as bitmaps
from . import compressed, cusparselt
from .bitmap import COLUMNS, PART_BYTES, THREADS, TILE_ROWS, Bitmap
from .compressed import MULTIPLE_E4M3, refuse_gpu
from .e4m3 import MULTIPLE_OF_TOKENS
from .layout import check_length
from .library import refusal, start
from .two_of_four import with_free_places

MOST_BLOCKS = 1056  # 8 on each of 132 multiprocessors
VALUES = 16  # of a thread's step
NOTED = 1024  # of a block that notes what is largest
TURN_TILE = 128
TURN_BYTES = 4 * TURN_TILE * (TURN_TILE // 4 + 1)
FILL_BYTES = (
    TILE_ROWS * COLUMNS + TILE_ROWS // 8 * 8 + COLUMNS // 8 * (TILE_ROWS + 8) + 40 * TILE_ROWS
)
# By the address at which a two-way layer notes its largest values: the power of two that the scales
# of its x and W are together. torch.compile takes results of an op with an operand on the host for
# unaligned, and would compile anew for each number.
exponents: dict[int, int] = {}
captured: set[int] = set()  # addresses of those that a CUDA graph has taken
_NAMES = {torch.bfloat16: "bf16", torch.float32: "f32"}
# Sums of weight gradients are added up in float32, as in Transformer Engine: tensor cores alone
# keep 14 bits of them.
FAST_WEIGHT_GRADIENT = False


@dataclass(frozen=True)
class _Pattern:
    bitmap: Bitmap
    tails: dict[str, Tensor]  # bytes, by op


def pattern_of(row_offsets: Tensor, col_indices: Tensor, n: int, k: int) -> _Pattern | None:
    """None for one that is not two-way."""

    def make(*_: Tensor) -> _Pattern | None:
        bitmap = bitmaps.bitmap_of(row_offsets, col_indices, n, k)
        if not bitmaps.is_two_way(bitmap):
            return None
        ones = torch.ones(len(col_indices), dtype=torch.bfloat16, device=col_indices.device)
        stored = bitmaps.write_out(bitmap, ones, n, k).bool()
        return _Pattern(bitmap, {"spmm": _tail(stored), "spmm_t": _tail(stored.t())})

    return derived("two of four e4m3", row_offsets, col_indices, n, k, make)


def _tail(stored: Tensor) -> Tensor:
    two = with_free_places(stored)
    return cusparselt.compress(two.float().to(DTYPE))[two.numel() // 2 :].clone()


def exponent_of(noted: Tensor) -> int:
    """Of the layer that notes there. RuntimeError where its Scaling notes elsewhere."""
    address = noted.data_ptr()
    if address not in exponents:
        raise RuntimeError(
            "float8: expected the buffers of a layer as to_float8_ has made them, views of those "
            "of its Scaling; these are others"
        )
    if torch.cuda.is_current_stream_capturing():
        captured.add(address)
    return exponents[address]


def forget_exponents(addresses: list[int]) -> None:
    """Nobody notes there any more."""
    captured.difference_update(addresses)
    for address in addresses:
        exponents.pop(address, None)


def quantise(x: Tensor, scale: Tensor, noted: Tensor) -> Tensor:
    """x [M, K], bfloat16 or float32, in E4M3 by scale [1], as float8.cast() does it. noted [1] is
    raised to the largest of x; both float32."""
    x = cusparselt.aligned(x.contiguous())
    x8 = torch.empty_like(x, dtype=DTYPE)
    sixteens = x.numel() // VALUES
    blocks = min(MOST_BLOCKS, max(1, -(-sixteens // THREADS)))
    tensors = x, scale, x8, noted
    start(f"sk_float8_cast_{_NAMES[x.dtype]}", blocks, THREADS, 0, tensors, sixteens)
    return x8


def note(largest: Tensor, noted: Tensor, others: Tensor, noted_other: Tensor) -> None:
    """Raise noted [1] to the largest of `largest` [M], and noted_other [1] to that of `others` [N],
    which have no negative one; float32."""
    largest, others = largest.contiguous(), others.contiguous()
    blocks = max(_noting(largest), _noting(others))
    tensors = largest, noted, others, noted_other
    start("sk_float8_note", 2 * blocks, THREADS, 0, tensors, len(largest), len(others))


def _noting(largest: Tensor | None) -> int:
    """Blocks of a launch that note what is largest."""
    return 0 if largest is None else -(-len(largest) // NOTED)


def transpose(
    x: Tensor,
    sums: Tensor | None = None,
    noting: tuple[Tensor, Tensor] | None = None,
    adding: tuple[Tensor, Tensor, Tensor] | None = None,
) -> Tensor:
    """x [M, K] of 8 bits as [K, M], written out; M and K are multiples of 16. In sums, float32
    [tiles(M), K], those of each column, of 128 tokens each.

    Beside it, so that neither needs a launch: noting (largest, noted) is as of note(), and adding
    (sums [parts, N], factor [1], total [N]) sets total to the sum of the parts times the factor."""
    (m, k), x = x.shape, cusparselt.aligned(x.contiguous())
    out = x.new_empty(k, m)
    largest, noted = noting or (None, None)
    largest = None if largest is None else largest.contiguous()
    added, factor, total = adding or (None, None, None)
    parts, added_columns = (0, 0) if added is None else added.shape
    beside = _noting(largest), -(-added_columns // THREADS)
    blocks = tiles(m) * tiles(k) + sum(beside)
    tensors = x, out, sums, largest, noted, added, factor, total
    count = 0 if largest is None else len(largest)
    sizes = m, k, beside[0], count, beside[1], parts, added_columns
    start("sk_float8_transpose", blocks, THREADS, TURN_BYTES, tensors, *sizes)
    return out


def tiles(size: int) -> int:
    return -(-size // TURN_TILE)


def operands(
    values: Tensor,
    scale: Tensor,
    noted: Tensor,
    row_offsets: Tensor,
    col_indices: Tensor,
    n: int,
    k: int,
    is_transposed_too: bool,
    noting: tuple[Tensor, Tensor] | None = None,
) -> tuple[Tensor, Tensor]:
    """Those of W and of W^T, bytes, from values [nnz], float32, rounded by scale [1]; noted [1] is
    raised to the largest. W^T is empty where it is not asked for. noting: as of transpose()."""
    check_length(values, len(col_indices))
    pattern = pattern_of(row_offsets, col_indices, n, k)
    if pattern is None:
        raise ValueError(NOT_TWO_WAY)
    tails, bitmap = [pattern.tails["spmm"], pattern.tails["spmm_t"]], pattern.bitmap
    slots = n * k // 2
    found = [values.new_empty(slots + len(tail), dtype=torch.uint8) for tail in tails]
    parts = [len(tail) // PART_BYTES for tail in tails]
    if not is_transposed_too:
        found[1], parts[1] = found[1][:0], 0
    largest, noted_x = noting or (None, None)
    largest = None if largest is None else largest.contiguous()
    count = 0 if largest is None else len(largest)
    blocks = _noting(largest) + -(-sum(parts) // THREADS)
    blocks += -(-n // TILE_ROWS) * bitmap.row_words
    operand_t = found[1] if is_transposed_too else None
    tensors = *bitmap.tensors, values.contiguous(), scale, noted, largest, noted_x, *tails
    sizes = bitmap.row_words, n, k, _noting(largest), count, *parts
    everything = *tensors, found[0], operand_t
    start("sk_float8_fill", blocks, THREADS, FILL_BYTES, everything, *sizes)
    return found[0], found[1]


@cache
def operand_bytes(n: int, k: int, device: torch.device) -> int:
    """Length of an operand of W [n, k]."""
    return cusparselt.operand_bytes(n, k, DTYPE, device.index)


def product(
    x8: Tensor, operand: Tensor, n: int, bias: Tensor | None = None, exponent: int = 0
) -> Tensor:
    """y [M, N] = x8 [M, K] times the operand of W [N, K] over 2^exponent, + bias [N]; bfloat16."""
    return compressed.multiply(operand, x8, n, bias, 2.0**-exponent)


def dense(
    x8: Tensor, w8: Tensor, inverses: tuple[Tensor, Tensor], bias: Tensor | None, dtype: torch.dtype
) -> Tensor:
    """y [M, N] = x8 [M, K] @ w8 [N, K].T + bias [N], times both inverses [1] of the scales."""
    return torch._scaled_mm(
        x8.contiguous(),
        w8.contiguous().t(),
        *inverses,
        bias=bias,
        out_dtype=dtype,
        use_fast_accum=True,
    )


def weight_gradient(
    dy8: Tensor,
    x8: Tensor,
    inverses: tuple[Tensor, Tensor],
    dtype: torch.dtype,
    noting: tuple[Tensor, Tensor] | None = None,
) -> tuple[Tensor, Tensor]:
    """dW [N, K] = dy8 [M, N].T @ x8 [M, K], times both inverses [1] of the scales, and the sum of
    dy8 over its tokens, float32 [N], times the first one. noting: as of transpose()."""
    m, n = dy8.shape
    sums = dy8.new_empty(tiles(m), n, dtype=torch.float32)
    dbias = dy8.new_empty(n, dtype=torch.float32)
    dy8_t = transpose(dy8, sums, noting)
    x8_t = transpose(x8, adding=(sums, inverses[0], dbias))
    dw = torch._scaled_mm(
        dy8_t, x8_t.t(), *inverses, out_dtype=dtype, use_fast_accum=FAST_WEIGHT_GRADIENT
    )
    return dw, dbias


NOT_TWO_WAY = (
    "float8: expected a two-way pattern, at most two of four neighbours along both axes: "
    'family="two-way" of an algorithm, --family two-way of train and prune; or another dtype'
)


def refuse_size(n: int, k: int) -> str | None:
    """Why W [n, k] cannot be multiplied in E4M3; None if it can."""
    if n % MULTIPLE_E4M3 or k % MULTIPLE_E4M3 or 0 in (n, k):
        return (
            f"expected out_features and in_features in multiples of {MULTIPLE_E4M3}, got {n}, {k}"
        )
    return None


def refuse_tokens(m: int) -> str | None:
    if m % MULTIPLE_OF_TOKENS or m == 0:
        return f"expected tokens in multiples of {MULTIPLE_OF_TOKENS}, got {m}"
    return None


def refuse_dense(device: torch.device) -> str | None:
    """Why dense layers cannot train in E4M3 on this device; None if they can."""
    if device.type != "cuda":
        return f"it needs an NVIDIA GPU of compute capability 8.9 or later, got {device}"
    capability = torch.cuda.get_device_capability(device)
    if capability < (8, 9):
        return f"it needs compute capability 8.9 or later, this GPU has {_version(capability)}"
    return refusal()


def refuse_two_way(device: torch.device) -> str | None:
    """The same of sparse ones, which need cuSPARSELt too."""
    return refuse_dense(device) or refuse_gpu() or _refuse_layout()


@cache
def _refuse_layout() -> str | None:
    if not _has_slots_in_rows():
        version = _version(cusparselt.loaded().version)
        return f"cuSPARSELt {version} lays out its operands of 8 bits in another way"
    return None


def _has_slots_in_rows(device: str = "cuda") -> bool:
    """Whether an operand of [N, K] begins with its slots [N, K / 2], of two shapes and of different
    places."""
    for n, k in ((32, 32), (288, 1056)):
        group = torch.arange(n * k // 4, device=device) % 6
        pairs = torch.tensor([(0, 1), (0, 2), (0, 3), (1, 2), (1, 3), (2, 3)], device=device)
        codes = torch.arange(n * k // 2, device=device) % 125 + 1  # no 0, no NaN
        slots = codes.view(-1, 2).to(torch.uint8)
        w = slots.new_zeros(n * k // 4, 4).scatter_(1, pairs[group], slots)
        operand = cusparselt.compress(w.view(n, k).view(DTYPE))
        if not torch.equal(operand[: n * k // 2], slots.flatten()):
            return False
    return True


def _version(parts: tuple[int, ...]) -> str:
    return ".".join(map(str, parts))
