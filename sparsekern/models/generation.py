"""Whether a model generates, and the calls that `generate` of transformers makes of it: for a
prompt, and for a token with its past."""

import inspect
from collections.abc import Mapping
from dataclasses import dataclass
from itertools import islice
from typing import Any

from torch import Tensor, nn

from .example import Calls, copied, floats, tensors
from .timing import clock, wait

ALL_THE_SAME = "if it generates all the same, give a function as example, in which it does"
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


def refuse_without_generation(model: nn.Module, new_tokens: int) -> None:
    """ValueError for a model of transformers that says of itself that it generates nothing."""
    can_generate = getattr(model, "can_generate", None)  # under an adapter of peft as well
    if callable(can_generate) and not can_generate():
        raise ValueError(
            f"new_tokens: expected 0 for a model that makes no tokens, got {new_tokens}: "
            f"can_generate() of {type(model).__name__} is False; {ALL_THE_SAME}"
        )


def refuse_same_answer(model: nn.Module, new_tokens: int, token: Any, outputs: Any) -> None:
    """ValueError where a model has no place in its output for each token: where two `outputs`, for
    sequences and for one `token` of each, are alike. The rows of a matrix are tokens, too."""
    is_matrix = any(t.ndim == 2 and t.is_floating_point() for t in islice(tensors(token), 1))
    of_all, of_one = ([tuple(t.shape) for t in floats(output)] for output in outputs)
    is_last = any(len(shape) > 2 and shape[1] == 1 for shape in of_one)  # the last token's logits
    if of_all == of_one and of_one and not (is_matrix or is_last or hasattr(model, "generate")):
        raise ValueError(
            f"new_tokens: expected 0 for a model that makes no tokens, got {new_tokens}: the "
            f"output of {type(model).__name__} has the shape {of_one[0]} both for sequences and "
            f"for one token of each; {ALL_THE_SAME}"
        )


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
