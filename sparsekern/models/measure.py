"""Which layers are faster sparse: times of each, dense and sparse in turn, with the cache as it is
in the model.

Between two calls of a layer the others pass: their weights push its own out of the cache, as far as
they do not fit beside it. `Rest` does that; without it a large model's layers look faster than they
are, the dense ones more than the sparse.
"""

from collections import defaultdict
from collections.abc import Callable, Sequence

import torch
from torch import Tensor, nn

from ..kernels.derived import derived_bytes
from ..kernels.problem import Problem
from ..kernels.table import pick
from ..nn import SparseLinear
from ..nn.stand_ins import SparseExperts
from .candidates import Candidate
from .example import Call, Calls, clock, error_between, tensors
from .report import Layer

LEAST_GAIN = 1.05  # times as fast that a sparse layer must be: below, it is noise
# |sparse - dense| / |dense| of a layer's output, beyond which it is taken for another function
TOLERANCE = {torch.float64: 1e-10, torch.float32: 1e-4, torch.float16: 1e-2, torch.bfloat16: 5e-2}
ROUNDS = 9
ENOUGH_S = 0.05  # of timed calls: no more rounds then, but for the least
LEAST_ROUNDS = 3
CACHE_BYTES = 2**26  # more than this pushes out all of a CPU's cache
IN_L2_BYTES = 2**19  # less than this disturbs nothing

Run = Callable[[], object]
BEFORE, DENSE, SPARSE = "before", "dense", "sparse"


def measured(model: nn.Module, candidates: Sequence[Candidate], calls: Calls) -> list[Layer]:
    """A row for each candidate, with the decision; nothing is replaced yet. Of candidates that are
    alike the first is measured, in each form in which any of them is called."""
    forms: dict[tuple, set] = defaultdict(set)
    for candidate in candidates:
        forms[candidate.key].update(calls.counts.get(candidate, ()))
    model_bytes = bytes_of(model)
    times: dict[tuple, _Alike] = {}
    layers = []
    for candidate in candidates:
        key = candidate.key
        if forms[key] and key not in times:
            found = {form: calls.forms[key, form] for form in forms[key]}
            times[key] = _Alike(candidate, found, model_bytes)
        layers.append(_row(candidate, calls, times.get(key)))
    return layers


class _Alike:
    """The times of one layer, for all that are like it."""

    def __init__(self, candidate: Candidate, forms: dict[tuple, Call], model_bytes: int):
        dense, sparse, plain = candidate.module, candidate.make(), candidate.plain()
        self.error, self.dtype = 0.0, candidate.weight.dtype
        self.seconds: dict[tuple, dict[str, float]] = {}
        self.kernels: dict[tuple, str] = {}
        rest = Rest(model_bytes - bytes_of(dense), candidate.weight.device)
        for form, call in forms.items():
            with call.cast():
                error = error_between(*(_call(layer, call)() for layer in (plain, sparse)))
                self.error = max(self.error, 0.0 if error is None else error)
                runs = {DENSE: _call(plain, call), SPARSE: _call(sparse, call)}
                if plain is not dense:
                    runs[BEFORE] = _call(dense, call)
                seconds = least_seconds(runs, rest, tuple(tensors([call.args, call.kwargs])))
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
    least = min(layer.before_s, layer.dense_s)
    if not alike.is_right:
        layer.reason = f"its class computes something else (output differs by {alike.error:.0e})"
    elif least < LEAST_GAIN * layer.sparse_s:
        layer.reason = f"sparse is {least / layer.sparse_s:.2f} times as fast"
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
    if isinstance(sparse, SparseExperts) and others:  # on average
        tokens = max(1, tokens * others[0].shape[-1] * 2 // len(layers))
    dtype = x.dtype if call.autocast is None else call.autocast
    sizes = tokens, layer.out_features, layer.in_features, layer.col_indices.shape[0]
    return pick(Problem("spmm", x.device.type, dtype, *sizes)).name


def bytes_of(module: nn.Module) -> int:
    """Bytes of parameters and buffers, and of what kernels keep beside the patterns."""
    held = {id(t): t.nbytes for t in [*module.parameters(), *module.buffers()] if not t.is_meta}
    layers = (m for m in module.modules() if isinstance(m, SparseLinear))
    kept = sum(derived_bytes(layer.row_offsets, layer.col_indices) for layer in layers)
    return sum(held.values()) + kept


class Rest:
    """What the other layers of a model do to the cache: they are so many bytes."""

    def __init__(self, size_bytes: int, device: torch.device):
        size = min(size_bytes, CACHE_BYTES) // 4
        self._data = torch.zeros(size if size * 4 > IN_L2_BYTES else 0, device=device)

    def passes(self, hot: tuple[Tensor, ...]) -> None:
        """The others are called; `hot` is what the layer gets from the one before it."""
        if self._data.numel():
            self._data.sum()
            for t in hot:
                t.sum()


def least_seconds(runs: dict[str, Run], rest: Rest, hot: tuple[Tensor, ...]) -> dict[str, float]:
    """The least time of a call of each; they take turns."""
    on_gpu, now = any(t.is_cuda for t in hot), clock()
    taken: dict[str, list[float]] = {name: [] for name in runs}
    for run in runs.values():  # packing, allocation
        run()
    for i in range(ROUNDS):
        if i >= LEAST_ROUNDS and sum(map(sum, taken.values())) > ENOUGH_S:
            break
        for name, run in runs.items():
            rest.passes(hot)
            taken[name].append(_gpu_seconds(run) if on_gpu else _host_seconds(run, now))
    return {name: min(each) for name, each in taken.items()}


def _host_seconds(run: Run, now: Callable[[], float]) -> float:
    began = now()
    run()
    return now() - began


def _gpu_seconds(run: Run) -> float:
    """As an eager call takes: with its launch, where the GPU waits for that."""
    begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    torch.cuda.synchronize()
    begin.record()
    run()
    end.record()
    end.synchronize()
    return 1e-3 * begin.elapsed_time(end)
