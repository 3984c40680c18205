"""CUDA kernels for few tokens: the table row `stream` on a GPU, and products of packed weights.

W is read once, by one of three kernels: `gather` reads delta streams (gather.py) and multiplies on
CUDA cores, `cover` a cover (cover.py) on sparse tensor cores, `pairs` pairs of columns (pairs.py)
on dense ones. Values are bfloat16 or float16, sums float32, rounded once. Results do not depend on
timing: sums of parts are added in a fixed order. A place that is not stored takes no part: an
infinite or NaN x reaches the outputs that a stored value connects it to, and no others. Where W is
written out (the row `expand`, a packed weight and many tokens) another kernel sees to that (mend).

A packed weight holds the counters by which blocks find out who is last, so it must not be used on
two streams at the same time.
"""

from functools import cache

import torch
from torch import Tensor

from ..crossover import density_limit
from ..dense import mm
from ..derived import ensure_checked
from ..problem import Kernel, Problem
from ..reference import places_of
from . import csr
from . import library as cuda_library
from .choose import choose_layout, layout_for, like
from .cover import Cover
from .csr import is_nearly_empty
from .gather import Streams
from .launch import (
    COVER_TOKENS,
    RUN_WARPS,
    Gpu,
    Launch,
    configure_cover,
    configure_gather,
    configure_pairs,
    cover_smem,
    gather_x,
    pairs_smem,
    ring_bytes,
)
from .layout import LANES, Packed
from .packs import pack_of
from .pairs import MOST_WORDS, Pairs, most_words

MOST_TOKENS = 64
EXPAND_WARPS = 8
CSR_THREADS, CSR_ROW_BYTES, CSR_COLUMNS = 256, 48 * 1024, 4096  # as in csr.cu and mend.cuh
MOST_COLUMNS = 2**25  # the kernels count 64 rows of x in 32 bits
MOST_ROWS = 2**30  # and W's, with those that fill a block up
_TYPES = {torch.bfloat16: "bf16", torch.float16: "f16"}
_ALL_TYPES = {**_TYPES, torch.float32: "f32", torch.float64: "f64"}


@cache
def gpu_of(device: torch.device) -> Gpu:
    properties = torch.cuda.get_device_properties(device)
    return Gpu(properties.multi_processor_count, properties.shared_memory_per_block_optin)


def spmm_packed(x: Tensor, packed: Packed, bias: Tensor | None = None) -> Tensor:
    """y [M, N] = x [M, K] @ W.T + bias [N], all on the GPU and in the dtype of the weight.

    Above 64 tokens W is written out and torch multiplies; so it is where a kernel would need more
    shared memory than the GPU has (streams: for one token of about 100,000 columns). No checks: the
    op has them (choose.py).
    """
    m = x.shape[0]
    if m > MOST_TOKENS or not _fits(packed, x):
        return _run_expanded(x, packed, bias)
    y = x.new_empty(m, packed.n)
    if y.numel() == 0:
        return y
    if packed.k == 0:
        return y.zero_() if bias is None else y.copy_(bias.expand_as(y))
    x = x.contiguous()
    bias = None if bias is None else bias.contiguous()
    if isinstance(packed, Pairs):
        _run_pairs(x, packed, bias, y)
    elif isinstance(packed, Cover):
        _run_cover(x, packed, bias, y)
    else:
        _run_gather(x, packed, bias, y)
    return y


def _run_expanded(x: Tensor, packed: Packed, bias: Tensor | None) -> Tensor:
    w = expand(packed)
    y = mm(x, w.t(), bias)
    if y.numel() == 0 or packed.nnz == w.numel():
        return y
    warps, device = CSR_THREADS // LANES, y.device.index
    x = x.contiguous()
    bias = None if bias is None else bias.contiguous()
    cuda_library.function(f"sk_expand_mend_{_TYPES[y.dtype]}", device)(
        (-(-x.shape[0] // warps), 1),
        CSR_THREADS,
        warps * 4,
        cuda_library.current_stream(device),
        *(0 if tensor is None else tensor.data_ptr() for tensor in (w, x, bias, y)),
        *(*y.shape, packed.k),
    )
    return y


def _run_gather(x: Tensor, packed: Streams, bias: Tensor | None, y: Tensor) -> None:
    launch = _configure_gather(packed, x)
    indices = packed.bounds, packed.slice_of, packed.first_piece, packed.starts, packed.row_order
    partial = x.new_empty(launch.partial, dtype=torch.float32)
    for first in range(0, x.shape[0], launch.tokens):
        _start(
            launch,
            (packed.values, packed.deltas, *indices),
            (x[first:], bias, y[first:], partial, packed.arrived),
            min(launch.tokens, x.shape[0] - first),
            packed.n,
            packed.k,
            packed.slice_of.shape[0],
            packed.values.shape[0],
        )


def _configure_gather(packed: Streams, x: Tensor) -> Launch | None:
    pieces, type_name = packed.slice_of.shape[0], _TYPES[x.dtype]
    return configure_gather(x.shape[0], packed.k, pieces, packed.bits, type_name, gpu_of(x.device))


def _fits(packed: Packed, x: Tensor) -> bool:
    """Whether a kernel has the shared memory that it needs, and counts far enough."""
    if packed.k >= MOST_COLUMNS or packed.n >= MOST_ROWS:
        return False
    if isinstance(packed, Streams):
        return _configure_gather(packed, x) is not None
    needed = pairs_smem(RUN_WARPS)
    if isinstance(packed, Cover):
        needed = cover_smem(COVER_TOKENS, RUN_WARPS)
    return needed <= gpu_of(x.device).smem_bytes


def _run_cover(x: Tensor, packed: Cover, bias: Tensor | None, y: Tensor) -> None:
    sizes = packed.slices, packed.windows
    launch = configure_cover(x.shape[0], *sizes, _TYPES[x.dtype], gpu_of(x.device))
    partial = x.new_empty(launch.partial, dtype=torch.float32)
    for first in range(0, x.shape[0], launch.tokens):
        _start(
            launch,
            (packed.records, packed.steps, packed.row_order),
            (x[first:], bias, y[first:], partial, packed.arrived),
            min(launch.tokens, x.shape[0] - first),
            packed.n,
            packed.k,
            *sizes,
            launch.group_warps,
            launch.shares,
            packed.records.shape[0],
        )


def _run_pairs(x: Tensor, packed: Pairs, bias: Tensor | None, y: Tensor) -> None:
    sizes = packed.slices, packed.row_steps
    launch = configure_pairs(x.shape[0], *sizes, _TYPES[x.dtype], gpu_of(x.device))
    partial = x.new_empty(launch.partial, dtype=torch.float32)
    _start(
        launch,
        (packed.words, packed.steps),
        (x, bias, y, partial, packed.arrived),
        x.shape[0],
        packed.n,
        packed.k,
        *sizes,
        launch.group_warps,
        launch.shares,
        packed.words.shape[0],
    )


def _start(
    launch: Launch, weight: tuple[Tensor, ...], operands: tuple[Tensor | None, ...], *sizes: int
) -> None:
    device = operands[0].device.index
    cuda_library.function(launch.kernel, device)(
        (launch.grid, 1),
        launch.block,
        launch.smem_bytes,
        cuda_library.current_stream(device),
        *(0 if tensor is None else tensor.data_ptr() for tensor in (*weight, *operands)),
        *sizes,
    )


def expand(packed: Packed) -> Tensor:
    """W [N, K], dense: a missing entry is +0, a stored zero -0."""
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
    tokens = like(x.shape[0])

    def make_layout(*indices: Tensor):
        return layout_for(*indices, n, k, tokens)

    pack = pack_of("stream", tokens, make_layout, row_offsets, col_indices, values, n, k)
    return spmm_packed(x, pack.packed, bias)


# `expand`: W written out and torch.mm, in the dtype of the operands. The kernels read the caller's
# indices, which were checked since they last changed; csr.cu says what a write that nobody counted
# may do.


def _expand_csr(row_offsets, col_indices, values, n, k):
    if cuda_library.refusal():
        w = values.new_zeros(n * k)
        w[places_of(row_offsets, col_indices, n, k)] = values
        return w.view(n, k)
    ensure_checked(row_offsets, col_indices, n, k)
    w = values.new_empty(n, k)
    if w.numel():
        row_bytes = min(k * values.element_size(), CSR_ROW_BYTES)
        tensors = row_offsets, col_indices, values, w
        _run_csr(f"write_out_{w.element_size()}", n, row_bytes, tensors, k, len(values))
    return w


def _collect_csr(row_offsets, col_indices, w):
    """The entries of w [N, K] at the places of the pattern."""
    n, k = w.shape
    if cuda_library.refusal():
        return w.view(-1)[places_of(row_offsets, col_indices, n, k)]
    ensure_checked(row_offsets, col_indices, n, k)
    values = w.new_empty(col_indices.shape[0])
    if len(values):
        warps, tensors = CSR_THREADS // LANES, (row_offsets, col_indices, w, values)
        _run_csr(f"collect_{w.element_size()}", -(-n // warps), 0, tensors, n, k, len(values))
    return values


def _mend(op, row_offsets, col_indices, values, n, k, x, bias, y):
    """y, the product of W written out. Infinities and NaN in it that come from a place that is not
    stored go, without a look at it from here: one launch, that a CUDA graph can capture."""
    m, nnz = x.shape[0], len(values)
    if cuda_library.refusal() or y.numel() == 0 or nnz == n * k:
        return y
    warps, kind = CSR_THREADS // LANES, _ALL_TYPES[x.dtype]
    smem_bytes = warps * 4
    if op == "mend_t":
        smem_bytes += CSR_COLUMNS * max(4, x.element_size())
    tensors = row_offsets, col_indices, values, x, bias, y
    _run_csr(f"{op}_{kind}", -(-m // warps), smem_bytes, tensors, m, n, k, nnz)
    return y


def _run_csr(
    name: str, grid: int, smem_bytes: int, tensors: tuple[Tensor | None, ...], *sizes: int
):
    device = tensors[0].device.index
    cuda_library.function(f"sk_csr_{name}", device)(
        (grid, 1),
        CSR_THREADS,
        smem_bytes,
        cuda_library.current_stream(device),
        *(0 if tensor is None else tensor.data_ptr() for tensor in tensors),
        *sizes,
    )


def _spmm_expand(row_offsets, col_indices, values, n, k, x, bias=None):
    weight = row_offsets, col_indices, values, n, k
    return _mend("mend", *weight, x, bias, mm(x, _expand_csr(*weight).t(), bias))


def _spmm_t_expand(row_offsets, col_indices, values, n, k, dy, bias=None):
    weight = row_offsets, col_indices, values, n, k
    return _mend("mend_t", *weight, dy, bias, mm(dy, _expand_csr(*weight), bias))


def _sddmm_expand(row_offsets, col_indices, n, k, dy, x):
    return _collect_csr(row_offsets, col_indices, mm(dy.t(), x))


def _refuse_stream(p: Problem) -> str | None:
    if p.M > MOST_TOKENS:
        return f"it serves up to {MOST_TOKENS} tokens, not {p.M}"
    if p.dtype not in _TYPES:
        return f"it takes bfloat16 and float16, not {str(p.dtype).removeprefix('torch.')}"
    if p.K >= MOST_COLUMNS or p.N >= MOST_ROWS:
        return f"it takes fewer than {MOST_ROWS} rows and {MOST_COLUMNS} columns"
    if reason := cuda_library.refusal():
        return reason
    if not torch.cuda.is_available():
        return "there is no GPU"
    major, minor = torch.cuda.get_device_capability()
    if major < 8:
        return f"it needs compute capability 8.0, not {major}.{minor}"
    if (needed := _smem_bytes(p)) > (most := gpu_of(torch.device("cuda")).smem_bytes):
        return f"it needs {needed} bytes of shared memory, the GPU has {most} for a block"
    layout = choose_layout(p.M, p.density)
    if layout == "pairs" and most_words(p.N, p.K, p.nnz) >= MOST_WORDS:
        return "its offsets have 32 bits, too few for the pairs of W"
    if layout != "streams" and is_nearly_empty(p):
        return f"W is too empty for {layout}"
    limit = density_limit(f"sm_{major}{minor}", p.dtype, p.M, "stream", "expand")
    if limit is not None and p.density > limit:
        return f"writing W out is faster above density {limit:.2f} at {p.M} tokens"
    return None


def _smem_bytes(p: Problem) -> int:
    """The least that a kernel needs."""
    layout = choose_layout(p.M, p.density)
    if layout == "streams":
        return ring_bytes(8) + gather_x(p.K, 1)
    tokens = 1 << (p.M - 1).bit_length()
    if layout == "cover":
        return cover_smem(max(8, tokens), RUN_WARPS)
    return pairs_smem(RUN_WARPS)


def _refuse_expand(p: Problem) -> str | None:
    if p.dtype not in _ALL_TYPES:
        return f"it takes floats of 16, 32 and 64 bits, not {str(p.dtype).removeprefix('torch.')}"
    return None


def _describe_stream(p: Problem) -> str:
    layout = choose_layout(p.M, p.density)
    kernel = "gather" if layout == "streams" else layout
    return f"{kernel} kernel, packed on the first call; values that require grad on every call"


KERNELS = (
    Kernel("stream", "spmm", "cuda", _refuse_stream, _spmm_stream, _describe_stream),
    *csr.KERNELS,
    Kernel("expand", "spmm", "cuda", _refuse_expand, _spmm_expand),
    Kernel("expand", "spmm_t", "cuda", _refuse_expand, _spmm_t_expand),
    Kernel("expand", "sddmm", "cuda", _refuse_expand, _sddmm_expand),
)
