"""accelerate_: a pruned model as it is, made faster in place where sparse layers are faster.

    scan      which modules have zeros, and what is left out and why       (candidates.py)
    record    one run of the example: with how many tokens each is called  (work.py, example.py)
    measure   the model, and each layer in it                              (timing.py)
    exchange  one layer at a time, so that memory holds one layer twice
    look      what changed in the output
    measure   once more; layers that gained nothing become dense again     (measure.py)

Until the last step has passed, an error puts back what was there.
"""

import time
import warnings
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from ..nn.checks import check_model
from .candidates import LEAST_SPARSITY, Candidate, Marks, scan
from .example import ROUNDING, SHORT_ROUNDING, Calls, compared
from .exchange import Exchange
from .measure import LEAST_GAIN, bytes_of, first_look, rest_gained, too_slow
from .report import Layer, Report, Skipped, seen
from .state import State
from .timing import Times
from .work import NOT_AGAIN, Work, place_of, told

PAST_MODULES = (
    "accelerate_: the model, which is as it was, does not run with sparse layers: something reads "
    "a layer's weight or attributes, or calls it past its module (layer.weight.requires_dense = "
    "True keeps one dense)"
)


def accelerate_(
    model: nn.Module, example: Any, *, new_tokens: int = 0, nan_is_pruned: bool = False
) -> Report:
    """Make sparse, in place, the layers of a pruned model that are faster so, and report on all.

    The zeros that are there decide (of a layer under torch.nn.utils.prune: its mask); nothing is
    pruned. Each layer is measured in the model, dense and sparse, with as many tokens as the
    example brings it, and stays dense where that is faster. The output is the same up to rounding.
    Memory holds one layer twice, never two models. Taken are nn.Linear and its subclasses that only
    hold a weight, transformers' Conv1D, nn.MultiheadAttention, convolutions without
    groups, and the stacked experts of mixtures; embeddings and tied weights stay dense. The report
    names what was left out, and why. The model is run some times, in eval mode, without gradients,
    and each time with the same inputs, buffers and random numbers. Afterwards these and each
    module's mode are as they were; what a model keeps elsewhere, such as a count of its calls, is
    not.

    Args:
        model: a model on a CPU or a GPU, with its dense weights.
        example: what to call the model with: a tensor, a tuple of arguments, a dict of named ones
            (what a tokenizer gives), or a function of the model, `lambda m: m.generate(**inputs)`.
            As many tokens as in real use: what pays for 128 may not pay for one.
        new_tokens: so many tokens are generated after the example, one at a time: each layer is
            weighed with one call of the example and so many of one token a sequence. A model of
            transformers is called as its `generate` does with max_new_tokens: for the logits of the
            prompt's last token, then one less with a token and the keys and values before it.
            Any other model is called with the first token of each sequence; the rows of a matrix
            [M, K] are tokens. ValueError for a model that makes none: it says so
            (`can_generate()`), or it has no place for each token in its output, as a classifier.
        nan_is_pruned: NaN in a weight marks what is pruned, and counts as zero.

    Layers replaced have new Parameters: make optimizers afterwards, and `torch.compile` too; an
    optimizer that was there takes those of linear layers with `sparsekern.nn.adopt_values_`.
    densify_ brings the dense modules back.

    Raises TypeError for an example that is none, ValueError where the model has no layer with at
    least 30 % zeros (the message lists what it has), where weights are NaN or have no shape yet, or
    where the model does not run with the example, or calls no such layer. Then, and after any other
    error, the model is as it was.
    """
    began = time.perf_counter()
    _check_model(model)
    if type(new_tokens) is not int or new_tokens < 0:
        raise ValueError(f"new_tokens: expected a whole number of at least 0, got {new_tokens!r}")
    state = State(model)
    work = Work(model, example, new_tokens, state)
    marks, exchange = Marks(), Exchange(model)
    with _evaluating(model), torch.inference_mode(False), torch.no_grad():
        try:
            if nan_is_pruned:
                marks.remove(model)
            report = _exchanged(work, model, new_tokens, exchange)
            _warn_of_change(report, model.parameters())
        except BaseException:
            exchange.undo()
            marks.undo()
            raise
        finally:
            state.put_back()
    report.seconds = time.perf_counter() - began
    return report


def _exchanged(work: Work, model: nn.Module, new_tokens: int, exchange: Exchange) -> Report:
    """The report on all layers, of which those that are faster sparse are in their places."""
    candidates, skipped = _candidates(model)
    device = candidates[0].weight.device
    calls = Calls()
    output = work.record(candidates, calls, device.type == "cuda")
    if not any(calls.counts.values()):
        raise ValueError(
            f"example: with it the model calls none of its {len(candidates)} layers with "
            f"zeros ({candidates[0].name}, ...), or with no tokens"
        )
    # With clocks on its layers torch's encoder leaves a path that is faster.
    is_apart = any(isinstance(m, nn.TransformerEncoderLayer) for m in model.modules())
    before = work.times([c.module for c in candidates], device, is_apart)
    layers = first_look(candidates, calls, before.layers_s)
    report = Report(layers, skipped, str(device), torch.get_num_threads(), new_tokens)
    report.before_s = report.after_s = before.whole_s
    for candidate, layer in zip(candidates, layers, strict=True):
        if layer.is_sparse:
            exchange.replace(candidate, candidate.make())
        elif candidate.is_masked:
            exchange.replace(candidate, candidate.plain())
    if exchange.is_begun:
        after_output = _run_sparse(work, model, exchange, candidates, layers)
        report.output_error, report.not_compared = compared(
            output, after_output, lambda: told(NOT_AGAIN, work.run)
        )
        _keep_what_gains(work, exchange, candidates, calls, before, report)
    for candidate, layer in zip(candidates, layers, strict=True):
        layer.bytes_after = bytes_of(exchange.now(candidate))
    return report


def _candidates(model: nn.Module) -> tuple[list[Candidate], list[Skipped]]:
    """What scan() finds. ValueError for nothing, TypeError for the model itself."""
    candidates, skipped = scan(model)
    if not candidates:
        raise ValueError(
            f"accelerate_: no layer with at least {LEAST_SPARSITY:.0%} zeros that a sparse "
            f"one could stand in for; there are: {seen(skipped) or 'no matrices at all'}"
        )
    if candidates[0].module is model:
        raise TypeError(
            f"model: expected a model that holds layers, got a {type(model).__name__}, in "
            "whose place nothing can be put: give nn.Sequential(layer)"
        )
    return candidates, skipped


def _keep_what_gains(
    work: Work,
    exchange: Exchange,
    candidates: Sequence[Candidate],
    calls: Calls,
    before: Times,
    report: Report,
) -> None:
    """Measure once more: layers that gained nothing become dense again; all, where the whole model
    gained nothing."""
    device, layers = torch.device(report.device), report.layers
    after = work.times([exchange.now(c) for c in candidates], device)
    # What one gains depends on the others: layers that are slow push out of the cache.
    while slow := too_slow(candidates, calls, layers, after.layers_s):
        for candidate in slow:
            _make_dense(exchange, candidate)
        after = work.times([exchange.now(c) for c in candidates], device)
    report.after_s = after.whole_s
    report.rest_gained_s = rest_gained(candidates, layers, before, after)
    if not exchange.is_begun:
        _nothing_gained(report)
    if report.after_s > LEAST_GAIN * report.before_s:  # a moment of the machine?
        report.after_s = min(report.after_s, work.times([], device).whole_s)
    if report.after_s > LEAST_GAIN * report.before_s:
        exchange.undo()
        _stay_dense(report)


def _make_dense(exchange: Exchange, candidate: Candidate) -> None:
    """Dense again, without the mask that it had."""
    exchange.take_back(candidate)
    if candidate.is_masked:
        exchange.replace(candidate, candidate.plain())


def _run_sparse(
    work: Work,
    model: nn.Module,
    exchange: Exchange,
    candidates: Sequence[Candidate],
    layers: Sequence[Layer],
) -> Any:
    """The output with sparse layers. One that is given what its sparse form does not take stays
    dense: T5 casts what goes into a float32 layer of a float16 model if the weight is a tensor."""
    while True:
        try:
            return told(PAST_MODULES, work.run, model)
        except ValueError as error:
            cause = error.__cause__
            assert isinstance(cause, Exception)
            if isinstance(cause, MemoryError | torch.OutOfMemoryError):
                raise
            inside = f"{place_of(cause, model)}."
            for candidate, layer in zip(candidates, layers, strict=True):
                if layer.is_sparse and inside.startswith(f"{candidate.name}."):
                    break
            else:
                raise
            _make_dense(exchange, candidate)
            layer.is_sparse = False
            layer.reason = f"it does not run sparse: {type(cause).__name__}: {cause}"


def _warn_of_change(report: Report, weights: Iterable[Tensor]) -> None:
    """Where the output changed by more than rounding, and by the same in each call."""
    is_short = any(w.dtype in (torch.bfloat16, torch.float16) for w in weights)
    if (report.output_error or 0.0) > (SHORT_ROUNDING if is_short else ROUNDING):
        warnings.warn(
            f"accelerate_: the output changed by {report.output_error:.1e}, more than rounding "
            "does: something in the model treats sparse layers otherwise than dense ones, or "
            "decides by small differences; densify_(model) brings the dense layers back",
            stacklevel=3,
        )


def _stay_dense(report: Report) -> None:
    """All has been taken back."""
    slower = report.after_s / report.before_s
    for layer in report.layers:
        layer.dense_s = layer.before_s
        if layer.is_sparse:
            layer.is_sparse = False
            layer.reason = f"with sparse layers the whole model took {slower:.2f} times as long"
    _nothing_gained(report)


def _nothing_gained(report: Report) -> None:
    report.after_s, report.rest_gained_s = report.before_s, 0.0
    report.output_error, report.not_compared = None, ""


def _check_model(model: nn.Module) -> None:
    check_model(model)
    for name, module in model.named_modules():
        if name and hasattr(module, "_orig_mod") or module._compiled_call_impl is not None:
            raise TypeError(
                f"model: expected it as it was before torch.compile: {name or 'it'} is compiled; "
                "make it sparse first, and compile it afterwards"
            )
    held = [*model.named_parameters(), *model.named_buffers()]
    if lazy := [name for name, t in held if nn.parameter.is_lazy(t)]:
        raise ValueError(f"model: {lazy[0]} has no shape yet: call the model once before")
    if hasattr(model, "_orig_mod") or isinstance(model, nn.parallel.DistributedDataParallel):
        inner = "model._orig_mod" if hasattr(model, "_orig_mod") else "model.module"
        raise TypeError(
            f"model: expected it as it was before torch.compile or DDP wrapped it: give {inner}, "
            "and wrap it afterwards"
        )


@contextmanager
def _evaluating(model: nn.Module) -> Iterator[None]:
    """The model in eval mode; what is there afterwards has its mode again, by name."""
    training = {name: module.training for name, module in model.named_modules()}
    try:
        model.eval()
        yield
    finally:
        for name, module in model.named_modules():
            outer = name
            while outer not in training:  # a part of a module that took another's place
                outer = outer.rpartition(".")[0]
            module.training = training[outer]
