"""CUDA kernels for few tokens: the table row `stream` on a GPU, and products of packed weights.

W is read once, by one of three kernels: `gather` reads delta streams (streams.py) and multiplies on
CUDA cores, `cover` a cover (cover.py) on sparse tensor cores, `pairs` pairs of columns (pairs.py)
on dense ones. Values are bfloat16 or float16, sums float32, rounded once. Results do not depend on
timing: sums of parts are added in a fixed order. A stored zero counts as missing. An infinite or
NaN x may give NaN in rows that do not have its column, as in a dense product.

A packed weight holds the counters by which blocks find out who is last, so it must not be used on
two streams at the same time.
"""

from functools import cache, lru_cache
from typing import NamedTuple

import torch
from torch import Tensor

from ..tensor import expand_rows
from . import cover, cuda_library, pairs
from .cover import Cover
from .crossover import density_limit
from .dense import mm
from .layout import LANES, Packed
from .packed import choose_layout, layout_for, like
from .packs import pack_of
from .pairs import Pairs
from .problem import Kernel, Problem
from .streams import BLOCK_PIECES, GRANULE, MOST_BLOCKS, Streams

MOST_TOKENS = 64
GATHER_TOKENS = 8  # of one launch
GATHER_DEPTH = 4  # as in spmm_gather.cu
RUN_WARPS = 16  # as in runs.cuh
FEW_TILES, MANY_TILES = 1.5, 5  # for each warp; few: one beginning and one end are most of the time
COVER_TOKENS, COVER_DEPTH = 32, 7  # as in spmm_cover.cu
PAIRS_WORDS_BYTES, PAIRS_WINDOW = 2 * (4352 + 8), 64  # as in spmm_pairs.cu; tokens times steps
EXPAND_WARPS = 8
CSR_THREADS, CSR_ROW_BYTES = 256, 48 * 1024  # as in csr.cu
_TYPES = {torch.bfloat16: "bf16", torch.float16: "f16"}


class Launch(NamedTuple):
    """How a kernel is launched for one problem."""

    kernel: str
    grid: int
    block: int
    smem_bytes: int
    partial: int  # float32 elements of workspace
    tokens: int  # the most of the kernel
    group_warps: int = 0  # cover: warps that share x
    shares: int = 0  # cover: most blocks that share rows


class Gpu(NamedTuple):
    """What a launch is fitted to."""

    multiprocessors: int
    smem_bytes: int  # the most of a block


@cache
def gpu_of(device: torch.device) -> Gpu:
    properties = torch.cuda.get_device_properties(device)
    return Gpu(properties.multi_processor_count, properties.shared_memory_per_block_optin)


@lru_cache(maxsize=4096)
def configure_gather(
    m: int, k: int, pieces: int, bits: int, type_name: str, gpu: Gpu
) -> Launch | None:
    """Kernel and sizes for as many of m tokens as it takes, 8 at most, on both routes; None if x of
    one token does not fit in shared memory."""
    tokens = min(GATHER_TOKENS, 1 << (m - 1).bit_length())
    ring_bytes = _ring_bytes(bits)
    while tokens and ring_bytes + _gather_x(k, tokens) > gpu.smem_bytes:
        tokens //= 2
    if not tokens:
        return None
    grid = -(-pieces // BLOCK_PIECES)
    smem_bytes = max(ring_bytes + _gather_x(k, tokens), BLOCK_PIECES * tokens * LANES * 4)
    # No more blocks on a multiprocessor than there are when all share the work: a launch that
    # starts early would fill those that are free first.
    each = max(1, min(MOST_BLOCKS, -(-grid // gpu.multiprocessors)))
    smem_bytes = max(smem_bytes, (gpu.smem_bytes + 1024) // (each + 1) - 1023)
    name = f"sk_spmm_gather_{type_name}_d{bits}_t{tokens}"
    return Launch(name, grid, BLOCK_PIECES * LANES, smem_bytes, 2 * grid * tokens * LANES, tokens)


def _ring_bytes(bits: int) -> int:
    """Bytes of the granules of a block that are on their way."""
    return BLOCK_PIECES * GATHER_DEPTH * LANES * (2 * GRANULE + bits)


def _gather_x(k: int, tokens: int) -> int:
    """Bytes of x in shared memory."""
    return -(-k // 4) * 8 * tokens


@lru_cache(maxsize=4096)
def configure_cover(m: int, slices: int, windows: int, type_name: str, gpu: Gpu) -> Launch:
    """Kernel and sizes for as many of m tokens of a cover as it takes, 32 at most, on both routes.

    The work is cut into runs of windows of blocks of rows, one run for each multiprocessor. 12288 x
    12288, 16 tokens, 132 multiprocessors: 2304 windows of 48 blocks of 256 rows, in 132 runs.
    """
    tokens = min(COVER_TOKENS, max(8, 1 << (m - 1).bit_length()))
    tiles_per_warp = slices * windows / (RUN_WARPS * gpu.multiprocessors)
    group_warps = choose_group_warps(tokens, tiles_per_warp)
    while group_warps < RUN_WARPS and _cover_smem(tokens, group_warps) > gpu.smem_bytes:
        group_warps *= 2
    busy = 0.7 if tiles_per_warp <= FEW_TILES else 0.8 if tokens <= 16 else 0.9
    runs = choose_runs(-(-slices // group_warps), windows, gpu.multiprocessors, busy)
    name, smem_bytes = f"sk_spmm_cover_{type_name}_t{tokens}", _cover_smem(tokens, group_warps)
    return _launch_runs(name, tokens, slices, windows, group_warps, runs, smem_bytes)


def choose_group_warps(tokens: int, tiles_per_warp: float) -> int:
    """How many of a block's 16 warps share x of a window, and a block's rows / 32: 16, 8 or 4.

    Many read x less often; few leave fewer sums to add up. docs/LOG.md has the measurements.
    """
    if tiles_per_warp <= FEW_TILES:
        return 4
    return 8 if tokens <= 16 or tiles_per_warp <= MANY_TILES else 16


def choose_runs(blocks: int, windows: int, multiprocessors: int, busy: float) -> int:
    """How many runs of equal length. A run that has windows of two blocks of rows begins anew
    within, so none does if the part `busy` of the multiprocessors can have one."""
    for_each = min(windows, multiprocessors // max(1, blocks))
    if blocks * for_each >= busy * multiprocessors or for_each == windows:
        return max(1, blocks * for_each)
    return max(1, min(multiprocessors, blocks * windows))


@lru_cache(maxsize=4096)
def configure_pairs(m: int, slices: int, row_steps: int, type_name: str, gpu: Gpu) -> Launch:
    """Kernel and sizes for up to 64 tokens of pairs. Runs as of a cover; groups of 4 warps are the
    fastest for W of up to 5 tiles a warp, where no run has two blocks of rows."""
    tokens = max(16, 1 << (m - 1).bit_length())
    windows = -(-row_steps // (PAIRS_WINDOW // tokens))
    tiles_per_warp = slices * row_steps * pairs.STEP / cover.WINDOW
    is_large = tiles_per_warp > MANY_TILES * RUN_WARPS * gpu.multiprocessors
    busy = 0.8 if is_large else 0.7
    for group_warps in (8,) if is_large else (4, 8):
        blocks = -(-slices // group_warps)
        runs = choose_runs(blocks, windows, gpu.multiprocessors, busy)
        if runs % max(1, blocks) == 0:
            break
    while group_warps < RUN_WARPS and _pairs_smem(group_warps) > gpu.smem_bytes:
        group_warps *= 2
        runs = choose_runs(-(-slices // group_warps), windows, gpu.multiprocessors, busy)
    name, smem_bytes = f"sk_spmm_pairs_{type_name}_t{tokens}", _pairs_smem(group_warps)
    return _launch_runs(name, tokens, slices, windows, group_warps, runs, smem_bytes)


def _launch_runs(
    name: str,
    tokens: int,
    slices: int,
    windows: int,
    group_warps: int,
    runs: int,
    smem_bytes: int,
) -> Launch:
    """Of a kernel that runs.cuh shares out."""
    groups, blocks = RUN_WARPS // group_warps, -(-slices // group_warps)
    units = blocks * windows
    shares = -(-windows * runs // units) + 1 if units else 1
    partial = blocks * shares * tokens * group_warps * LANES
    smem_bytes = max(smem_bytes, groups * tokens * (group_warps * LANES + 4) * 4)  # or its sums
    return Launch(name, runs, RUN_WARPS * LANES, smem_bytes, partial, tokens, group_warps, shares)


def _cover_smem(tokens: int, group_warps: int) -> int:
    """Bytes of shared memory: two windows of x of each group and the records of each warp."""
    x_bytes = RUN_WARPS // group_warps * 2 * tokens * cover.WINDOW * 2
    return x_bytes + RUN_WARPS * COVER_DEPTH * cover.RECORD_BYTES


def _pairs_smem(group_warps: int) -> int:
    """Bytes of shared memory: two windows of x of each group, at a multiple of 1024, and the words
    of each warp."""
    x_bytes = RUN_WARPS // group_warps * 2 * PAIRS_WINDOW * pairs.STEP * 2
    return 1024 + x_bytes + RUN_WARPS * PAIRS_WORDS_BYTES


def spmm_packed(x: Tensor, packed: Packed, bias: Tensor | None = None) -> Tensor:
    """y [M, N] = x [M, K] @ W.T + bias [N], all on the GPU and in the dtype of the weight.

    Above 64 tokens W is written out and torch multiplies; so it is where streams have so many
    columns, about 100,000, that x of one token does not fit in shared memory. No checks:
    PackedLinear has them.
    """
    m = x.shape[0]
    if m > MOST_TOKENS or not _fits(packed, x):
        return mm(x, expand(packed).t(), bias)
    y = x.new_empty(m, packed.n)
    if y.numel() == 0:
        return y
    if packed.k == 0:
        return y.zero_() if bias is None else y.copy_(bias.expand_as(y))
    x = x.contiguous()
    if isinstance(packed, Pairs):
        _run_pairs(x, packed, bias, y)
    elif isinstance(packed, Cover):
        _run_cover(x, packed, bias, y)
    else:
        _run_gather(x, packed, bias, y)
    return y


def _run_gather(x: Tensor, packed: Streams, bias: Tensor | None, y: Tensor) -> None:
    device = x.device.index
    launch = _configure_gather(packed, x)
    partial = x.new_empty(launch.partial, dtype=torch.float32)
    for first in range(0, x.shape[0], launch.tokens):
        tokens = min(launch.tokens, x.shape[0] - first)
        cuda_library.function(launch.kernel, device)(
            (launch.grid, 1),
            launch.block,
            launch.smem_bytes,
            cuda_library.current_stream(device),
            packed.values.data_ptr(),
            packed.deltas.data_ptr(),
            packed.bounds.data_ptr(),
            packed.slice_of.data_ptr(),
            packed.first_piece.data_ptr(),
            packed.starts.data_ptr(),
            packed.row_order.data_ptr(),
            x[first:].data_ptr(),
            0 if bias is None else bias.data_ptr(),
            y[first:].data_ptr(),
            partial.data_ptr(),
            packed.arrived.data_ptr(),
            tokens,
            packed.n,
            packed.k,
            packed.slice_of.shape[0],
            packed.values.shape[0],
        )


def _configure_gather(packed: Streams, x: Tensor) -> Launch | None:
    pieces, type_name = packed.slice_of.shape[0], _TYPES[x.dtype]
    return configure_gather(x.shape[0], packed.k, pieces, packed.bits, type_name, gpu_of(x.device))


def _fits(packed: Packed, x: Tensor) -> bool:
    """Whether a kernel has the shared memory that it needs."""
    if isinstance(packed, Streams):
        return _configure_gather(packed, x) is not None
    needed = _pairs_smem(RUN_WARPS)
    if isinstance(packed, Cover):
        needed = _cover_smem(COVER_TOKENS, RUN_WARPS)
    return needed <= gpu_of(x.device).smem_bytes


def _run_cover(x: Tensor, packed: Cover, bias: Tensor | None, y: Tensor) -> None:
    device = x.device.index
    sizes = packed.slices, packed.windows
    launch = configure_cover(x.shape[0], *sizes, _TYPES[x.dtype], gpu_of(x.device))
    partial = x.new_empty(launch.partial, dtype=torch.float32)
    for first in range(0, x.shape[0], launch.tokens):
        cuda_library.function(launch.kernel, device)(
            (launch.grid, 1),
            launch.block,
            launch.smem_bytes,
            cuda_library.current_stream(device),
            packed.records.data_ptr(),
            packed.steps.data_ptr(),
            packed.row_order.data_ptr(),
            x[first:].data_ptr(),
            0 if bias is None else bias.data_ptr(),
            y[first:].data_ptr(),
            partial.data_ptr(),
            packed.arrived.data_ptr(),
            min(launch.tokens, x.shape[0] - first),
            packed.n,
            packed.k,
            *sizes,
            launch.group_warps,
            launch.shares,
            packed.records.shape[0],
        )


def _run_pairs(x: Tensor, packed: Pairs, bias: Tensor | None, y: Tensor) -> None:
    device = x.device.index
    sizes = packed.slices, packed.row_steps
    launch = configure_pairs(x.shape[0], *sizes, _TYPES[x.dtype], gpu_of(x.device))
    partial = x.new_empty(launch.partial, dtype=torch.float32)
    cuda_library.function(launch.kernel, device)(
        (launch.grid, 1),
        launch.block,
        launch.smem_bytes,
        cuda_library.current_stream(device),
        packed.words.data_ptr(),
        packed.steps.data_ptr(),
        x.data_ptr(),
        0 if bias is None else bias.data_ptr(),
        y.data_ptr(),
        partial.data_ptr(),
        packed.arrived.data_ptr(),
        x.shape[0],
        packed.n,
        packed.k,
        *sizes,
        launch.group_warps,
        launch.shares,
        packed.words.shape[0],
    )


def expand(packed: Packed) -> Tensor:
    """W [N, K], dense; stored zeros and missing entries are both 0."""
    w = torch.zeros(packed.n, packed.k, dtype=packed.dtype, device=packed.arrived.device)
    if packed.nnz == 0:
        return w
    if isinstance(packed, Pairs):
        name, units = "sk_expand_pairs", packed.slices * packed.row_steps
        tensors, sizes = (packed.words, packed.steps), (packed.slices, packed.row_steps)
    elif isinstance(packed, Cover):
        name, units = "sk_expand_cover", packed.slices * packed.windows
        tensors, sizes = (
            (packed.records, packed.steps, packed.row_order),
            (packed.slices, packed.windows),
        )
    else:
        name, units = f"sk_expand_d{packed.bits}", packed.slice_of.shape[0]
        tensors = packed.values, packed.deltas, packed.bounds, packed.slice_of, packed.starts
        tensors += (packed.row_order,)
        sizes = (units,)
    device = w.device.index
    cuda_library.function(name, device)(
        (-(-units // EXPAND_WARPS), 1),
        EXPAND_WARPS * LANES,
        0,
        cuda_library.current_stream(device),
        *(tensor.data_ptr() for tensor in tensors),
        w.data_ptr(),
        packed.k,
        *sizes,
    )
    return w


def _spmm_stream(row_offsets, col_indices, values, n, k, x, bias=None):
    tokens, pattern = like(x.shape[0]), (row_offsets, col_indices)
    pack = pack_of(
        "stream", tokens, lambda: layout_for(*pattern, n, k, tokens), *pattern, values, n, k
    )
    return spmm_packed(x, pack.packed, bias)


# `expand`: W written out and torch.mm, in the dtype of the operands.


def _expand_csr(row_offsets, col_indices, values, n, k):
    if cuda_library.refusal():
        rows = expand_rows(row_offsets, values.shape[0])
        w = values.new_zeros(n * k)
        w[rows * k + col_indices] = values
        return w.view(n, k)
    w = values.new_empty(n, k)
    if w.numel():
        row_bytes = min(k * values.element_size(), CSR_ROW_BYTES)
        _run_csr("write_out", n, row_bytes, (row_offsets, col_indices, values, w), k)
    return w


def _collect_csr(row_offsets, col_indices, w):
    """The entries of w [N, K] at the places of the pattern."""
    n, k = w.shape
    if cuda_library.refusal():
        return w.view(-1)[expand_rows(row_offsets, col_indices.shape[0]) * k + col_indices]
    values = w.new_empty(col_indices.shape[0])
    if values.numel():
        warps = CSR_THREADS // LANES
        _run_csr("collect", -(-n // warps), 0, (row_offsets, col_indices, w, values), n, k)
    return values


def _run_csr(name: str, grid: int, smem_bytes: int, tensors: tuple[Tensor, ...], *sizes: int):
    device = tensors[0].device.index
    cuda_library.function(f"sk_csr_{name}_{tensors[-1].element_size()}", device)(
        (grid, 1),
        CSR_THREADS,
        smem_bytes,
        cuda_library.current_stream(device),
        *(tensor.data_ptr() for tensor in tensors),
        *sizes,
    )


def _spmm_expand(row_offsets, col_indices, values, n, k, x, bias=None):
    return mm(x, _expand_csr(row_offsets, col_indices, values, n, k).t(), bias)


def _spmm_t_expand(row_offsets, col_indices, values, n, k, dy, bias=None):
    return mm(dy, _expand_csr(row_offsets, col_indices, values, n, k), bias)


def _sddmm_expand(row_offsets, col_indices, n, k, dy, x):
    return _collect_csr(row_offsets, col_indices, mm(dy.t(), x))


def _refuse_stream(p: Problem) -> str | None:
    if p.M > MOST_TOKENS:
        return f"it serves up to {MOST_TOKENS} tokens, not {p.M}"
    if p.dtype not in _TYPES:
        return f"it takes bfloat16 and float16, not {str(p.dtype).removeprefix('torch.')}"
    if reason := cuda_library.refusal():
        return reason
    if not torch.cuda.is_available():
        return "there is no GPU"
    major, minor = torch.cuda.get_device_capability()
    if major < 8:
        return f"it needs compute capability 8.0, not {major}.{minor}"
    if (needed := _smem_bytes(p)) > (most := gpu_of(torch.device("cuda")).smem_bytes):
        return f"it needs {needed} bytes of shared memory, the GPU has {most} for a block"
    limit = density_limit(f"sm_{major}{minor}", p.dtype, p.M, "stream", "expand")
    if limit is not None and p.density > limit:
        return f"writing W out is faster above density {limit:.2f} at {p.M} tokens"
    return None


def _smem_bytes(p: Problem) -> int:
    """The least that a kernel needs."""
    layout = choose_layout(p.M, p.density)
    if layout == "streams":
        return _ring_bytes(8) + _gather_x(p.K, 1)
    tokens = 1 << (p.M - 1).bit_length()
    if layout == "cover":
        return _cover_smem(max(8, tokens), RUN_WARPS)
    return _pairs_smem(RUN_WARPS)


def _refuse_expand(p: Problem) -> str | None:
    if p.dtype not in (*_TYPES, torch.float32):
        return f"it takes 16-bit floats and float32, not {str(p.dtype).removeprefix('torch.')}"
    return None


def _describe_stream(p: Problem) -> str:
    layout = choose_layout(p.M, p.density)
    kernel = "gather" if layout == "streams" else layout
    return f"{kernel} kernel, packed on the first call; values that require grad on every call"


KERNELS = (
    Kernel("stream", "spmm", "cuda", _refuse_stream, _spmm_stream, _describe_stream),
    Kernel("expand", "spmm", "cuda", _refuse_expand, _spmm_expand),
    Kernel("expand", "spmm_t", "cuda", _refuse_expand, _spmm_t_expand),
    Kernel("expand", "sddmm", "cuda", _refuse_expand, _sddmm_expand),
)
