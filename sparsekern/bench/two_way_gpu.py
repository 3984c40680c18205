"""Two-way patterns on sparse tensor cores, in 16 bits and in E4M3, and dense E4M3 beside."""

from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial

import torch
from torch import Tensor

from ..kernels.cuda import compressed, e4m3
from ..kernels.cuda.few_tokens import spmm_packed
from ..kernels.cuda.layout import Packed
from ..tensor import SparseTensor
from .measure_gpu import Way
from .peers_gpu import absent
from .records import OTHER, OURS
from .two_way_mask import TWO_WAY

LARGEST = 6.0  # of x, as an example would have shown it
EXPONENT = e4m3.exponent_of(LARGEST, e4m3.HEADROOM)
IN_TIME, BEFORE = "the cast of x in the time", "x in E4M3 before"


@dataclass(frozen=True)
class Rounded:
    """W [N, K] in E4M3 in one of two forms, and its values."""

    held: Packed | Tensor
    values: Tensor  # exact in bfloat16
    exponent: int

    def clone(self) -> "Rounded":
        return replace(self, held=self.held.clone())


def ways() -> list[Way]:
    if reason := compressed.refuse_gpu():
        return [absent(TWO_WAY, OURS, reason)]
    given, found = _sparse(LARGEST), _sparse(None)
    return [
        Way(TWO_WAY, OURS, _packed, Packed.clone, spmm_packed, lambda W: W.nbytes),
        _in_e4m3("two-way E4M3", OURS, given, _multiply),
        _in_e4m3("two-way E4M3, scale found", OURS, found, _multiply, exponent=None),
        _in_e4m3("two-way E4M3 alone", OURS, given, _multiply_cast, _cast, note=BEFORE),
        _in_e4m3("dense E4M3", OTHER, _dense, _cast_and_scaled),
        _in_e4m3("dense E4M3 alone", OTHER, _dense, _scaled, _cast, note=BEFORE),
    ]


def _in_e4m3(
    name: str,
    kind: str,
    lay_out: Callable[[SparseTensor], Rounded],
    multiply: Callable[[Tensor, Rounded], Tensor],
    prepare: Callable[[Tensor], Tensor] = lambda x: x,
    note: str = IN_TIME,
    exponent: int | None = EXPONENT,
) -> Way:
    return Way(
        name,
        kind,
        lay_out,
        Rounded.clone,
        multiply,
        lambda W: W.held.nbytes,
        prepare=prepare,
        note=note,
        dense_of=lambda W: W.values,
        x_of=partial(_rounded, exponent=exponent),
    )


def _packed(W: SparseTensor) -> Packed:
    return compressed.pack_two_of_four(W, W.values.dtype)


def _sparse(largest: float | None) -> Callable[[SparseTensor], Rounded]:
    def lay_out(W: SparseTensor) -> Rounded:
        packed = compressed.pack_two_of_four(W, e4m3.DTYPE, largest)
        return replace(_dense(W), held=packed)

    return lay_out


def _dense(W: SparseTensor) -> Rounded:
    w8, exponent = e4m3.quantise_weight(W.to_dense())
    return Rounded(w8, (w8.float() * 2.0**-exponent).bfloat16(), exponent)


def _cast(x: Tensor) -> Tensor:
    return e4m3.quantise(x, EXPONENT)[0]


def _rounded(x: Tensor, exponent: int | None = EXPONENT) -> Tensor:
    x8, inverse = e4m3.traced(x, exponent)
    return x8.float() * (2.0**-EXPONENT if inverse is None else inverse)


def _multiply(x: Tensor, W: Rounded) -> Tensor:
    return spmm_packed(x, W.held)


def _multiply_cast(x8: Tensor, W: Rounded) -> Tensor:
    alpha = 2.0 ** -(W.exponent + EXPONENT)
    return compressed.multiply(W.held.operand, x8, W.held.n, None, alpha)


def _scaled(x8: Tensor, W: Rounded) -> Tensor:
    scales = (_scale(exponent, x8.device) for exponent in (EXPONENT, W.exponent))
    return torch._scaled_mm(x8, W.held.t(), *scales, out_dtype=torch.bfloat16, use_fast_accum=True)


_SCALES: dict[tuple[int, torch.device], Tensor] = {}


def _scale(exponent: int, device: torch.device) -> Tensor:
    """2^-exponent, made once: a graph that is captured may make none."""
    if (exponent, device) not in _SCALES:
        _SCALES[exponent, device] = torch.tensor(2.0**-exponent, device=device)
    return _SCALES[exponent, device]


def _cast_and_scaled(x: Tensor, W: Rounded) -> Tensor:
    return _scaled(_cast(x), W)
