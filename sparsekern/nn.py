"""SparseLinear, and sparsify_ / densify_ to swap it in and out of a model.

The weight is a 1-D `values` Parameter beside int32 index buffers. To optimizers, DDP, state_dict
and deepcopy it is an ordinary module, its optimizer state has nnz elements, and no momentum or
weight decay can bring a removed weight back: there is no place for it.
"""

from collections import Counter
from collections.abc import Callable

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from .kernels.layout import Packed
from .kernels.packed import name_of, pack
from .matmul import linear
from .ops import spmm_packed
from .tensor import SparseTensor

HEAD_NAMES = ("head", "lm_head")


class SparseLinear(nn.Module):
    """y [..., N] = x [..., K] @ W.T + bias, as nn.Linear with in_features K and out_features N.

    Args:
        in_features, out_features: K and N.
        row_offsets, col_indices, values: W as in SparseTensor, which checks them.
        bias: [N] or None.
    """

    def __init__(
        self,
        in_features: int,
        out_features: int,
        row_offsets: Tensor,
        col_indices: Tensor,
        values: Tensor,
        bias: Tensor | None = None,
    ):
        super().__init__()
        weight = SparseTensor(row_offsets, col_indices, values, (out_features, in_features))
        if bias is not None and bias.shape != (out_features,):
            raise ValueError(f"bias: expected shape ({out_features},), got {tuple(bias.shape)}")
        self.in_features = in_features
        self.out_features = out_features
        self.register_buffer("row_offsets", weight.row_offsets)
        self.register_buffer("col_indices", weight.col_indices)
        self.values = _parameter(values)
        self.register_parameter("bias", None if bias is None else _parameter(bias))

    @classmethod
    def from_linear(cls, linear: nn.Linear, mask: Tensor | None = None) -> "SparseLinear":
        """The weights of `linear` where the bool mask [N, K] is True; without one, where != 0.

        The bias is the same Parameter.
        """
        weight = SparseTensor.from_dense(linear.weight.detach(), mask)
        module = cls(
            linear.in_features,
            linear.out_features,
            weight.row_offsets,
            weight.col_indices,
            nn.Parameter(weight.values, requires_grad=linear.weight.requires_grad),
            linear.bias,
        )
        return module.train(linear.training)

    def to_linear(self) -> nn.Linear:
        """The nn.Linear of the same function, zeros where nothing is stored; shares the bias."""
        module = nn.Linear(self.in_features, self.out_features, bias=False, device="meta")
        weight = self.weight.detach().to_dense()
        module.weight = nn.Parameter(weight, requires_grad=self.values.requires_grad)
        module.bias = self.bias
        return module.train(self.training)

    @property
    def weight(self) -> SparseTensor:
        """W [N, K], sharing this module's tensors."""
        return SparseTensor._trusted(
            self.row_offsets, self.col_indices, self.values, self.out_features, self.in_features
        )

    def forward(self, x: Tensor) -> Tensor:
        return linear(x, self.weight, self.bias)

    def extra_repr(self) -> str:
        return (
            f"in_features={self.in_features}, out_features={self.out_features}, "
            f"bias={self.bias is not None}, nnz={self.values.shape[0]}, "
            f"sparsity={self.weight.sparsity:.4g}"
        )

    def _load_from_state_dict(
        self, state_dict, prefix, local_metadata, strict, missing_keys, unexpected_keys, error_msgs
    ):
        """Accepts another pattern than the module's own, also one with another nnz."""
        names = [prefix + name for name in ("row_offsets", "col_indices", "values")]
        if all(name in state_dict for name in names):
            parts = [state_dict[name] for name in names]
            try:
                weight = SparseTensor(*parts, (self.out_features, self.in_features))
            except (TypeError, ValueError) as error:
                error_msgs.append(f"{prefix}{error}")
                return
            # int64 indices would stay so under assign=True.
            state_dict[names[0]] = weight.row_offsets
            state_dict[names[1]] = weight.col_indices
            if weight.nnz != self.values.shape[0]:
                self.col_indices = self.col_indices.new_empty(weight.nnz)
                resize_(self.values, self.values.new_empty(weight.nnz))
        super()._load_from_state_dict(
            state_dict, prefix, local_metadata, strict, missing_keys, unexpected_keys, error_msgs
        )


class PackedLinear(nn.Module):
    """A SparseLinear for inference on a GPU: its weight in the layout that the CUDA kernels read.

    At 75 % sparsity it takes 0.32 to 0.37 of the bytes of a dense 16-bit weight if packed for one
    or two tokens (the less, the larger it is), 0.43 for more. Up to 64 tokens W is read in that
    form; above, it is written out for each call. No gradient, and no way back to CSR: keep the
    checkpoint. Not for two CUDA streams at the same time (kernels/cuda.py says why). Its buffers
    are in no state_dict. Each call checks their types and sizes, but not what stands in them: to
    average or write them by hand may lead a kernel anywhere.

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
        self.layout, self.dtype = name_of(packed), packed.dtype
        self.nnz, self.numbers = packed.nnz, packed.numbers()
        self._names = tuple(packed.tensors())
        for name, tensor in packed.tensors().items():
            self.register_buffer(name, tensor, persistent=False)
        self.register_buffer("bias", bias, persistent=False)

    @classmethod
    def from_sparse(cls, linear: SparseLinear, tokens: int = 1) -> "PackedLinear":
        """The same function, laid out for calls of about so many tokens. TypeError unless its
        values are bfloat16 or float16."""
        bias = None if linear.bias is None else linear.bias.detach().to(linear.values.dtype)
        return cls(pack(linear.weight.detach(), tokens), bias).train(linear.training)

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
        y = spmm_packed(
            x.reshape(-1, self.in_features),
            self.layout,
            self.out_features,
            self.in_features,
            self.nnz,
            self.numbers,
            [getattr(self, name) for name in self._names],
            self.bias,
        )
        return y.view(*x.shape[:-1], self.out_features)

    def extra_repr(self) -> str:
        return (
            f"in_features={self.in_features}, out_features={self.out_features}, "
            f"bias={self.bias is not None}, nnz={self.nnz}, layout={self.layout}"
        )


def pack_(model: nn.Module, tokens: int = 1) -> nn.Module:
    """Replace every SparseLinear of `model` by a PackedLinear, in place, and return the model.

    For inference on a GPU, in calls of about so many tokens (the batch, in generation): CSR and
    values are dropped. TypeError, and an unchanged model, unless all their values are bfloat16 or
    float16.
    """

    def replace(name: str, module: nn.Module) -> nn.Module | None:
        if not isinstance(module, SparseLinear):
            return None
        return PackedLinear.from_sparse(module, tokens)

    return replace_modules(model, replace)


def sparsify_(
    model: nn.Module, algorithm, filter_fn: Callable[[nn.Module, str], bool] | None = None
) -> nn.Module:
    """Replace the nn.Linear modules of `model` by SparseLinear, in place, and return the model.

    Args:
        algorithm: has `mask(name, weight)` -> bool [N, K], True where a weight is kept.
        filter_fn: filter_fn(module, name) says which nn.Linear to replace. By default all but
            those named `head` or `lm_head`.

    A weight that another module uses too (tied to an embedding) stays dense, and so does one with
    the attribute `requires_dense`. So do subclasses of nn.Linear: they compute something of their
    own. Make the optimizer afterwards: it must see the new Parameters. If an algorithm fails the
    model is unchanged.
    """
    chosen = sparsifiable(model, filter_fn)

    def replace(name: str, module: nn.Module) -> nn.Module | None:
        if name not in chosen or isinstance(module, SparseLinear):
            return None
        return SparseLinear.from_linear(module, algorithm.mask(name, module.weight.detach()))

    return replace_modules(model, replace)


def sparsifiable(
    model: nn.Module, filter_fn: Callable[[nn.Module, str], bool] | None = None
) -> dict[str, nn.Module]:
    """The layers that `sparsify_` would replace, and those that are a SparseLinear already."""
    uses = Counter(id(p) for module in model.modules() for p in module._parameters.values())

    def chosen(name: str, module: nn.Module) -> bool:
        if type(module) is nn.Linear:
            if uses[id(module.weight)] > 1 or getattr(module.weight, "requires_dense", False):
                return False
        elif not isinstance(module, SparseLinear):
            return False
        return filter_fn(module, name) if filter_fn else name.split(".")[-1] not in HEAD_NAMES

    return {name: module for name, module in model.named_modules() if chosen(name, module)}


def densify_(model: nn.Module, optimizer: Optimizer | None = None) -> nn.Module:
    """Replace every SparseLinear of `model` by its nn.Linear, in place, and return the model.

    With an optimizer, the dense weights take the place of the values in its groups and its state
    becomes dense too: zero where nothing was stored.
    """
    dense: dict[nn.Parameter, tuple[nn.Parameter, SparseLinear]] = {}

    def replace(name: str, module: nn.Module) -> nn.Module | None:
        if not isinstance(module, SparseLinear):
            return None
        linear = module.to_linear()
        dense[module.values] = linear.weight, module
        return linear

    model = replace_modules(model, replace)
    if optimizer:
        for group in optimizer.param_groups:
            group["params"] = [dense[p][0] if p in dense else p for p in group["params"]]
        for values, (weight, module) in dense.items():
            if values in optimizer.state:
                state = optimizer.state.pop(values)
                optimizer.state[weight] = {k: _densified(t, module) for k, t in state.items()}
    return model


def _densified(state, module: SparseLinear):
    """A part of the optimizer state of the module's values; `step` and the like stay."""
    if not isinstance(state, Tensor) or state.shape != module.values.shape:
        return state
    n, k = module.out_features, module.in_features
    return SparseTensor._trusted(module.row_offsets, module.col_indices, state, n, k).to_dense()


def resize_(parameter: nn.Parameter, data: Tensor) -> None:
    """Give the same Parameter other data, of another size; its gradient goes."""
    parameter.grad = None
    # A graph that is still alive (the loss of the step before) holds the parameter's node, with the
    # old size. torch replaces that node when the dtype changes, and then alone.
    other = torch.float64 if data.dtype != torch.float64 else torch.float32
    parameter.data = data.new_empty(0, dtype=other)
    parameter.data = data


def replace_modules(
    model: nn.Module, replace: Callable[[str, nn.Module], nn.Module | None]
) -> nn.Module:
    """Put replace(name, module) in the place of each module for which it is not None."""
    swaps = {module: replace(name, module) for name, module in model.named_modules()}
    # A module may sit in several places.
    for name, module in list(model.named_modules(remove_duplicate=False)):
        new = swaps[module]
        if new is None:
            continue
        if module is model:
            return new
        parent, _, child = name.rpartition(".")
        setattr(model.get_submodule(parent), child, new)
    return model


def _parameter(tensor: Tensor) -> nn.Parameter:
    return tensor if isinstance(tensor, nn.Parameter) else nn.Parameter(tensor)
