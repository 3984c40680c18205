"""How fast products are with W in each layout, at all numbers of tokens: what pack_ chooses by.

Every layout on every number of tokens, the kept dense copy too, beside the best dense call.
sparsekern/kernels/cuda/times.py says how sparsekern/kernels/packed_times.json is laid out.
"""

import json

from ..kernels.cuda import cover
from ..kernels.cuda import library as cuda_library
from ..kernels.cuda.choose import PACKED, Packed, choose_layout, lay_out
from ..kernels.cuda.few_tokens import spmm_packed
from ..kernels.cuda.kept import Dense
from ..tensor import SparseTensor
from .measure_gpu import Grid, Way
from .records import OURS, select

GRID = Grid(
    shapes=((2048, 2048), (6144, 2048), (2048, 8192), (4096, 4096), (11008, 4096), (12288, 12288)),
    tokens=(1, 4, 8, 16, 32, 64, 128, 256, 2048),
    sparsities=(0.5, 0.9),  # a line goes through both: at 70 and 80 % it meets what was measured
    masks=("random",),
)
NAMES = (*PACKED, Dense.name)


def ways() -> list[Way]:
    return [_way(name) for name in NAMES]


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

    def share(name: str, N: int, K: int, sparsity: float, M: int) -> float | None:
        for cell in select(cells, N=N, K=K, sparsity=sparsity, M=M):
            is_chosen = name == choose_layout(M, 1 - sparsity).kind.name
            way = cell["ways"].get("few_tokens" if is_chosen else name, cell["ways"].get(name))
            if way and way.get("is_right") and "median_s" in way:
                return round(way["median_s"] / cell["dense_s"], 3)
        return None

    return {
        "machine": machine,
        "tokens": tokens,
        "shapes": shapes,
        "densities": [round(1 - sparsity, 6) for sparsity in sparsities],
        "shares": {
            name: [[[share(name, *s, z, M) for M in tokens] for z in sparsities] for s in shapes]
            for name in NAMES
        },
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
