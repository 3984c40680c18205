"""The question to the table in `table.py` and its rows: `Problem` and `Kernel`."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, NamedTuple

import torch
from torch import Tensor

if TYPE_CHECKING:
    from .steps import Prepare

OLD_NAMES = {"stream": "few_tokens"}  # of rows: files and settings have them for one release more


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
    is_two_way: bool = False  # known for what cuda/two_of_four.py takes alone
    is_ordered: bool = False  # there is an order of columns; known for what cuda/ordered.py takes

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
    None. `run` takes the arguments of the function of the same op in `reference.py`. Where it
    decides something by the problem alone, `bind(problem)` is the same function with that decided,
    once for all calls.
    """

    name: str
    op: str
    device: str | None  # None: any device
    refuse: Callable[[Problem], str | None]
    run: Callable[..., Tensor]
    plan: Callable[[Problem], str] | None = None  # how it would go about the problem, in words
    bind: Callable[[Problem], Callable[..., Tensor]] | None = None
    prepare: "Prepare | None" = None

    def bound(self, problem: Problem) -> Callable[..., Tensor]:
        """`run` for the problem that has chosen this row."""
        return self.bind(problem) if self.bind else self.run


def problem_of(op: str, *operands) -> Problem:
    """The problem of a function in `reference.py` called with these operands."""
    col_indices = operands[1]
    n, k, x = operands[2:5] if op == "sddmm" else operands[3:6]
    return Problem(op, x.device.type, x.dtype, x.shape[0], n, k, col_indices.shape[0])


def bound_kernel(
    name: str,
    op: str,
    device: str,
    refuse: Callable[[Problem], str | None],
    bind: Callable[[Problem], Callable[..., Tensor]],
    plan: Callable[[Problem], str] | None = None,
    prepare: "Prepare | None" = None,
) -> Kernel:
    """A row whose `run` binds for each call."""

    def run(*operands) -> Tensor:
        return bind(problem_of(op, *operands))(*operands)

    return Kernel(name, op, device, refuse, run, plan, bind, prepare)
