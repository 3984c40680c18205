"""The plug-in for transformers: a quantizer that changes no number, only how weights are stored.

    file    X.weight [nnz], X.weight_shape, X.weight_bitmask: weights/layouts.py
    module  X.values, X.col_indices, X.row_offsets: SparseLinear

Saving packs, in get_state_dict_and_metadata. Loading reads the headers of the files, puts empty
SparseLinear modules into the model while it is on the meta device, and lets transformers' loader
collect the parts of each weight and hand them to Unpack.
"""

from collections.abc import Sequence
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.conversion_mapping import get_model_conversion_mapping
from transformers.core_model_loading import ConversionOps, WeightConverter, WeightRenaming
from transformers.quantizers import HfQuantizer, register_quantization_config, register_quantizer
from transformers.utils.quantization_config import QuantizationConfigMixin

from ..nn import SparseLinear, densify_
from ..nn.stored import own_weight
from ..nn.substitutes import sizes_of_layers, substitute
from ..tensor import SparseTensor
from ..weights import layouts, weights_of

METHOD = "sparsekern"
FORMAT_VERSION = 2  # of weights/read.py
PARTS = ("weight", "weight_shape", *(f"weight{part}" for p in layouts.PATTERNS for part in p))


class _Header:
    """A tensor of a file, of which only the shape was read, or of a few numbers all."""

    def __init__(self, file: str, shape: list[int], numbers: list[int] | None):
        self.file, self.shape, self.numbers = file, tuple(shape), numbers


_Parts = dict[str, _Header]  # of one weight, by the names in PARTS

# _init_weights of GPT-2 and others reads the weights of children, and leaves alone what has this.
SparseTensor._is_hf_initialized = True  # type: ignore[attr-defined]


@register_quantization_config(METHOD)
class SparseConfig(QuantizationConfigMixin):
    """What config.json says of a model that was saved with sparse layers."""

    def __init__(self, format_version: int = FORMAT_VERSION, **_: object):
        if format_version != FORMAT_VERSION:
            raise ValueError(
                f"config.json: quantization_config: format_version: this sparsekern reads "
                f"{FORMAT_VERSION}, got {format_version}"
            )
        self.quant_method = METHOD
        self.format_version = format_version


@register_quantizer(METHOD)
class SparseQuantizer(HfQuantizer):
    """Sparse layers in from_pretrained and save_pretrained."""

    requires_calibration = False
    is_trainable = is_qat_trainable = is_compileable = True

    def __init__(self, quantization_config: QuantizationConfigMixin, **kwargs: Any):
        super().__init__(quantization_config, **kwargs)
        self.layers: set[str] = set()  # names in the file, as transformers renames them

    def validate_environment(self, *args: object, **kwargs: object) -> None:
        if not self.pre_quantized:
            raise ValueError(
                "quantization_config: a SparseConfig belongs to a model that was saved sparse: "
                "load this one without it, then make its layers sparse, and save it"
            )

    def is_serializable(self) -> bool:
        return True

    # Loading

    def _process_model_before_weight_loading(
        self, model: PreTrainedModel, checkpoint_files: list[str] | None = None, **kwargs: object
    ) -> PreTrainedModel:
        tensors = _renamed(_headers(checkpoint_files or []), model)
        self.layers = {
            name.removesuffix(f".{part}")
            for name in tensors
            for part in PARTS[1:]
            if name.endswith(f".{part}")
        }
        owners: dict[str, dict[str, _Parts]] = {}
        for saved in sorted(self.layers):
            headers = {p: t for p in PARTS if (t := tensors.get(f"{saved}.{p}")) is not None}
            place = _place_in(model, saved)
            if place is None:
                _refuse_lost(model, saved, headers)
            else:
                owners.setdefault(place[0], {})[place[1]] = headers
        for name, layers in owners.items():
            dense = model.get_submodule(name)
            model.set_submodule(name, _empty(name, dense, layers))
            if isinstance(dense, nn.MultiheadAttention):
                _spare(model.get_submodule(name.rpartition(".")[0]), name, tensors)
        return model

    def get_weight_conversions(self) -> list[WeightConverter]:
        # One target: convert() gives whole names.
        return [_Converter(list(PARTS), ["values"], [Unpack(self)], layers=self.layers)]

    def update_weight_conversions(self, weight_conversions: list, model: Any = None) -> list:
        return weight_conversions + self.get_weight_conversions()

    def _process_model_after_weight_loading(
        self, model: PreTrainedModel, **kwargs: object
    ) -> PreTrainedModel:
        # Nothing is quantized: half(), float() and training are right. They ask this flag.
        model.is_quantized = False
        return model

    # Saving

    def get_state_dict_and_metadata(self, model: PreTrainedModel) -> tuple[dict, dict]:
        state: dict[str, Tensor] = {}
        for name, w in weights_of(model).items():
            if not isinstance(w, SparseTensor):
                state[name] = w
                continue
            if w.values.is_meta:
                raise ValueError(
                    f"save_pretrained: {name} is offloaded: load the model without a device_map "
                    "that names disk, then save it"
                )
            state |= layouts.parts_of(name, w)
        return state, {}

    def _dequantize(self, model: PreTrainedModel, dtype: Any = None) -> nn.Module:
        return densify_(model)


class Unpack(ConversionOps):
    """The parts of one weight in a file -> row_offsets, col_indices and values of its layer."""

    def __init__(self, hf_quantizer: SparseQuantizer):
        self.hf_quantizer = hf_quantizer  # whoever has one is handed tensors as they are

    def __deepcopy__(self, memo: dict) -> "Unpack":  # a copy for each weight, with all it holds
        return self

    def convert(
        self, input_dict: dict, full_layer_name: str = "", model: Any = None, **kwargs: object
    ) -> dict[str, Tensor]:
        prefix = full_layer_name.rpartition(".")[0]
        layer = model.get_submodule(prefix)
        parts = {name: tensors[0] for name, tensors in input_dict.items()}
        try:
            w = layouts.take("weight", parts)
        except (TypeError, ValueError) as error:
            raise ValueError(f"{prefix}.weight: {error}") from error
        w = own_weight(layer, w)
        new = w.row_offsets, w.col_indices, w.values.to(layer.values.dtype)
        return {f"{prefix}.{p}": t for p, t in zip(layouts.BUFFERS, new, strict=True)}

    @property
    def reverse_op(self) -> "Unpack":
        return self  # get_state_dict_and_metadata has packed: nothing matches


class _Converter(WeightConverter):
    """Knows its tensors by name and not by a pattern, which would match with one prefix alone."""

    __slots__ = ("layers",)

    def __init__(
        self,
        source_patterns: list[str],
        target_patterns: list[str],
        operations: list[ConversionOps],
        layers: set[str] | frozenset[str] = frozenset(),  # a copy for saving has none
        **kwargs: Any,
    ):
        super().__init__(source_patterns, target_patterns, operations, **kwargs)
        self.layers = layers

    def rename_source_key(self, source_key: str) -> tuple[str, str | None]:
        layer, _, part = source_key.rpartition(".")
        if layer not in self.layers or part not in PARTS:
            return source_key, None
        self._was_used = True
        return f"{layer}.values", part


def attach(model: PreTrainedModel, is_sparse: bool) -> None:
    """Let save_pretrained write sparse layers as such; where none is left, the model as any
    other."""
    quantizer = getattr(model, "hf_quantizer", None)
    if quantizer is None:
        model.config.quantization_config = SparseConfig()
        model.hf_quantizer = SparseQuantizer(model.config.quantization_config, pre_quantized=True)
        model.is_quantized = False
    elif isinstance(quantizer, SparseQuantizer):
        if not is_sparse:
            quantizer.remove_quantization_config(model)
    elif is_sparse:
        raise ValueError(
            f"save_pretrained: the model has sparse layers and was quantized by "
            f"{type(quantizer).__name__}, whose files hold none: call densify_(model) first"
        )


def _headers(files: list[str]) -> dict[str, _Header]:
    found: dict[str, _Header] = {}
    for path in files:
        if not str(path).endswith(".safetensors"):
            raise ValueError(
                f"{path}: expected .safetensors; sparsekern.weights.load_weights reads others, and "
                "set_weights_ puts what it reads into a model"
            )
        try:
            with safe_open(path, "pt") as file:
                for name in file.keys():
                    shape = file.get_slice(name).get_shape()
                    is_shape = name.endswith(PARTS[1]) and shape == [2]
                    numbers = file.get_tensor(name).tolist() if is_shape else None
                    found[name] = _Header(path, shape, numbers)
        except SafetensorError as error:
            raise ValueError(f"{path} is truncated or not safetensors") from error
    return found


def _renamed(headers: dict[str, _Header], model: PreTrainedModel) -> dict[str, _Header]:
    """Under the names of modules: files of Mixtral, say, have older ones, which the loader changes
    before it asks for our conversion."""
    renamings = [r for r in get_model_conversion_mapping(model) if isinstance(r, WeightRenaming)]
    renamed = {}
    for name, header in headers.items():
        for renaming in renamings:
            name, _ = renaming.rename_source_key(name)
        renamed[name] = header
    return renamed


def _name_in(model: PreTrainedModel, saved: str) -> str | None:
    """The name of that module, in a model with or without its head."""
    base = model.base_model_prefix
    named = dict(model.named_modules())
    names = saved, saved.removeprefix(f"{base}."), f"{base}.{saved}"
    return next((name for name in names if name in named), None)


def _place_in(model: PreTrainedModel, saved: str) -> tuple[str, str] | None:
    """The dense module whose place is taken for that layer, and the layer's name in what takes it:
    "" where it is the layer itself."""
    above = saved
    while above:
        if (name := _name_in(model, above)) is not None:
            inner = saved.removeprefix(above).removeprefix(".")
            if inner in sizes_of_layers(model.get_submodule(name)):
                return name, inner
        above = above.rpartition(".")[0]
    return None


def _spare(parent: Any, name: str, tensors: dict[str, _Header]) -> None:
    """Keep _init_weights from a module that holds attention: it would look for the bias that the
    sparse one has as None. Not where a parameter of the module is missing in the file."""
    above = name.rpartition(".")[0]
    own = [f"{above}.{part}" for part, p in parent._parameters.items() if p is not None]
    if all(any(key == n or key.endswith(f".{n}") for key in tensors) for n in own):
        parent._is_hf_initialized = True


def _refuse_lost(model: PreTrainedModel, saved: str, parts: _Parts) -> None:
    """A model without a layer of the file is one without that head, say, and transformers tells of
    it. Where a module with other parameters stands in its place they would be random."""
    above = saved
    while above:
        if (name := _name_in(model, above)) is not None:
            module = model.get_submodule(name)
            if any(p is not None for p in module._parameters.values()):
                raise ValueError(
                    f"{next(iter(parts.values())).file}: {saved}: the model has a "
                    f"{type(module).__name__} at {name}, which takes no such weight"
                )
            return
        above = above.rpartition(".")[0]


def _empty(name: str, module: nn.Module, layers: dict[str, _Parts]) -> nn.Module:
    """What takes the module's place, on the meta device, with as many values as the file has."""
    sizes = sizes_of_layers(module)
    if lacking := sorted(sizes.keys() - layers.keys()):
        (first, *_), *_ = (list(parts.values()) for parts in layers.values())
        raise ValueError(
            f"{first.file}: {name}: expected sparse weights for {', '.join(sizes)}, the file "
            f"lacks {', '.join(lacking)}"
        )

    def make(
        kind: type[SparseLinear],
        inner: str,
        shape: Sequence[int],
        bias: nn.Parameter | None,
        parameter: nn.Parameter,
    ) -> SparseLinear:
        full = f"{name}.{inner}" if inner else name
        nnz = _checked_nnz(full, layers[inner], sizes[inner])
        with torch.device("meta"):
            offsets = torch.empty(shape[0] + 1, dtype=torch.int32)
            columns = torch.empty(nnz, dtype=torch.int32)
            values = nn.Parameter(torch.empty(nnz, dtype=parameter.dtype))
        return kind(shape[1], shape[0], offsets, columns, values, bias)

    return substitute(module, make)


def _checked_nnz(name: str, parts: _Parts, stored: tuple[int, int]) -> int:
    """How many values the file has for a weight of that shape."""
    values, shape = parts.get("weight"), parts.get("weight_shape")
    wanted = [PARTS[:2] + tuple(f"weight{part}" for part in p) for p in layouts.PATTERNS]
    if values is None or shape is None or len(values.shape) != 1 or tuple(parts) not in wanted:
        raise ValueError(
            f"{next(iter(parts.values())).file}: {name}: expected "
            f"{' or '.join(', '.join(p) for p in wanted)}, with as many values in weight as the "
            "pattern has places, got "
            + ", ".join(f"{part} {list(header.shape)}" for part, header in parts.items())
        )
    if shape.numbers != list(stored):
        raise ValueError(
            f"{values.file}: {name}: expected a weight {list(stored)}, got {shape.numbers}"
        )
    return values.shape[0]
