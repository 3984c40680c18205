"""What a model keeps in float32 whatever its dtype, and sparse layers do not."""

import warnings

import torch
from transformers import PreTrainedModel

from ..nn import SparseLinear


def told_of_short_values(model: PreTrainedModel) -> PreTrainedModel:
    """The model, with a warning where sparse layers hold 16 bits and dense ones in their place
    would hold float32 (wo of T5 in float16). They take the dtype of what comes to them: the models
    cast that for dense layers alone."""
    in_half, in_any = model._keep_in_fp32_modules or (), model._keep_in_fp32_modules_strict or ()
    kept = {torch.float16: {*in_half, *in_any}, torch.bfloat16: {*in_any}}
    short = [
        name
        for name, module in model.named_modules()
        if isinstance(module, SparseLinear)
        if any(f".{part}." in f".{name}." for part in kept.get(module.values.dtype, ()))
    ]
    if short:
        dtype = model.get_submodule(short[0]).values.dtype
        warnings.warn(
            f"from_pretrained: {short[0]}{' and others' * (len(short) > 1)} hold {dtype}, where a "
            f"dense {type(model).__name__} keeps float32, since these layers may overflow or lose "
            "too much: give dtype=torch.float32, or make them dense",
            stacklevel=2,
        )
    return model
