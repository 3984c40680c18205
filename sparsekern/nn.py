"""SparseLinear, and sparsify_ / densify_ to swap it in and out of a model.

The weight is a 1-D `values` Parameter beside int32 index buffers. To optimizers, DDP, state_dict
and deepcopy it is an ordinary module, its optimizer state has nnz elements, and no momentum or
weight decay can bring a removed weight back: there is no place for it.
"""

from collections import Counter
from collections.abc import Callable

from torch import Tensor, nn

from .matmul import linear
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
                self.values.data = self.values.new_empty(weight.nnz)
                self.values.grad = None
        super()._load_from_state_dict(
            state_dict, prefix, local_metadata, strict, missing_keys, unexpected_keys, error_msgs
        )


def sparsify_(
    model: nn.Module, algorithm, filter_fn: Callable[[nn.Module, str], bool] | None = None
) -> nn.Module:
    """Replace the nn.Linear modules of `model` by SparseLinear, in place, and return the model.

    Args:
        algorithm: has `mask(name, weight)` -> bool [N, K], True where a weight is kept.
        filter_fn: filter_fn(module, name) says which nn.Linear to replace. By default all but
            those named `head` or `lm_head`.

    A weight that another module uses too (tied to an embedding) stays dense. So do subclasses of
    nn.Linear: they compute something of their own. Make the optimizer afterwards: it must see the
    new Parameters. If an algorithm fails the model is unchanged.
    """
    uses = Counter(id(p) for module in model.modules() for p in module._parameters.values())

    def replace(name: str, module: nn.Module) -> nn.Module | None:
        if type(module) is not nn.Linear or uses[id(module.weight)] > 1:
            return None
        chosen = filter_fn(module, name) if filter_fn else name.split(".")[-1] not in HEAD_NAMES
        if not chosen:
            return None
        return SparseLinear.from_linear(module, algorithm.mask(name, module.weight.detach()))

    return _swap(model, replace)


def densify_(model: nn.Module) -> nn.Module:
    """Replace every SparseLinear of `model` by its nn.Linear, in place, and return the model."""

    def replace(name: str, module: nn.Module) -> nn.Module | None:
        return module.to_linear() if isinstance(module, SparseLinear) else None

    return _swap(model, replace)


def _swap(model: nn.Module, replace: Callable[[str, nn.Module], nn.Module | None]) -> nn.Module:
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
