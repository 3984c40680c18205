"""PackedLinear, a layer for inference on a GPU, and pack_, which puts it into a model."""

import math
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from ..kernels.cuda import e4m3
from ..kernels.cuda.choose import pack
from ..kernels.cuda.compressed import FOUND, TwoOfFourE4m3, pack_two_of_four
from ..kernels.cuda.layout import Packed
from ..registered import spmm_e4m3, spmm_packed
from .convert import replace_modules
from .linear import SparseLinear

__all__ = ["PackedLinear", "pack_"]


class PackedLinear(nn.Module):
    """A SparseLinear for inference on a GPU: its weight in the layout that the CUDA kernels read.

    At 75 % sparsity it takes 0.32 to 0.37 of the bytes of a dense 16-bit weight if packed for one
    or two tokens (the less, the larger it is), 0.43 for more. Up to 64 tokens W is read in that
    form; above, it is written out for each call. A two-way pattern that is packed for many tokens
    runs on sparse tensor cores instead, from 0.56 of the bytes; in E4M3 from 0.31, with x cast in
    each call. There a free place counts as 0 times x: an infinity or NaN makes NaN, in E4M3 of the
    whole token. No gradient, and no way back to CSR: keep the checkpoint. Not for two CUDA streams
    at the same time (kernels/cuda/few_tokens.py says why). Its buffers are in no state_dict. Each
    call checks their types and sizes, but not what stands in them: to average or write them by hand
    may lead a kernel anywhere.

    Args:
        packed: W [out_features, in_features].
        bias: [out_features] of the dtype of W, or None.
    """

    def __init__(self, packed: Packed, bias: Tensor | None = None):
        super().__init__()
        packed.check()
        if bias is not None and bias.shape != (packed.n,):
            raise ValueError(f"bias: expected shape ({packed.n},), got {tuple(bias.shape)}")
        self.in_features = packed.k
        self.out_features = packed.n
        self.layout, self.dtype = packed.name, packed.dtype
        self.nnz, self.numbers = packed.nnz, packed.numbers()
        self._names = tuple(packed.tensors())
        for name, tensor in packed.tensors().items():
            self.register_buffer(name, tensor, persistent=False)
        self.register_buffer("bias", bias, persistent=False)

    @classmethod
    def from_sparse(
        cls,
        linear: SparseLinear,
        tokens: int = 1,
        dtype: torch.dtype | None = None,
        largest: float | None = None,
    ) -> "PackedLinear":
        """The same function, laid out for calls of about so many tokens. TypeError unless its
        values are bfloat16 or float16. With dtype torch.float8_e4m3fn in that type, as pack_()
        says; largest: of what x holds, if it is known."""
        bias = None if linear.bias is None else linear.bias.detach().to(linear.values.dtype)
        weight = linear.weight.detach()
        packed = pack_two_of_four(weight, dtype, largest) if dtype else pack(weight, tokens)
        return cls(packed, bias).train(linear.training)

    def _apply(self, fn, recurse=True):
        """Moves go through. Casts (half(), float()) do not: indices lie in the bits of the floats,
        which no cast keeps, so the layer stays as it was packed and wants x in its dtype."""

        def move(tensor: Tensor) -> Tensor:
            result = fn(tensor)
            return result if result.dtype == tensor.dtype else tensor.to(result.device)

        return super()._apply(move, recurse)

    @property
    def packed_bytes(self) -> int:
        """Bytes of the packed weight."""
        return sum(getattr(self, name).nbytes for name in self._names)

    def forward(self, x: Tensor) -> Tensor:
        device = getattr(self, self._names[-1]).device
        if x.device.type != "cuda" or x.device != device:
            raise NotImplementedError(
                f"PackedLinear: expected x on the weight's GPU, got x on {x.device} and the weight "
                f"on {device}"
            )
        if torch.is_grad_enabled() and x.requires_grad:
            raise RuntimeError("PackedLinear: it has no gradient; use SparseLinear to train")
        if x.dtype != self.dtype:
            raise RuntimeError(f"PackedLinear: expected x of dtype {self.dtype}, got {x.dtype}")
        if x.ndim == 0 or x.shape[-1] != self.in_features:
            raise RuntimeError(
                f"PackedLinear: expected x [..., {self.in_features}], got {tuple(x.shape)}"
            )
        shape, x = x.shape[:-1], x.reshape(-1, self.in_features)
        if self.layout == TwoOfFourE4m3.name and torch.compiler.is_compiling() and x.numel():
            return self._traced(x).view(*shape, self.out_features)
        y = spmm_packed(
            x,
            self.layout,
            self.out_features,
            self.in_features,
            self.nnz,
            self.numbers,
            [getattr(self, name) for name in self._names],
            self.bias,
        )
        return y.view(*shape, self.out_features)

    def _traced(self, x: Tensor) -> Tensor:
        """y [M, N] in E4M3 for torch.compile: what makes x casts it, and what takes y scales it."""
        exponent, given = self.numbers
        x8, inverse = e4m3.traced(x, None if given == FOUND else given)
        if inverse is None:
            alpha = 2.0 ** -(exponent + given)
            return spmm_e4m3(x8, self.operand, self.out_features, alpha, self.bias)
        y = spmm_e4m3(x8, self.operand, self.out_features, 2.0**-exponent) * inverse
        return y if self.bias is None else y + self.bias

    def extra_repr(self) -> str:
        return (
            f"in_features={self.in_features}, out_features={self.out_features}, "
            f"bias={self.bias is not None}, nnz={self.nnz}, layout={self.layout}"
        )


def pack_(
    model: nn.Module, tokens: int = 1, dtype: torch.dtype | None = None, example: Any = None
) -> nn.Module:
    """Replace every SparseLinear of `model` by a PackedLinear, in place, and return the model.

    For inference on a GPU, in calls of about so many tokens (the batch, in generation): CSR and
    values are dropped. Of two-way patterns and many tokens the products run on sparse tensor cores.
    An error names the layer, and the model is unchanged: TypeError unless all values are bfloat16
    or float16.

    Args:
        dtype: torch.float8_e4m3fn rounds weights and, in each call, x to E4M3, each tensor with one
            scale. For many tokens, on a GPU of compute capability 9.0. ValueError, TypeError or
            NotImplementedError unless all patterns are two-way, values bfloat16, sizes multiples of
            32, and cuSPARSELt is there.
        example: what to call the model with, once, to see how large x gets in E4M3: a tensor, a
            tuple of arguments, a dict of named ones, or a function of the model. What is eight
            times as large later becomes NaN. Without it the scale is found in each call, which
            takes longer.
    """
    if dtype not in (None, e4m3.DTYPE):
        raise ValueError(f"dtype: expected torch.float8_e4m3fn or None, got {dtype}")
    if example is not None and dtype is None:
        raise ValueError("example: it has a meaning with dtype=torch.float8_e4m3fn alone")
    largest = {} if example is None else _largest_inputs(model, example)

    def replace(name: str, module: nn.Module) -> nn.Module | None:
        if not isinstance(module, SparseLinear):
            return None
        try:
            return PackedLinear.from_sparse(module, tokens, dtype, largest.get(module))
        except (TypeError, ValueError, NotImplementedError) as error:
            raise type(error)(f"pack_: {name or 'the model'}: {error}") from None

    return replace_modules(model, replace)


def _largest_inputs(model: nn.Module, example: Any) -> dict[nn.Module, float]:
    """By each SparseLinear, the largest element of what the example brings it."""
    layers = {m: name for name, m in model.named_modules() if isinstance(m, SparseLinear)}
    found: dict[nn.Module, Tensor] = {}

    def note(module: nn.Module, arguments: tuple) -> None:
        largest = arguments[0].detach().abs().amax()
        found[module] = torch.maximum(largest, found.get(module, largest))

    hooks = [layer.register_forward_pre_hook(note) for layer in layers]
    try:
        with torch.no_grad():
            _call(model, example)
    finally:
        for hook in hooks:
            hook.remove()
    largest = {layer: value.item() for layer, value in found.items()}
    for layer, name in layers.items():
        if not math.isfinite(size := largest.get(layer, math.nan)):
            got = f"an input of {size}" if layer in largest else "none"
            raise ValueError(
                f"example: expected finite inputs of {name or 'the model'}, it brought {got}"
            )
    return largest


def _call(model: nn.Module, example: Any) -> None:
    if isinstance(example, Tensor):
        model(example)
    elif isinstance(example, tuple):
        model(*example)
    elif isinstance(example, Mapping):
        model(**example)
    elif callable(example):
        example(model)
    else:
        raise TypeError(
            "example: expected a tensor, a tuple, a dict or a function of the model, got "
            f"{type(example).__name__}"
        )
