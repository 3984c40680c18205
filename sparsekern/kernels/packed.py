"""Weights of one layer laid out for the CUDA kernels: which layouts there are, and which one suits.

`streams` (streams.py) takes the fewest bytes and is read by CUDA cores: for one or two tokens.
`cover` (cover.py) is read by sparse tensor cores: for more, up to 32, where W is sparse enough.
`pairs` (pairs.py) is read by dense tensor cores. All hold any pattern, exactly.
"""

import torch

from ..tensor import SparseTensor
from . import cover, pairs, streams
from .cover import Cover
from .layout import Packed
from .pairs import Pairs
from .streams import Streams

LAYOUTS: dict[str, type[Packed]] = {"streams": Streams, "cover": Cover, "pairs": Pairs}
STREAM_TOKENS = 2  # up to here `streams` is the faster layout (docs/LOG.md)


def name_of(packed: Packed) -> str:
    return next(name for name, layout in LAYOUTS.items() if isinstance(packed, layout))


def like(tokens: int) -> int:
    """The least number of tokens for which W is laid out as for `tokens`: 1, 3, 17 or 33."""
    return next((first for first in (33, 17, STREAM_TOKENS + 1) if tokens >= first), 1)


def choose_layout(tokens: int, density: float) -> str:
    """The layout for products of about so many tokens: what is faster on an H200 (docs/LOG.md).
    `cover` is made by the C++ library alone."""
    if tokens <= STREAM_TOKENS:
        return "streams"
    densest = 0.55 if tokens <= 16 else 0.4 if tokens <= 32 else 0.0
    return "cover" if density <= densest and cover.is_built() else "pairs"


def pack(weight: SparseTensor, tokens: int = 1) -> Packed:
    """`weight` laid out for products of about so many tokens, on its device.

    Products of other numbers of tokens are as exact, only slower. TypeError unless values are
    bfloat16 or float16.
    """
    if weight.values.dtype not in (torch.bfloat16, torch.float16):
        raise TypeError(f"weight: expected bfloat16 or float16 values, got {weight.values.dtype}")
    return layout_for(weight.row_offsets, weight.col_indices, *weight.shape, tokens).fill(
        weight.values
    )


def layout_for(
    row_offsets: torch.Tensor, col_indices: torch.Tensor, n: int, k: int, tokens: int
) -> "streams.StreamsLayout | cover.CoverLayout | pairs.PairsLayout":
    """The index part of a pack."""
    layouts = {
        "streams": streams.StreamsLayout,
        "cover": cover.CoverLayout,
        "pairs": pairs.PairsLayout,
    }
    name = choose_layout(tokens, col_indices.shape[0] / max(1, n * k))
    return layouts[name](row_offsets, col_indices, n, k)
