"""From how many tokens, rows and columns on sparse tensor cores are the faster way: what dispatch
reads.

The rows of the kernel table that use them, `two_of_four` for a two-way pattern and `ordered` for a
free one, each beside `expand`, forward and input gradient of a square W. sparsekern/kernels/
least_sizes.json holds, by row, compute capability and dtype, pairs of rising numbers of tokens and
the least size from there on; null: never.
"""

from collections.abc import Iterator
from dataclasses import dataclass, replace
from functools import partial
from statistics import geometric_mean

import torch
from torch import Tensor

from ..kernels import table
from ..kernels.cuda.packs import share_packs
from ..tensor import SparseTensor
from .gpt_gpu import FREE
from .measure_gpu import LAUNCHES, ROUNDS, TOLERANCE, attempt, copies_of, weight
from .peers_gpu import clone
from .records import OURS, groups, select
from .replay_gpu import Clock, Contender, Runner, race
from .two_way_mask import TWO_WAY


@dataclass(frozen=True)
class Row:
    """A row of the kernel table, and what it is measured with."""

    name: str
    mask: str
    sparsity: float
    tokens: tuple[int, ...]
    sizes: tuple[int, ...]


ROWS = (
    Row(
        "two_of_four",
        TWO_WAY,
        0.75,
        (256, 512, 1024, 2048),
        (512, 768, 1024, 1536, 2048, 3072, 4096),
    ),
    Row("ordered", FREE, 0.9, (1024, 2048, 4096, 8192), (1024, 1536, 2048, 3072, 4096)),
)
# In float16 the library's algorithms gain less, so from more tokens on.
FLOAT16 = (
    replace(ROWS[0], tokens=(1024, 2048, 4096, 8192), sizes=(1024, 1536, 2048, 3072, 4096)),
    replace(ROWS[1], tokens=(2048, 4096, 8192), sizes=(2048, 3072, 4096)),
)
GRIDS = {torch.bfloat16: ROWS, torch.float16: FLOAT16}
EXPAND = "expand"
OPS = ("spmm", "spmm_t")


def cases(
    clock: Clock, device: torch.device, dtype: torch.dtype = torch.bfloat16
) -> Iterator[dict]:
    """A record for each row, size, number of tokens and product."""
    generator = torch.Generator(device)
    for row in GRIDS[dtype]:
        for size in row.sizes:
            made = weight(size, size, row.sparsity, row.mask, dtype, generator)
            W = SparseTensor.from_dense(*made)
            wide = W.to_dense().double()
            nbytes = wide.numel() * dtype.itemsize
            copies = [W, *(clone(W) for _ in range(copies_of(nbytes, LAUNCHES[0]) - 1))]
            for M in row.tokens:
                x = torch.randn(M, size, device=device).to(dtype)
                for op in OPS:
                    exact = x.double() @ (wide.t() if op == "spmm" else wide)
                    yield _case(row, op, W, x, _race(row, op, copies, x, exact, clock))


def _race(
    row: Row, op: str, copies: list[SparseTensor], x: Tensor, exact: Tensor, clock: Clock
) -> dict:
    failed: dict[str, dict] = {}
    runners = []
    for name in (row.name, EXPAND):
        run = next(r.run for r in table.KERNELS if (r.name, r.op, r.device) == (name, op, "cuda"))
        calls = [partial(run, V.row_offsets, V.col_indices, V.values, *V.shape, x) for V in copies]
        each = Contender(name, OURS, calls)

        def make(calls=calls, each=each) -> Runner:
            calls[0]()  # whose packs the copies share out
            for copy in copies[1:]:
                share_packs(copies[0], copy)
            return Runner(each, LAUNCHES[0], exact, clock)

        runners += attempt(failed, each, make)
    return race(runners, exact, TOLERANCE[x.dtype], clock, ROUNDS) | failed


def _case(row: Row, op: str, W: SparseTensor, x: Tensor, ways: dict) -> dict:
    return {
        **{"op": op, "device": "cuda", "M": len(x), "N": W.n, "K": W.k, "nnz": W.nnz},
        **{"sparsity": row.sparsity, "mask": row.mask, "threads": 0, "is_cold": True},
        **{"dtype": str(W.dtype).removeprefix("torch."), "ways": ways},
    }


def summarize(cases: list[dict], row: Row) -> list[list[int | None]]:
    """[tokens, least size] for each number of tokens: from that size on all sizes gain or lose
    nothing, both products together."""
    cases = select(cases, mask=row.mask)
    found: list[list[int | None]] = []
    for M in sorted({case["M"] for case in cases}):
        least = None
        for (size,), both in sorted(groups(select(cases, M=M), lambda c: c["N"]).items())[::-1]:
            if ratio(both, row) < 1:
                break
            least = size
        found.append([M, least])
    return found


def ratio(cases: list[dict], row: Row) -> float:
    """How many times faster the row is: 0 where it failed or is wrong."""
    ratios = []
    for case in cases:
        sparse, expand = (case["ways"][name] for name in (row.name, EXPAND))
        if "median_s" not in sparse or not sparse["is_right"]:
            return 0.0
        ratios.append(expand["median_s"] / sparse["median_s"])
    return geometric_mean(ratios)
