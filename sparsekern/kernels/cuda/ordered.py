"""Products of a free pattern of few values on sparse tensor cores: the table rows `ordered`.

From about 90 % zeros on there is an order of the columns of W in which at most two of four
neighbours are stored in any row (csrc/packing/order.h), and so one of the rows for the input
gradient. x is brought into this order by a kernel of its own (csrc/cuda/order.cu), which takes a
tenth of a dense product with 4096 rows; cuSPARSELt multiplies, as in two_of_four.py. One order
serves so many rows; those of a taller W are cut into panels, each with an order and a copy of x.

W in the order is [N, width]: a column that had to be split by rows stands there twice. The order is
sought on the CPU at the first product with a pattern, in a tenth of a second for 4096 x 4096; one
for the forward pass, one for the input gradient. Of the first 2 bytes a value are kept, of the
second 6, and of each an eighth of a byte a place.

Infinity and NaN in x: as in two_of_four.py.
"""

import math
import os
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import lru_cache

import torch
from torch import Tensor

from ...indices import expand_rows
from ..crossover import least_size
from ..derived import derived, is_passing
from ..problem import Kernel, Problem
from . import cusparselt, expand, two_of_four
from .algorithms import NONE_RIGHT, algorithm_of
from .layout import TYPES
from .library import start
from .two_of_four import MACHINE, with_free_places

try:
    from ... import _C
except ImportError:
    _C = None

MULTIPLE = 16  # of N and K, and of the rows of a panel
MULTIPLE_OF_TOKENS = 8
MULTIPLE_OF_WIDTH = 64
MOST_WIDTH = 1.1  # of K: what an order may take
MOST_COLUMNS = 2**15  # two tokens of x are in shared memory
FILL = 0.9  # rows of a panel, of those for which an order would just be there by chance
THREADS, PERMUTE_TOKENS = 256, 2  # of a block
TILE_SLOTS = 2**13  # of the operand, that a block has in shared memory
TILE_COLUMNS = 128  # slots of a row in a tile of W^T
TILE_PAD = 8  # slots behind each of its rows
PART_BYTES = 16


@dataclass(frozen=True)
class _Panel:
    """Some of the rows of W, neighbours, in one order of the columns.

    Row by row the operand has width / 2 slots. A block fills a tile of them with the values
    starts[b] to starts[b + 1].
    """

    rows: int
    width: int
    tile: tuple[int, int]  # rows, slots
    starts: Tensor  # int32 [tiles + 1]
    tail: Tensor  # bytes, behind the slots


@dataclass(frozen=True)
class _Side:
    """W, or W^T, in such orders."""

    panels: tuple[_Panel, ...]
    columns: Tensor  # uint16 as int16, of one panel after the other [sum of widths]
    targets: Tensor  # uint16 as int16 [nnz]: where each value is in its tile
    sources: Tensor | None  # int32 [nnz]: where a value of W^T is in those of W
    checked: int


def _side_of(op: str, row_offsets: Tensor, col_indices: Tensor, n: int, k: int) -> _Side | None:
    """None where there is no such order."""

    def make(row_offsets: Tensor, col_indices: Tensor) -> _Side | None:
        if op == "spmm":
            return _make_side(row_offsets, col_indices, n, k)
        sources = col_indices.argsort(stable=True)
        offsets = row_offsets.new_zeros(k + 1)
        offsets[1:] = col_indices.bincount(minlength=k).cumsum(0)
        rows = expand_rows(row_offsets, len(sources))[sources].int()
        return _make_side(offsets, rows, k, n, sources.int())

    return derived(f"ordered {op}", row_offsets, col_indices, n, k, make)


def _make_side(
    row_offsets: Tensor, col_indices: Tensor, n: int, k: int, sources: Tensor | None = None
) -> _Side | None:
    height = panel_rows(row_offsets.diff() / k, n, k)
    offsets, indices = row_offsets.cpu(), col_indices.cpu()
    firsts = range(0, n, height)
    with ThreadPoolExecutor(torch.get_num_threads()) as pool:
        orders = list(pool.map(lambda i: _order(offsets[i : i + height + 1], indices, k), firsts))
    parts, device = [], col_indices.device
    met = torch.full((k,), n, dtype=torch.int32, device=device)
    for first, order in zip(firsts, orders, strict=True):
        if order is None:
            return None
        columns, places = (t.to(device) for t in order)
        own = row_offsets[first : first + height + 1]
        here = None if sources is None else sources[offsets[first] :][: len(places)]
        *part, two = _make_panel(own, len(columns), places, here)
        parts.append(part)
        met.scatter_reduce_(0, columns.long(), first + first_rows(two, n), "amin")
    # Rows up to where each column has been multiplied that is multiplied at all.
    checked = 1 + int(met.masked_fill(met >= n, -1).max())
    columns = torch.cat([order[0] for order in orders if order]).to(device, torch.int16)
    panels, targets, in_tiles = zip(*parts, strict=True)
    own_sources = None if sources is None else torch.cat(in_tiles)
    return _Side(panels, columns, torch.cat(targets), own_sources, checked)


def _order(row_offsets: Tensor, col_indices: Tensor, k: int) -> tuple[Tensor, Tensor] | None:
    """columns int32 [width], and the place there of each entry, int32, of the rows row_offsets are
    of; None where there is no order narrow enough."""
    first, end = int(row_offsets[0]), int(row_offsets[-1])
    offsets, indices = row_offsets - first, col_indices[first:end]
    addresses = offsets.data_ptr(), indices.data_ptr()
    order = _C.Order(*addresses, len(offsets) - 1, k, end - first, int(MOST_WIDTH * k))
    if not order.slots:
        return None
    width = -(-order.slots // MULTIPLE_OF_WIDTH) * MULTIPLE_OF_WIDTH
    columns = torch.full((width,), -1, dtype=torch.int32, device="cpu")
    places = torch.empty(end - first, dtype=torch.int32, device="cpu")
    order.write(columns.data_ptr(), places.data_ptr())
    return columns.clamp(min=0), places  # what an empty one is multiplied with is of no account


def _make_panel(
    row_offsets: Tensor, width: int, places: Tensor, sources: Tensor | None
) -> tuple[_Panel, Tensor, Tensor | None, Tensor]:
    """The panel, the targets of its values, their sources in this order, and the two places of four
    [rows, width] that are multiplied."""
    rows, slots = len(row_offsets) - 1, width // 2
    row = expand_rows(row_offsets - row_offsets[0], len(places))
    at = row * width + places
    stored = torch.zeros(rows * width, dtype=torch.bool, device=places.device)
    stored[at] = True
    stored = stored.view(rows, width)
    two = torch.empty_like(stored)
    # Free places from the left in one row and from the right in the next: so the first rows
    # multiply all columns, and few results of a token tell whether it was spoilt.
    two[::2] = with_free_places(stored[::2])
    two[1::2] = with_free_places(stored[1::2].flip(1)).flip(1)
    slot = places // 4 * 2 + two.view(-1, 4).cumsum(1, dtype=torch.int8).view(-1)[at] - 1
    # The values of W are read row by row. So a tile of W has whole rows, and one of W^T many of a
    # few columns.
    tile_slots = slots if sources is None else min(slots, TILE_COLUMNS)
    tile_rows = max(1, TILE_SLOTS // tile_slots)
    targets = row % tile_rows * (tile_slots + TILE_PAD) + slot % tile_slots
    across = -(-slots // tile_slots)
    tile = row // tile_rows * across + slot // tile_slots
    if sources is not None:
        order = (tile * (int(sources.max()) + 1 if len(sources) else 1) + sources).argsort()
        targets, sources = targets[order], sources[order]
    ends = tile.bincount(minlength=-(-rows // tile_rows) * across).cumsum(0)
    starts = row_offsets[0] + torch.cat((ends.new_zeros(1), ends))
    tail = cusparselt.compress(two.to(torch.bfloat16))[two.numel() :].clone()
    panel = _Panel(rows, width, (tile_rows, tile_slots), starts.int(), tail)
    return panel, targets.to(torch.int16), sources, two


def first_rows(two: Tensor, none: int) -> Tensor:
    """int32 [width]: the first row that has a column; `none` for a column of no row."""
    rows = torch.arange(len(two), dtype=torch.int32, device=two.device).unsqueeze(1)
    return torch.where(two, rows, none).amin(0)


def panel_rows(densities: Tensor, n: int, k: int) -> int:
    """How many rows of W [N, K] one order may serve, where N is cut into panels of one size, a
    multiple of 16. densities: those of its rows, or of a part of them that stands for all.

    Four columns are no group where any row has three of them. By the first moment (docs/math.md)
    the columns can be cut into groups while the expected number of such rows is less than the
    logarithm of the number of cuts, for each group.
    """
    d = densities.double()
    three = 4 * d**3 * (1 - d) + d**4
    broken = -n * torch.log1p(-three).mean().item()
    groups = k / 4
    most = (math.lgamma(k + 1) - math.lgamma(groups + 1)) / groups - math.log(24)
    panels = math.ceil(min(broken / (FILL * most), n)) or 1
    return -(-n // (panels * MULTIPLE)) * MULTIPLE


def _product(op, row_offsets, col_indices, values, n, k, x, bias=None) -> Tensor:
    weight = row_offsets, col_indices, values, n, k
    side = _side_of(op, row_offsets, col_indices, n, k)
    assert side is not None  # or the row had refused
    outputs = n if op == "spmm" else k
    x, m = cusparselt.aligned(x), x.shape[0]
    y, in_order = x.new_empty(m, outputs), permute(x, side.columns)
    row = column = 0
    for panel in side.panels:
        algorithm = algorithm_of(panel.rows, panel.width, m, x.dtype, x.device)
        if algorithm == NONE_RIGHT:
            return (expand.spmm if op == "spmm" else expand.spmm_t)(*weight, x, bias)
        rows, columns = slice(row, row + panel.rows), slice(column, column + panel.width)
        own_bias, operand = None if bias is None else bias[rows], fill(side, panel, values)
        cusparselt.multiply(operand, in_order[:, columns], y[:, rows], own_bias, algorithm)
        row, column = rows.stop, columns.stop
    return expand.mend(op, *weight, x, bias, y, side.checked)


def permute(x: Tensor, columns: Tensor) -> Tensor:
    """x [M, columns]; x is contiguous and begins on a multiple of 16 bytes, M is even."""
    (m, k), width = x.shape, len(columns)
    out = x.new_empty(m, width)
    smem_bytes = PERMUTE_TOKENS * k * x.element_size()
    blocks = m // PERMUTE_TOKENS
    start("sk_order_permute", blocks, THREADS, smem_bytes, (x, columns, out), k, width)
    return out


def fill(side: _Side, panel: _Panel, values: Tensor) -> Tensor:
    """The operand of a panel."""
    slots, parts = panel.width // 2, len(panel.tail) // PART_BYTES
    operand = values.new_empty(panel.rows * slots + len(panel.tail) // values.element_size())
    blocks = len(panel.starts) - 1 + -(-parts // THREADS)
    tile_rows, tile_slots = panel.tile
    smem_bytes = tile_rows * (tile_slots + TILE_PAD) * values.element_size()
    tensors = values, side.sources, side.targets, panel.starts, panel.tail, operand
    sizes = panel.rows, slots, *panel.tile, parts
    start("sk_order_fill", blocks, THREADS, smem_bytes, tensors, *sizes)
    return operand


def spmm(*operands) -> Tensor:
    return _product("spmm", *operands)


def spmm_t(*operands) -> Tensor:
    return _product("spmm_t", *operands)


def recognised(problem: Problem, row_offsets: Tensor, col_indices: Tensor) -> Problem:
    """The problem, and whether its pattern is two-way, or else has an order, where a row of the
    table takes it if so. A pattern is looked at once."""
    problem = two_of_four.recognised(problem, row_offsets, col_indices)
    if problem.is_two_way or problem.op == "sddmm" or _refuse_here(problem):
        return problem
    # An order takes long to find.
    if is_passing(row_offsets) or os.environ.get("SPARSEKERN_KERNEL", "ordered") != "ordered":
        return problem
    side = _side_of(problem.op, row_offsets, col_indices, problem.N, problem.K)
    return problem._replace(is_ordered=side is not None)


@lru_cache(maxsize=4096)
def _least_size(tokens: int, dtype: torch.dtype) -> int | None:
    return least_size(MACHINE, dtype, tokens, "ordered")


@lru_cache(maxsize=4096)
def refuse_size(p: Problem) -> str | None:
    """Why the row does not take a problem of these sizes, on any machine."""
    if p.dtype not in TYPES:
        return f"it takes bfloat16 and float16, not {str(p.dtype).removeprefix('torch.')}"
    least, (n, k) = _least_size(p.M, p.dtype), (p.N, p.K) if p.op == "spmm" else (p.K, p.N)
    if least is None or min(n, k) < least:
        return f"writing W [{p.N}, {p.K}] out is as fast at {p.M} tokens"
    if p.N % MULTIPLE or p.K % MULTIPLE or p.M % MULTIPLE_OF_TOKENS:
        return f"it takes N and K in multiples of {MULTIPLE}, M of {MULTIPLE_OF_TOKENS}"
    if k > MOST_COLUMNS:
        return f"it takes inputs of up to {MOST_COLUMNS}"
    rows = panel_rows(torch.tensor([p.density], device="cpu"), n, k)
    if rows < least:
        return f"an order of so many values serves {rows} rows, and pays from {least} on"
    return None


def _refuse_here(p: Problem) -> str | None:
    if reason := refuse_size(p):
        return reason
    if _C is None:
        return "the C++ library, which finds the order, is not built"
    return two_of_four.refuse_machine(p.dtype)


def _refuse(p: Problem) -> str | None:
    if reason := _refuse_here(p):
        return reason
    if not p.is_ordered:
        return (
            "no order of the columns was found that puts at most two of four in each row, or none "
            "was sought, as a sparsity algorithm will change the pattern soon or SPARSEKERN_KERNEL "
            "names another row"
        )
    return None


KERNELS = (
    Kernel("ordered", "spmm", "cuda", _refuse, spmm),
    Kernel("ordered", "spmm_t", "cuda", _refuse, spmm_t),
)
