"""Packed weights for many tokens on sparse tensor cores: at most two of four neighbours in a row.

W is compressed once, through cuSPARSELt (cusparselt.py), which multiplies half of the places: 9/16
of the bytes of a dense 16-bit weight (`two_of_four`), or 10/16 byte a place in E4M3
(`two_of_four_e4m3`; x is cast in each call, e4m3.py). Any number of tokens gives the right result;
few are no faster than many. Every two-way pattern will do: its rule along columns is for the
backward pass alone.

A free place beside a stored one is multiplied by 0, as in a dense weight: an infinity or NaN in x
makes NaN there.
"""

from dataclasses import dataclass
from functools import cache

import torch
import torch.nn.functional as F
from torch import Tensor

from ...indices import expand_rows
from ...tensor import SparseTensor
from ..crossover import least_size
from . import cusparselt, e4m3
from . import library as cuda_library
from .algorithms import NONE_RIGHT, algorithm_of
from .layout import Packed
from .vendor import Error

DEVICE, MACHINE = "cuda", "sm_90"  # it was tried there alone
MULTIPLE_OF_TOKENS, MULTIPLE, MULTIPLE_E4M3 = 8, 16, 32  # of M; of N and K
FOUND = 2**15  # in place of an exponent: it is found in each x


@dataclass(frozen=True)
class TwoOfFour(Packed):
    """W in bfloat16 or float16."""

    operand: Tensor  # cuSPARSELt's own, seen as floats; of a small W it is longer than W needs
    name = "two_of_four"

    @property
    def arrived(self) -> Tensor:
        return self.operand

    def parts(self) -> dict[str, tuple[torch.dtype | None, tuple[int, ...]]]:
        return {"operand": (None, (max(len(self.operand), self.n * self.k // 16 * 9),))}

    def multiply(self, x: Tensor, bias: Tensor | None) -> Tensor:
        """y [M, N] = x [M, K] @ W.T + bias [N]."""
        return multiply(self.operand, x, self.n, bias)


@dataclass(frozen=True)
class TwoOfFourE4m3(Packed):
    """W times 2^exponent in E4M3; x and the result are bfloat16."""

    exponent: int
    x_exponent: int  # of what x is multiplied by, or FOUND
    operand: Tensor  # cuSPARSELt's own, bytes
    name = "two_of_four_e4m3"

    @property
    def arrived(self) -> Tensor:
        return self.operand

    @property
    def dtype(self) -> torch.dtype:
        return torch.bfloat16

    @property
    def values_dtype(self) -> torch.dtype:
        return e4m3.DTYPE

    def parts(self) -> dict[str, tuple[torch.dtype | None, tuple[int, ...]]]:
        return {"operand": (torch.uint8, (max(len(self.operand), self.n * self.k // 8 * 5),))}

    def multiply(self, x: Tensor, bias: Tensor | None) -> Tensor:
        """y [M, N] = x [M, K] @ W.T + bias [N], of x in E4M3."""
        x8, inverse = e4m3.quantise(x, self.given_exponent)
        return self._multiply_cast(x8, inverse, bias)[: len(x)]

    @property
    def given_exponent(self) -> int | None:
        return None if self.x_exponent == FOUND else self.x_exponent

    def _multiply_cast(self, x8: Tensor, inverse: Tensor | None, bias: Tensor | None) -> Tensor:
        """y [M, N] of what e4m3.quantise() made of x. The library has no factor that is on the GPU:
        where the scale was found there, one more pass takes it out of y."""
        alpha = 2.0 ** -(self.exponent + (self.given_exponent or 0))
        if inverse is None:
            return multiply(self.operand, x8, self.n, bias, alpha)
        return e4m3.finish(multiply(self.operand, x8, self.n, None, alpha), inverse, bias)


def multiply(operand: Tensor, x: Tensor, n: int, bias: Tensor | None, alpha: float = 1.0) -> Tensor:
    """y [M, n] = alpha x [M, K] @ W.T + bias [n]; of x in E4M3, y is bfloat16."""
    m, k = x.shape
    if m == 0:
        return x.new_empty(m, n, dtype=cusparselt.result_dtype(x.dtype))
    multiple = e4m3.MULTIPLE_OF_TOKENS if x.dtype is e4m3.DTYPE else MULTIPLE_OF_TOKENS
    if missing := -m % multiple:
        x = F.pad(x.view(torch.uint8), (0, 0, 0, missing)).view(x.dtype)
    algorithm = algorithm_of(n, k, m + missing, x.dtype, x.device)
    if algorithm == NONE_RIGHT:
        raise RuntimeError(
            f"two_of_four: none of cuSPARSELt's algorithms multiplies [{m}, {k}] and [{n}, {k}] "
            f"right in {_short(x.dtype)} on this GPU"
        )
    y = x.new_empty(m + missing, n, dtype=cusparselt.result_dtype(x.dtype))
    is_late = bias is not None and x.dtype is e4m3.DTYPE and not _adds_bias_in_e4m3(x.device)
    cusparselt.multiply(operand, x.contiguous(), y, None if is_late else bias, algorithm, alpha)
    return (e4m3.finish(y, None, bias) if is_late else y)[:m]


@cache
def _adds_bias_in_e4m3(device: torch.device) -> bool:
    bias = torch.zeros(32, dtype=torch.bfloat16, device=device)
    try:
        cusparselt.Plan(32, 32, 16, device.index, None, bias, e4m3.DTYPE)
    except Error:
        return False
    return True


def pack_two_of_four(
    weight: SparseTensor, dtype: torch.dtype, largest: float | None = None
) -> TwoOfFour | TwoOfFourE4m3:
    """`weight` compressed, in its own type or, rounded, in E4M3, where `largest` may say how large
    x gets; 0 says nothing. ValueError, TypeError or NotImplementedError says why it cannot be."""
    if reason := refusal(weight, dtype):
        raise reason
    (n, k), dense = weight.shape, weight.to_dense()
    if dtype is not e4m3.DTYPE:
        operand = cusparselt.compress(dense).view(dtype)
        packed: TwoOfFour | TwoOfFourE4m3 = TwoOfFour(n, k, weight.nnz, operand)
    else:
        if not dense.isfinite().all():
            raise ValueError("weight: expected finite values, since E4M3 has no infinities")
        rounded, exponent = e4m3.quantise_weight(dense)
        x_exponent = e4m3.exponent_of(largest, e4m3.HEADROOM) if largest else FOUND
        operand = cusparselt.compress(rounded)
        packed = TwoOfFourE4m3(n, k, weight.nnz, exponent, x_exponent, operand)
    packed.check()
    return packed


def refusal(weight: SparseTensor, dtype: torch.dtype) -> Exception | None:
    """Why `weight` cannot be compressed in this type; None if it can."""
    n, k = weight.shape
    own = weight.values.dtype
    if own is not dtype and not (own is torch.bfloat16 and dtype is e4m3.DTYPE):
        wanted = "bfloat16" if dtype is e4m3.DTYPE else _short(dtype)
        return TypeError(f"weight: expected {wanted} values for {_short(dtype)}, got {_short(own)}")
    multiple = MULTIPLE_E4M3 if dtype is e4m3.DTYPE else MULTIPLE
    if n % multiple or k % multiple or 0 in (n, k):
        return ValueError(
            f"weight: expected out_features and in_features in multiples of {multiple} for "
            f"{_short(dtype)}, got {n} and {k}"
        )
    if weight.is_transposed:
        return ValueError("weight: expected W [N, K] as it is stored, got a transpose")
    if reason := refuse_gpu():
        return NotImplementedError(f"two_of_four: {reason}")
    if weight.values.device.type != DEVICE:
        return NotImplementedError(
            f"two_of_four: expected a weight on a GPU, got {weight.values.device}"
        )
    if not is_two_of_four(weight):
        return ValueError(
            "weight: expected a two-way pattern, at most two of four neighbours; "
            'Static(sparsity, family="two-way") and the other algorithms make such'
        )
    return None


def is_faster(tokens: int, n: int, k: int, dtype: torch.dtype) -> bool:
    """Whether products of so many tokens with W [n, k] of this 16-bit type are faster compressed
    than in any other layout or dense."""
    least = least_size(MACHINE, dtype, tokens, "two_of_four packed")
    return least is not None and min(n, k) >= least


def pays(weight: SparseTensor, tokens: int) -> bool:
    """Whether that is so for `weight`, and it can be compressed."""
    (n, k), dtype = weight.shape, weight.values.dtype
    return is_faster(tokens, n, k, dtype) and not refusal(weight, dtype)


def is_two_of_four(weight: SparseTensor) -> bool:
    """Whether at most two of four neighbours in a row are stored; K is a multiple of 4."""
    if 2 * weight.nnz > weight.n * weight.k:
        return False
    rows = expand_rows(weight.row_offsets, weight.nnz).long()
    four = (rows * weight.k + weight.col_indices).div_(4, rounding_mode="floor")
    return not (four[2:] == four[:-2]).any()


@cache
def refuse_gpu() -> str | None:
    """Why nothing can be compressed on this machine; None if it can."""
    lib = cusparselt.library()
    if isinstance(lib, str):
        return lib
    if reason := cuda_library.refusal():
        return reason
    if not torch.cuda.is_available():
        return "there is no GPU"
    major, minor = torch.cuda.get_device_capability()
    if f"sm_{major}{minor}" != MACHINE:
        return f"it was tried with compute capability 9.0 alone, not {major}.{minor}"
    return None


def _short(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")
