"""Means of gradients over all processes, on their way while backward computes the next ones.

Parameters are cut into buckets from the last one back, which is about how backward comes to their
gradients. A bucket whose gradients are all there goes through one all-reduce, in place and without
a copy; of sparse weights these are the stored values. Every process sends the same buckets in the
same order.

With several micro-batches the last one alone sends. On a GPU all of it can be captured in a CUDA
graph with the backward pass: NCCL's stream then is a branch of it.
"""

import weakref
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from functools import partial

import torch.distributed as dist
from torch import Tensor, nn
from torch.optim import Optimizer

from .distributed import Ranks

BUCKET_BYTES = 2**25  # or one gradient, where it is larger


class Buckets:
    """Those of a model whose every process holds all of it. `sent_bytes`: of the gradients that
    went into the last all-reduces together, on each process."""

    def __init__(self, model: nn.Module, ranks: Ranks, bucket_bytes: int = BUCKET_BYTES) -> None:
        """The model gets the weights of the first process, whose shapes all must have."""
        named = [(name, p) for name, p in model.named_parameters() if p.requires_grad]
        self._named, self.ranks, self._bucket_bytes = named[::-1], ranks, bucket_bytes
        self._buckets: list[list[nn.Parameter]] = []
        self._missing: list[set[int]] = []  # places of gradients that a bucket waits for
        self._bucket_of: list[int] = []  # by place
        self._works: list[list[dist.Work]] = []  # of the buckets that are on their way
        self.sent_bytes = 0
        arrived = weakref.WeakMethod(self._arrived)  # hooks would keep parameters, and they hooks
        for place, (_, p) in enumerate(self._named):
            dist.broadcast(p.detach(), 0)
            p.register_post_accumulate_grad_hook(partial(_call, arrived, place))

    @contextmanager
    def sending(self) -> Iterator[None]:
        """Around the last backward pass of a step: after it gradients are means, the same
        everywhere. RuntimeError where a parameter has none."""
        self._cut()
        try:
            yield
            self._arrive_everywhere()
        finally:
            self._buckets, self._missing, self._works = [], [], []

    def clip(self, most: float) -> Tensor:
        """Clip the gradients in place -> their norm before."""
        return nn.utils.clip_grad_norm_([p for _, p in self._named], most)

    def optimizers_of(self, optimizer: Optimizer) -> list[Optimizer]:
        """Those that make the steps of `optimizer` in this process."""
        return [optimizer]

    def step_all(self, optimizers: list[Optimizer]) -> None:
        """Their steps; after them the weights are the same everywhere."""
        for optimizer in optimizers:
            optimizer.step()

    def _cut(self) -> None:
        """Into buckets; patterns may have other sizes than in the step before."""
        parameters = [p for _, p in self._named]
        cut = in_buckets(parameters, self._bucket_bytes)
        self._buckets = [[parameters[place] for place in places] for places in cut]
        self._missing = [set(places) for places in cut]
        self._bucket_of = [i for i, places in enumerate(cut) for _ in places]
        self.sent_bytes = 0

    def _arrived(self, place: int) -> None:
        """A gradient is there: send the buckets that have all of theirs, and none before its
        turn."""
        if not self._buckets:
            return  # of an earlier micro-batch
        self._missing[self._bucket_of[place]].discard(place)
        while len(self._works) < len(self._buckets) and not self._missing[len(self._works)]:
            self._send(gradients_of(self._buckets[len(self._works)]))

    def _send(self, gradients: list[Tensor]) -> None:
        self.sent_bytes += sum(g.nbytes for g in gradients)
        self._works.append(self._reduce(gradients))

    def _reduce(self, gradients: list[Tensor]) -> list[dist.Work]:
        options = dist.AllreduceCoalescedOptions()
        options.reduceOp, options.asyncOp = self._op, True
        # What dist.all_reduce_coalesced calls, without its FutureWarning.
        return [dist.group.WORLD.allreduce_coalesced(gradients, options)]

    def _arrive_everywhere(self) -> None:
        if missing := [self._named[place][0] for places in self._missing for place in places]:
            raise RuntimeError(f"gradients: expected one of each parameter, got none of {missing}")
        for works, bucket in zip(self._works, self._buckets, strict=True):
            for work in works:
                work.wait()
            if not self._averages:
                for gradient in gradients_of(bucket):
                    gradient /= self.ranks.size

    @property
    def _op(self) -> dist.ReduceOp:
        return dist.ReduceOp.AVG if self._averages else dist.ReduceOp.SUM

    @property
    def _averages(self) -> bool:
        """Whether the backend divides by itself: NCCL does, gloo does not."""
        return self.ranks.device.type == "cuda"


def _call(arrived: weakref.WeakMethod, place: int, parameter: nn.Parameter) -> None:
    if method := arrived():
        method(place)


def gradients_of(bucket: list[nn.Parameter]) -> list[Tensor]:
    return [p.grad for p in bucket if p.grad is not None]


def in_buckets(tensors: Sequence[Tensor], most: int) -> list[list[int]]:
    """Places of the tensors, in their order, of at most so many bytes together, or of one tensor
    that is larger."""
    buckets: list[list[int]] = []
    nbytes = 0
    for place, t in enumerate(tensors):
        if not buckets or nbytes + t.nbytes > most:
            buckets.append([])
            nbytes = 0
        nbytes += t.nbytes
        buckets[-1].append(place)
    return buckets
