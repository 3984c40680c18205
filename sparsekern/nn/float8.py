"""Training in E4M3: linear layers whose three products take operands of 8 bits, dense or two-way.

kernels/float8.py has the recipe of the scales. What is cast stays what it was elsewhere: weights
are float32, and results, gradients and all between the layers as autocast has them. Outside of
training mode a layer is the one that it was. Compiled, casts and scales go into the kernels that
make and read the operands; eager, each is a kernel of its own.
"""

import warnings
import weakref
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd import Function
from torch.autograd.function import once_differentiable

from .. import registered_float8  # noqa: F401  (its ops)
from ..kernels.cuda import e4m3, float8
from ..kernels.float8 import HISTORY, cast, largest_of, largest_of_rows, next_scale, scale_of
from .convert import sparsifiable
from .linear import SparseLinear

_ops = torch.ops.sparsekern
_is_compiling = torch.compiler.is_compiling
X, W, DY = range(3)  # tensors of a layer, and places of their scales
# Floats of a layer in what all layers share: so its views begin on multiples of 16 bytes. cuBLAS
# takes scales from there alone, and torch.compile reads and writes results of an op in vectors only
# where all of its operands do.
EACH = 4
TYPES = torch.bfloat16, torch.float32  # of x
SLACK = 3  # powers of two by which W's scale is smaller than need be, when exponents are chosen
FIRST_STEPS = 3  # at most: layers that begin at 0, or a rate that does, take as many to show values


class Scaling:
    """The scales of all layers of a model, and what was largest in the last steps.

    They stay for all micro-batches of a step; advance() after the optimizer's step, which follow()
    sees to, makes the next ones. In the first step each tensor has a scale of its own, and nothing
    may be compiled: float8_step() around forward and backward keeps torch.compile away. Where some
    tensor was 0 all through it, the next step is a first one, too, up to FIRST_STEPS.

    cuSPARSELt takes a factor from the host alone. So after the first steps the scales of x and W of
    a two-way layer are 2^exponent together: W's is smaller than need be and gives way to x. Where
    it cannot any more, settle() finds other exponents. `wanted` are the scales without that rule: a
    tensor that is always 0 keeps its own, whatever the other has to give way to.

    A CUDA graph keeps the exponents that it was captured with. So then advance() leaves them alone
    and warns, and settle(), which changes them, says that it has."""

    STATE = "scales", "wanted", "noted", "history"

    def __init__(self, layers: int, device: torch.device | str, is_two_way: bool = False):
        self.scales = torch.ones(EACH * layers, device=device)
        self.wanted = torch.ones(EACH * layers, device=device)
        self.inverses = torch.ones(EACH * layers, EACH, device=device)
        self.noted = torch.zeros(EACH * layers, device=device)
        self.history = torch.zeros(HISTORY, EACH * layers, device=device)
        self.has_begun = False  # the first steps are over
        self._first_steps = 0  # that were taken
        self.is_two_way = is_two_way
        self.exponents = torch.zeros(layers, dtype=torch.int32)  # on the host
        self._products = torch.ones(layers, device=device)  # 2^exponent
        self._is_off = torch.zeros(1, dtype=torch.bool, device=device)
        self._begin()

    def __setstate__(self, state: dict) -> None:
        self.__dict__.update(state)
        self._begin()

    def _begin(self) -> None:
        self._notes = [noted.data_ptr() for noted in self.noted.split(EACH)]  # where layers note
        self._tell()
        weakref.finalize(self, float8.forget_exponents, self._notes)

    def follow(self, optimizer: torch.optim.Optimizer) -> None:
        """Advance after each of its steps. A replay of a CUDA graph is none."""
        optimizer.register_step_post_hook(lambda *_: self.advance())

    def advance(self) -> None:
        """From the scales of one step to those of the next. Waits for the GPU in the first steps,
        and of two-way layers in each that no CUDA graph takes."""
        largest = torch.where(self.noted.isfinite(), self.noted, 0.0)
        self.history.copy_(torch.cat([largest.unsqueeze(0), self.history[:-1]]))
        self.noted.zero_()
        if not self.has_begun:
            self._first_steps += 1
            is_last = self._first_steps == FIRST_STEPS
            self.has_begun = is_last or bool(_of_tensors(self.history).any(0).all())
        self._choose()
        if not self.is_two_way or torch.cuda.is_current_stream_capturing():
            return
        if float8.captured.isdisjoint(self._notes):
            self.settle()
        elif self._is_off.item():
            warnings.warn(
                "float8: scales have outgrown the factors of products, which a CUDA graph was "
                "captured with: call settle() of the Scaling and capture anew, or "
                "sparsekern.nn.forget_graphs_(model) where no graph is replayed any more",
                stacklevel=2,
            )

    def settle(self) -> bool:
        """Whether exponents had to change: then graphs that were captured before are to be captured
        anew. For the time between two steps; after every few, as it waits for the GPU."""
        if not (self.has_begun and self._is_off.item()):
            return False
        float8.captured.difference_update(self._notes)
        of_x, of_w, _ = _of_tensors(self.wanted).unbind(1)
        self._take((of_x.log2() + of_w.log2() - SLACK).round().int().cpu())
        self._choose()
        return True

    def _choose(self) -> None:
        """The scales of the next step."""
        self.wanted.copy_(next_scale(self.wanted, self.history))
        scales = self.wanted.clone()
        if self.is_two_way and self.has_begun:
            of_x, of_w, _ = _of_tensors(scales).unbind(1)
            slack = of_x * of_w / self._products
            self._is_off.copy_(((slack < 2) | (slack > 4.0**SLACK)).any())
            of_w.copy_(torch.minimum(self._products / of_x, of_w))
            of_x.copy_(self._products / of_w)
        self.scales.copy_(scales)
        self._invert()

    def _invert(self) -> None:
        self.inverses.copy_(self.scales.reciprocal().unsqueeze(1))

    def _take(self, exponents: Tensor) -> None:
        self.exponents.copy_(exponents)
        self._products.copy_(torch.exp2(self.exponents.float()))
        self._tell()

    def _tell(self) -> None:
        """Whoever multiplies finds the exponents by these addresses."""
        float8.exponents.update(zip(self._notes, self.exponents.tolist(), strict=True))

    def _parts(self) -> dict[str, Tensor]:
        """[..., layers, 3] of each part of the state."""
        return {name: _of_tensors(getattr(self, name)) for name in self.STATE}

    def state_dict(self) -> dict[str, Tensor | int]:
        state: dict[str, Tensor | int]
        state = {name: t.flatten(-2).to("cpu", copy=True) for name, t in self._parts().items()}
        if self.is_two_way:
            state["exponents"] = self.exponents.clone()
        return state | {"has_begun": self.has_begun, "first_steps": self._first_steps}

    def load_state_dict(self, state: dict) -> None:
        """ValueError for the state of another model, RuntimeError for other exponents than those of
        a CUDA graph; the scales are as they were then."""
        own = self._parts()
        shapes = {name: tuple(t.flatten(-2).shape) for name, t in own.items()}
        if "exponents" in state:
            shapes["exponents"] = tuple(self.exponents.shape)
        for name, shape in shapes.items():
            given = state.get(name)
            if not isinstance(given, Tensor) or given.shape != shape:
                got = tuple(given.shape) if isinstance(given, Tensor) else given
                raise ValueError(f"float8: {name}: expected {shape}, got {got}")
        exponents = state.get("exponents")  # a dense run has none
        is_same = exponents is not None and torch.equal(exponents.cpu(), self.exponents)
        if float8.captured.intersection(self._notes) and not is_same:
            raise RuntimeError(
                "float8: a CUDA graph was captured with the factors of this model, which would not "
                "see others: say with sparsekern.nn.forget_graphs_(model) that it is replayed no "
                "more, load the state, and capture anew"
            )
        for name, t in own.items():
            t.copy_(state[name].view(t.shape))
        self._invert()
        self.has_begun = bool(state.get("has_begun"))
        self._first_steps = int(state.get("first_steps", 0))
        if exponents is not None:
            self._take(exponents)
        else:
            self._is_off.fill_(self.is_two_way)
            self.settle()


def _of_tensors(t: Tensor) -> Tensor:
    """[..., layers, 3] of what all layers share, [..., EACH * layers]."""
    return t.unflatten(-1, (-1, EACH))[..., :3]


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
        """pickle makes tensors of their own of views."""
        super().__setstate__(state)  # type: ignore[misc]
        self._begin(self.scaling, self._place)

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
    @once_differentiable
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
    @once_differentiable
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
