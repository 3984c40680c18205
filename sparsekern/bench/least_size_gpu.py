"""From how many tokens, rows and columns on sparse tensor cores are the faster way: what dispatch
reads.

Both rows of the kernel table that serve a two-way pattern, `two_of_four` and `expand`, forward and
input gradient of a square W. sparsekern/kernels/least_sizes.json holds, by row, compute capability
and dtype, pairs of rising numbers of tokens and the least size from there on; null: never.
"""

from collections.abc import Iterator
from functools import partial
from statistics import geometric_mean

import torch
from torch import Tensor

from ..kernels import table
from ..tensor import SparseTensor
from .gpt_gpu import TWO_WAY, TwoWayMask
from .measure_gpu import LAUNCHES, ROUNDS, TOLERANCE, attempt, copies_of
from .peers_gpu import clone
from .records import OURS, groups, select
from .replay_gpu import Clock, Contender, Runner, race

SIZES = (512, 768, 1024, 1536, 2048, 3072, 4096)
TOKENS = (256, 512, 1024, 2048)
SPARSITY, DTYPE = 0.75, torch.bfloat16
SPARSE, EXPAND = "two_of_four", "expand"
OPS = ("spmm", "spmm_t")


def cases(clock: Clock, device: torch.device) -> Iterator[dict]:
    """A record for each size, number of tokens and product."""
    for size in SIZES:
        dense = torch.randn(size, size, device=device).to(DTYPE)
        W = SparseTensor.from_dense(dense, TwoWayMask(SPARSITY).mask("W", dense))
        wide = W.to_dense().double()
        copies = [W, *(clone(W) for _ in range(copies_of(dense.nbytes, LAUNCHES[0]) - 1))]
        for M in TOKENS:
            x = torch.randn(M, size, device=device).to(DTYPE)
            for op in OPS:
                exact = x.double() @ (wide.t() if op == "spmm" else wide)
                yield _case(op, W, x, _race(op, copies, x, exact, clock))


def _race(op: str, copies: list[SparseTensor], x: Tensor, exact: Tensor, clock: Clock) -> dict:
    failed: dict[str, dict] = {}
    runners = []
    for name in (SPARSE, EXPAND):
        run = next(r.run for r in table.KERNELS if (r.name, r.op, r.device) == (name, op, "cuda"))
        calls = [partial(run, V.row_offsets, V.col_indices, V.values, *V.shape, x) for V in copies]
        each = Contender(name, OURS, calls)
        runners += attempt(failed, each, partial(Runner, each, LAUNCHES[0], exact, clock))
    return race(runners, exact, TOLERANCE[DTYPE], clock, ROUNDS) | failed


def _case(op: str, W: SparseTensor, x: Tensor, ways: dict) -> dict:
    return {
        **{"op": op, "device": "cuda", "M": len(x), "N": W.n, "K": W.k, "nnz": W.nnz},
        **{"sparsity": SPARSITY, "mask": TWO_WAY, "threads": 0, "is_cold": True},
        **{"dtype": str(DTYPE).removeprefix("torch."), "ways": ways},
    }


def summarize(cases: list[dict]) -> list[list[int | None]]:
    """[tokens, least size] for each number of tokens: from that size on all sizes gain or lose
    nothing, both products together."""
    found: list[list[int | None]] = []
    for M in sorted({case["M"] for case in cases}):
        least = None
        for (size,), both in sorted(groups(select(cases, M=M), lambda c: c["N"]).items())[::-1]:
            if ratio(both) < 1:
                break
            least = size
        found.append([M, least])
    return found


def ratio(cases: list[dict]) -> float:
    """How many times faster two_of_four is: 0 where it failed or is wrong."""
    ratios = []
    for case in cases:
        sparse, expand = (case["ways"][name] for name in (SPARSE, EXPAND))
        if "median_s" not in sparse or not sparse["is_right"]:
            return 0.0
        ratios.append(expand["median_s"] / sparse["median_s"])
    return geometric_mean(ratios)
