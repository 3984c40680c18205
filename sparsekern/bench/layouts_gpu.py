"""How fast products are with W in each layout, at all numbers of tokens: what pack_ chooses by.

Every layout on every number of tokens, beside all dense calls: that of a kept copy is one of these.
sparsekern/kernels/cuda/times.py says how sparsekern/kernels/packed_times.json is laid out.
"""

import json
from collections.abc import Callable
from functools import partial

from ..kernels.cuda import cover
from ..kernels.cuda import library as cuda_library
from ..kernels.cuda.choose import PACKED, Packed, choose_layout, lay_out
from ..kernels.cuda.few_tokens import spmm_packed
from ..kernels.cuda.kept import Dense
from ..tensor import SparseTensor
from .measure_gpu import NEAR_BEST, Grid, Way
from .records import OURS, select

GRID = Grid(
    shapes=((512, 1024), (2048, 2048), (6144, 2048), (2048, 8192), (11008, 4096), (12288, 12288)),
    tokens=(1, 2, 8, 16, 32, 64, 256, 2048),
    sparsities=(0.5, 0.9),  # a line goes through both: at 70 and 80 % it meets what was measured
    masks=("random",),
)
KEPT = "mm(x, W[K, N]) cublas"


def ways() -> list[Way]:
    return [_way(name) for name in PACKED]


def _way(name: str) -> Way:
    def laid_out(W: SparseTensor) -> Packed:
        return lay_out(W, name)

    reason = cuda_library.refusal()
    if name == "cover" and not cover.is_built():
        reason = "the C++ library is not built"
    return Way(name, OURS, laid_out, Packed.clone, spmm_packed, lambda W: W.nbytes, missing=reason)


def summarize(cells: list[dict], machine: str) -> dict:
    """What packed_times.json holds. Cells of the decode benchmark have one layout each."""
    cells = select(cells, mask="random")
    tokens = sorted({cell["M"] for cell in cells})
    shapes = sorted({(cell["N"], cell["K"]) for cell in cells})
    sparsities = sorted({cell["sparsity"] for cell in cells}, reverse=True)

    shares = {
        name: [
            [[find(select(cells, M=M, N=n, K=k, sparsity=z)) for M in tokens] for z in sparsities]
            for n, k in shapes
        ]
        for name, find in FINDERS.items()
    }
    return {
        "machine": machine,
        "tokens": tokens,
        "shapes": shapes,
        "densities": [round(1 - sparsity, 6) for sparsity in sparsities],
        "shares": shares,
    }


def packed_share(cells: list[dict], name: str) -> float | None:
    for cell in cells:
        chosen = choose_layout(cell["M"], 1 - cell["sparsity"]).kind.name
        found = _share(cell, name)
        return _share(cell, "few_tokens") if found is None and name == chosen else found
    return None


def dense_share(cells: list[dict]) -> float | None:
    """Where that call was not near the best, it is at least as slow as that allows."""
    return next((_share(cell, KEPT) or NEAR_BEST for cell in cells), None)


def _share(cell: dict, name: str) -> float | None:
    way = cell["ways"].get(name)
    if way and way.get("is_right") and "median_s" in way:
        return round(way["median_s"] / cell["dense_s"], 3)
    return None


FINDERS: dict[str, Callable[[list[dict]], float | None]] = {
    **{name: partial(packed_share, name=name) for name in PACKED},
    Dense.name: dense_share,
}


def in_json(data: dict) -> str:
    """A line for each shape of each layout."""
    text = [f" {json.dumps(key)}: {json.dumps(data[key])}" for key in list(data)[:-1]]
    layouts = [
        f"  {json.dumps(name)}: [\n"
        + ",\n".join(f"   {json.dumps(shape)}" for shape in shapes)
        + "\n  ]"
        for name, shapes in data["shares"].items()
    ]
    text.append(' "shares": {\n' + ",\n".join(layouts) + "\n }")
    return "{\n" + ",\n".join(text) + "\n}\n"
