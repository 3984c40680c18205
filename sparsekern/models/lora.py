"""LoRA adapters of peft on sparse layers. To import this file teaches peft what a SparseLinear is.

    y = x W^T + s x A^T B^T        W sparse and frozen, A [r, K] and B [N, r] trained

`LoraConfig(target_modules="all-linear")` finds sparse layers too. The change B A is dense, so there
are two ways to merge it: into the stored weights alone, which is another function, or exactly, into
a dense layer (`merge_`).
"""

import functools
import warnings
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from ..extras import require
from ..indices import expand_rows
from ..nn import SparseLinear, replace_modules

require("peft", "hf")

from peft.tuners import tuners_utils  # noqa: E402
from peft.tuners.lora import LoraModel  # noqa: E402
from peft.tuners.lora import model as lora_model  # noqa: E402
from peft.tuners.lora.layer import Linear as LoraLinear  # noqa: E402
from peft.tuners.tuners_utils import check_adapters_to_merge  # noqa: E402

WEIGHTLESS = (True, False, "gaussian", "orthogonal")  # ways to begin that do not look at W


class SparseLora(LoraLinear):
    """LoRA on a SparseLinear. `merge()` is exact: the base becomes dense until `unmerge()`."""

    def __init__(self, base_layer: nn.Module, adapter_name: str, config: Any, **kwargs: Any):
        super().__init__(base_layer, adapter_name, config=config, **kwargs)
        self.fan_in_fan_out = False  # W is [N, K] whatever the layer was before

    def update_layer(self, adapter_name: str, *args: Any, config: Any, **kwargs: Any) -> None:
        if config.init_lora_weights not in WEIGHTLESS:
            raise ValueError(
                f"init_lora_weights: a sparse layer begins with True, False, gaussian or "
                f"orthogonal, got {config.init_lora_weights!r}, which needs a dense weight"
            )
        for names in super().lora_variants:
            if asked := [name for name in names if getattr(config, name, None)]:
                raise ValueError(
                    f"{asked[0]}: sparse layers have plain LoRA, got "
                    f"{getattr(config, asked[0])!r}, which may need a dense weight"
                )
        super().update_layer(adapter_name, *args, config=config, **kwargs)

    def _get_in_out_features(self, module: Any) -> tuple[int, int]:
        return module.in_features, module.out_features

    def merge(self, safe_merge: bool = False, adapter_names: list[str] | None = None) -> None:
        names = check_adapters_to_merge(self, adapter_names)
        if not names:
            return
        base = self.get_base_layer()
        if isinstance(base, SparseLinear):
            warnings.warn(
                "sparsekern: B A is dense, and so are the layers that it is merged into; "
                "sparsekern.models.lora.merge_(model, keep_pattern=True) keeps their zeros",
                stacklevel=2,
            )
            self._set_base(base.to_linear(), base)
        try:
            super().merge(safe_merge, names)
        finally:
            self._unset_base()

    def unmerge(self) -> None:
        super().unmerge()
        self._unset_base()

    def _set_base(self, dense: nn.Module, sparse: SparseLinear) -> None:
        self.base_layer = dense
        self.__dict__["_sparse"] = sparse  # no module of the model
        self.fan_in_fan_out = type(dense).__name__ == "Conv1D"  # transformers': [K, N]

    def _unset_base(self) -> None:
        """The sparse layer again, unless something is merged into the dense one."""
        sparse = self.__dict__.get("_sparse")
        if sparse is not None and not self.merged_adapters:
            self.base_layer, self.fan_in_fan_out = sparse, False
            del self.__dict__["_sparse"]

    def unload_and_optionally_merge_module(
        self, merge: bool, safe_merge: bool, adapter_names: list[str] | None
    ) -> nn.Module:
        """What peft puts in the place of this module."""
        if merge:
            self.merge(safe_merge, adapter_names)
        return self.get_base_layer()


def merge_(
    model: nn.Module, *, keep_pattern: bool, adapter_names: list[str] | None = None
) -> nn.Module:
    """Merge the adapters of a peft model into its layers, and return the model without peft.

    Args:
        keep_pattern: True adds what B A has at the places that are stored, and drops the rest of
            it: another function, with a warning that says how much is lost. False is exact and
            makes the sparse layers with adapters dense.
        adapter_names: the adapters to merge, by default the active ones.

    ValueError, and the sparse layers are as before, for adapters that are not finite.
    """
    if not isinstance(getattr(model, "base_model", None), LoraModel):
        got = type(model).__name__
        raise TypeError(f"merge_: expected a model of peft's with LoRA adapters, got {got}")
    if keep_pattern:
        sparse = [layer for layer in model.modules() if _is_sparse(layer)]
        lost = _merge_into_patterns(sparse, adapter_names)
        if any(lost):
            warnings.warn(
                f"merge_: {sum(lost) / len(lost):.0%} of |B A|^2 lay where nothing is stored, and "
                f"were dropped ({min(lost):.0%} to {max(lost):.0%} in a layer)",
                stacklevel=2,
            )
        replace_modules(
            model.base_model.model,
            lambda name, m: m.get_base_layer() if _is_sparse(m) else None,
        )
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="sparsekern: B A is dense")
        return model.merge_and_unload(safe_merge=True, adapter_names=adapter_names)  # type: ignore


@torch.no_grad()
def _merge_into_patterns(layers: list[SparseLora], names: list[str] | None) -> list[float]:
    """The shares of |B A|^2 that are lost, of each layer. All changes are made, or none."""
    changes: list[tuple[Tensor, Tensor]] = []
    lost = []
    for layer in layers:
        if layer.merged:
            layer.unmerge()
        base = layer.get_base_layer()
        rows = expand_rows(base.row_offsets, base.col_indices.shape[0])
        for name in check_adapters_to_merge(layer, names) or []:
            if name not in layer.lora_A:
                continue
            delta = layer.get_delta_weight(name)
            inside = delta[rows, base.col_indices.long()]
            if not delta.isfinite().all():
                raise ValueError(f"merge_: expected finite weights, adapter {name!r} has others")
            whole = delta.float().square().sum().item()
            lost.append(1 - inside.float().square().sum().item() / whole if whole else 0.0)
            changes.append((base.values, inside))
            if layer.lora_bias[name]:
                if base.bias is None:
                    raise ValueError(f"merge_: adapter {name!r} has a bias, but {base} has none")
                changes.append((base.bias, layer.lora_B[name].bias * layer.scaling[name]))
    for parameter, change in changes:
        parameter += change.to(parameter.dtype)
    return lost


def _wrapped_dispatch(default: Callable) -> Callable:
    def dispatch(target: nn.Module, adapter_name: str, config: Any, **kwargs: Any) -> Any:
        layer = target.get_base_layer() if hasattr(target, "get_base_layer") else target
        if isinstance(layer, SparseLinear):
            return SparseLora(target, adapter_name, config=config, **kwargs)
        return default(target, adapter_name, config=config, **kwargs)

    return dispatch


def _wrapped_all_linear(find: Callable) -> Callable:
    def find_sparse_too(config: Any, model: nn.Module) -> Any:
        asked = getattr(config, "target_modules", None)
        config = find(config, model)
        if isinstance(asked, str) and asked.lower() == "all-linear":
            get = getattr(model, "get_output_embeddings", None)
            head = get() if callable(get) else None
            config.target_modules = set(config.target_modules) | {
                name
                for name, module in model.named_modules()
                if isinstance(module, SparseLinear) and module is not head
            }
        return config

    return find_sparse_too


def _is_sparse(module: nn.Module) -> bool:
    """Whether it is LoRA on a SparseLinear. One of peft's own, whose base was pruned after the
    adapter was there, becomes a SparseLora."""
    if type(module) is LoraLinear and isinstance(module.get_base_layer(), SparseLinear):
        module.__class__ = SparseLora
        module.fan_in_fan_out = False
    return isinstance(module, SparseLora)


def _wrapped_merge(merge: Callable) -> Callable:
    @functools.wraps(merge)
    def merge_sparse_too(self: LoraLinear, *args: Any, **kwargs: Any) -> None:
        was_one = isinstance(self, SparseLora)
        return (
            merge(self, *args, **kwargs)
            if was_one or not _is_sparse(self)
            else self.merge(*args, **kwargs)
        )

    return merge_sparse_too


# peft has no registry for other kinds of layers that its saved adapters know of.
lora_model.dispatch_default = _wrapped_dispatch(lora_model.dispatch_default)
tuners_utils._maybe_include_all_linear_layers = _wrapped_all_linear(
    tuners_utils._maybe_include_all_linear_layers
)
LoraLinear.merge = _wrapped_merge(LoraLinear.merge)
