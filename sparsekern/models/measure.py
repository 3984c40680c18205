"""Which layers are faster sparse, and which stay dense."""

from collections import defaultdict
from collections.abc import Sequence
from itertools import cycle

import torch
from torch import Tensor, nn

from ..kernels.derived import derived_bytes
from ..kernels.problem import Problem
from ..kernels.table import pick
from ..nn import SparseLinear
from ..nn.stand_ins import SparseExperts
from .candidates import Candidate
from .example import Call, Calls, error_between, tensors
from .report import Layer
from .timing import Rest, Run, usual_seconds

LEAST_GAIN = 1.05  # times as fast that a sparse layer must be: below, it is noise
# |sparse - dense| / |dense| of a layer's output, beyond which it is taken for another function
TOLERANCE = {torch.float64: 1e-10, torch.float32: 1e-4, torch.float16: 1e-2, torch.bfloat16: 5e-2}
BEFORE, DENSE, SPARSE = "before", "dense", "sparse"


def measured(model: nn.Module, candidates: Sequence[Candidate], calls: Calls) -> list[Layer]:
    """A row for each candidate, with the decision; nothing is replaced yet. Of candidates that are
    alike the first is measured, in each form in which any of them is called."""
    forms: dict[tuple, set] = defaultdict(set)
    for candidate in candidates:
        forms[candidate.key].update(calls.counts.get(candidate, ()))
    weight = candidates[0].weight
    rest = Rest(weight.device, weight.dtype)
    pruned = sum(bytes_of(candidate.module) for candidate in candidates)
    others = _read_bytes(model) - pruned
    alike: dict[tuple, list[Candidate]] = defaultdict(list)
    for candidate in candidates:
        alike[candidate.key].append(candidate)
    times: dict[tuple, _Alike] = {}
    for key, found in alike.items():
        if forms[key]:
            called = {form: calls.forms[key, form] for form in forms[key]}
            times[key] = _Alike(found, called, rest, others, pruned)
    return [_row(candidate, calls, times.get(candidate.key)) for candidate in candidates]


def _read_bytes(model: nn.Module) -> int:
    """Bytes of what a call of the model reads: of a table of embeddings next to nothing."""
    tables = nn.Embedding | nn.EmbeddingBag
    modules = [module for module in model.modules() if not isinstance(module, tables)]
    held = {id(t): t for m in modules for t in [*m._parameters.values(), *m._buffers.values()]}
    return sum(_nbytes(t) for t in held.values() if t is not None)


class _Alike:
    """The times of one layer, for all that are like it."""

    def __init__(
        self,
        alike: Sequence[Candidate],
        forms: dict[tuple, Call],
        rest: Rest,
        others: int,
        pruned: int,
    ):
        """`others` are the bytes of what stays dense in any case, `pruned` those of candidates."""
        candidate = alike[0]
        dense, sparse, plain = candidate.module, candidate.make(), candidate.plain()
        self.error, self.dtype = 0.0, candidate.weight.dtype
        self.seconds: dict[tuple, dict[str, float]] = {}
        self.kernels: dict[tuple, str] = {}
        for form, call in forms.items():
            with call.cast():
                error = error_between(*(_call(layer, call)() for layer in (plain, sparse)))
                self.error = max(self.error, 0.0 if error is None else error)
                runs = {DENSE: _call(plain, call), SPARSE: _call(sparse, call)}
                twins: dict[str, Run] = {}
                if plain is not dense:
                    runs[BEFORE] = _call(dense, call)
                elif len(alike) > 1:  # each time the next one, which is not in the cache
                    runs[DENSE] = _in_turn([_call(each.module, call) for each in alike])
                    twins[DENSE] = runs[DENSE]
                # A sparse layer stands among others that are sparse alike.
                sizes = {name: float(bytes_of(dense)) for name in (BEFORE, DENSE)}
                sizes[SPARSE] = float(bytes_of(sparse))
                share = pruned / sizes[DENSE] - 1
                sizes = {name: others + share * size for name, size in sizes.items()}
                hot = tuple(tensors([call.args, call.kwargs]))
                seconds = usual_seconds(runs, rest, sizes, hot, twins)
                self.seconds[form] = {BEFORE: seconds[DENSE]} | seconds
                self.kernels[form] = kernel_of(sparse, call)

    @property
    def is_right(self) -> bool:
        return self.error <= TOLERANCE[self.dtype]  # NaN is not


def _row(candidate: Candidate, calls: Calls, alike: _Alike | None) -> Layer:
    kind = type(candidate.module).__name__
    layer = Layer(candidate.name, kind, candidate.shapes, candidate.sparsity)
    layer.bytes_before = layer.bytes_after = bytes_of(candidate.module)
    counts = calls.counts.get(candidate)
    if alike is None or not counts:
        layer.reason = "the example never calls it"
        return layer
    for form, count in counts.items():
        tokens = calls.forms[candidate.key, form].tokens
        layer.tokens[tokens] = layer.tokens.get(tokens, 0) + count
        layer.kernels[tokens] = alike.kernels[form]
        layer.before_s += count * alike.seconds[form][BEFORE]
        layer.dense_s += count * alike.seconds[form][DENSE]
        layer.sparse_s += count * alike.seconds[form][SPARSE]
    if not alike.is_right:
        layer.reason = f"its class computes something else (output differs by {alike.error:.0e})"
    elif layer.gain < LEAST_GAIN:
        layer.reason = "sparse is no faster"
    else:
        layer.is_sparse = True
    return layer


def _call(layer: nn.Module, call: Call) -> Run:
    return lambda: layer(*call.args, **call.kwargs)


def _in_turn(runs: Sequence[Run]) -> Run:
    endless = cycle(runs)
    return lambda: next(endless)()


def kernel_of(sparse: nn.Module, call: Call) -> str:
    """The row of the kernel table that serves the largest matrix of a sparse module."""
    layers = [m for m in sparse.modules() if isinstance(m, SparseLinear)]
    layer = max(layers, key=lambda m: m.in_features * m.out_features)
    tokens, (x, *others) = call.tokens, tensors([call.args, call.kwargs])
    if isinstance(sparse, SparseExperts) and others:  # on average
        tokens = max(1, tokens * others[0].shape[-1] * 2 // len(layers))
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
