"""The calls that `generate` of transformers makes of a model: for a prompt, and for a token with
its past."""

import inspect
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn

from .example import copied
from .timing import clock, wait

STEPS = 4  # tokens by which a step is known


@dataclass
class Generated:
    """Arguments of the model by which `generate` reads a prompt, and a token after it."""

    prompt: dict
    token: dict  # with the keys and values of what came before
    between_s: float  # seconds from the end of a call to the next: a token is chosen


def calls_of_generate(model: nn.Module, example: Any, is_gpu: bool) -> Generated | None:
    """What `generate` does with the example as a prompt; None of a model that has no `generate` of
    transformers."""
    inner = _generating(model)
    if inner is None:
        return None
    if not isinstance(example, Mapping):
        args = (example,) if isinstance(example, Tensor) else tuple(example)
        example = inspect.signature(inner.forward).bind(*args).arguments
    now, usual = clock(is_gpu)
    calls: list[dict] = []
    began: list[float] = []
    ended: list[float] = []

    def before(module: nn.Module, args: tuple, kwargs: dict) -> None:
        began.append(now())
        bound = inspect.signature(inner.forward).bind(*args).arguments
        calls[1:] = [copied(bound | kwargs)]

    def after(module: nn.Module, args: tuple, output: object) -> None:
        wait(is_gpu)
        ended.append(now())

    handles = [
        inner.register_forward_pre_hook(before, with_kwargs=True),
        inner.register_forward_hook(after),
    ]
    try:
        settings = {"max_new_tokens": STEPS, "min_new_tokens": STEPS, "disable_compile": True}
        model.generate(**copied(dict(example)), **settings)  # type: ignore[operator]
    finally:
        for handle in handles:
            handle.remove()
    if len(calls) < 2:
        raise ValueError(f"generate() called {type(inner).__name__} {len(calls)} times")
    prompt, token = calls
    if prompt.pop("encoder_outputs", None) is not None:  # the encoder reads the prompt, too
        prompt |= example
    return Generated(prompt, token, usual([b - a for a, b in zip(ended, began[1:], strict=False)]))


def _generating(model: nn.Module) -> Any:
    """The model of transformers that generates, under an adapter of peft as well."""
    if not callable(getattr(model, "generate", None)):
        return None
    for module in model.modules():
        can_generate = getattr(type(module), "can_generate", None)
        if callable(can_generate) and module.can_generate():  # type: ignore[operator]
            return module
    return None
