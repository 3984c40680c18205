"""SparseLinear, and sparsify_ / densify_ to swap it in and out of a model.

The weight is a 1-D `values` Parameter beside int32 index buffers. To optimizers, DDP, state_dict
and deepcopy it is an ordinary module, its optimizer state has nnz elements, and no momentum or
weight decay can bring a removed weight back: there is no place for it.
"""

import copy
import weakref
from collections import Counter
from collections.abc import Callable

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from . import copies, loading
from .indices import check_sizes, counted
from .kernels.layout import Packed
from .kernels.packed import name_of, pack
from .loading import resize_, set_indices
from .matmul import linear
from .ops import spmm_packed
from .tensor import SparseTensor

__all__ = [
    "PackedLinear",
    "SparseLinear",
    "densify_",
    "pack_",
    "replace_modules",
    "resize_",
    "sparsifiable",
    "sparsify_",
]

HEAD_NAMES = ("head", "lm_head")

# torch.compile takes the shapes of parameters for fixed, and would compile again for each nnz: of
# every pruning, and of every layer under the compilation of blocks. These it takes for dynamic.
_sources = (r".*_parameters\['values'\]", r".*_buffers\['col_indices'\]")
torch.compiler.config.dynamic_sources = ",".join(
    filter(None, (torch.compiler.config.dynamic_sources, *_sources))
)

_layers: "weakref.WeakSet[SparseLinear]" = weakref.WeakSet()


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
        return layer

    def __deepcopy__(self, memo):
        layer = memo[id(self)] = type(self).__new__(type(self))
        layer.__dict__.update(copy.deepcopy(self.__dict__, memo))
        copies.note(layer, self)
        return layer

    @classmethod
    def from_linear(cls, linear: nn.Linear, mask: Tensor | None = None) -> "SparseLinear":
        """The weights of `linear` where the bool mask [N, K] is True; without one, where != 0.

        The bias is the same Parameter.
        """
        _refuse_meta("weight", linear.weight)
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
        lists = missing_keys, unexpected_keys, error_msgs
        load_others = super()._load_from_state_dict
        loading.load(self, load_others, state_dict, prefix, local_metadata, strict, *lists)

    def _apply(self, fn, recurse=True):
        """Moves and casts; indices stay int32 whatever the values become."""

        def kept(t: Tensor) -> Tensor:
            result = fn(t)
            is_cast = t.dtype == torch.int32 and result.dtype != torch.int32
            return t.to(result.device) if is_cast else result

        before = self.row_offsets
        super()._apply(kept, recurse)
        after, self._buffers["row_offsets"] = self.row_offsets, before
        set_indices(self, after, self.col_indices)
        return self

    def __setattr__(self, name, value):
        # torch.nn.utils.parametrize keeps what it knows of `values` in a ModuleDict under that
        # name, which a ModuleDict cannot have: it is one of its methods.
        if name == "parametrizations" and type(value) is nn.ModuleDict:
            value = _Parametrizations(value)
        super().__setattr__(name, value)


class _Parametrizations(nn.ModuleDict):
    """`parametrizations` of a module with a parameter that is called `values`."""

    def add_module(self, name: str, module: nn.Module | None) -> None:
        if name == "values":
            self._modules[name] = module
        else:
            super().add_module(name, module)

    @property
    def values(self) -> nn.Module:
        return self.__getattr__("values")


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
    model is unchanged. ValueError where there is nothing to replace, unless filter_fn said so.
    """
    chosen = sparsifiable(model, filter_fn)
    if not chosen and not (filter_fn and sparsifiable(model, lambda module, name: True)):
        raise ValueError(f"sparsify_: {_nothing_in(model)}")
    for name, module in chosen.items():
        _refuse_meta(f"{name}.weight" if name else "weight", module)

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
    becomes dense too: zero where nothing was stored. ValueError, and an unchanged model, for state
    of another shape than the values.
    """
    if optimizer:
        for layer in (m for m in model.modules() if isinstance(m, SparseLinear)):
            for key, t in optimizer.state.get(layer.values, {}).items():
                if isinstance(t, Tensor) and t.numel() != 1 and t.shape != layer.values.shape:
                    raise ValueError(
                        f"densify_: the optimizer keeps {key!r} of shape {tuple(t.shape)} for the "
                        f"{layer.values.shape[0]} values of {layer}, expected as many"
                    )
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


def value_parameters(layer: SparseLinear) -> list[nn.Parameter]:
    """The values, or what a parametrization makes them from."""
    return [
        p
        for name, p in layer.named_parameters()
        if name == "values" or name.startswith("parametrizations.values.")
    ]


def layer_of(values: Tensor) -> SparseLinear | None:
    """The layer whose values these are. Looks at all there are."""
    return next(
        (m for m in list(_layers) if m.__dict__.get("_parameters", {}).get("values") is values),
        None,
    )


def _nothing_in(model: nn.Module) -> str:
    def has_matrix(module: nn.Module) -> bool:
        return any(p is not None and p.ndim > 1 for p in module._parameters.values())

    kinds = Counter(type(m).__name__ for m in model.modules() if has_matrix(m))
    there = ", ".join(f"{count} {kind}" for kind, count in sorted(kinds.items())) or "none"
    return (
        f"no nn.Linear to replace; modules with a matrix: {there}. Its subclasses stay dense, and "
        "tied weights, those that are marked requires_dense, and without a filter_fn the layers "
        f"named {' or '.join(HEAD_NAMES)}"
    )


def _refuse_meta(name: str, module: nn.Module | Tensor) -> None:
    weight = module if isinstance(module, Tensor) else getattr(module, "weight", None)
    if isinstance(weight, Tensor) and weight.is_meta:
        raise NotImplementedError(
            f"{name}: on the meta device there are no weights to choose from: make the model "
            "sparse where it has some (to_empty, then load them); a sparse one may then go to meta"
        )
