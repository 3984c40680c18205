"""A training step on a GPU in CUDA graphs: of forward and backward, of clipping, and of AdamW.

Each launch of a graph is one call of the host, which is otherwise what a step waits for. The
micro-batches of a step go through the same memory: the first one writes its gradients (fp32, of
sparse weights at nnz), the next ones add theirs in place. The learning rate is a tensor, which a
schedule writes.

A graph keeps the addresses and the patterns that it was captured with. So before each replay all of
them are compared, and the step is captured anew where one has moved. A step after which an
algorithm changes its patterns is taken without a graph: RigL must see its gradients. So are
WARM_UPS steps at the start (in float8 from the last of its first ones), and one after each change:
what they compile and derive no capture can, nor what they connect between processes.

Several processes capture the same all-reduces at the same step, or none does.
"""

import copy
from collections.abc import Callable, Sequence
from contextlib import nullcontext

import torch
from torch import Tensor
from torch.optim import Optimizer

from ..kernels.derived import versions
from ..nn import SparseLinear, forget_graphs_
from ..nn.float8 import scaling_of
from ..sparsity import Algorithm
from .buckets import Buckets
from .distributed import Ranks
from .graphs import Aside, CudaGraph
from .model import GPT
from .step import add_gradients, clip, compute_gradients, micro_batches

WARM_UPS = 2
SETTLED_EVERY = 16  # replays, after which the host looks whether scales of float8 have room


def why_eager(ranks: Ranks) -> str | None:
    """The reason why no step is captured there; None where it is."""
    if ranks.device.type != "cuda":
        return "CUDA graphs need a GPU"
    return None


class CapturedStep:
    """The step of a model, its optimizer and the algorithms that follow this optimizer.

    `is_replayed` says whether the step under way is a replay, whose numbers nobody waits for,
    `has_failed` whether a capture failed, here or in another process.
    """

    def __init__(
        self,
        model: GPT,
        stepper: GPT,
        optimizer: Optimizer,
        algorithms: Sequence[Algorithm],
        dtype: torch.dtype,
        micro_batch: int = 0,
        buckets: Buckets | None = None,
    ) -> None:
        """`stepper` may be another form of the model. `micro_batch` as of compute_gradients.
        `buckets`: where several processes take the step."""
        self._model, self._stepper = model, stepper
        self._optimizer, self._algorithms = optimizer, algorithms
        self._dtype, self._micro_batch, self._buckets = dtype, micro_batch, buckets
        self._sending = buckets.sending if buckets else nullcontext
        device = model.wte.weight.device
        for group in optimizer.param_groups:
            group["lr"] = torch.tensor(float(group["lr"]), device=device)
        self._aside = Aside(device)
        self._graphs: dict[str, CudaGraph] = {}
        self._seen: list[object] = []  # what the graphs depend on, at the step before
        self._cold = WARM_UPS  # steps to take without a graph
        self._replays = 0
        self.is_replayed = self.has_failed = False

    def compute_gradients(self, x: Tensor, y: Tensor) -> tuple[Tensor, Tensor]:
        """As step.compute_gradients; the loss is that of all processes. It may leave gradients
        half-done where it raises, and the weights as they were."""
        scaling = scaling_of(self._model)
        if scaling and self._replays == SETTLED_EVERY:
            scaling.settle()
            self._replays = 0
        seen = self._dependencies(x)
        if len(seen) != len(self._seen) or any(map(_differ, seen, self._seen)):
            self.drop()
            self._seen, self._cold = seen, max(1, self._cold)
        if scaling and not scaling.has_begun:
            self._cold = WARM_UPS
        is_due = any(algorithm.is_due for algorithm in self._algorithms)
        self.is_replayed = not is_due and self._cold == 0
        if self.is_replayed:
            self._replays += 1
            return self._replay(micro_batches(x, y, self._micro_batch))
        self.drop()
        self._cold = max(0, self._cold - 1)
        with self._aside():
            how = self._dtype, self._micro_batch, self._buckets
            loss, norm = compute_gradients(self._stepper, x, y, *how)
            return self._mean(loss), norm

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
            self._capture_everywhere(parts)
        for name, (x, y) in zip(self._passes(len(parts)), parts, strict=True):
            self._x.copy_(x)
            self._y.copy_(y)
            self._graphs[name].replay()
        self._graphs["clip"].replay()
        return self._loss_of_all, self._norm

    @property
    def _optimizers(self) -> list[Optimizer]:
        """Those that step weights in this process."""
        optimizer = self._optimizer
        return self._buckets.optimizers_of(optimizer) if self._buckets else [optimizer]

    def _passes(self, count: int) -> list[str]:
        """The graphs of so many micro-batches. Where gradients are sent, the last has its own."""
        last = "last" if self._buckets else "next"
        return ["first", *["next"] * (count - 2), last][:count]

    def _mean(self, loss: Tensor) -> Tensor:
        return self._buckets.ranks.mean(loss) if self._buckets else loss

    def _capture_everywhere(self, parts: list[tuple[Tensor, Tensor]]) -> None:
        """RuntimeError where another process could not."""
        failure: Exception | None = None
        try:
            self._capture(parts)
        except Exception as error:
            failure = error
        if self._buckets and (found := self._buckets.ranks.failures(failure)):
            failure = failure or RuntimeError(f"not captured by {'; '.join(found)}")
        if failure:
            self.has_failed = True
            self._graphs.clear()
            forget_graphs_(self._model)
            raise failure

    def _capture(self, parts: list[tuple[Tensor, Tensor]]) -> None:
        self._x, self._y = (t.clone() for t in parts[0])
        # Twins with the same parameters, rates and state, and no hooks: a capture is no step.
        twins = [copy.copy(optimizer) for optimizer in self._optimizers]
        for twin in twins:
            twin.param_groups = [group | {"capturable": True} for group in twin.param_groups]

        def gradients() -> Tensor:
            return add_gradients(self._stepper, self._x, self._y, 1 / len(parts), self._dtype)

        def first() -> None:
            self._model.zero_grad()
            with self._sending() if len(parts) == 1 else nullcontext():
                self._loss = gradients()

        def following() -> None:
            self._loss += gradients()

        def last() -> None:
            with self._sending():
                self._loss += gradients()

        def clipped() -> None:
            self._norm = clip(self._model, self._buckets)
            self._loss_of_all = self._mean(self._loss)

        def adamw() -> None:
            if self._buckets:
                self._buckets.step_all(twins)
            else:
                twins[0].step()
            if scaling := scaling_of(self._model):
                scaling.advance()

        launches: dict[str, Callable] = {"first": first, "next": following, "last": last}
        launches |= {"clip": clipped, "adamw": adamw}
        for name in dict.fromkeys([*self._passes(len(parts)), "clip", "adamw"]):
            first_graph = self._graphs.get("first")
            self._graphs[name] = CudaGraph(launches[name], self._aside, first_graph)

    def _dependencies(self, x: Tensor) -> list[object]:
        """What a graph would not see change: the shape of the batch, patterns, factors of products
        in float8, and addresses of parameters and of the optimizer's state."""
        found: list[object] = [x.shape]
        if scaling := scaling_of(self._model):
            found.append(scaling.exponents.tolist())
        found += [(p.data_ptr(), p.shape) for p in self._model.parameters()]
        for optimizer in self._optimizers:
            for state in optimizer.state.values():
                found += [(t.data_ptr(), t.shape) for t in state.values()]
        for layer in self._model.modules():
            if isinstance(layer, SparseLinear):
                indices = layer.row_offsets, layer.col_indices
                found += [*indices, versions(*indices)]
        return found


def _differ(a: object, b: object) -> bool:
    """Index tensors are compared by identity, which the one that is kept has for itself."""
    return a is not b if isinstance(a, Tensor) or isinstance(b, Tensor) else a != b
