"""AdamW in shares: each process has the state of its part of every parameter, and steps it alone.

Every process has the whole model. The last backward pass of a step gives each the means of the
gradients of its share (reduce-scatters, in the buckets of buckets.py). It steps these weights, and
all-gathers bring them to all others. A share is a slice of a parameter, of sparse weights one of
the stored values; its weights and gradients are views, so nothing is copied. What is left over,
fewer than GRANULE weights for each process, is reduced and stepped by all of them alike.

Whoever looks at the optimizer, an algorithm or a checkpoint, sees whole parameters and whole state.
After a step that changes patterns the state is joined, changed, and cut up anew: so shares may
change their size.
"""

from collections.abc import Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.optim import AdamW, Optimizer

from ..sparsity import Algorithm
from .buckets import BUCKET_BYTES, Buckets, in_buckets
from .distributed import MOMENTS, Ranks

GRANULE = 32  # weights: a share begins at a multiple of 128 bytes


class ShardedAdamW(AdamW):
    """AdamW of whole parameters; once it has Shards, they make its steps and have its state."""

    shards: "Shards"

    def step(self, closure: Any = None) -> None:
        if closure:
            raise ValueError("closure: expected none, the gradients of the last step are averaged")
        self.shards.step()

    def state_dict(self) -> dict[str, Any]:
        """Of whole tensors on the CPU, for the first process; others get no state. All of them must
        call it together."""
        return super().state_dict() | {"state": self.shards.whole_state()}


class Shards(Buckets):
    """Buckets of a model whose `optimizer` makes its steps in shares."""

    def __init__(
        self,
        model: nn.Module,
        ranks: Ranks,
        optimizer: ShardedAdamW,
        algorithms: Sequence[Algorithm] = (),
        bucket_bytes: int = BUCKET_BYTES,
    ) -> None:
        """The optimizer has its state, if any, and the hooks of `algorithms`, which follow it."""
        super().__init__(model, ranks, bucket_bytes)
        self._whole, self._algorithms = optimizer, algorithms
        self._shares: dict[nn.Parameter, list[tuple[slice, nn.Parameter]]] = {}
        self._optimizer: AdamW | None = None  # of the shares; None while the state is whole
        optimizer.shards = self
        self._split()
        optimizer.register_step_post_hook(lambda *_: self._split())

    def stepped(self, optimizer: Optimizer) -> Optimizer:
        assert self._optimizer
        return self._optimizer

    def step(self) -> None:
        """The step of the optimizer, between its hooks."""
        mine = self.stepped(self._whole)
        for group, whole in zip(mine.param_groups, self._whole.param_groups, strict=True):
            group["lr"] = whole["lr"]
        mine.step()
        self.gather()
        if any(algorithm.is_due for algorithm in self._algorithms):
            self._join()

    def gather(self) -> None:
        for shares in self._shares.values():
            for _, share in shares:
                share.grad = None  # a view, which would keep the whole gradient
        self._fill([_flat(p) for p in self._shares])

    def clip(self, most: float) -> Tensor:
        shares = [share for shares in self._shares.values() for _, share in shares]
        own, left = [], []
        for p, of_parameter in self._shares.items():
            for at, share in of_parameter:
                (left if at == self._left(p.numel()) else own).append(share.grad)
        square = self._square(own)
        dist.all_reduce(square)
        norm = (square + self._square(left)).sqrt()
        nn.utils.clip_grads_with_norm_(shares, most, norm)
        return norm

    def _square(self, tensors: list[Tensor]) -> Tensor:
        """Of the norm of all of them together."""
        if not tensors:  # torch's zero would be on the CPU, and a capture copies nothing from there
            return torch.zeros((), device=self.ranks.device)
        return nn.utils.get_total_norm(tensors).square()

    # What goes between processes

    def _reduce(self, gradients: list[Tensor]) -> list[dist.Work]:
        flat = [_flat(g) for g in gradients]
        left = [t[self._left(len(t))] for t in flat]
        works = super()._reduce(left) if (left := [t for t in left if len(t)]) else []
        bodies, own = self._bodies(flat)
        if bodies:
            options = dist.ReduceScatterOptions()
            options.reduceOp, options.asyncOp = self._op, True
            group = dist.group.WORLD
            works.append(group.reduce_scatter_tensor_coalesced(own, bodies, options))
        return works

    def _arrive_everywhere(self) -> None:
        super()._arrive_everywhere()
        for p, shares in self._shares.items():
            for at, share in shares:
                share.grad = _flat(p.grad)[at]

    def _fill(self, flat: list[Tensor]) -> None:
        """Tensors of which each process has its own slice, and what is left over."""
        works = []
        for places in in_buckets(flat, self._bucket_bytes):
            bodies, own = self._bodies([flat[place] for place in places])
            if bodies:
                options = dist.distributed_c10d.AllgatherOptions()
                options.asyncOp = True
                group = dist.group.WORLD
                works.append(group.allgather_into_tensor_coalesced(bodies, own, options))
        for work in works:
            work.wait()

    def _bodies(self, flat: list[Tensor]) -> tuple[list[Tensor], list[Tensor]]:
        """Of each that has shares: all of them, and that of this process."""
        cut = [(t[: self._left(len(t)).start], t[self._own(len(t))]) for t in flat]
        cut = [(body, own) for body, own in cut if len(own)]
        return [body for body, _ in cut], [own for _, own in cut]

    # Shares

    def _own(self, count: int) -> slice:
        """This process's share of so many weights."""
        each = count // (GRANULE * self.ranks.size) * GRANULE
        return slice(self.ranks.rank * each, (self.ranks.rank + 1) * each)

    def _left(self, count: int) -> slice:
        """What is left over of them."""
        return slice(count - count % (GRANULE * self.ranks.size), count)

    def _split(self) -> None:
        """Cut parameters and state into shares, where they are whole."""
        if self._optimizer:
            return
        groups, states = [], {}
        for group in self._whole.param_groups:
            shares: list[nn.Parameter] = []
            for p in group["params"]:
                state = self._whole.state.pop(p, {})
                self._shares[p] = []
                for at in (self._own(p.numel()), self._left(p.numel())):
                    if at.start < at.stop:
                        share = nn.Parameter(_flat(p)[at])
                        states[share] = {
                            key: (t if key == "step" else _flat(t)[at]).clone()
                            for key, t in state.items()
                        }
                        self._shares[p].append((at, share))
                        shares.append(share)
            groups.append(group | {"params": shares})
        self._optimizer = AdamW(groups, fused=True)
        self._optimizer.state.update({share: state for share, state in states.items() if state})

    def _join(self) -> None:
        """Give the optimizer its whole state."""
        for p in self._shares:
            if state := self._state_of(p):
                self._whole.state[p] = state
        self._shares, self._optimizer = {}, None

    def _state_of(self, p: nn.Parameter) -> dict[str, Tensor]:
        """That of a whole parameter."""
        states = self.stepped(self._whole).state
        shares = [(at, states[share]) for at, share in self._shares[p] if share in states]
        if not shares:
            return {}
        whole = {key: torch.empty_like(p.detach()) for key in MOMENTS if key != "step"}
        for key, t in whole.items():
            for at, state in shares:
                _flat(t)[at] = state[key]
        self._fill([_flat(t) for t in whole.values()])
        return {"step": shares[0][1]["step"].clone()} | whole

    def whole_state(self) -> dict[int, dict[str, Tensor]]:
        """That of the optimizer's state_dict, on the CPU of the first process, else empty."""
        found = {}
        parameters = [p for group in self._whole.param_groups for p in group["params"]]
        for place, p in enumerate(parameters):
            state = self._state_of(p)
            if state and self.ranks.rank == 0:
                found[place] = {key: t.cpu() for key, t in state.items()}
        return found


def _flat(t: Tensor) -> Tensor:
    """Its elements, without a copy. RuntimeError where they are not in order."""
    return t.detach().view(-1)
