"""What a kernel is asked, and what it answers: the two records of the table in `table.py`."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import NamedTuple

import torch


class Problem(NamedTuple):
    """One product: everything that the choice of a kernel may depend on.

    A NamedTuple and not a dataclass: it is made and hashed on every call (0.9 us against 2.5 us).
    """

    op: str  # "spmm", "spmm_t" or "sddmm"
    device: str  # "cpu", "cuda"
    dtype: torch.dtype  # of the values, of x and of the result
    M: int  # tokens
    N: int  # out_features, the rows of W
    K: int  # in_features, the columns of W
    nnz: int  # stored values of W

    @property
    def density(self) -> float:
        """nnz / (N * K); 0 for an empty W."""
        return self.nnz / max(1, self.N * self.K)

    def __str__(self) -> str:
        return (
            f"{self.op} M={self.M} N={self.N} K={self.K} nnz={self.nnz} "
            f"(density {self.density:.3g}) {self.dtype} on {self.device}"
        )


@dataclass(frozen=True)
class Kernel:
    """One row of the table.

    `refuse(problem)` returns the reason why this kernel cannot or should not run the problem, or
    None. `run` takes the arguments of the function of the same op in `reference.py`.
    """

    name: str
    op: str
    device: str | None  # None: any device
    refuse: Callable[[Problem], str | None]
    run: Callable[..., torch.Tensor]
    plan: Callable[[Problem], str] | None = None  # how it would go about the problem, in words
