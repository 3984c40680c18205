"""Tools of tests and benchmarks: random patterns, awkward problems, error measure, fair timer.

Letters as everywhere: `y[M, N] = x[M, K] @ W[N, K].T`, M tokens, N out_features, K in_features.
"""

import math
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor


def random_mask(
    n: int, k: int, sparsity: float, generator: torch.Generator | None = None
) -> Tensor:
    """A uniformly random bool mask [n, k], exactly round((1 - sparsity) * n * k) of it True.

    The draw stays as it is, a permutation of all places, since recorded measurements name masks by
    their generator; algorithms draw in O(nnz) (sparsity/select.py)."""
    mask = torch.zeros(n * k, dtype=torch.bool, device="cpu")
    nnz = round((1 - sparsity) * n * k)
    dtype = torch.int32 if n * k < 2**31 else torch.int64  # the same permutation
    mask[torch.randperm(n * k, generator=generator, dtype=dtype, device="cpu")[:nnz]] = True
    return mask.view(n, k)


def mask_to_csr(mask: Tensor) -> tuple[Tensor, Tensor]:
    """row_offsets int32 [N + 1] and col_indices int32 [nnz] of a bool mask [N, K]."""
    row_offsets = torch.zeros(mask.shape[0] + 1, dtype=torch.int32, device="cpu")
    row_offsets[1:] = mask.sum(dim=1).cumsum(0)
    return row_offsets, mask.nonzero()[:, 1].int()


def random_csr(
    n: int, k: int, sparsity: float, dtype: torch.dtype = torch.float32, seed: int = 0
) -> tuple[Tensor, Tensor, Tensor]:
    """(row_offsets int32 [n + 1], col_indices int32 [nnz], values [nnz]), values normal."""
    generator = torch.Generator().manual_seed(seed)
    row_offsets, col_indices = mask_to_csr(random_mask(n, k, sparsity, generator))
    values = torch.randn(
        len(col_indices), generator=generator, dtype=torch.float64, device="cpu"
    ).to(dtype)
    return row_offsets, col_indices, values


class Tensors(NamedTuple):
    """The operands of one problem; `values` are W at the True places of `mask`, row by row."""

    mask: Tensor  # bool [N, K]
    row_offsets: Tensor  # int32 [N + 1]
    col_indices: Tensor  # int32 [nnz]
    values: Tensor  # [nnz]
    x: Tensor  # [M, K]
    dy: Tensor  # [M, N]

    @property
    def weight(self) -> Tensor:
        """W as a dense tensor [N, K]."""
        return self.values.new_zeros(self.mask.shape).masked_scatter(self.mask, self.values)


@dataclass(frozen=True)
class Case:
    """One problem. mask_kind: random, empty_row, full_row, empty_column, empty or full."""

    name: str
    M: int
    N: int
    K: int
    mask_kind: str = "random"
    sparsity: float = 0.75

    def mask(self, generator: torch.Generator) -> Tensor:
        """The bool mask [N, K] of W."""
        mask = random_mask(self.N, self.K, self.sparsity, generator)
        match self.mask_kind:
            case "random":
                pass
            case "empty_row":
                mask[self.N // 2] = False
            case "full_row":
                mask[self.N // 2] = True
            case "empty_column":
                mask[:, self.K // 2] = False
            case "empty":
                mask[:] = False
            case "full":
                mask[:] = True
            case other:
                raise ValueError(f"Case {self.name}: unknown mask_kind {other!r}")
        return mask

    def tensors(self, dtype: torch.dtype = torch.float32, seed: int = 0) -> Tensors:
        """Operands on the CPU, normal numbers, the same ones (rounded) for every dtype."""
        generator = torch.Generator().manual_seed(seed)
        mask = self.mask(generator)
        row_offsets, col_indices = mask_to_csr(mask)

        def normal(*shape: int) -> Tensor:
            return torch.randn(shape, generator=generator, dtype=torch.float64, device="cpu").to(
                dtype
            )

        return Tensors(
            mask,
            row_offsets,
            col_indices,
            normal(len(col_indices)),
            normal(self.M, self.K),
            normal(self.M, self.N),
        )


# Odd sizes meet every tail of a kernel: rows, columns, the last vector, the last panel of tokens.
_ODD = [
    Case(f"{kind}-M{M}", M, 37, 101, kind)
    for kind in ("random", "empty_row", "full_row", "empty_column", "empty", "full")
    for M in (1, 7, 64, 513)
]
# The linears of a small GPT (width 128): qkv, attention output, MLP up, MLP down.
_GPT = [
    Case(f"gpt-{N}x{K}-{sparsity:.0%}", 64, N, K, sparsity=sparsity)
    for N, K in ((384, 128), (128, 128), (512, 128), (128, 512))
    for sparsity in (0.5, 0.8, 0.9, 0.95, 0.99)
]
PROBLEMS: tuple[Case, ...] = (
    *_ODD,
    *_GPT,
    Case("no-tokens", 0, 37, 101),
    Case("one-by-one", 1, 1, 1, "full"),
    Case("one-row", 65, 1, 300),
    Case("one-column", 65, 300, 1),
    Case("many-blocks", 130, 1001, 1100),
)


def exact(t: Tensors) -> dict[str, tuple[Tensor, Tensor]]:
    """op -> (result, scale), both in fp64: the three products and the same products of |operands|.

    spmm [M, N], spmm_t [M, K], sddmm [nnz]. The scale is what relative_error() divides by.
    """
    w, x, dy = t.weight.double(), t.x.double(), t.dy.double()
    products = {
        "spmm": lambda w, x, dy: x @ w.T,
        "spmm_t": lambda w, x, dy: dy @ w,
        "sddmm": lambda w, x, dy: (dy.T @ x)[t.mask],
    }
    return {op: (f(w, x, dy), f(w.abs(), x.abs(), dy.abs())) for op, f in products.items()}


def relative_error(got: Tensor, want_fp64: Tensor, scale_fp64: Tensor) -> float:
    """max |got - want| / scale over all elements, with scale = |x| @ |W|.T.

    The scale is that of the usual bound of a rounded sum (Higham, Accuracy and Stability of
    Numerical Algorithms, 3.1), so that cancellation does not look like an error. Where the scale
    is 0 the result must be exact: any difference there gives inf. NaN anywhere gives NaN.
    """
    if got.shape != want_fp64.shape:
        raise ValueError(f"shape of the result: expected {want_fp64.shape}, got {got.shape}")
    error = (got.double() - want_fp64).abs()
    relative = torch.where(error == 0, error, error / scale_fp64)
    return relative.max().item() if relative.numel() else 0.0


def frobenius_error(y: Tensor, exact: Tensor) -> float:
    """|y - exact| / |exact|, in fp64."""
    if y.shape != exact.shape:
        raise ValueError(f"shape of the result: expected {exact.shape}, got {y.shape}")
    return ((y.double() - exact).norm() / exact.norm()).item()


def interleaved_times(
    fns: dict[str, Callable[[], object]],
    rounds: int = 15,
    min_round_s: float = 0.005,
    clock: Callable[[], float] = time.perf_counter,
) -> dict[str, list[float]]:
    """Seconds per call of every function, one number a round.

    Each round runs all functions in turn, each for at least about `min_round_s`, so that a slow
    moment of the machine hits all of them alike and ratios stay fair.
    """
    calls = {}
    for name, fn in fns.items():
        fn()  # the first call pays for packing and allocation
        start = clock()
        fn()
        calls[name] = max(1, math.ceil(min_round_s / max(clock() - start, 1e-7)))
    seconds: dict[str, list[float]] = {name: [] for name in fns}
    for _ in range(rounds):
        for name, fn in fns.items():
            start = clock()
            for _ in range(calls[name]):
                fn()
            seconds[name].append((clock() - start) / calls[name])
    return seconds
