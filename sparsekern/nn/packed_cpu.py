"""The layer that pack_ puts into a model on a CPU."""

from typing import Any

from torch import Tensor, nn

from ..kernels.cpu.lanes import Lanes, writes_out
from ..kernels.operands import native
from ..ops import spmm_lanes
from ..registered import prepare_spmm_lanes
from .packed import PackedLinear


class PackedLinearOnCpu(PackedLinear):
    """A SparseLinear for inference on a CPU: its weight as the fastest kernel for up to 4 tokens
    reads it.

    At 50, 75, 90 and 95 % sparsity it takes 0.76, 0.44, 0.22 and 0.13 of the bytes of a dense
    float32 weight, in bfloat16 0.92, 0.53, 0.26 and 0.16 of those of a dense bfloat16 one.
    SparseLinear is as fast from 8 tokens on, and reads less where weights come from memory; for
    many tokens the weight is written out for each call. No gradient, and no way back to CSR: keep
    the checkpoint. Its buffers are in no state_dict.

    Args:
        packed: W [out_features, in_features].
        nnz: stored values of W.
        bias: [out_features] of the dtype of W, or None.
    """

    def __init__(self, packed: Lanes, nnz: int, bias: Tensor | None = None):
        nn.Module.__init__(self)
        packed.check()
        if bias is not None and bias.shape != (packed.n,):
            raise ValueError(f"bias: expected shape ({packed.n},), got {tuple(bias.shape)}")
        self.in_features, self.out_features, self.nnz = packed.k, packed.n, nnz
        self.layout, self.dtype, self.numbers = "lanes", packed.values.dtype, []
        self.values_dtype = self.dtype
        self._names = list(Lanes._fields[2:])
        for name in self._names:
            self.register_buffer(name, getattr(packed, name), persistent=False)
        self.register_buffer("bias", bias, persistent=False)
        self._calls = native and native.packed_calls()

    def explain(self, x: Tensor | int) -> str:
        """What a call with x [..., in_features], or with so many tokens, runs."""
        m = self._tokens_of(x)
        way = "written out, then torch.mm" if writes_out(m, self._packed()) else "16 rows in lanes"
        return f"{m} tokens -> {self.layout}: {way}, {self.packed_bytes} bytes"

    def _prepare(self, x: Tensor) -> object:
        return prepare_spmm_lanes(x, self._packed(), self._buffers["bias"])

    def _multiply(self, input: Tensor) -> Tensor:
        x, packed = input, self._packed()
        if not x.is_cpu or not packed.values.is_cpu:
            raise NotImplementedError(
                f"PackedLinear: expected x and the weight on a CPU, for which it was packed, got x "
                f"on {x.device} and the weight on {packed.values.device}; for a GPU, move the "
                "model there before pack_"
            )
        self._check(x)
        bias = self._buffers["bias"]
        if x.ndim == 2:
            return spmm_lanes(x, packed, bias)
        y = spmm_lanes(x.reshape(x.shape[:-1].numel(), packed.k), packed, bias)
        return y.view(*x.shape[:-1], packed.n)

    def _packed(self) -> Lanes:
        b: dict[str, Any] = self._buffers  # faster than attributes
        sizes = self.out_features, self.in_features
        return Lanes(*sizes, b["part_steps"], b["heads"], b["cols"], b["values"])
