"""Files of transformers' models: save_pretrained keeps SparseLinear layers, from_pretrained brings
them back.

    import sparsekern.hf
    model = AutoModelForCausalLM.from_pretrained("a-folder-that-was-saved-sparse", dtype="auto")

A file of a sparse model can be read where this is imported, and is an error elsewhere. Saving needs
no import: the first SparseLinear in a program that uses transformers brings this in.
"""

from functools import wraps
from importlib import import_module
from inspect import signature

from torch.nn import Module

from ..extras import require
from ..nn import PackedLinear, SparseLinear
from ..nn.adapters import is_adapted

__all__ = ["SparseConfig"]


def _is_marked(model: object) -> bool:
    """Whether its config says that its file is sparse, as one that two models share may do."""
    found = getattr(getattr(model, "config", None), "quantization_config", None)
    given = found if isinstance(found, dict) else vars(found) if found else {}
    return given.get("quant_method") == "sparsekern"


def _is_sparse(module: Module) -> bool:
    return any(isinstance(m, SparseLinear) for m in module.modules())


def _guard(kind: type) -> None:
    """Look at each model before it is saved. transformers would write what SparseLinear has in its
    state_dict, find no weight under the names it knows, and load random ones."""
    original = kind.save_pretrained
    if getattr(original, "looks_for_sparse_layers", False):
        return

    @wraps(original)
    def save_pretrained(self, *args, **kwargs):
        packed = next((n for n, m in self.named_modules() if isinstance(m, PackedLinear)), None)
        if packed is not None:  # its buffers are in no state_dict
            raise ValueError(
                f"save_pretrained: {packed} is packed for inference and cannot be saved: save the "
                "model before pack_"
            )
        inside = next((n for n, m in self.named_modules() if is_adapted(m) and _is_sparse(m)), None)
        if inside is not None and not getattr(self, "_hf_peft_config_loaded", False):
            raise ValueError(
                f"save_pretrained: {inside}.base_layer is under an adapter of peft, and its name "
                "in the file would be one that no model has: save the adapter with peft, and the "
                "model after sparsekern.models.lora.merge_, or unload()"
            )
        is_sparse = _is_sparse(self)
        if is_sparse or getattr(self, "hf_quantizer", None) or _is_marked(self):
            from .quantizer import are_made_others, attach

            given = signature(original).bind(self, *args, **kwargs)
            attach(self, is_sparse, given.arguments.get("state_dict"))
            if is_sparse and are_made_others(self):
                given.arguments["save_original_format"] = False
                args, kwargs = given.args[1:], given.kwargs
        return original(self, *args, **kwargs)

    save_pretrained.looks_for_sparse_layers = True
    kind.save_pretrained = save_pretrained


require("transformers", "hf")
_guard(import_module("transformers.modeling_utils").PreTrainedModel)

try:
    from .quantizer import SparseConfig
except ImportError as error:
    raise ImportError(
        f"sparsekern.hf needs transformers 5.10 or later: {error}; densify_(model) saves a dense "
        "model with any version"
    ) from error
