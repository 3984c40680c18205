"""Triton kernels: the table rows `triton`. Portable, with no compiler to install; bitmap_kernels.py
has the kernels and why they are as they are, bitmap.py the format.

W is expanded tile by tile inside the kernel and multiplied by tl.dot, in bfloat16, float16 and
float32, summed in float32. A missing entry is a zero there, which makes NaN of an infinite or NaN
x; so a second launch computes what is not finite anew, from the stored values (mend_kernels.py).

Up to 64 tokens in a 16-bit type W is packed as for the CUDA kernel (cover.py), if the C++ library
is there to do it. cover_kernel.py has that kernel.
"""

from collections.abc import Callable
from functools import lru_cache, partial
from importlib.util import find_spec
from typing import NamedTuple

import torch
from torch import Tensor

from ..cuda import cover
from ..cuda.cover import WINDOW, CoverLayout
from ..cuda.layout import LANES
from ..cuda.packs import pack_of
from ..derived import to_keep
from ..problem import Kernel, Problem, bound_kernel
from .bitmap import UNIT_COLUMNS, UNIT_ROWS, Bitmap, bitmap_of, places

DTYPES = (torch.bfloat16, torch.float16, torch.float32)
MOST_BLOCKS = 65535  # of the second dimension of a grid
MOST_TOKENS = MOST_BLOCKS * 64
COVER_TOKENS = 64
COVER_OPTIONS = {"num_warps": 1, "num_stages": 1}
# Programs of one warp, by BLOCK_M, for which 132 multiprocessors have the registers at once.
COVER_PROGRAMS = {16: 2772, 32: 2112, 64: 1188}
MOST_PLACES = 2**36  # of a bitmap: an int32 counts 32 of them


class Config(NamedTuple):
    """How a kernel is compiled and spread over the GPU."""

    block_m: int
    warps: int
    units: int  # of 4 rows, for each warp
    split: int = 1  # of K
    stages: int = 2
    max_registers: int | None = None
    precision: str = "ieee"  # of tl.dot in float32
    ahead: bool = False  # a tile's bits are loaded while the tile before it is decoded

    @property
    def block_n(self) -> int:
        return UNIT_ROWS * self.units * self.warps


def spmm_config(m: int, n: int, k: int, size: int) -> Config:
    """Tiles and split of K of y = x W^T for values of `size` bytes.

    12288 x 12288 in bfloat16, 16 tokens: 192 row blocks of 64, K in 4 parts: 768 programs.
    """
    block_m = min(128, max(16, 1 << max(0, m - 1).bit_length()))
    if block_m > 64:
        return Config(128, 8, 4) if size == 2 else Config(64, 8, 2, stages=1)
    config = Config(block_m, 4, 4) if size == 2 else Config(block_m, 4, 4, stages=1)
    programs = -(-n // config.block_n) * -(-m // block_m)
    tiles = -(-k // UNIT_COLUMNS)
    split = 1
    while split < 16 and programs * split < 600 and tiles >= 4 * split:
        split *= 2
    return config._replace(split=split)


def spmm_t_config(m: int, size: int) -> Config:
    return Config(64 if m > 32 else 16, 8, 2 if size == 2 else 1)


def sddmm_config(size: int) -> Config:
    return Config(32, 8, 4 if size == 2 else 2, stages=3)


def _bind_spmm(p: Problem) -> Callable[..., Tensor]:
    return _spmm_cover if takes_cover(p.M, p.dtype) else _spmm


def _spmm(row_offsets, col_indices, values, n, k, x, bias=None, config=None):
    m, nnz = x.shape[0], values.shape[0]
    y = x.new_empty(m, n)
    if nnz == 0 or m == 0:
        return _no_product(y, bias)
    config = config or spmm_config(m, n, k, x.element_size())
    bitmap = bitmap_of(row_offsets, col_indices, n, k)
    blocks = -(-n // config.block_n), -(-m // config.block_m)
    cells = blocks[0] * blocks[1] if config.split > 1 else 0
    arrived = _zeros(x.device, cells) if cells else x.new_empty(0, dtype=torch.int32)
    parts = x.new_empty(config.split * cells * config.block_n * config.block_m, dtype=torch.float32)
    _launch(
        _device().spmm_kernel,
        (*blocks, config.split),
        *_matrix(bitmap),
        values,
        x,
        y if bias is None else bias,
        y,
        parts,
        arrived,
        *(m, n, k, bitmap.tiles, 1, x.element_size()),
        HAS_BIAS=bias is not None,
        AHEAD=config.ahead,
        **_constants(config, x.dtype),
    )
    if nnz < n * k:
        mend(row_offsets, col_indices, values, n, k, x, bias, y)
    return y


def takes_cover(m: int, dtype: torch.dtype) -> bool:
    return m <= COVER_TOKENS and dtype.itemsize == 2 and cover.is_built()


def cover_block(m: int) -> int:
    """Tokens of a program: all."""
    return max(16, 1 << (m - 1).bit_length())


def cover_split(m: int, n: int, k: int) -> int:
    """Parts of K, such that all programs run at once: 28672 x 8192 and 16 tokens have 896 slices of
    32 rows, in 3 parts 2688 programs."""
    most = COVER_PROGRAMS[cover_block(m)] // max(1, -(-n // LANES))
    return max(1, min(most, -(-k // WINDOW)))


class _TritonCover(CoverLayout):
    """With the first column of its window for each record."""

    def __init__(self, row_offsets: Tensor, col_indices: Tensor, n: int, k: int):
        super().__init__(row_offsets, col_indices, n, k)
        counts = self.steps.diff().long()
        tiles = torch.arange(counts.shape[0], dtype=torch.int32, device=counts.device)
        self.bases = (tiles % -(-k // WINDOW) * WINDOW).repeat_interleave(counts)


def _spmm_cover(row_offsets, col_indices, values, n, k, x, bias=None, split=None):
    m, nnz = x.shape[0], values.shape[0]
    y = x.new_empty(m, n)
    if nnz == 0 or m == 0:
        return _no_product(y, bias)

    def make_layout(row_offsets: Tensor, col_indices: Tensor) -> _TritonCover:
        return _TritonCover(row_offsets, col_indices, n, k)

    pack = pack_of("triton", "cover", make_layout, row_offsets, col_indices, values, n, k)
    packed = pack.packed
    split, block_m = split or cover_split(m, n, k), cover_block(m)
    x_fm = x.new_empty(k, block_m)  # columns of tokens from m on stay as they are, and unused
    x_fm[:, :m].copy_(x.t())
    cells = packed.slices if split > 1 else 0
    arrived = _zeros(x.device, cells) if cells else x.new_empty(0, dtype=torch.int32)
    parts = x.new_empty(split * cells * LANES * block_m, dtype=torch.float32)
    _launch(
        _device_cover().spmm_cover_kernel,
        (packed.slices, split),
        packed.records.view(torch.int32),
        pack.layout.bases,
        packed.steps,
        packed.row_order,
        x_fm,
        y if bias is None else bias,
        y,
        parts,
        arrived,
        *(m, n, k, packed.windows),
        HAS_BIAS=bias is not None,
        BLOCK_M=block_m,
        UPCAST=_device().INTERPRETED and x.dtype == torch.bfloat16,
        **COVER_OPTIONS,
    )
    # Of a full W too: slots without values have columns of it.
    mend(row_offsets, col_indices, values, n, k, x, bias, y)
    return y


def _spmm_t(row_offsets, col_indices, values, n, k, dy, bias=None, config=None):
    m, nnz = dy.shape[0], values.shape[0]
    dx = dy.new_empty(m, k)
    if nnz == 0 or m == 0:
        return _no_product(dx, bias)
    config = config or spmm_t_config(m, dy.element_size())
    bitmap = bitmap_of(row_offsets, col_indices, n, k)
    _launch(
        _device().spmm_t_kernel,
        (bitmap.tiles, -(-m // config.block_m)),
        *_matrix(bitmap),
        values,
        dy,
        dx if bias is None else bias,
        dx,
        *(m, n, k, bitmap.tiles, 1, dy.element_size()),
        HAS_BIAS=bias is not None,
        **_constants(config, dy.dtype),
    )
    if nnz < n * k:
        mend_t(row_offsets, col_indices, values, n, k, dy, bias, dx)
    return dx


def _sddmm(row_offsets, col_indices, n, k, dy, x, config=None):
    m, nnz = x.shape[0], col_indices.shape[0]
    dvalues = x.new_empty(nnz)
    if nnz == 0:
        return dvalues
    config = config or sddmm_config(x.element_size())
    bitmap = bitmap_of(row_offsets, col_indices, n, k)
    _launch(
        _device().sddmm_kernel,
        (-(-n // config.block_n), bitmap.tiles),
        *_matrix(bitmap),
        dy,
        x,
        dvalues,
        *(m, n, k, bitmap.tiles, 1, x.element_size()),
        **_constants(config, x.dtype),
    )
    return dvalues


def can_mend(dtype: torch.dtype) -> bool:
    return _is_installed() and dtype in DTYPES


def mend(
    row_offsets: Tensor,
    col_indices: Tensor,
    values: Tensor,
    n: int,
    k: int,
    x: Tensor,
    bias: Tensor | None,
    y: Tensor,
) -> None:
    """y = x W^T + bias: what is infinite or NaN in it anew, in place, from the stored values. The
    indices are the caller's, which were checked."""
    device = _device_mend()
    _launch(
        device.mend_kernel,
        (x.shape[0] * -(-n // device.ROWS),),
        row_offsets,
        col_indices,
        values,
        x,
        y if bias is None else bias,
        y,
        *(n, k, len(values)),
        HAS_BIAS=bias is not None,
        ROWS=device.ROWS,
        num_warps=1,
    )


def mend_t(
    row_offsets: Tensor,
    col_indices: Tensor,
    values: Tensor,
    n: int,
    k: int,
    dy: Tensor,
    bias: Tensor | None,
    dx: Tensor,
) -> None:
    """The same of dx = dy W + bias."""
    bitmap = bitmap_of(row_offsets, col_indices, n, k)
    _launch(
        _device_mend().mend_t_kernel,
        (dy.shape[0] * bitmap.tiles,),
        *_matrix(bitmap),
        values,
        dy,
        dx if bias is None else bias,
        dx,
        *(n, k, bitmap.tiles),
        HAS_BIAS=bias is not None,
    )


def _launch(kernel, grid: tuple[int, ...], first: Tensor, *operands, **constants) -> None:
    """On the GPU of the operands: Triton takes the current one."""
    with torch.cuda.device_of(first):
        kernel[grid](first, *operands, **constants)


@lru_cache(maxsize=1)
def _device():
    from . import bitmap_kernels  # imports triton, which is optional

    return bitmap_kernels


@lru_cache(maxsize=1)
def _device_cover():
    from . import cover_kernel

    return cover_kernel


@lru_cache(maxsize=1)
def _device_mend():
    from . import mend_kernels

    return mend_kernels


def _matrix(bitmap: Bitmap) -> tuple[Tensor, Tensor]:
    return bitmap.lanes, bitmap.starts


def _constants(config: Config, dtype: torch.dtype) -> dict:
    """The compile-time constants of the three kernels."""
    options = {"num_warps": config.warps, "num_stages": config.stages}
    if config.max_registers:
        options["maxnreg"] = config.max_registers
    return {
        "BLOCK_M": config.block_m,
        "WARPS": config.warps,
        "UNITS": config.units,
        "UPCAST": _device().INTERPRETED and dtype == torch.bfloat16,
        "PRECISION": config.precision,
        **options,
    }


def _no_product(y: Tensor, bias: Tensor | None) -> Tensor:
    return y.zero_() if bias is None else y.copy_(bias.expand_as(y))


# Counters of programs that have arrived, all 0 between kernels. Two kernels that run at once must
# not share any: calls on one stream may, and each call that a CUDA graph captures has its own.
_ARENA = 2**18
_arenas: dict[torch.device, tuple[Tensor, list[int]]] = {}  # counters, [how many are taken]
_of_stream: dict[tuple[torch.device, int], Tensor] = {}


def _zeros(device: torch.device, count: int) -> Tensor:
    """int32 [at least count]."""
    make = partial(torch.zeros, dtype=torch.int32, device=device)
    if device.type == "cpu":  # interpreted
        return make(count)
    if not torch.cuda.is_current_stream_capturing():
        key = device, torch.cuda.current_stream(device).cuda_stream
        if key not in _of_stream or _of_stream[key].shape[0] < count:
            _of_stream[key] = to_keep(device, lambda: make(max(count, 4096)))
        if device not in _arenas:
            _arenas[device] = to_keep(device, lambda: make(_ARENA)), [0]
        return _of_stream[key]
    counters, taken = _arenas.get(device, (None, [_ARENA]))
    if counters is None or taken[0] + count > _ARENA:
        return make(count)  # a node of the graph
    taken[0] += count
    return counters[taken[0] - count : taken[0]]


@lru_cache(maxsize=1)
def _is_installed() -> bool:
    return find_spec("triton") is not None


def _refuse(p: Problem) -> str | None:
    if not _is_installed():
        return "Triton is not installed"
    if p.dtype not in DTYPES:
        return f"it takes bfloat16, float16 and float32, not {str(p.dtype).removeprefix('torch.')}"
    if p.M > MOST_TOKENS:
        return f"it serves up to {MOST_TOKENS} tokens, not {p.M}"
    if p.op == "sddmm" and p.K > (most := MOST_BLOCKS * UNIT_COLUMNS):
        return f"it takes up to {most} columns, not {p.K}"
    if (count := places(p.N, p.K)) >= MOST_PLACES:
        return f"its bitmap has fewer than {MOST_PLACES} places, and that of W has {count}"
    return None


def _describe(p: Problem) -> str:
    size = p.dtype.itemsize
    if p.op == "spmm" and takes_cover(p.M, p.dtype):
        split = cover_split(p.M, p.N, p.K)
        return f"cover, {LANES} rows a block, K in {split} part{'s' if split > 1 else ''}"
    config = {
        "spmm": lambda: spmm_config(p.M, p.N, p.K, size),
        "spmm_t": lambda: spmm_t_config(p.M, size),
        "sddmm": lambda: sddmm_config(size),
    }[p.op]()
    return (
        f"{config.block_n} x {UNIT_COLUMNS} of W and {config.block_m} tokens a block, "
        f"K in {config.split} part{'s' if config.split > 1 else ''}"
    )


KERNELS = (
    bound_kernel("triton", "spmm", "cuda", _refuse, _bind_spmm, _describe),
    Kernel("triton", "spmm_t", "cuda", _refuse, _spmm_t, _describe),
    Kernel("triton", "sddmm", "cuda", _refuse, _sddmm, _describe),
)
