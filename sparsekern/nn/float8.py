"""Training in E4M3: linear layers whose three products take operands of 8 bits, dense or two-way.

kernels/float8.py has the recipe of the scales. What is cast stays what it was elsewhere: weights
are float32, and results, gradients and all between the layers as autocast has them. Outside of
training mode a layer is the one that it was. Compiled, casts and scales go into the kernels that
make and read the operands; eager, each is a kernel of its own.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import wraps
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd import Function
from torch.autograd.function import once_differentiable

from .. import registered_float8  # noqa: F401  (its ops)
from ..kernels.cuda import e4m3, float8
from ..kernels.float8 import cast, largest_of, largest_of_rows, scale_of
from .convert import sparsifiable
from .linear import SparseLinear
from .scaling import EACH, Scaling

_ops = torch.ops.sparsekern
_is_compiling = torch.compiler.is_compiling
X, W, DY = range(3)  # tensors of a layer, and places of their scales
TYPES = torch.bfloat16, torch.float32  # of x
VIEWS = "scales", "inverses", "noted"


class _Float8:
    """What a layer in E4M3 has beside its own."""

    scaling: Scaling
    float8_scales: Tensor  # [3], views of those of all layers
    float8_inverses: Tensor  # [3, 4]
    float8_noted: Tensor

    def _begin(self: Any, scaling: Scaling, place: int) -> None:
        self.scaling, self._place = scaling, place
        for name in VIEWS:
            of_all = getattr(scaling, name)
            self.register_buffer(f"float8_{name}", of_all[EACH * place :][:3], persistent=False)

    def __setstate__(self: Any, state: dict) -> None:
        """pickle makes tensors of their own of views. Versions before wrote no place."""
        super().__setstate__(state)  # type: ignore[misc]
        place = state.get("_place", self.float8_scales.storage_offset() // EACH)
        self._begin(self.scaling, place)

    def _apply(self: Any, *arguments: Any, **named: Any) -> Any:
        """Whatever happens to the weights, the scales stay those of all layers."""
        kept = {name: self._buffers.pop(f"float8_{name}") for name in VIEWS}
        try:
            return super()._apply(*arguments, **named)  # type: ignore[misc]
        finally:
            self._buffers.update({f"float8_{name}": view for name, view in kept.items()})

    def _multiply(self: Any, input: Tensor, function: type[Function], *operands: object) -> Tensor:
        is_first = not self.scaling.has_begun
        if is_first and _is_compiling():
            raise RuntimeError(
                "float8: expected a first step that is not compiled: put forward and backward into "
                "`with float8_step(model):`, and let the Scaling follow() the optimizer"
            )
        if input.dtype not in TYPES or input.shape[-1] != self.in_features:
            raise TypeError(
                f"float8: expected x [..., {self.in_features}] in bfloat16 or float32, got "
                f"{tuple(input.shape)} in {input.dtype}"
            )
        weight = _weight(self)
        if weight.dtype is not torch.float32 or weight.device != self.float8_scales.device:
            raise TypeError(
                f"float8: expected weights in float32 on {self.float8_scales.device}, where "
                f"to_float8_ has found them, got {weight.dtype} on {weight.device}"
            )
        x = input.reshape(-1, self.in_features)
        if reason := float8.refuse_tokens(x.shape[0]):
            raise ValueError(f"float8: {reason}")
        state = self.float8_scales, self.float8_inverses, self.float8_noted
        y = function.apply(x, *operands, *state, is_first)
        return y.view(*input.shape[:-1], self.out_features)


class Float8Linear(_Float8, nn.Linear):
    """nn.Linear in E4M3."""

    def forward(self, input: Tensor) -> Tensor:
        if not self.training:
            return super().forward(input)
        return self._multiply(input, _Dense, self.weight, self.bias)


class Float8SparseLinear(_Float8, SparseLinear):
    """SparseLinear of a two-way pattern in E4M3."""

    def forward(self, input: Tensor) -> Tensor:
        if not self.training:
            return super().forward(input)
        sizes = self.out_features, self.in_features
        operands = self.values, self.bias, self.row_offsets, self.col_indices, *sizes
        return self._multiply(input, _TwoWay, *operands)


def to_float8_(model: nn.Module, filter_fn: Callable | None = None) -> Scaling:
    """Make the linear layers of `model`, in place, train in E4M3: its SparseLinear, which must have
    two-way patterns, and where it has none its nn.Linear, those that sparsify_ would take.

    The weights stay the same Parameters, in float32, so it may have an optimizer; move the model to
    its GPU before. ValueError, TypeError or NotImplementedError says which layer cannot, and the
    model is as it was."""
    chosen: dict[str, Any] = dict(sparsifiable(model, filter_fn))
    if any(isinstance(m, SparseLinear) for m in chosen.values()):
        chosen = {name: m for name, m in chosen.items() if isinstance(m, SparseLinear)}
    if not chosen:
        raise ValueError("float8: expected linear layers, the model has none that could take it")
    for name, layer in chosen.items():
        if reason := _refuse(layer):
            raise type(reason)(f"float8: {name}: {reason}")
    devices = {_weight(layer).device for layer in chosen.values()}
    if len(devices) > 1:
        raise ValueError(f"float8: expected all layers on one GPU, got {sorted(map(str, devices))}")
    is_two_way = any(isinstance(layer, SparseLinear) for layer in chosen.values())
    scaling = Scaling(len(chosen), devices.pop(), is_two_way)
    for place, layer in enumerate(chosen.values()):
        is_sparse = isinstance(layer, SparseLinear)
        layer.__class__ = Float8SparseLinear if is_sparse else Float8Linear
        layer._begin(scaling, place)
    return scaling


def _weight(layer: Any) -> Tensor:
    return layer.values if isinstance(layer, SparseLinear) else layer.weight


def _refuse(layer: Any) -> Exception | None:
    is_sparse, weight = isinstance(layer, SparseLinear), _weight(layer)
    if isinstance(layer, _Float8):
        return ValueError("it trains in float8 already")
    refuse = float8.refuse_two_way if is_sparse else float8.refuse_dense
    if reason := refuse(weight.device):
        return NotImplementedError(reason)
    if weight.dtype is not torch.float32:
        return TypeError(f"expected weights in float32, got {weight.dtype}")
    if reason := float8.refuse_size(layer.out_features, layer.in_features):
        return ValueError(reason)
    if is_sparse:
        operands = layer.row_offsets, layer.col_indices, layer.out_features, layer.in_features
        if float8.pattern_of(*operands) is None:
            return ValueError(float8.NOT_TWO_WAY)
    return None


def scaling_of(model: nn.Module) -> Scaling | None:
    """What to_float8_ has given for this model; None for another one."""
    return next((m.scaling for m in model.modules() if isinstance(m, _Float8)), None)


@contextmanager
def float8_step(model: nn.Module) -> Iterator[None]:
    """Forward and backward of any model: the first ones in float8 without torch.compile."""
    scaling = scaling_of(model)
    if scaling is None or scaling.has_begun:
        yield
        return
    with torch.compiler.set_stance("force_eager"):
        yield


def _own(scales: Tensor, inverses: Tensor) -> tuple[Tensor, Tensor]:
    """Copies for one pass of one call in a first step: other calls of the layer have others."""
    return scales.clone(), inverses.clone()


def _find(t: Tensor, which: int, scales: Tensor, inverses: Tensor) -> None:
    """The scale of t, by t itself."""
    scale = scale_of(largest_of(t))
    scales[which].copy_(scale[0])
    inverses[which].copy_(1 / scale)


def _cast(
    x: Tensor, which: int, scales: Tensor, inverses: Tensor, noted: Tensor, is_first: bool
) -> tuple[Tensor, Tensor | None]:
    """x in E4M3; and the largest of its rows, where nobody has noted it."""
    if is_first:
        _find(x, which, scales, inverses)
    scale, noted = scales[which : which + 1], noted[which : which + 1]
    if _is_compiling():
        return cast(x, scale), largest_of_rows(x)
    return _ops.float8_cast(x, scale, noted), None


def _scaled(y: Tensor, inverses: Tensor, which: int, bias: Tensor | None) -> Tensor:
    """y times the inverses of its operands' scales, + bias."""
    inverse = inverses[which, :1] * inverses[W, :1]
    if _is_compiling():  # dx: the first steps are not compiled
        return (y.float() * inverse).bfloat16()
    bias = None if bias is None else bias.bfloat16()
    return e4m3.finish(y, inverse.bfloat16(), bias)  # a power of two


def _once_differentiable(backward: Callable[..., tuple]) -> Callable[..., tuple]:
    """As torch's, with which gradients have no graph, and nothing says so, where dy needs none."""
    refusing = once_differentiable(backward)

    @wraps(backward)
    def run(ctx: Any, dy: Tensor) -> tuple:
        if torch.is_grad_enabled() and not _is_compiling():
            dy = dy.detach().requires_grad_()
        return refusing(ctx, dy)

    return run


class _TwoWay(Function):
    """y = x W^T + bias, with W at a two-way pattern."""

    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        values: Tensor,
        bias: Tensor | None,
        row_offsets: Tensor,
        col_indices: Tensor,
        n: int,
        k: int,
        scales: Tensor,
        inverses: Tensor,
        noted: Tensor,
        is_first: bool,
    ) -> Tensor:
        if is_first:
            scales, inverses = _own(scales, inverses)
            _find(values, W, scales, inverses)  # which the product casts
        state = scales, inverses, noted
        x8, largest = _cast(x, X, *state, is_first)
        pattern, needs_dx = (row_offsets, col_indices), ctx.needs_input_grad[0]
        operands = values, scales, noted, *pattern, n, k, needs_dx
        rounded = None if is_first or bias is None else bias.bfloat16()
        y, operand_t = _ops.float8_spmm(x8, largest, *operands, rounded, not is_first)
        if is_first:
            y = _scaled(y, inverses, X, bias)
        ctx.save_for_backward(x8, operand_t, *pattern, *state)
        ctx.settings = n, k, x.dtype, is_first, needs_dx
        return y

    @staticmethod
    @_once_differentiable
    def backward(ctx: Any, dy: Tensor) -> tuple:
        x8, operand_t, row_offsets, col_indices, scales, inverses, noted = ctx.saved_tensors
        n, k, x_dtype, is_first, needs_dx = ctx.settings
        if is_first:
            scales, inverses = _own(scales, inverses)
        dy8, largest = _cast(dy, DY, scales, inverses, noted, is_first)
        operands = x8, operand_t, inverses, noted, row_offsets, col_indices, n, k, needs_dx
        dx, dvalues, dbias = _ops.float8_spmm_gradients(dy8, largest, *operands)
        dx = _scaled(dx, inverses, DY, None).to(x_dtype) if needs_dx else None
        return dx, dvalues, dbias if ctx.needs_input_grad[2] else None, *(None,) * 8


class _Dense(Function):
    """The same of a dense W."""

    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        scales: Tensor,
        inverses: Tensor,
        noted: Tensor,
        is_first: bool,
    ) -> Tensor:
        if is_first:
            scales, inverses = _own(scales, inverses)
        state = scales, inverses, noted
        x8, largest = _cast(x, X, *state, is_first)
        w8, largest_w = _cast(weight, W, *state, is_first)
        rounded = None if bias is None else bias.bfloat16()
        y = _ops.float8_linear(x8, largest, w8, largest_w, inverses, noted, rounded)
        ctx.save_for_backward(x8, w8, *state)
        ctx.settings = x.dtype, is_first
        return y

    @staticmethod
    @_once_differentiable
    def backward(ctx: Any, dy: Tensor) -> tuple:
        x8, w8, scales, inverses, noted = ctx.saved_tensors
        x_dtype, is_first = ctx.settings
        if is_first:
            scales, inverses = _own(scales, inverses)
        dy8, largest = _cast(dy, DY, scales, inverses, noted, is_first)
        needs_dx, _, needs_dbias, *_ = ctx.needs_input_grad
        operands = x8, w8, inverses, noted, needs_dx
        dx, dw, dbias = _ops.float8_linear_gradients(dy8, largest, *operands)
        dx = dx.to(x_dtype) if needs_dx else None
        return dx, dw, dbias if needs_dbias else None, *(None,) * 4
