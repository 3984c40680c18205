"""Products of a two-way pattern on sparse tensor cores: the table rows `two_of_four`.

Where at most two of four neighbours of W are stored, in its rows and in its columns, forward and
input gradient of many tokens run through cuSPARSELt (cusparselt.py), which multiplies half of the
places. Its operand of W is half of W and a tail that says which half. The tail is made once a
pattern, by compressing what is stored and, where that is less than two of four, the first free
places beside it; never from live weights, which may be 0. The values are written before each
product (bitmap.cu), to memory that all layers share.

That the operand holds the slots row by row, and that the tail is the same in both 16-bit types, is
not documented. _has_slots_in_rows() looks, once in a process, and the rows refuse where it is
otherwise.

A place that is not stored takes no part in a product: where x is infinite or NaN, a free place
beside a stored one makes NaN of it. Such a token shows in its first results: `checked` of them have
every column that is multiplied at all. They are computed anew (mend.cu).
"""

from dataclasses import dataclass
from functools import cache, lru_cache

import torch
from torch import Tensor

from ..crossover import least_size
from ..derived import derived
from ..problem import Kernel, Problem
from ..steps import VALUES, Asked, Slot, Steps
from . import bitmap as bitmaps
from . import cusparselt, expand
from .algorithms import NONE_RIGHT, algorithm_of
from .bitmap import Bitmap
from .compressed import MACHINE, MULTIPLE, MULTIPLE_OF_TOKENS, refuse_gpu
from .cublaslt import workspace_at
from .layout import TYPES


@dataclass(frozen=True)
class _Side:
    """What the operand of W or of W^T holds beside values."""

    tail: Tensor  # bytes
    checked: int


@dataclass(frozen=True)
class _TwoOfFour:
    bitmap: Bitmap
    sides: dict[str, _Side]  # by op


def _make(bitmap: Bitmap, nnz: int, n: int, k: int) -> _TwoOfFour | None:
    """None for a pattern that is not two-way."""
    if not bitmaps.is_two_way(bitmap):
        return None
    ones = torch.ones(nnz, dtype=torch.bfloat16, device=bitmap.words.device)
    stored = bitmaps.write_out(bitmap, ones, n, k).bool()
    return _TwoOfFour(bitmap, {"spmm": _side(stored), "spmm_t": _side(stored.t())})


def _side(stored: Tensor) -> _Side:
    two = with_free_places(stored)
    operand = cusparselt.compress(two.to(torch.bfloat16))
    return _Side(operand[two.numel() :].clone(), rows_of_all_columns(two))


def with_free_places(stored: Tensor) -> Tensor:
    """bool [N, K]: two of four neighbours, the stored ones and the first free ones beside them."""
    four = stored.reshape(stored.shape[0], -1, 4)
    free = ~four
    missing = 2 - four.sum(-1, keepdim=True)
    return (four | free & (free.cumsum(-1) <= missing)).view(stored.shape)


def rows_of_all_columns(two: Tensor) -> int:
    """How many of the first rows hold every column that any row holds."""
    n = len(two)
    rows = torch.arange(n, device=two.device).unsqueeze(1)
    first = torch.where(two, rows, n).amin(0)  # n for a column of none
    return 1 + int(first.masked_fill(first == n, -1).max())


def _pattern(row_offsets: Tensor, col_indices: Tensor, n: int, k: int) -> _TwoOfFour | None:
    def make(*_: Tensor) -> _TwoOfFour | None:  # the bitmap, of a checked copy too, is expand's
        bitmap = bitmaps.bitmap_of(row_offsets, col_indices, n, k)
        return _make(bitmap, len(col_indices), n, k)

    return derived("two of four", row_offsets, col_indices, n, k, make)


def recognised(problem: Problem, row_offsets: Tensor, col_indices: Tensor) -> Problem:
    """The problem, and whether its pattern is two-way, where the rows take it if it is. A pattern
    is looked at once."""
    if _refuse_size(problem) or problem.op == "sddmm":
        return problem
    is_two_way = _pattern(row_offsets, col_indices, problem.N, problem.K) is not None
    return problem._replace(is_two_way=is_two_way)


def _product(op, row_offsets, col_indices, values, n, k, x, bias=None) -> Tensor:
    weight = row_offsets, col_indices, values, n, k
    pattern = _pattern(row_offsets, col_indices, n, k)
    assert pattern is not None  # or the row had refused
    outputs, inputs = (n, k) if op == "spmm" else (k, n)
    algorithm = algorithm_of(outputs, inputs, x.shape[0], x.dtype, x.device)
    if algorithm == NONE_RIGHT:
        return (expand.spmm if op == "spmm" else expand.spmm_t)(*weight, x, bias)
    y = x.new_empty(x.shape[0], outputs)
    cusparselt.multiply(_operand(op, pattern, values, n, k), x, y, bias, algorithm)
    return expand.mend(op, *weight, x, bias, y, pattern.sides[op].checked)


def _operand(op: str, pattern: _TwoOfFour, values: Tensor, n: int, k: int) -> Tensor:
    tail = pattern.sides[op].tail
    operand = values.new_empty(n * k // 2 + len(tail) // 2)
    fill = bitmaps.fill if op == "spmm" else bitmaps.fill_transposed
    fill(pattern.bitmap, values, tail, operand, n, k)
    return operand


def _prepare(steps: Steps, asked: Asked, a: Slot, b: Slot | None) -> Slot | None:
    p = asked.problem
    op, n, k, m = p.op, p.N, p.K, p.M
    pattern = _pattern(asked.row_offsets, asked.col_indices, n, k)
    assert pattern is not None
    outputs, inputs = (n, k) if op == "spmm" else (k, n)
    algorithm = algorithm_of(outputs, inputs, m, p.dtype, asked.a.device)
    if algorithm in (None, NONE_RIGHT):
        return None
    side, b = pattern.sides[op], b if asked.has_bias else None
    device = asked.a.device.index
    plan = cusparselt.Plan(outputs, inputs, m, device, algorithm, asked.bias, p.dtype)
    behind = workspace_at(n * k + len(side.tail))
    operand = steps.scratch(VALUES, -(-(behind + plan.workspace_bytes) // 2))
    launch = bitmaps.fill_launch if op == "spmm" else bitmaps.fill_transposed_launch
    steps.start(*launch(pattern.bitmap, VALUES, side.tail, operand, n, k))
    y = steps.empty(a, *asked.tokens, outputs)

    def other_way(operand: Tensor, x: Tensor, y: Tensor, bias: Tensor | None) -> None:
        flat = x.view(m, inputs), y.view(m, outputs)
        cusparselt.multiply(operand, *flat, bias, algorithm)

    steps.add(plan.start(other_way, behind), (1, 1, 1, 0), (operand, a, y, b))
    expand.prepare_mend(steps, asked, a, b, y, side.checked)
    return y


def spmm(*operands) -> Tensor:
    return _product("spmm", *operands)


def spmm_t(*operands) -> Tensor:
    return _product("spmm_t", *operands)


@lru_cache(maxsize=4096)
def _least_size(tokens: int, dtype: torch.dtype) -> int | None:
    return least_size(MACHINE, dtype, tokens, "two_of_four")


def _refuse_size(p: Problem) -> str | None:
    if p.dtype not in TYPES:
        return f"it takes bfloat16 and float16, not {str(p.dtype).removeprefix('torch.')}"
    least = _least_size(p.M, p.dtype)
    if least is None or min(p.N, p.K) < least:
        return f"writing W [{p.N}, {p.K}] out is as fast at {p.M} tokens"
    if p.N % MULTIPLE or p.K % MULTIPLE or p.M % MULTIPLE_OF_TOKENS:
        return f"it takes N and K in multiples of {MULTIPLE}, M of {MULTIPLE_OF_TOKENS}"
    if 2 * p.nnz > p.N * p.K:
        return "more than two of four are stored"
    return refuse_machine(p.dtype)


def refuse_machine(dtype: torch.dtype) -> str | None:
    """Why cuSPARSELt multiplies nothing here with operands of this type that are filled."""
    return refuse_gpu() or _refuse_layout(dtype)


@cache
def _refuse_layout(dtype: torch.dtype) -> str | None:
    if torch.cuda.is_current_stream_capturing():
        raise RuntimeError(
            "a CUDA graph cannot capture the first look at cuSPARSELt: call the product once "
            "before the capture, as for any warm-up"
        )
    if not _has_slots_in_rows(dtype):
        version = ".".join(map(str, cusparselt.loaded().version))
        return f"cuSPARSELt {version} lays out its operands in another way"
    return None


def _has_slots_in_rows(dtype: torch.dtype, device: str = "cuda") -> bool:
    """Whether an operand of [N, K] begins with its slots [N, K / 2] and ends as one of bfloat16, of
    two shapes and of different places."""
    for n, k in ((16, 16), (272, 1040)):
        group = torch.arange(n * k // 4, device=device) % 6
        pairs = torch.tensor([(0, 1), (0, 2), (0, 3), (1, 2), (1, 3), (2, 3)], device=device)
        slots = (torch.arange(n * k // 2, device=device) % 251 + 1).view(-1, 2).to(dtype)
        w = slots.new_zeros(n * k // 4, 4).scatter_(1, pairs[group], slots).view(n, k)
        operand, like = cusparselt.compress(w), cusparselt.compress(w.bfloat16())
        if not (
            torch.equal(operand[: n * k].view(dtype), slots.flatten())
            and torch.equal(operand[n * k :], like[n * k :])
        ):
            return False
    return True


def _refuse(p: Problem) -> str | None:
    if reason := _refuse_size(p):
        return reason
    if not p.is_two_way:
        return "the pattern is not two-way: at most two of four in rows and in columns"
    return None


KERNELS = tuple(
    Kernel("two_of_four", run.__name__, "cuda", _refuse, run, prepare=_prepare)
    for run in (spmm, spmm_t)
)
