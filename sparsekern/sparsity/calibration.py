"""Inputs of a model for calibration: batches of tensors, tuples, dicts, or texts with a tokenizer.

Padding does not count: where a batch has an attention_mask [B, T], the inputs of a layer at places
where it is 0 are left out.
"""

import inspect
import sys
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from torch import Tensor, nn

TEXT_TOKENS = 512  # of a text; the rest of it is cut off
BATCH_TOKENS = 4096  # of texts that run together
MASKS = ("attention_mask", "decoder_attention_mask")


def checked(calibration: Any, tokenizer: Callable | None) -> list:
    """The batches, or texts, as a list. ValueError for anything else."""
    no_list = (str, bytes, Mapping, Tensor)
    if not isinstance(calibration, Iterable) or isinstance(calibration, no_list):
        got = type(calibration).__name__
        raise ValueError(f"calibration: expected a list of inputs of the model, got {got}")
    batches = list(calibration)
    if not batches:
        raise ValueError("calibration: expected at least one input of the model, got none")
    texts = sum(isinstance(batch, str) for batch in batches)
    if texts and texts < len(batches):
        raise ValueError(
            f"calibration: expected texts or inputs of the model, got {texts} of {len(batches)} "
            "that are text"
        )
    if texts and not callable(tokenizer):
        got = "None" if tokenizer is None else type(tokenizer).__name__
        raise ValueError(f"tokenizer: calibration with texts needs one, got {got}")
    return batches


def batches_for(model: nn.Module, calibration: list, tokenizer: Callable | None) -> list:
    """The inputs of the model, on its device."""
    if calibration and isinstance(calibration[0], str):
        assert tokenizer is not None  # says checked()
        texts = len(calibration)
        calibration = of_texts(calibration, tokenizer, _longest(model, tokenizer))
        if not calibration:
            raise ValueError(f"calibration: none of the {texts} texts has a token")
    tensors = (t for part in (model.parameters(), model.buffers()) for t in part)
    device = next((t.device for t in tensors), torch.device("cpu"))
    return [_mapped(batch, lambda t: t.to(device)) for batch in calibration]


def of_texts(texts: Sequence[str], tokenizer: Callable, longest: int) -> list[dict[str, Tensor]]:
    """Batches of texts of about the same length, each at most `longest` tokens, padded with 0 (what
    it is does not matter) and with an attention_mask."""
    coded = [tokenizer(text, truncation=True, max_length=longest) for text in texts]
    coded = [dict(c) for c in coded if len(c["input_ids"])]
    coded.sort(key=lambda c: len(c["input_ids"]), reverse=True)
    batches = []
    while coded:
        together = max(1, BATCH_TOKENS // len(coded[0]["input_ids"]))
        batches.append(_padded(coded[:together]))
        coded = coded[together:]
    return batches


def _padded(coded: list[dict]) -> dict[str, Tensor]:
    length = len(coded[0]["input_ids"])
    for c in coded:
        c.setdefault("attention_mask", [1] * len(c["input_ids"]))
    return {
        key: torch.tensor(
            [list(c[key]) + [0] * (length - len(c[key])) for c in coded], device="cpu"
        )
        for key in coded[0]
    }


def _longest(model: nn.Module, tokenizer: Callable) -> int:
    config = getattr(model, "config", None)
    limits = [getattr(tokenizer, "model_max_length", None)]
    limits.append(getattr(config, "max_position_embeddings", None))
    return int(min([TEXT_TOKENS, *(n for n in limits if isinstance(n, (int, float)) and n > 0)]))


def _mapped(part: Any, change: Callable[[Tensor], Tensor]) -> Any:
    """The same with each tensor in it changed."""
    if isinstance(part, Tensor):
        return change(part)
    if isinstance(part, Mapping):
        return {key: _mapped(value, change) for key, value in part.items()}
    if type(part) in (tuple, list):
        return type(part)(_mapped(value, change) for value in part)
    return part


def call(model: nn.Module, batch: Any) -> Any:
    """With a copy: the model may write into what it is given, and is given it again."""
    batch = _mapped(batch, torch.clone)
    if isinstance(batch, Mapping):
        return model(**batch)
    if isinstance(batch, (tuple, list)):
        return model(*batch)
    return model(batch)


def call_for_order(model: nn.Module, batch: Any) -> None:
    """The same where only the order of layers is of interest: without the logits of all tokens, if
    the model of transformers has a word for it, since they may be larger than anything else."""
    if isinstance(batch, Mapping) and "labels" not in batch:
        if "logits_to_keep" in inspect.signature(model.forward).parameters:
            batch = {"logits_to_keep": 1, **batch}
    try:
        call(model, batch)
    except torch.OutOfMemoryError:
        raise
    except (TypeError, ValueError, LookupError, AttributeError, RuntimeError) as error:
        raise ValueError(
            f"calibration: {type(model).__name__} does not run on the first input, a "
            f"{type(batch).__name__} ({type(error).__name__}: {error}); it is called as model(*x) "
            "with a tuple or a list, as model(**x) with a dict, and as model(x) with others"
        ) from error


def masks_of(model: nn.Module, batch: Any) -> dict[str, Tensor]:
    """The masks [B, T] of a batch that leave something out, by their names; bool, True counts."""
    if isinstance(batch, Mapping):
        named: Mapping[str, Any] = batch
    else:
        given = batch if isinstance(batch, (tuple, list)) else (batch,)
        named = inspect.signature(_inside(model).forward).bind_partial(*given).arguments
    masks = {name: named.get(name) for name in MASKS}
    return {
        name: mask.bool()
        for name, mask in masks.items()
        if isinstance(mask, Tensor) and mask.ndim == 2 and not mask.bool().all()
    }


def _inside(model: Any) -> nn.Module:
    """The model that a wrapper gives its arguments to: of torch.compile, DataParallel, peft."""
    while True:
        if hasattr(model, "get_base_model"):
            inner = model.get_base_model()
        else:
            inner = getattr(model, "_orig_mod", None)
            if inner is None and isinstance(model, nn.DataParallel):
                inner = model.module
        if not isinstance(inner, nn.Module) or inner is model:
            return model
        model = inner


def counted(x: Tensor, masks: Mapping[str, Tensor], is_decoder: bool = False) -> Tensor:
    """The tokens [M, K] of a layer's input [..., K] that count: all, where no mask has as many.

    A decoder beside an encoder has its own mask, and sees the encoder's tokens too."""
    rows = x.reshape(-1, x.shape[-1])
    names = reversed(MASKS) if is_decoder else MASKS
    for mask in (masks[name] for name in names if name in masks):
        if rows.shape[0] == mask.numel() and x.shape[0] in (1, mask.shape[0], mask.numel()):
            return rows[mask.flatten()]
    return rows


@contextmanager
def evaluating(model: nn.Module) -> Iterator[None]:
    """The model in eval mode, without gradients, compiled code and key-value caches. Each module
    and config is as before afterwards."""
    training = {module: module.training for module in model.modules()}
    configs = {id(c): c for m in model.modules() if (c := getattr(m, "config", None)) is not None}
    caching = [c for c in configs.values() if getattr(c, "use_cache", None)]
    with ExitStack() as stack:
        # A cache would grow in each pass through a block, and give wrong keys without an error.
        for config in caching:
            config.use_cache = False
            stack.callback(setattr, config, "use_cache", True)
        for module, mode in training.items():
            stack.callback(setattr, module, "training", mode)
        model.eval()
        stack.enter_context(torch.no_grad())
        if "torch._dynamo" in sys.modules:  # else nothing is compiled, and to import it takes long
            stack.enter_context(torch.compiler.set_stance("force_eager"))
        yield
