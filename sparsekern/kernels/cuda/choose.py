"""The layouts of packed weights, and the choice among them.

`gather` (gather.py) takes the fewest bytes and is read by CUDA cores: for one or two tokens.
`cover` (cover.py) is read by sparse tensor cores: for more, up to 32, where W is sparse enough.
`pairs` (pairs.py) is read by dense tensor cores. All hold any pattern, exactly.
`two_of_four` (compressed.py) is for many tokens, and for two-way patterns alone.
"""

from dataclasses import fields

from torch import Tensor

from ...tensor import SparseTensor
from . import cover
from .compressed import TwoOfFour, TwoOfFourE4m3, pack_two_of_four, pays
from .cover import Cover, CoverLayout
from .gather import Gather, GatherLayout
from .layout import TYPES, Layout, Packed
from .pairs import Pairs, PairsLayout

LAYOUTS: dict[str, type[Packed]] = {
    kind.name: kind for kind in (Gather, Cover, Pairs, TwoOfFour, TwoOfFourE4m3)
}
_COUNTS = {  # of numbers and of tensors
    name: tuple([field.type for field in fields(kind)[3:]].count(t) for t in (int, Tensor))
    for name, kind in LAYOUTS.items()
}
MOST_GATHERED = 2  # tokens up to which `gather` is the faster layout (docs/log.md)


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
    if weight.values.dtype not in TYPES:
        raise TypeError(f"weight: expected bfloat16 or float16 values, got {weight.values.dtype}")
    if weight.is_transposed:
        raise ValueError("weight: expected W [N, K] as it is stored, got a transpose")
    # A copy, which is checked, and which nobody writes to.
    indices = weight.row_offsets.clone(), weight.col_indices.clone()
    own = SparseTensor(*indices, weight.values, (weight.n, weight.k))
    if pays(own, tokens):
        return pack_two_of_four(own, own.values.dtype)
    layout = choose_layout(tokens, own.density)
    return layout(own.row_offsets, own.col_indices, *own.shape).fill(own.values)


def assemble(
    layout: str, n: int, k: int, nnz: int, numbers: list[int], tensors: list[Tensor]
) -> Packed:
    """The packed weight of these parts, as PackedLinear keeps them and the op gets them; TypeError
    or ValueError that names what is not as Packed.check() wants it."""
    if layout not in LAYOUTS:
        raise ValueError(f"layout: expected one of {', '.join(LAYOUTS)}, got {layout!r}")
    kind = LAYOUTS[layout]
    counts = _COUNTS[layout]
    if (len(numbers), len(tensors)) != counts:
        raise ValueError(
            f"{layout}: expected {counts[0]} numbers and {counts[1]} tensors, "
            f"got {len(numbers)} and {len(tensors)}"
        )
    packed = kind(n, k, nnz, *numbers, *tensors)
    packed.check()
    return packed


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
