"""Running a model with the example, and what its layers are called with meanwhile."""

import copy
import math
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode
from torch.utils import _pytree as pytree

from .candidates import Candidate
from .state import State

PART = 2**16  # elements
ROUNDING = 1e-2  # relative change of an output, beyond which it has another reason, but in bfloat16
SHORT_ROUNDING = 0.1  # the same of a model with numbers of 16 bits


@dataclass
class Call:
    """One form of call of a layer: its first arguments, and how many rows x had."""

    args: tuple
    kwargs: dict
    tokens: int
    device: str
    autocast: torch.dtype | None  # to which torch.autocast cast it

    def cast(self) -> AbstractContextManager:
        """The autocast that the call was made in."""
        if self.autocast is None:
            return nullcontext()
        return torch.autocast(self.device, dtype=self.autocast)


@dataclass
class Calls:
    """How often each layer is called in which form, and one call of each form for layers alike."""

    times: int = 1  # as how many the next calls count
    counts: dict[Candidate, Counter] = field(default_factory=dict)
    forms: dict[tuple, Call] = field(default_factory=dict)  # by (key of the layer, form)


class Runs:
    """Calls of a model with an example, each with the same inputs, buffers and random numbers."""

    def __init__(self, model: nn.Module, example: Any, state: State):
        """TypeError for what cannot be an example."""
        self._model, self._state = model, state
        self._args: Sequence = ()
        self._kwargs: dict = {}
        self._function: Callable[[nn.Module], Any] | None = None
        if isinstance(example, Tensor):
            self._args = (example,)
        elif isinstance(example, Mapping):
            self._kwargs = dict(example)
        elif isinstance(example, list | tuple):
            self._args = tuple(example)
        elif callable(example) and not isinstance(example, type | nn.Module):
            self._function = example
        else:
            raise TypeError(
                "example: expected a tensor, a tuple of arguments, a dict of named ones (what a "
                "tokenizer gives with return_tensors='pt') or a function of the model, got "
                f"{type(example).__name__}"
            )

    def ready(self) -> Callable[[], Any]:
        """The next call: the model may write to what it gets."""
        self._state.put_back()
        model, function = self._model, self._function
        if function is not None:
            return lambda: function(model)
        args, kwargs = copied((self._args, self._kwargs))
        return lambda: model(*args, **kwargs)

    def __call__(self) -> Any:
        return self.ready()()


def one_token(example: Any) -> Any:
    """The example cut to the first token of each sequence: [B, T, ...] to [B, 1, ...], and a matrix
    of activations [M, K] to [1, K]; one beside ids or embeddings of its B and T is a mask."""
    found = list(tensors(example))
    sequences = {t.shape[:2] for t in found if t.ndim > 2 or not t.is_floating_point()}

    def cut(t: Any) -> Any:
        if not isinstance(t, Tensor) or t.ndim < 2:
            return t
        is_activations = t.ndim == 2 and t.is_floating_point() and t.shape not in sequences
        return t[:1] if is_activations else t[:, :1]

    if isinstance(example, Mapping):
        return {key: cut(t) for key, t in example.items()}
    if isinstance(example, list | tuple):
        return tuple(map(cut, example))
    if isinstance(example, Tensor):
        return cut(example)
    raise ValueError(
        "new_tokens: expected 0 with a function as example: let it generate as many as you need"
    )


@contextmanager
def recording(candidates: Sequence[Candidate], calls: Calls) -> Iterator[None]:
    """Inside, each call of a candidate is noted, as `calls.times` calls."""

    def note(candidate: Candidate) -> Callable:
        counts = calls.counts.setdefault(candidate, Counter())

        def hook(module: nn.Module, args: tuple, kwargs: dict) -> None:
            x = next(tensors([args, kwargs]), None)
            if x is None or not x.numel() or not calls.times:
                return
            tokens = _tokens(candidate.module, x)
            form = _form(candidate.module, args, kwargs, tokens)
            counts[form] += calls.times
            if (candidate.key, form) not in calls.forms:
                device = x.device.type
                is_cast = device in ("cpu", "cuda") and torch.is_autocast_enabled(device)
                dtype = torch.get_autocast_dtype(device) if is_cast else None
                call = Call(copied(args), copied(kwargs), tokens, device, dtype)
                calls.forms[candidate.key, form] = call

        return hook

    handles = [
        candidate.module.register_forward_pre_hook(note(candidate), with_kwargs=True)
        for candidate in candidates
    ]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def _tokens(module: nn.Module, x: Tensor) -> int:
    """Rows of x that the layer's matrix is multiplied by."""
    if isinstance(module, nn.modules.conv._ConvNd):
        dims, pads = len(module.stride), module._reversed_padding_repeated_twice
        batch = x.shape[0] if x.ndim == dims + 2 else 1
        windows = zip(module.kernel_size, module.stride, module.dilation, strict=True)
        places = batch
        for i, (size, stride, dilation) in enumerate(windows):
            padded = x.shape[i - dims] + sum(pads[2 * (dims - 1 - i) : 2 * (dims - i)])
            places *= (padded - dilation * (size - 1) - 1) // stride + 1
        return places
    return x.numel() // max(1, x.shape[-1])


def _form(module: nn.Module, args: tuple, kwargs: dict, tokens: int) -> tuple:
    """Equal for calls that take as long as each other. Of a linear layer: the tokens, to two bits
    after the first, since the experts of a mixture see any number."""
    if not isinstance(module, nn.MultiheadAttention | nn.modules.conv._ConvNd):
        unit = 2 ** max(0, tokens.bit_length() - 3)
        return (-(-tokens // unit) * unit,)
    shapes = tuple(tuple(t.shape) for t in tensors([args, kwargs]))
    return shapes, tuple(sorted((k, v) for k, v in kwargs.items() if isinstance(v, bool)))


def tensors(things: Any) -> Iterator[Tensor]:
    """All tensors in lists, tuples and dicts, in their order."""
    if isinstance(things, Tensor):
        yield things
    elif isinstance(things, Mapping):
        yield from tensors(list(things.values()))
    elif isinstance(things, list | tuple):
        for thing in things:
            yield from tensors(thing)


def copied(things: Any) -> Any:
    """Tensors that stand twice in it, as query and key, stay one: attention asks for that. Of other
    objects deep copies: a cache of keys and values grows with each call."""
    copies: dict[int, Any] = {}

    def copied_leaf(thing: Any) -> Any:
        if isinstance(thing, Tensor):
            if id(thing) not in copies:
                copies[id(thing)] = thing.detach().clone()
            return copies[id(thing)]
        return copy.deepcopy(thing, copies)

    with _Detaching():
        return pytree.tree_map(copied_leaf, things)


class _Detaching(TorchFunctionMode):
    """Inside, deepcopy takes tensors that have a gradient function, too, as those of a cache that
    was filled outside of torch.no_grad()."""

    def __torch_function__(
        self, func: Callable, types: Any, args: tuple = (), kwargs: dict | None = None
    ) -> Any:
        if func is Tensor.__deepcopy__ and not args[0].is_leaf:
            tensor, memo = args
            return memo.setdefault(id(tensor), tensor.detach().clone())
        return func(*args, **kwargs or {})


def error_between(before: Any, after: Any) -> float | None:
    """|after - before| / |before| over all floating-point tensors of two outputs, where they were
    finite: an infinity in x reaches more of a dense product than of a sparse one. Infinite where
    they are so no more; None where there are no tensors, or not the same ones."""
    pairs = list(zip(floats(before), floats(after), strict=False))
    if not pairs or any(a.shape != b.shape for a, b in pairs):
        return None
    wrong = size = 0.0
    for whole_a, whole_b in pairs:
        # Parts in double that stay in a CPU's cache.
        part = PART if whole_a.device.type == "cpu" else max(1, whole_a.numel())
        parts = zip(whole_a.flatten().split(part), whole_b.flatten().split(part), strict=True)
        for a, b in parts:
            is_other = ~a.isfinite()
            a, b = (t.double().masked_fill(is_other, 0.0) for t in (a, b))
            wrong += float((b - a).square().sum())
            size += float(a.square().sum())
    error = math.sqrt(wrong / size) if size else math.sqrt(wrong)
    return math.inf if math.isnan(error) else error


def compared(before: Any, after: Any, run: Callable[[], Any]) -> tuple[float | None, str]:
    """How far an output is from what it was, or why that cannot be said. `run` gives one more."""
    if not any(True for _ in floats(before)):
        return None, "it has no floating-point tensors"
    error = error_between(before, after)
    if error is None or error > ROUNDING:
        again = error_between(after, run())
        if again is None or again > ROUNDING:
            return None, "the model gives another one in each call with the same inputs"
    return error, "" if error is not None else "its tensors have other shapes than before"


def floats(things: Any) -> Iterable[Tensor]:
    """Those of `tensors` that an output is compared by."""
    return (
        t
        for t in tensors(things)
        if t.is_floating_point() and t.layout == torch.strided and not t.is_nested
    )
