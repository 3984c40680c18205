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
from ..nn.stored import own_weight, transposed
from ..nn.substitutes import sizes_of_layers, substitute
from ..tensor import SparseTensor
from ..weights import layouts
from .precision import told_of_short_values

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

    def get(self, name: str, default: object = None) -> object:
        """As of a dict: so transformers asks the config of a model that it has loaded."""
        return getattr(self, name, default)


@register_quantizer(METHOD)
class SparseQuantizer(HfQuantizer):
    """Sparse layers in from_pretrained and save_pretrained."""

    requires_calibration = False
    is_trainable = is_qat_trainable = is_compileable = True

    def __init__(self, quantization_config: QuantizationConfigMixin, **kwargs: Any):
        super().__init__(quantization_config, **kwargs)
        self.layers: set[str] = set()  # names in the file, as transformers renames them
        self.state: dict[str, Tensor] | None = None  # what save_pretrained was given to save

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
        if not checkpoint_files:
            raise ValueError(
                "from_pretrained: state_dict: expected the files of a sparse model; "
                "sparsekern.weights.set_weights_ puts a state_dict into a model"
            )
        tensors = _renamed(_headers(checkpoint_files), model)
        self.layers = {
            name.removesuffix(f".{part}")
            for name in tensors
            for part in PARTS[1:]
            if name.endswith(f".{part}")
        }
        skeleton = _Skeleton(model)
        owners: dict[str, dict[str, _Parts]] = {}
        for saved in sorted(self.layers):
            parts = {p: t for p in PARTS if (t := tensors.get(f"{saved}.{p}")) is not None}
            if (place := skeleton.place_of(saved)) is not None:
                owners.setdefault(place[0], {})[place[1]] = parts
            elif (lost := skeleton.nearest(saved)) is not None:
                # Without the head, say, transformers tells of the tensors. Here it would make up
                # the parameters of another module.
                raise ValueError(
                    f"{_file(parts)}: {saved}: the model has a {type(lost).__name__} there, which "
                    "takes no such weight"
                )
        made: dict[nn.Module, nn.Module] = {}
        for name, layers in owners.items():
            dense = skeleton.modules[name]
            if dense not in made:  # a module may sit in several places
                made[dense] = _empty(name, dense, layers)
            model.set_submodule(name, made[dense])
            if isinstance(dense, nn.MultiheadAttention):
                _spare(name.rpartition(".")[0], skeleton, tensors)
        _untie(model, skeleton, made)
        _check_ties(model, "from_pretrained")
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
        return told_of_short_values(model)

    # Saving

    def get_state_dict_and_metadata(self, model: PreTrainedModel) -> tuple[dict, dict]:
        given, self.state = self.state, None
        state = dict(model.state_dict() if given is None else given)
        written: set[nn.Module] = set()
        for name, layer in model.named_modules(remove_duplicate=False):
            if not isinstance(layer, SparseLinear):
                continue
            lacking = [p for p in layouts.BUFFERS if f"{name}.{p}" not in state]
            if lacking:
                raise ValueError(f"save_pretrained: state_dict: it lacks {name}.{lacking[0]}")
            parts = [state.pop(f"{name}.{part}").detach() for part in layouts.BUFFERS]
            if layer in written:  # under another name: transformers would drop some of its parts
                parts = [part.clone() for part in parts]
            written.add(layer)
            w = SparseTensor._trusted(*parts, layer.out_features, layer.in_features)
            if w.values.is_meta:
                raise ValueError(
                    f"save_pretrained: {name} is offloaded: load the model without a device_map "
                    "that names disk, then save it"
                )
            w = transposed(w) if layer.stores_transpose else w
            state |= layouts.parts_of(f"{name}.weight", w)
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


def attach(model: PreTrainedModel, is_sparse: bool, state: dict[str, Tensor] | None) -> None:
    """Let save_pretrained write sparse layers as such, of the model or of the state_dict that it
    was given; where none is left, the model as any other."""
    quantizer = getattr(model, "hf_quantizer", None)
    if not is_sparse:
        if isinstance(quantizer, SparseQuantizer):
            quantizer.remove_quantization_config(model)
        elif quantizer is None:  # the config came from a sparse model
            del model.config.quantization_config
        return
    if quantizer is None:
        quantizer = SparseQuantizer(SparseConfig(), pre_quantized=True)
        model.hf_quantizer, model.is_quantized = quantizer, False
    if not isinstance(quantizer, SparseQuantizer):
        raise ValueError(
            f"save_pretrained: the model has sparse layers and was quantized by "
            f"{type(quantizer).__name__}, whose files hold none: call densify_(model) first"
        )
    _check_ties(model, "save_pretrained")
    model.config.quantization_config = quantizer.quantization_config
    quantizer.state = state


def are_made_others(model: PreTrainedModel) -> bool:
    """Whether transformers makes other tensors of those of its sparse layers for a file, as where
    the models that it was published as have one matrix for gate and up. What it makes of a pattern
    and its values nobody can read."""
    found = getattr(model, "_weight_conversions", None) or get_model_conversion_mapping(model)
    back = [c.reverse_transform() for c in found if isinstance(c, WeightConverter)]
    names = [n for n, m in model.named_modules() if isinstance(m, SparseLinear)]
    return any(c.rename_source_key(f"{n}.weight")[1] is not None for c in back for n in names)


def _check_ties(model: PreTrainedModel, call: str) -> None:
    """ValueError where from_pretrained would tie a sparse weight to another one."""
    if not getattr(model.config.get_text_config(), "tie_word_embeddings", False):
        return
    tied = model.all_tied_weights_keys
    for name, module in model.named_modules():
        if isinstance(module, SparseLinear) and f"{name}.weight" in {*tied, *tied.values()}:
            raise ValueError(
                f"{call}: {name} is sparse, and config.tie_word_embeddings would tie its weight: "
                "set that to False, or make the layer dense before it is saved"
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


class _Skeleton:
    """The dense model on the meta device, by the names of its modules, with or without the prefix
    that its files may have or lack."""

    def __init__(self, model: PreTrainedModel):
        self.base = f"{model.base_model_prefix}."
        self.modules = dict(model.named_modules(remove_duplicate=False))
        self._places = {
            f"{name}.{inner}" if inner else name: (name, inner)
            for name, module in self.modules.items()
            for inner in sizes_of_layers(module)
        }

    def names_of(self, saved: str) -> tuple[str, ...]:
        return saved, saved.removeprefix(self.base), self.base + saved

    def place_of(self, saved: str) -> tuple[str, str] | None:
        """The module whose place is taken for that layer, and the layer's name in what takes it, ""
        where it is the layer itself."""
        found = (self._places.get(name) for name in self.names_of(saved))
        return next((place for place in found if place is not None), None)

    def nearest(self, saved: str) -> nn.Module | None:
        """The module of that name, or the innermost that would hold it, if it has parameters."""
        while saved:
            for name in self.names_of(saved):
                if (module := self.modules.get(name)) is not None:
                    has_own = any(p is not None for p in module._parameters.values())
                    return module if has_own else None
            saved = saved.rpartition(".")[0]
        return None


def _untie(model: Any, skeleton: _Skeleton, made: dict[nn.Module, nn.Module]) -> None:
    """Weights that are one since their modules are: there is nothing to tie in the sparse one."""
    for target, source in list(model.all_tied_weights_keys.items()):
        places = [skeleton.modules.get(x.removesuffix(".weight")) for x in (target, source)]
        if places[0] is places[1] and places[0] in made:
            del model.all_tied_weights_keys[target]


def _spare(name: str, skeleton: _Skeleton, tensors: dict[str, _Header]) -> None:
    """Keep _init_weights from a module that holds attention: it would look for the bias that the
    sparse one has as None. Not where a parameter of its own is missing in the file."""
    holder: Any = skeleton.modules[name]
    own = [f"{name}.{part}" for part, p in holder._parameters.items() if p is not None]
    if all(any(saved in tensors for saved in skeleton.names_of(n)) for n in own):
        holder._is_hf_initialized = True


def _empty(name: str, module: nn.Module, layers: dict[str, _Parts]) -> nn.Module:
    """What takes the module's place, on the meta device, with as many values as the file has."""
    sizes = sizes_of_layers(module)
    if lacking := sorted(sizes.keys() - layers.keys()):
        raise ValueError(
            f"{_file(next(iter(layers.values())))}: {name}: expected sparse weights for "
            f"{', '.join(sizes)}, the file lacks {', '.join(lacking)}"
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


def _file(parts: _Parts) -> str:
    return next(iter(parts.values())).file


def _checked_nnz(name: str, parts: _Parts, stored: tuple[int, int]) -> int:
    """How many values the file has for a weight of that shape."""
    values, shape = parts.get("weight"), parts.get("weight_shape")
    wanted = [PARTS[:2] + tuple(f"weight{part}" for part in p) for p in layouts.PATTERNS]
    if values is None or shape is None or len(values.shape) != 1 or tuple(parts) not in wanted:
        raise ValueError(
            f"{_file(parts)}: {name}: expected "
            f"{' or '.join(', '.join(p) for p in wanted)}, with as many values in weight as the "
            "pattern has places, got "
            + ", ".join(f"{part} {list(header.shape)}" for part, header in parts.items())
        )
    if shape.numbers != list(stored):
        raise ValueError(
            f"{values.file}: {name}: expected a weight {list(stored)}, got {shape.numbers}"
        )
    return values.shape[0]
