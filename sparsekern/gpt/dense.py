"""Dense linears by every library that torch and NumPy bring: what sparse ones are held against.

A library is a function as F.linear is: (x [M, K], weight [N, K], bias [N] or None) -> y [M, N]. All
three products of training are of that form: y = f(x, W, b), dx = f(dy, W^T), dW = f(dy^T, x^T).

    python -m sparsekern.gpt.dense NAME train ...    a command with every nn.Linear by that library
"""

import ctypes
import runpy
import sys
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from functools import partial
from pathlib import Path

import numpy
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..testing import relative_error

Linear = Callable[..., Tensor]

TORCH, ONEDNN, NUMPY = "F.linear", "oneDNN", "NumPy"
PACKED = "oneDNN, W packed"  # forward only
CHECKED = 24, 40, 56  # M, N, K
TOLERANCE = 2e-6  # of fp32, relative to |x| @ |W|.T; it rounds to 6e-8


def onednn(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """torch's own oneDNN. F.linear takes it for bfloat16, and another library for float32."""
    return torch.ops.mkldnn._linear_pointwise(x, weight, bias, "none", [], "")


def packed(weight: Tensor, tokens: int) -> Callable[[Tensor], Tensor]:
    """oneDNN with `weight` laid out for it beforehand, for products of so many tokens."""
    laid_out = torch.ops.mkldnn._reorder_linear_weight(weight.detach(), tokens)
    return lambda x: onednn(x, laid_out)


def _packing(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    return packed(weight.contiguous(), x.shape[0])(x)


def by_numpy(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """NumPy's matmul: OpenBLAS in the wheels of most machines."""
    y = torch.from_numpy(x.detach().numpy() @ weight.detach().numpy().T)
    return y if bias is None else y.add_(bias)


LIBRARIES: dict[str, Linear] = {TORCH: F.linear, ONEDNN: onednn, NUMPY: by_numpy}


def libraries() -> tuple[dict[str, Linear], dict[str, str]]:
    """Those that are right here, and why not the others."""
    found, missing = {}, {}
    for name, library in (LIBRARIES | {PACKED: _packing}).items():
        try:
            error = _error(library)
        except (AttributeError, RuntimeError, NotImplementedError) as reason:
            missing[name] = str(reason).partition("\n")[0]
            continue
        if error < TOLERANCE:
            found[name] = library
        else:
            missing[name] = f"wrong by {error:.0e}"
    return found, missing


def _error(library: Linear) -> float:
    """The worst relative error of the three products against fp64."""
    generator = torch.Generator().manual_seed(0)
    M, N, K = CHECKED
    x, weight, dy = (torch.randn(s, generator=generator) for s in ((M, K), (N, K), (M, N)))
    errors = [
        relative_error(
            library(a, b), a.double() @ b.double().t(), a.double().abs() @ b.double().abs().t()
        )
        for a, b in ((x, weight), (dy, weight.t()), (dy.t(), x.t()))
    ]
    return max(errors)


def openblas(threads: int) -> str:
    """NumPy's BLAS in words, held to so many threads where it is an OpenBLAS."""
    for path in (Path(numpy.__file__).parents[1] / "numpy.libs").glob("*openblas*"):
        library = ctypes.CDLL(str(path))
        try:
            library.scipy_openblas_set_num_threads64_(threads)
            kernel = library.scipy_openblas_get_corename64_
        except AttributeError:
            continue
        kernel.restype = ctypes.c_char_p
        return f"OpenBLAS with its kernel for {kernel().decode()}"
    return "its BLAS"


class _Linear(torch.autograd.Function):
    """A linear layer by a library, which is on the clock: clock(name) is a context."""

    @staticmethod
    def forward(ctx, x: Tensor, weight: Tensor, bias: Tensor, library: Linear, clock) -> Tensor:
        ctx.save_for_backward(x, weight)
        ctx.library, ctx.clock = library, clock
        with clock("linear forward"):
            return library(x.flatten(0, -2), weight, bias).view(*x.shape[:-1], -1)

    @staticmethod
    def backward(ctx, dy: Tensor) -> tuple[Tensor, Tensor, Tensor | None, None, None]:
        x, weight = ctx.saved_tensors
        flat_dy, flat_x = dy.flatten(0, -2), x.flatten(0, -2)  # [M, N], [M, K]
        with ctx.clock("linear backward"):
            dx = ctx.library(flat_dy, weight.t())
            dw = ctx.library(flat_dy.t(), flat_x.t())
            db = flat_dy.sum(0) if ctx.needs_input_grad[2] else None
        return dx.view_as(x), dw, db, None, None


def linear(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    library: Linear,
    clock: Callable[[str], AbstractContextManager] = lambda name: nullcontext(),
) -> Tensor:
    """F.linear with gradients, by a library."""
    return _Linear.apply(x, weight, bias, library, clock)


def use_(model: nn.Module, library: Linear) -> None:
    """Every nn.Linear of the model by this library."""
    for layer in model.modules():
        if isinstance(layer, nn.Linear):
            layer.forward = partial(_forward, layer, library)


def _forward(layer: nn.Linear, library: Linear, x: Tensor) -> Tensor:
    return linear(x, layer.weight, layer.bias, library)


def main() -> None:
    _, name, *arguments = sys.argv
    library = LIBRARIES[name]
    nn.Linear.forward = lambda layer, x: _forward(layer, library, x)
    sys.argv = ["sparsekern", *arguments]
    runpy.run_module("sparsekern", run_name="__main__", alter_sys=True)


if __name__ == "__main__":
    main()
