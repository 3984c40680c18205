"""SparseLinear: the module that takes the place of nn.Linear.

The weight is a 1-D `values` Parameter beside int32 index buffers. To optimizers, DDP, state_dict
and deepcopy it is an ordinary module, its optimizer state has nnz elements, and no momentum or
weight decay can bring a removed weight back: there is no place for it.
"""

import copy
import weakref
from collections.abc import Callable, Sequence
from typing import Any, Self

import torch
from torch import Tensor, nn

from ..casts import is_any_autocast_enabled
from ..indices import check_sizes, counted, kind, whole
from ..kernels import observed
from ..matmul import linear, quick_linear
from ..ops import SPMM, call
from ..tensor import SparseTensor
from . import copies, loading
from .alive import alive
from .checks import cannot_be_set
from .kinds import parameter_of, renew_weight
from .loading import IN_FEATURES, TRANSPOSE

# torch.compile takes the shapes of parameters for fixed, and would compile again for each nnz: of
# every pruning, and of every layer under the compilation of blocks. These it takes for dynamic.
_sources = (r".*_parameters\['values'\]", r".*_buffers\['col_indices'\]")
torch.compiler.config.dynamic_sources = ",".join(
    filter(None, (torch.compiler.config.dynamic_sources, *_sources))
)

_is_compiling = torch.compiler.is_compiling

HOW_TO_SET = (
    "`values` takes other numbers of its places, sparsekern.weights.set_weights_(model, weights) "
    "another pattern or a dense weight, among all weights of the model"
)

_layers: "weakref.WeakSet[SparseLinear]" = weakref.WeakSet()

# Called when a layer is made, until they say that they have done their work.
plug_ins: list[Callable[[], bool]] = []


class SparseLinear(nn.Module):
    """y [..., N] = x [..., K] @ W.T + bias, as nn.Linear with in_features K and out_features N.

    Args:
        in_features, out_features: K and N.
        row_offsets, col_indices, values: W as in SparseTensor, which checks them.
        bias: [N] or None.
    """

    row_offsets: Tensor
    col_indices: Tensor
    bias: nn.Parameter | None
    stores_transpose = False  # whether its dense module has the weight as [K, N]

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
        in_features = whole("in_features", in_features)
        out_features = whole("out_features", out_features)
        shape = (out_features, in_features)
        if getattr(values, "is_meta", False):  # no indices to look at: load_state_dict will
            check_sizes(row_offsets, col_indices, values, shape)
            indices = row_offsets.int(), col_indices.int()
        else:
            weight = SparseTensor(row_offsets, col_indices, values, shape)
            indices = weight.row_offsets, weight.col_indices
            if weight.values is not values:  # the columns were not sorted: the values move along
                trained = values.requires_grad or not isinstance(values, nn.Parameter)
                values = nn.Parameter(weight.values.detach(), trained)
        if bias is not None and not (isinstance(bias, Tensor) and bias.is_floating_point()):
            raise TypeError(f"bias: expected a tensor of floats, got {kind(bias)}")
        if bias is not None and bias.shape != (out_features,):
            raise ValueError(f"bias: expected shape ({out_features},), got {tuple(bias.shape)}")
        self.in_features = in_features
        self.out_features = out_features
        self.register_buffer("row_offsets", counted(indices[0]))
        self.register_buffer("col_indices", counted(indices[1]))
        self.values = _parameter(values)
        self.register_parameter("bias", None if bias is None else _parameter(bias))

    def __new__(cls, *args, **kwargs):  # copies and unpickled ones come this way too
        layer = super().__new__(cls)
        _layers.add(layer)
        if plug_ins:
            plug_ins[:] = [plug_in for plug_in in plug_ins if not plug_in()]
        return layer

    def __deepcopy__(self, memo):
        layer = memo[id(self)] = type(self).__new__(type(self))
        layer.__dict__.update(copy.deepcopy(self.__dict__, memo))
        copies.note(layer, self)
        return layer

    @classmethod
    def from_linear(cls, linear: nn.Linear, mask: Tensor | None = None) -> Self:
        """The weights of `linear` where the bool mask [N, K] is True; without one, where != 0.

        The bias is the same Parameter.
        """
        if not isinstance(linear, nn.Linear):
            raise TypeError(f"linear: expected a torch.nn.Linear, got {type(linear).__name__}")
        renew_weight(linear)
        weight = linear.weight.detach()
        refuse_meta("weight", weight)
        layer = cls.from_weight(parameter_of(linear), linear.bias, mask, weight)
        return layer.train(linear.training)

    @classmethod
    def from_weight(
        cls,
        parameter: Tensor,
        bias: Tensor | None = None,
        mask: Tensor | None = None,
        weight: Tensor | None = None,
    ) -> Self:
        """The same of a Parameter alone: trained if it is. `weight` [N, K] is the part or the view
        of it that the layer takes, by default all of it."""
        if not isinstance(parameter, Tensor):
            raise TypeError(f"parameter: expected a tensor, got {type(parameter).__name__}")
        weight = parameter.detach() if weight is None else weight
        w = SparseTensor.from_dense(weight, mask)
        values = nn.Parameter(w.values, requires_grad=parameter.requires_grad)
        return cls(w.k, w.n, w.row_offsets, w.col_indices, values, bias)

    def to_linear(self) -> nn.Linear:
        """The nn.Linear of the same function, zeros where nothing is stored; shares the bias."""
        module = nn.Linear(self.in_features, self.out_features, bias=False, device="meta")
        weight = self.weight.detach().to_dense()
        module.weight = nn.Parameter(weight, requires_grad=self.values.requires_grad)
        module.register_parameter("bias", self.bias)
        return module.train(self.training)

    def to_dense(self) -> nn.Module:
        """The dense module in whose place it stands."""
        return self.to_linear()

    def as_stored(self, weight: Tensor) -> Tensor:
        """W [N, K] as the weight of to_linear() lies in memory."""
        return weight

    @property
    def weight(self) -> SparseTensor:
        """W [N, K], sharing this module's tensors."""
        return SparseTensor._trusted(
            self.row_offsets, self.col_indices, self.values, self.out_features, self.in_features
        )

    @weight.setter
    def weight(self, weight: object) -> None:
        """Its own alone, which peft assigns: a pattern cannot be set so."""
        if getattr(weight, "values", None) is not self.values:
            raise cannot_be_set(self, "weight", HOW_TO_SET)

    def forward(self, input: Tensor) -> Tensor:  # the name that nn.Linear gives x
        # nn.Module's way to an attribute takes longer than the check of an operand.
        parameters: dict[str, Any] = self._parameters
        buffers: dict[str, Any] = self._buffers
        if "values" in parameters and "bias" in parameters:  # else they are parametrized
            operands = buffers["row_offsets"], buffers["col_indices"], parameters["values"]
            weight, bias = (*operands, self.out_features, self.in_features), parameters["bias"]
            y = None
            if not _is_compiling() and not is_any_autocast_enabled():
                y = call(SPMM, *weight, input, bias)
            if y is None:
                y = quick_linear(input, *weight, bias)
            if y is not None:
                return y
        return linear(input, self.weight, self.bias)

    def extra_repr(self) -> str:
        return (
            f"in_features={self.in_features}, out_features={self.out_features}, "
            f"bias={self.bias is not None}, nnz={self.values.shape[0]}, "
            f"sparsity={self.weight.sparsity:.4g}"
        )

    def _save_to_state_dict(self, destination, prefix, keep_vars):
        """Beside the tensors, which do not tell in_features, what a state_dict knows of modules:
        no key more, and files without it load as ever."""
        super()._save_to_state_dict(destination, prefix, keep_vars)
        if (known := getattr(destination, "_metadata", {}).get(prefix[:-1])) is not None:
            known |= {IN_FEATURES: self.in_features, TRANSPOSE: self.stores_transpose}

    def _load_from_state_dict(
        self, state_dict, prefix, local_metadata, strict, missing_keys, unexpected_keys, error_msgs
    ):
        """Accepts another pattern than the module's own, also one with another nnz."""
        lists = missing_keys, unexpected_keys, error_msgs
        load_others = super()._load_from_state_dict
        loading.load(self, load_others, state_dict, prefix, local_metadata, strict, *lists)

    def _apply(self, fn, recurse=True):
        """Moves and casts; indices stay int32 whatever the values become."""

        def kept(t: Tensor) -> Tensor:
            result = fn(t)
            is_cast = t.dtype == torch.int32 and result.dtype != torch.int32
            return t.to(result.device) if is_cast else result

        address = observed.address(self.row_offsets)  # share_memory() moves the same tensor
        super()._apply(kept, recurse)
        self.row_offsets, self.col_indices = counted(self.row_offsets), counted(self.col_indices)
        observed.moved(address, self.row_offsets)
        return self

    def __setattr__(self, name, value):
        if name == "weight":
            return object.__setattr__(self, name, value)  # the property, also for a Parameter
        # torch.nn.utils.parametrize keeps what it knows of `values` in a ModuleDict under that
        # name, which a ModuleDict cannot have: it is one of its methods.
        if name == "parametrizations" and type(value) is nn.ModuleDict:
            value = _Parametrizations(value)
        super().__setattr__(name, value)


class _Parametrizations(nn.ModuleDict):
    """`parametrizations` of a module with a parameter that is called `values`."""

    def add_module(self, name: str, module: nn.Module | None) -> None:
        if name == "values" and module is not None:
            self._modules[name] = module
        else:
            super().add_module(name, module)

    @property
    def values(self) -> nn.Module:
        module: Any = self.__getattr__("values")
        return module


def value_parameters(layer: SparseLinear) -> list[nn.Parameter]:
    """The values, or what a parametrization makes them from."""
    values = layer._parameters.get("values")
    if values is not None:
        return [values]
    prefix = "parametrizations.values."
    return [p for name, p in layer.named_parameters() if name.startswith(prefix)]


def layer_of(values: Tensor) -> SparseLinear | None:
    """The layer whose values these are. Looks at all there are."""
    return layers_of([values])[0]


def layers_of(parameters: Sequence[Tensor]) -> list[SparseLinear | None]:
    """The same of each, None for those that are no values."""
    layers = {id(m.__dict__.get("_parameters", {}).get("values")): m for m in alive(_layers)}
    return [layers.get(id(p)) for p in parameters]


def _parameter(tensor: Tensor) -> nn.Parameter:
    return tensor if isinstance(tensor, nn.Parameter) else nn.Parameter(tensor)


def refuse_meta(name: str, module: nn.Module | Tensor) -> None:
    weight = module if isinstance(module, Tensor) else getattr(module, "weight", None)
    if isinstance(weight, Tensor) and weight.is_meta:
        raise NotImplementedError(
            f"{name}: on the meta device there are no weights to choose from: make the model "
            "sparse where it has some (to_empty, then load them); a sparse one may then go to meta"
        )
