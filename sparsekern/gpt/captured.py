"""A training step on a GPU in CUDA graphs: of forward and backward, of clipping, and of AdamW.

Each launch of a graph is one call of the host, which is otherwise what a step waits for. The
micro-batches of a step go through the same memory: the first one writes its gradients (fp32, of
sparse weights at nnz), the next ones add theirs in place. The learning rate is a tensor, which a
schedule writes.

A graph keeps the addresses and the patterns that it was captured with. So before each replay all of
them are compared, and the step is captured anew where one has moved. A step after which an
algorithm changes its patterns is taken without a graph: RigL must see its gradients. So are
WARM_UPS steps at the start, and one after each change: what they compile and derive no capture can.
"""

import copy
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager

import torch
from torch import Tensor
from torch.optim import Optimizer

from ..kernels.derived import versions
from ..nn import SparseLinear, forget_graphs_
from ..nn.float8 import scaling_of
from ..sparsity import Algorithm
from .distributed import Ranks
from .model import GPT
from .step import add_gradients, clip, compute_gradients, micro_batches

WARM_UPS = 2


def why_eager(ranks: Ranks) -> str | None:
    """The reason why no step is captured there; None where it is."""
    if ranks.device.type != "cuda":
        return "CUDA graphs need a GPU"
    if ranks.parallel != "none":
        return f"{ranks.parallel} is not captured in CUDA graphs yet"
    return None


class CudaGraph:
    """What a function launches on the GPU. Making one runs nothing: replay() does."""

    def __init__(self, launch: Callable[[], None], aside: "Aside", first: "CudaGraph | None"):
        """Captured on the stream of `aside`; in the memory of `first`, which is replayed before."""
        self._graph = torch.cuda.CUDAGraph()
        pool, stream = first and first._graph.pool(), aside.stream
        # The stream of now is also that of afterwards, where a capture fails.
        with torch.cuda.stream(torch.cuda.current_stream(stream.device)):
            # thread_local: products plan in the thread of autograd, too.
            with torch.cuda.graph(self._graph, pool, stream, capture_error_mode="thread_local"):
                launch()

    def replay(self) -> None:
        self._graph.replay()


class Aside:
    """The stream that steps are captured on, and taken on without a graph: what autograd keeps of a
    parameter belongs to one stream."""

    def __init__(self, device: torch.device) -> None:
        self.stream = torch.cuda.Stream(device)

    @contextmanager
    def __call__(self) -> Iterator[None]:
        """Work inside comes after that before, and before that behind."""
        around = torch.cuda.current_stream(self.stream.device)
        self.stream.wait_stream(around)
        try:
            with torch.cuda.stream(self.stream):
                yield
        finally:
            around.wait_stream(self.stream)


class CapturedStep:
    """The step of a model, its optimizer and the algorithms that follow this optimizer.

    `is_replayed` says whether the step under way is a replay, whose numbers nobody waits for.
    """

    def __init__(
        self,
        model: GPT,
        stepper: GPT,
        optimizer: Optimizer,
        algorithms: Sequence[Algorithm],
        dtype: torch.dtype,
        micro_batch: int = 0,
    ) -> None:
        """`stepper` may be another form of the model. `micro_batch` as of compute_gradients."""
        self._model, self._stepper = model, stepper
        self._optimizer, self._algorithms = optimizer, algorithms
        self._dtype, self._micro_batch = dtype, micro_batch
        device = model.wte.weight.device
        for group in optimizer.param_groups:
            group["lr"] = torch.tensor(float(group["lr"]), device=device)
        self._aside = Aside(device)
        self._graphs: dict[str, CudaGraph] = {}
        self._seen: list[object] = []  # what the graphs depend on, at the step before
        self._cold = WARM_UPS  # steps to take without a graph
        self.is_replayed = False

    def compute_gradients(self, x: Tensor, y: Tensor) -> tuple[Tensor, Tensor]:
        """As step.compute_gradients. It may leave gradients half-done where it raises, and the
        weights as they were."""
        seen = self._dependencies(x)
        if len(seen) != len(self._seen) or any(map(_differ, seen, self._seen)):
            self.drop()
            self._seen, self._cold = seen, max(1, self._cold)
        is_due = any(algorithm.is_due for algorithm in self._algorithms)
        self.is_replayed = not is_due and self._cold == 0
        if self.is_replayed:
            return self._replay(micro_batches(x, y, self._micro_batch))
        self.drop()
        self._cold = max(0, self._cold - 1)
        with self._aside():
            return compute_gradients(self._stepper, x, y, self._dtype, self._micro_batch)

    def update(self) -> None:
        """The optimizer's step, and that of the algorithms."""
        if not self.is_replayed:
            with self._aside():
                self._optimizer.step()
            return
        self._graphs["adamw"].replay()
        for algorithm in self._algorithms:  # a replay calls no hook of the optimizer
            algorithm._after_step()

    def drop(self) -> None:
        """Forget the graphs, and their memory with them."""
        if self._graphs:
            self._graphs.clear()
            forget_graphs_(self._model)

    def _replay(self, parts: list[tuple[Tensor, Tensor]]) -> tuple[Tensor, Tensor]:
        if not self._graphs:
            self._graphs = self._capture(parts)
        for i, (x, y) in enumerate(parts):
            self._x.copy_(x)
            self._y.copy_(y)
            self._graphs["next" if i else "first"].replay()
        self._graphs["clip"].replay()
        return self._loss, self._norm

    def _capture(self, parts: list[tuple[Tensor, Tensor]]) -> dict[str, CudaGraph]:
        self._x, self._y = (t.clone() for t in parts[0])
        # A twin with the same parameters, rates and state, and no hooks: a capture is no step.
        twin = copy.copy(self._optimizer)
        twin.param_groups = [group | {"capturable": True} for group in twin.param_groups]

        def gradients() -> Tensor:
            return add_gradients(self._stepper, self._x, self._y, 1 / len(parts), self._dtype)

        def first() -> None:
            self._model.zero_grad()
            self._loss = gradients()

        def following() -> None:
            self._loss += gradients()

        def clipped() -> None:
            self._norm = clip(self._model)

        def adamw() -> None:
            twin.step()
            if scaling := scaling_of(self._model):
                scaling.advance()

        launches: dict[str, Callable] = {"first": first, "clip": clipped, "adamw": adamw}
        if len(parts) > 1:
            launches = {"first": first, "next": following} | launches
        graphs: dict[str, CudaGraph] = {}
        try:
            for name, launch in launches.items():
                graphs[name] = CudaGraph(launch, self._aside, graphs.get("first"))
        except BaseException:
            graphs.clear()
            forget_graphs_(self._model)
            raise
        return graphs

    def _dependencies(self, x: Tensor) -> list[object]:
        """What a graph would not see change: the shape of the batch, patterns, and addresses of
        parameters and of the optimizer's state."""
        found: list[object] = [x.shape]
        for p in self._model.parameters():
            state = self._optimizer.state.get(p, {}).values()
            found += [(t.data_ptr(), t.shape) for t in (p, *state)]
        for layer in self._model.modules():
            if isinstance(layer, SparseLinear):
                indices = layer.row_offsets, layer.col_indices
                found += [*indices, versions(*indices)]
        return found


def _differ(a: object, b: object) -> bool:
    """Index tensors are compared by identity, which the one that is kept has for itself."""
    return a is not b if isinstance(a, Tensor) or isinstance(b, Tensor) else a != b
