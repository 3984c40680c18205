"""PackedLinear, a layer for inference on a GPU, and pack_, which puts it into a model."""

import torch
from torch import Tensor, nn

from ..kernels.cuda import e4m3
from ..kernels.cuda.choose import pack
from ..kernels.cuda.compressed import TwoOfFourE4m3, pack_two_of_four
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
    each call by one scale (an infinity or NaN there makes NaN of its token). No gradient, and no way back to CSR: keep the
    checkpoint. Not for two CUDA streams at the same time (kernels/cuda/few_tokens.py says why). Its
    buffers are in no state_dict. Each call checks their types and sizes, but not what stands in
    them: to average or write them by hand may lead a kernel anywhere.

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
        cls, linear: SparseLinear, tokens: int = 1, dtype: torch.dtype | None = None
    ) -> "PackedLinear":
        """The same function, laid out for calls of about so many tokens; with dtype
        torch.float8_e4m3fn rounded to that, for many. TypeError unless its values are bfloat16 or
        float16; pack_() says what E4M3 takes."""
        bias = None if linear.bias is None else linear.bias.detach().to(linear.values.dtype)
        weight = linear.weight.detach()
        packed = pack_two_of_four(weight, dtype) if dtype else pack(weight, tokens)
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
        if x.device.type != "cuda" or x.device != self.arrived.device:
            raise NotImplementedError(
                f"PackedLinear: expected x on the weight's GPU, got x on {x.device} and the weight "
                f"on {self.arrived.device}"
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
            # What made x casts it too.
            x8, factors = e4m3.traced(x, self.scales)
            y = spmm_e4m3(x8, factors, self.operand, self.out_features, self.bias)
            return y.view(*shape, self.out_features)
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

    def extra_repr(self) -> str:
        return (
            f"in_features={self.in_features}, out_features={self.out_features}, "
            f"bias={self.bias is not None}, nnz={self.nnz}, layout={self.layout}"
        )


def pack_(model: nn.Module, tokens: int = 1, dtype: torch.dtype | None = None) -> nn.Module:
    """Replace every SparseLinear of `model` by a PackedLinear, in place, and return the model.

    For inference on a GPU, in calls of about so many tokens (the batch, in generation): CSR and
    values are dropped. TypeError, and an unchanged model, unless all their values are bfloat16 or
    float16.

    With dtype=torch.float8_e4m3fn all products run in E4M3 on sparse tensor cores, for calls of
    many tokens: weights are rounded with a scale for each row, x in each call with one scale.
    An error names the layer that cannot: its values must be bfloat16, its pattern two-way, its
    sizes multiples of 32; and the GPU of compute capability 9.0.
    """
    if dtype not in (None, e4m3.DTYPE):
        raise ValueError(f"dtype: expected torch.float8_e4m3fn or None, got {dtype}")

    def replace(name: str, module: nn.Module) -> nn.Module | None:
        if not isinstance(module, SparseLinear):
            return None
        try:
            return PackedLinear.from_sparse(module, tokens, dtype)
        except (TypeError, ValueError, NotImplementedError) as error:
            raise type(error)(f"pack_: {name or 'the model'}: {error}") from None

    return replace_modules(model, replace)
