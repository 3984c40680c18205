"""The calls that `generate` of transformers makes of a model: for a prompt, and for a token with
its past."""

import inspect
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn

from .example import Calls, copied, tensors
from .timing import clock, wait

STEPS = 4  # tokens, at most, by which a step is known


@dataclass
class Generated:
    """Arguments of the model by which `generate` reads a prompt, and a token after it."""

    prompt: dict
    output: Any  # of the prompt; None where an encoder reads it first
    token: dict  # with the keys and values of what came before
    between_s: float  # seconds from the end of a call to the next: a token is chosen


def generating(model: nn.Module) -> Any:
    """The model of transformers whose `generate` the model has, under an adapter of peft as well;
    None where it has none."""
    if not callable(getattr(model, "generate", None)):
        return None
    for module in model.modules():
        can_generate = getattr(type(module), "can_generate", None)
        if callable(can_generate) and module.can_generate():  # type: ignore[operator]
            return module
    return None


def calls_of_generate(
    model: nn.Module, example: Any, calls: Calls, steps: int, is_gpu: bool
) -> Generated:
    """What `generate` does with the example as a prompt and for `steps` tokens more, as which its
    last call counts in `calls`."""
    inner = generating(model)
    if not isinstance(example, Mapping):
        args = (example,) if isinstance(example, Tensor) else tuple(example)
        example = inspect.signature(inner.forward).bind(*args).arguments
    now, usual = clock(is_gpu)
    count = min(STEPS, 1 + steps)  # the context may have no place for more
    given: list[dict] = []
    began: list[float] = []
    ended: list[float] = []
    outputs: list[Any] = []

    def before(module: nn.Module, args: tuple, kwargs: dict) -> None:
        began.append(now())
        bound = inspect.signature(inner.forward).bind(*args).arguments
        given[1:] = [copied(bound | kwargs)]
        calls.times = {count: steps, 1: 1}.get(len(began), 0)

    def after(module: nn.Module, args: tuple, output: Any) -> None:
        wait(is_gpu)
        ended.append(now())
        outputs[1:] = [output]

    handles = [
        inner.register_forward_pre_hook(before, with_kwargs=True),
        inner.register_forward_hook(after),
    ]
    settings = {"max_new_tokens": count, "min_new_tokens": count, "disable_compile": True}
    try:
        model.generate(**copied(dict(example)), **settings)  # type: ignore[operator]
    finally:
        for handle in handles:
            handle.remove()
    if len(began) != count:
        raise ValueError(
            f"it called {type(inner).__name__} {len(began)} times for {count} tokens: give a "
            "function as example, lambda m: m.generate(...), and new_tokens=0"
        )
    prompt, token, output = given[0], given[-1], outputs[0]
    if prompt.pop("encoder_outputs", None) is not None:
        prompt, output = _of_texts(prompt, example) | dict(example), None
    gaps = [b - a for a, b in zip(ended, began[1:], strict=False)]
    return Generated(prompt, output, token, usual(gaps) if gaps else 0.0)


def _of_texts(prompt: dict, example: Mapping) -> dict:
    """Of the beams of each text the first: the encoder has none."""
    texts, *_ = (t.shape[0] for t in tensors(example) if t.ndim)
    rows = prompt["decoder_input_ids"].shape[0]
    return {
        name: t[:: rows // texts] if isinstance(t, Tensor) and t.shape[:1] == (rows,) else t
        for name, t in prompt.items()
    }
