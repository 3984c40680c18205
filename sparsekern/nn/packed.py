"""PackedLinear, a layer for inference on a GPU, and what it takes to make one, or that of
packed_cpu.py."""

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.autograd import forward_ad

from ..casts import is_any_autocast_enabled, wanted_dtype
from ..kernels.cpu.lanes import pack as pack_for_cpu
from ..kernels.cuda import e4m3
from ..kernels.cuda.choose import pack_for
from ..kernels.cuda.compressed import FOUND, TwoOfFourE4m3, pack_two_of_four
from ..kernels.cuda.explained import explain_packed
from ..kernels.cuda.layout import Packed
from ..kernels.cuda.row_scales import check_values_type
from ..kernels.operands import native
from ..registered import prepare_spmm_packed, spmm_e4m3, spmm_packed
from ..tensor import SparseTensor
from .checks import cannot_be_set
from .linear import SparseLinear
from .shared import refuse_weights

_is_compiling = torch.compiler.is_compiling


class PackedWeight(NamedTuple):
    """What models ask of a weight before they call its layer; its numbers are nowhere."""

    shape: torch.Size
    dtype: torch.dtype  # that x must have
    device: torch.device

    @classmethod
    def __torch_function__(cls, func, types, args=(), kwargs=None):
        """Its presence keeps TransformerEncoderLayer from its kernel for dense weights."""
        name = getattr(func, "__name__", func)
        raise TypeError(f"{name}: a packed weight holds no numbers: call its layer")


class PackedLinear(nn.Module):
    """A SparseLinear for inference on a GPU: its weight in the layout that the CUDA kernels read,
    or in two of them.

    At 75 % sparsity it takes 0.32 to 0.37 of the bytes of a dense 16-bit weight if packed for one
    or two tokens (the less, the larger it is), 0.43 for more; with values of 8 bits, which pack_
    may make, 0.20, and 0.25 to 0.27. Up to 64 tokens (`pairs` on Hopper: 256) W is read in that
    form; above, it is written out for each call, unless a dense copy is kept. A two-way pattern
    that is packed for many tokens runs on sparse tensor cores, in 0.56 of the bytes, or 0.31 in
    E4M3, with x cast in each call; some free places count as 0 times x then: an infinity or NaN
    makes NaN, in E4M3 of the whole token. Under autocast the result has its dtype, as of nn.Linear,
    and the product that of W. No gradient, and no way back to CSR: keep the checkpoint.
    Not for two CUDA streams at the same time (kernels/cuda/few_tokens.py says why). Its buffers are
    in no state_dict. Each call checks their types and sizes, but not what stands in them: to
    average or write them by hand may lead a kernel anywhere. `layout` names what is held; explain()
    says what a call runs.

    Args:
        packed: W [out_features, in_features], in one layout or in several, each another one.
        bias: [out_features] of the dtype of W, or None.
    """

    def __init__(self, packed: Packed | Sequence[Packed], bias: Tensor | None = None):
        super().__init__()
        forms = [packed] if isinstance(packed, Packed) else list(packed)
        for form in forms:
            form.check()
        names = [form.name for form in forms]
        kinds = {
            (form.n, form.k, form.nnz, form.dtype, form.values_dtype, form.arrived.device)
            for form in forms
        }
        if len(kinds) != 1 or len(set(names)) < len(names):
            raise ValueError(f"packed: expected one W in different layouts, got {names}, {kinds}")
        self.layout = ",".join(names)
        first = forms[0]
        if bias is not None and bias.shape != (first.n,):
            raise ValueError(f"bias: expected shape ({first.n},), got {tuple(bias.shape)}")
        self.in_features, self.out_features = first.k, first.n
        self.dtype, self.values_dtype, self.nnz = first.dtype, first.values_dtype, first.nnz
        self.numbers = [number for form in forms for number in form.numbers()]
        self._names = []
        for form in forms:
            for name, tensor in form.tensors().items():
                self._names.append(f"{form.name}_{name}")
                self.register_buffer(self._names[-1], tensor, persistent=False)
        self.register_buffer("bias", bias, persistent=False)
        self._calls = native and native.packed_calls()

    @classmethod
    def from_sparse(
        cls,
        linear: SparseLinear,
        tokens: int | Sequence[int] = 1,
        dense: bool = False,
        dtype: torch.dtype | None = None,
        largest: float | None = None,
        values: torch.dtype | None = None,
    ) -> "PackedLinear":
        """The same function, laid out for calls of about so many tokens where its values are, as of
        pack_. TypeError unless they are bfloat16 or float16, on a CPU float32 or bfloat16. largest:
        of what x holds, where that is known, for dtype torch.float8_e4m3fn."""
        check_eight_bits(dtype, values, dense)
        weight = linear.weight.detach()
        bias: Tensor | None = linear.bias
        if bias is not None:
            bias = bias.detach().to(linear.values.dtype, copy=True)
        layer = packed_layer(weight, bias, tokens, dense, dtype, largest, values)
        return layer.train(linear.training)

    def _apply(self, fn, recurse=True):
        """Moves go through. Casts (half(), float()) do not: indices lie in the bits of the floats,
        which no cast keeps, so the layer stays as it was packed and wants x in its dtype."""

        def move(tensor: Tensor) -> Tensor:
            result = fn(tensor)
            if tensor.is_meta and not result.is_meta:  # to_empty: kernels would read anything
                raise NotImplementedError("PackedLinear: it has no way back from meta")
            return result if result.dtype == tensor.dtype else tensor.to(result.device)

        moved = super()._apply(move, recurse)
        self._calls = native and native.packed_calls()  # which would keep what has moved
        return moved

    def __getstate__(self) -> dict:
        return {**self.__dict__, "_calls": None}

    def __setstate__(self, state: dict) -> None:
        super().__setstate__(state)
        self._calls = native and native.packed_calls()

    @property
    def packed_bytes(self) -> int:
        """Bytes of the weight, in all layouts that are held."""
        return sum(getattr(self, name).nbytes for name in self._names)

    @property
    def device(self) -> torch.device:
        return getattr(self, self._names[0]).device

    @property
    def weight(self) -> PackedWeight:
        """Its shape [out_features, in_features], dtype and device."""
        shape = torch.Size([self.out_features, self.in_features])
        return PackedWeight(shape, self.dtype, self.device)

    def __setattr__(self, name: str, value: Any) -> None:
        if name == "weight":
            raise cannot_be_set(self, name, "set it before pack_")
        super().__setattr__(name, value)

    @property
    def _x_exponent(self) -> int | None:
        """Of the power of two times which _multiply_e4m3() takes x; None where it takes none."""
        is_given = self.layout == TwoOfFourE4m3.name and self.numbers[1] != FOUND
        return self.numbers[1] if is_given else None

    def _multiply_e4m3(self, x8: Tensor) -> Tensor:
        """y [M, N] of x [M, K] times 2^_x_exponent in E4M3, cast by what made it."""
        exponent, given = self.numbers
        operand, alpha = getattr(self, self._names[0]), 2.0 ** -(exponent + given)
        return spmm_e4m3(x8, operand, self.out_features, alpha, self.bias)

    def explain(self, x: Tensor | int) -> str:
        """What a call with x [..., in_features], or with so many tokens, runs: layout and kernel,
        bytes, whether W is written out or dense runs, and how long that took where it was
        measured. `sparsekern.explain(x, layer)` is the same."""
        return explain_packed(self._tokens_of(x), self._parts())

    def _tokens_of(self, x: Tensor | int) -> int:
        """M of a call with x, or that number."""
        if not isinstance(x, Tensor):
            if type(x) is not int or x < 0:
                raise ValueError(
                    f"x: expected a Tensor or a number of tokens of at least 0, got {x!r}"
                )
            return x
        if x.ndim == 0 or x.shape[-1] != self.in_features:
            raise ValueError(
                f"x: expected [..., {self.in_features}] or a number of tokens, got {tuple(x.shape)}"
            )
        return x.shape[:-1].numel()

    def _load_from_state_dict(self, state_dict, prefix, *others):
        refuse_weights(state_dict, prefix, others[-1])

    def forward(self, input: Tensor) -> Tensor:  # the name that nn.Linear gives x
        library = None if _is_compiling() else native
        dtype = wanted_dtype(input) if library is None or is_any_autocast_enabled() else None
        if dtype is not None:
            input = input.to(self.dtype)
        y = library.call_packed(self._calls, self._buffers, input) if library else None
        if y is None:
            y = self._multiply(input)
        elif y is False and library:  # the first such x
            y = self._multiply(input)
            bias = self._buffers["bias"]
            if bias is None or bias.is_contiguous():  # a kept call reads it where it lies
                library.keep_packed(self._calls, self._buffers, input, self._prepare(input))
        return y if dtype is None else y.to(dtype)

    def _prepare(self, x: Tensor) -> object:
        """The call for all x of this shape, of which _multiply() takes one."""
        return prepare_spmm_packed(x, *self._parts(), self.bias)

    def _multiply(self, input: Tensor) -> Tensor:
        if input.device.type != "cuda" or input.device != self.device:
            raise NotImplementedError(
                f"PackedLinear: expected x on the weight's GPU, got x on {input.device} and the "
                f"weight on {self.device}"
            )
        self._check(input)
        shape, x = input.shape[:-1], input.reshape(input.shape[:-1].numel(), self.in_features)
        if self.layout == TwoOfFourE4m3.name and torch.compiler.is_compiling() and x.numel():
            y = self._traced(x)
        else:
            y = spmm_packed(x, *self._parts(), self.bias)
        return y.view(*shape, self.out_features)

    def _check(self, x: Tensor) -> None:
        """RuntimeError for x of another type or size, or with a gradient to come."""
        refuse_derivatives(x)
        if x.dtype != self.dtype:
            raise RuntimeError(f"PackedLinear: expected x of dtype {self.dtype}, got {x.dtype}")
        if x.ndim == 0 or x.shape[-1] != self.in_features:
            raise RuntimeError(
                f"PackedLinear: expected x [..., {self.in_features}], got {tuple(x.shape)}"
            )

    def _traced(self, x: Tensor) -> Tensor:
        """y [M, N] in E4M3 for torch.compile: what makes x casts it, and what takes y scales it."""
        x8, inverse = e4m3.traced(x, self._x_exponent)
        if inverse is None:
            return self._multiply_e4m3(x8)
        exponent, operand = self.numbers[0], getattr(self, self._names[0])
        y = spmm_e4m3(x8, operand, self.out_features, 2.0**-exponent) * inverse
        return y if self.bias is None else y + self.bias

    def _parts(self) -> tuple[str, int, int, int, list[int], list[Tensor]]:
        """W as the op gets it."""
        tensors = [getattr(self, name) for name in self._names]
        sizes = self.out_features, self.in_features, self.nnz
        return self.layout, *sizes, self.numbers, tensors

    def extra_repr(self) -> str:
        return (
            f"in_features={self.in_features}, out_features={self.out_features}, "
            f"bias={self.bias is not None}, nnz={self.nnz}, layout={self.layout}"
        )


def refuse_derivatives(x: Tensor) -> None:
    """RuntimeError if one of the product with respect to x is wanted."""
    is_wanted = torch.is_grad_enabled() and x.requires_grad
    if forward_ad._current_level >= 0 and not is_wanted:
        is_wanted = forward_ad.unpack_dual(x).tangent is not None
    if is_wanted:
        raise RuntimeError(
            "PackedLinear: it has no gradient: call it under torch.no_grad() or "
            "torch.inference_mode(), or use SparseLinear to train"
        )


def is_for_cpu(weight: SparseTensor) -> bool:
    """Whether it is packed for where it is, not for a GPU."""
    return weight.values.is_cpu


def packed_layer(
    weight: SparseTensor,
    bias: Tensor | None,
    tokens: int | Sequence[int],
    dense: bool,
    dtype: torch.dtype | None,
    largest: float | None,
    values: torch.dtype | None,
) -> PackedLinear:
    """The layer for calls of so many tokens where `weight` is; 8 bits are for GPUs alone."""
    if is_for_cpu(weight):
        for name, given in (("values", values), ("dtype", dtype)):
            if given is not None:
                raise NotImplementedError(
                    f"{name}: {given} is for a weight on a GPU, got one on a CPU: move the model "
                    "there before pack_"
                )
        from .packed_cpu import PackedLinearOnCpu  # a PackedLinear

        return PackedLinearOnCpu(pack_for_cpu(weight), weight.nnz, bias)
    if dtype is not None:
        return PackedLinear(pack_two_of_four(weight, dtype, largest), bias)
    return PackedLinear(pack_for(weight, token_range(tokens), dense, values), bias)


def check_eight_bits(dtype: object, values: object, dense: object) -> None:
    """ValueError unless at most one of the two is given, as a type that it may be, and `dense` is
    False then."""
    if dtype not in (None, e4m3.DTYPE):
        raise ValueError(f"dtype: expected torch.float8_e4m3fn or None, got {dtype}")
    if values is not None:
        check_values_type(values)
    if dtype is not None and values is not None:
        raise ValueError(
            f"values, dtype: expected one of the two, got {values} and {dtype}: values rounds the "
            "weight alone, dtype x too"
        )
    if dense is not False and (dtype, values) != (None, None):
        name = "dtype" if values is None else "values"
        raise ValueError(f"dense: expected False with {name}={values or dtype}")


def token_range(tokens: int | Sequence[int]) -> tuple[int, int]:
    """The least and the most number of tokens. ValueError unless 1 <= least <= most."""
    pair: tuple = (tokens, tokens)
    if isinstance(tokens, Sequence):
        pair = (*tokens[:1], *tokens[-1:]) if isinstance(tokens, range) else tuple(tokens)
    if [type(m) for m in pair] != [int, int] or not 1 <= pair[0] <= pair[1]:
        raise ValueError(
            "tokens: expected a number above 0, two of them (the least and the most), or a range, "
            f"got {tokens!r}"
        )
    return pair[0], pair[1]
