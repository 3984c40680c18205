"""What a model is measured with: a call of the example, and the tokens that come after it."""

import traceback
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import nn

from .candidates import Candidate
from .example import Calls, Runs, one_token, recording
from .generation import (
    calls_of_generate,
    generating,
    refuse_same_answer,
    refuse_without_generation,
)
from .state import State
from .timing import Times, times_of

DID_NOT_RUN = "the model did not run with it"
NO_TOKEN = (
    "new_tokens: expected 0 for a model that makes no tokens; with the example cut to one token a "
    "sequence the model did not run"
)
NO_GENERATE = "new_tokens: the model's generate() did not run with the example"
NOT_AGAIN = (
    "example: the model ran with it once, but not again with the same inputs, buffers and random "
    "numbers"
)


class Work:
    """A call of the example, and of one token `steps` times."""

    def __init__(self, model: nn.Module, example: Any, new_tokens: int, state: State):
        """TypeError or ValueError for what cannot be an example, ValueError for new tokens of a
        model that says that it makes none."""
        if new_tokens:
            refuse_without_generation(model, new_tokens)
        self.run = Runs(model, example, state)
        self._model, self._example, self._state = model, example, state
        self._token_run = Runs(model, one_token(example), state) if new_tokens else None
        self._steps, self._between_s = new_tokens, 0.0

    def record(self, candidates: Sequence[Candidate], calls: Calls, is_gpu: bool) -> Any:
        """Its output; `calls` gets those of the candidates."""
        if self._steps and generating(self._model) is not None:
            return self._record_generate(candidates, calls, is_gpu)
        with recording(candidates, calls):
            output = told(f"example: {DID_NOT_RUN}", self.run)
            if self._token_run is not None:
                calls.times = self._steps
                answer = told(NO_TOKEN, self._token_run)
                token = one_token(self._example)
                refuse_same_answer(self._model, self._steps, token, (output, answer))
        return output

    def _record_generate(self, candidates: Sequence[Candidate], calls: Calls, is_gpu: bool) -> Any:
        self._steps -= 1  # the prompt gives the first token
        with recording(candidates, calls):
            found = told(
                NO_GENERATE,
                lambda: calls_of_generate(self._model, self._example, calls, self._steps, is_gpu),
            )
        self._state.put_back()
        self.run = Runs(self._model, found.prompt, self._state)
        self._token_run = Runs(self._model, found.token, self._state) if self._steps else None
        self._between_s = found.between_s
        if found.output is not None:
            return found.output
        return told(f"example: {DID_NOT_RUN}", self.run)

    def times(
        self, modules: Sequence[nn.Module], device: torch.device, is_whole_apart: bool = True
    ) -> Times:
        """Of all of it, with clocks on the modules."""

        def both() -> Times:
            found = times_of(self.run.ready, modules, device, is_whole_apart)
            if self._token_run is not None:
                tokens = times_of(self._token_run.ready, modules, device, is_whole_apart)
                found = found.plus(self._steps, tokens, self._between_s)
            return found

        return told(NOT_AGAIN, both)


def told(what: str, run: Callable[..., Any], model: nn.Module | None = None) -> Any:
    """run(); of an error it says what failed, and with `model` in which of its modules."""
    try:
        return run()
    except Exception as error:
        place = "" if model is None else place_of(error, model)
        where = f", in {place}" if place else ""
        raise ValueError(f"{what}{where}: {type(error).__name__}: {error}") from error


def place_of(error: Exception, model: nn.Module) -> str:
    """The name of the innermost module in which it was raised, or nothing."""
    names = {id(m): name for name, m in model.named_modules()}
    frames = [id(f.f_locals.get("self")) for f, _ in traceback.walk_tb(error.__traceback__)]
    places = [names[owner] for owner in frames if names.get(owner)]
    return places[-1] if places else ""
