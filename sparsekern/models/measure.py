"""Which layers are faster sparse, and which stay dense."""

from collections import Counter, defaultdict
from collections.abc import Sequence

import torch
from torch import Tensor, nn

from ..kernels.derived import derived_bytes
from ..kernels.problem import Problem
from ..kernels.table import pick
from ..nn import SparseLinear
from ..nn.experts import SparseExperts
from .candidates import Candidate
from .example import Call, Calls, error_between, tensors
from .report import Layer
from .timing import Run, Times, seconds_alone

LEAST_GAIN = 1.05  # times as fast that a sparse layer must be: below, it is noise
HOPELESS = 0.5  # times as fast, alone, that it must be to be tried in the model
# |sparse - dense| / |dense| of a layer's output, beyond which it is taken for another function. For
# float32 torch may multiply in TF32 or bfloat16, by autocast or by settings of each library.
TOLERANCE = {torch.float64: 1e-10, torch.float32: 1e-2, torch.float16: 1e-2, torch.bfloat16: 5e-2}
BEFORE, DENSE, SPARSE = "before", "dense", "sparse"
NO_FASTER = "sparse is no faster"


def first_look(
    candidates: Sequence[Candidate], calls: Calls, seconds: Sequence[float]
) -> list[Layer]:
    """A row for each candidate, of which `seconds` are its time in the model as it is. `is_sparse`
    says which are to be tried; nothing is replaced yet.

    Of candidates that are alike the first is called alone, in each form in which any of them is:
    whether it computes the same, and about how long it takes in another form."""
    forms: dict[tuple, set] = defaultdict(set)
    first: dict[tuple, Candidate] = {}
    for candidate in candidates:
        forms[candidate.key].update(calls.counts.get(candidate, ()))
        first.setdefault(candidate.key, candidate)
    alone = {
        key: _Alone(candidate, {form: calls.forms[key, form] for form in forms[key]})
        for key, candidate in first.items()
        if forms[key]
    }
    return [
        _row(candidate, calls, alone.get(candidate.key), before_s)
        for candidate, before_s in zip(candidates, seconds, strict=True)
    ]


def too_slow(
    candidates: Sequence[Candidate],
    calls: Calls,
    layers: Sequence[Layer],
    seconds: Sequence[float],
) -> list[Candidate]:
    """Those of the sparse layers that gain nothing in the model, where they took so many seconds;
    they are marked as dense. Layers alike share the decision: in one alone it is closer to noise.
    """
    alike: dict[tuple, list[tuple[Candidate, Layer]]] = defaultdict(list)
    for candidate, layer, after_s in zip(candidates, layers, seconds, strict=True):
        if layer.is_sparse:
            layer.sparse_s = after_s
            counts = frozenset(calls.counts[candidate].items())
            alike[candidate.key, counts].append((candidate, layer))
    slow = []
    for found in alike.values():
        dense = sum(min(layer.before_s, layer.dense_s) for _, layer in found)
        if dense < LEAST_GAIN * sum(layer.sparse_s for _, layer in found):
            slow += found
    for _, layer in slow:
        layer.is_sparse, layer.reason = False, NO_FASTER
    return [candidate for candidate, _ in slow]


def rest_gained(
    candidates: Sequence[Candidate], layers: Sequence[Layer], before: Times, after: Times
) -> float:
    """Seconds less in what is not sparse; a mask that is multiplied in is a gain of its layer."""
    gained = before.rest_s - after.rest_s
    rows = zip(candidates, layers, before.layers_s, after.layers_s, strict=True)
    for candidate, layer, before_s, after_s in rows:
        if not layer.is_sparse and candidate.is_masked:
            layer.dense_s = after_s
        elif not layer.is_sparse:
            gained += before_s - after_s
    return gained


class _Alone:
    """The calls of one layer by itself, for all that are like it."""

    def __init__(self, candidate: Candidate, forms: dict[tuple, Call]):
        dense, sparse, plain = candidate.module, candidate.make(), candidate.plain()
        self.error, self.tolerance = 0.0, TOLERANCE[candidate.weight.dtype]
        self.seconds: dict[tuple, dict[str, float]] = {}
        self.kernels: dict[tuple, str] = {}
        for form, call in forms.items():
            with call.cast():
                error = error_between(*(_call(layer, call)() for layer in (plain, sparse)))
                self.error = max(self.error, 0.0 if error is None else error)
                runs = {DENSE: _call(plain, call), SPARSE: _call(sparse, call)}
                if plain is not dense:
                    runs[BEFORE] = _call(dense, call)
                seconds = seconds_alone(runs, candidate.weight.device)
                self.seconds[form] = {BEFORE: seconds[DENSE]} | seconds
                self.kernels[form] = kernel_of(sparse, call)

    @property
    def is_right(self) -> bool:
        return self.error <= self.tolerance

    def total(self, name: str, counts: Counter) -> float:
        return sum(count * self.seconds[form][name] for form, count in counts.items())


def _row(candidate: Candidate, calls: Calls, alone: _Alone | None, before_s: float) -> Layer:
    kind = type(candidate.module).__name__
    layer = Layer(candidate.name, kind, candidate.shapes, candidate.sparsity)
    layer.bytes_before = layer.bytes_after = bytes_of(candidate.module)
    counts = calls.counts.get(candidate)
    if alone is None or not counts:
        layer.reason = "the example never calls it"
        return layer
    for form, count in counts.items():
        tokens = calls.forms[candidate.key, form].tokens
        layer.tokens[tokens] = layer.tokens.get(tokens, 0) + count
        layer.kernels[tokens] = alone.kernels[form]
    layer.before_s = before_s
    share = before_s / max(alone.total(BEFORE, counts), 1e-9)
    layer.dense_s = share * alone.total(DENSE, counts) if candidate.is_masked else before_s
    layer.sparse_s = share * alone.total(SPARSE, counts)
    if not alone.is_right:
        layer.reason = f"its class computes something else (output differs by {alone.error:.0e})"
    elif layer.gain < HOPELESS:
        layer.reason = NO_FASTER
    else:
        layer.is_sparse = True
    return layer


def _call(layer: nn.Module, call: Call) -> Run:
    return lambda: layer(*call.args, **call.kwargs)


def kernel_of(sparse: nn.Module, call: Call) -> str:
    """The row of the kernel table that serves the largest matrix of a sparse module."""
    layers = [m for m in sparse.modules() if isinstance(m, SparseLinear)]
    layer = max(layers, key=lambda m: m.in_features * m.out_features)
    tokens, (x, *others) = call.tokens, tensors([call.args, call.kwargs])
    if isinstance(sparse, SparseExperts):  # on average
        top_k = others[0].shape[-1] if others else 1
        tokens = max(1, tokens * top_k * 2 // len(layers))
    dtype = x.dtype if call.autocast is None else call.autocast
    sizes = tokens, layer.out_features, layer.in_features, layer.col_indices.shape[0]
    return pick(Problem("spmm", x.device.type, dtype, *sizes)).name


def bytes_of(module: nn.Module) -> int:
    """Bytes of parameters and buffers, and of what kernels keep beside the patterns."""
    held = {id(t): _nbytes(t) for t in [*module.parameters(), *module.buffers()] if not t.is_meta}
    layers = (m for m in module.modules() if isinstance(m, SparseLinear))
    kept = sum(derived_bytes(layer.row_offsets, layer.col_indices) for layer in layers)
    return sum(held.values()) + kept


def _nbytes(t: Tensor) -> int:
    """Of a sparse tensor of torch's, those of its values."""
    return t.nbytes if t.layout == torch.strided else t._nnz() * t.itemsize
