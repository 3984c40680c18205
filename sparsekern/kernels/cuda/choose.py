"""The layouts of packed weights, and the choice among them.

`gather` (gather.py) takes the fewest bytes and is read by CUDA cores: for one or two tokens.
`cover` (cover.py) is read by sparse tensor cores: for more, up to 32, where W is sparse enough.
`pairs` (pairs.py) is read by dense tensor cores. All hold any pattern, exactly. `dense` (kept.py)
is W with its zeros, for where these lose. `two_of_four` (compressed.py) is for many tokens, and for
two-way patterns alone. `gather_int8`, `gather_e4m3` and so on are the first three with values of 8
bits (row_scales.py), and are chosen as if these had 16.

A weight for calls of one token and of many may be held in two of them: names and parts then stand
behind each other, "gather,dense", and each call takes the faster one (times.py has what was
measured).
"""

from collections.abc import Sequence
from dataclasses import fields
from functools import lru_cache

import torch
from torch import Tensor

from ...tensor import SparseTensor
from . import cover
from .compressed import TwoOfFour, TwoOfFourE4m3, is_faster, pack_two_of_four, pays
from .cover import Cover, CoverLayout
from .gather import GatherLayout
from .kept import Dense
from .layout import TYPES, Layout, Packed
from .pairs import PairsLayout
from .row_scales import round_rows
from .times import measured, share

PACKED: dict[str, type[Layout]] = {
    layout.kind.name: layout for layout in (GatherLayout, CoverLayout, PairsLayout)
}
OF_8_BITS: dict[str, tuple[type[Packed], ...]] = {
    name: tuple(layout.kinds_of_8_bits.values()) for name, layout in PACKED.items()
}
_KINDS: list[type[Packed]] = [layout.kind for layout in PACKED.values()]
_KINDS += [kind for kinds in OF_8_BITS.values() for kind in kinds]
_KINDS += [Dense, TwoOfFour, TwoOfFourE4m3]
LAYOUTS = {kind.name: kind for kind in _KINDS}
# Of a layout of values of 8 bits: that of 16.
LIKE = {kind.name: name for name, kinds in OF_8_BITS.items() for kind in kinds}
_COUNTS = {  # of numbers and of tensors
    name: tuple([field.type for field in fields(kind)[3:]].count(t) for t in (int, Tensor))
    for name, kind in LAYOUTS.items()
}
WORTH = 1.1  # how many times as fast a second layout makes calls, or it is not held
NEVER_BELOW = 0.97  # of dense: where dense may be kept, it is for what is slower
MOST_GATHERED = 2  # tokens up to which `gather` is the faster layout (docs/log.md)
FEW_BY_TWO_OF_FOUR = 1.6  # times as long as dense, below its crossover: at 96 tokens (docs/log.md)


def like(tokens: int) -> int:
    """The least number of tokens for which W is laid out as for `tokens`: 1, 3, 17 or 33."""
    return next((first for first in (33, 17, MOST_GATHERED + 1) if tokens >= first), 1)


def choose_layout(tokens: int, density: float) -> type[Layout]:
    """The layout for products of about so many tokens: what is faster on an H200 (docs/log.md).
    `cover` is made by the C++ library alone."""
    if tokens <= MOST_GATHERED:
        return GatherLayout
    densest = 0.55 if tokens <= 16 else 0.4 if tokens <= 32 else 0.0
    return CoverLayout if density <= densest and cover.is_built() else PairsLayout


def pack(weight: SparseTensor, tokens: int = 1) -> Packed:
    """`weight` laid out for products of about so many tokens, on its device.

    Products of other numbers of tokens are as exact, only slower. TypeError unless values are
    bfloat16 or float16; ValueError if the indices are not valid any more, or of a transpose.
    """
    own = _own(weight)
    return lay_out(own, choose_layout(tokens, own.density).kind.name)


def pack_for(
    weight: SparseTensor,
    tokens: Sequence[int],
    may_be_dense: bool = False,
    values: torch.dtype | None = None,
) -> list[Packed]:
    """`weight` in the layout, or the two, that choose_forms() names for so many tokens, with values
    of this type, of 8 bits, or their own. Raises what pack() and round_rows() do."""
    own = _own(weight)
    if values is not None:
        rounded = round_rows(own, values)
        chosen = choose_forms(tokens, own.n, own.k, own.nnz, packed_names())
        return [layout_of(own, name, 1).fill_rounded(*rounded) for name in chosen]
    names = [*packed_names(), *[Dense.name] * may_be_dense]
    many = pack_two_of_four(own, own.values.dtype) if pays(own, tokens[-1]) else None
    if many and is_faster(tokens[0], own.n, own.k, own.values.dtype):
        return [many]
    ends = (tokens[0], tokens[0]) if many else tokens
    forms = [lay_out(own, name) for name in choose_forms(ends, own.n, own.k, own.nnz, names)]
    return [*forms, many] if many else forms


def _own(weight: SparseTensor) -> SparseTensor:
    """A copy, which is checked, and which nobody writes to."""
    if weight.values.dtype not in TYPES:
        raise TypeError(f"weight: expected bfloat16 or float16 values, got {weight.values.dtype}")
    if weight.is_transposed:
        raise ValueError("weight: expected W [N, K] as it is stored, got a transpose")
    indices = weight.row_offsets.clone(), weight.col_indices.clone()
    return SparseTensor(*indices, weight.values, (weight.n, weight.k))


def lay_out(own: SparseTensor, name: str) -> Packed:
    """W in the layout of this name, of indices that are valid and that nobody writes to."""
    if name == Dense.name:
        return Dense.of(own)
    return layout_of(own, name).fill(own.values)


def layout_of(own: SparseTensor, name: str, value_bytes: int = 2) -> Layout:
    """The layout of this name for the pattern of W, for values of so many bytes."""
    indices = own.row_offsets, own.col_indices
    return PACKED[name](*indices, own.n, own.k, value_bytes=value_bytes)


def packed_names() -> list[str]:
    """Names of the layouts that can be made here of any pattern."""
    return [name for name in PACKED if name != Cover.name or cover.is_built()]


def choose_forms(
    tokens: Sequence[int], n: int, k: int, nnz: int, names: Sequence[str]
) -> tuple[str, ...]:
    """Which of these layouts, one or two, to hold W in for calls of tokens[0] to tokens[-1].

    The fastest for the first number and the fastest for the last; one of them alone where it is
    nowhere much slower. If `dense` is among the names it is one of the two where all that is packed
    is slower with some number of tokens.
    """
    least, most = tokens[0], tokens[-1]
    density = nnz / max(1, n * k)
    numbers = sorted({least, most, *(m for m in measured().tokens if least < m < most)})

    def time(name: str, m: int) -> float:
        found = share(name, m, n, k, density)
        if name == Dense.name:
            return max(found or 1.0, 1 / NEVER_BELOW)  # the smaller one where it is as fast
        if found is None:  # the fastest as far as is known
            return 2.0 if name == choose_layout(m, density).kind.name else 4.0
        return found

    def best(held: Sequence[str], m: int) -> float:
        return min(time(name, m) for name in held)

    held = tuple(min(names, key=lambda name: time(name, m)) for m in (least, most))
    first = min(held, key=lambda name: time(name, least) * time(name, most))
    if all(time(first, m) <= WORTH * best(held, m) for m in (least, most)):
        held = (first,)
    if Dense.name in names and any(best(held, m) > time(Dense.name, m) for m in numbers):
        # Dense alone, if what is packed gains nothing worth its bytes.
        gains = any(WORTH * time(held[0], m) < time(Dense.name, m) for m in numbers)
        held = (held[0], Dense.name) if gains else (Dense.name,)
    return held


@lru_cache(maxsize=4096)
def fastest(held: tuple[str, ...], m: int, n: int, k: int, nnz: int, dtype: torch.dtype) -> int:
    """Which of these layouts runs a product of m tokens: its place. dtype: of a W in
    `two_of_four`."""
    density = nnz / max(1, n * k)

    def time(place: int) -> float:
        if held[place] == TwoOfFour.name:
            return 0.0 if is_faster(m, n, k, dtype) else FEW_BY_TWO_OF_FOUR
        found = share(LIKE.get(held[place], held[place]), m, n, k, density)
        return (1.0 if held[place] == Dense.name else 2.0) if found is None else found

    return min(range(len(held)), key=time)


def form_for(
    m: int, layout: str, n: int, k: int, nnz: int, numbers: list[int], tensors: list[Tensor]
) -> tuple[str, list[int], list[Tensor]]:
    """Name and parts of the one layout that runs m tokens, out of those of all that are held.
    ValueError where the parts are not as many as theirs."""
    _check_counts(layout, numbers, tensors)
    held, counts, _ = _counts(layout)
    place = fastest(held, m, n, k, nnz, tensors[-1].dtype)  # many tokens stand last
    before = [sum(count[i] for count in counts[:place]) for i in (0, 1)]
    count = counts[place]
    return (
        held[place],
        numbers[before[0] : before[0] + count[0]],
        tensors[before[1] : before[1] + count[1]],
    )


def assemble(
    layout: str, n: int, k: int, nnz: int, numbers: list[int], tensors: list[Tensor]
) -> Packed:
    """The packed weight of these parts, as PackedLinear keeps them and the op gets them; TypeError
    or ValueError that names what is not as Packed.check() wants it."""
    _check_counts(layout, numbers, tensors)
    packed = LAYOUTS[layout](n, k, nnz, *numbers, *tensors)
    packed.check()
    return packed


@lru_cache
def _counts(layout: str) -> tuple[tuple[str, ...], list[tuple[int, ...]], tuple[int, ...]]:
    """The names in it, how many numbers and tensors each has, and all; ValueError for another."""
    held = tuple(layout.split(","))
    if unknown := [name for name in held if name not in LAYOUTS]:
        raise ValueError(f"layout: expected some of {', '.join(LAYOUTS)}, got {unknown[0]!r}")
    counts = [_COUNTS[name] for name in held]
    return held, counts, tuple(map(sum, zip(*counts, strict=True)))


def _check_counts(layout: str, numbers: list[int], tensors: list[Tensor]) -> None:
    wanted = _counts(layout)[2]
    if (len(numbers), len(tensors)) != wanted:
        raise ValueError(
            f"{layout}: expected {wanted[0]} numbers and {wanted[1]} tensors, "
            f"got {len(numbers)} and {len(tensors)}"
        )


def check_operands(packed: Packed, x: Tensor, bias: Tensor | None) -> None:
    """Check the operands of spmm_packed(): TypeError or ValueError names the wrong one."""
    dtype, device = packed.dtype, packed.arrived.device
    for name, t, shape in (("x", x, (*x.shape[:1], packed.k)), ("bias", bias, (packed.n,))):
        if t is None:
            continue
        if t.shape != shape:
            raise ValueError(f"{name}: expected shape {shape}, got {tuple(t.shape)}")
        if t.dtype is not dtype or t.device != device:
            raise TypeError(f"{name}: expected {dtype} on {device}, got {t.dtype} on {t.device}")
