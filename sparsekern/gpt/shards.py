"""AdamW in shares: each process has the state of its part of every parameter, and steps it alone.

Every process has the whole model. The last backward pass of a step gives each the means of the
gradients of its share (reduce-scatters, in the buckets of buckets.py). It steps these weights, and
all-gathers bring them to all others, while the next ones are stepped. A share is a slice of a
parameter, of sparse weights one of the stored values; its weights and gradients are views, so
nothing is copied. What is left over, fewer than GRANULE weights for each process, is reduced and
stepped by all of them alike.

Whoever looks at the optimizer, an algorithm or a checkpoint, sees whole parameters and whole state.
After a step that changes patterns the state is joined, changed, and cut up anew: so shares may
change their size.
"""

from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.optim import AdamW, Optimizer

from ..sparsity import Algorithm
from .buckets import BUCKET_BYTES, Buckets, in_buckets
from .distributed import MOMENTS, Ranks

GRANULE = 32  # weights: a share begins at a multiple of 128 bytes
PART_BYTES = 2**28  # of weights that are gathered together, or one parameter, where it is larger


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


class Part(NamedTuple):
    """Parameters of one group of the whole optimizer, and the AdamW of their shares."""

    group: dict[str, Any]
    parameters: list[nn.Parameter]
    optimizer: AdamW


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
        self._parts: list[Part] = []  # none while the state is whole
        optimizer.shards = self
        self._split()
        optimizer.register_step_post_hook(lambda *_: self._split())

    def optimizers_of(self, optimizer: Optimizer) -> list[Optimizer]:
        return [part.optimizer for part in self._parts]

    def step(self) -> None:
        """The step of the optimizer, between its hooks."""
        for part in self._parts:
            part.optimizer.param_groups[0]["lr"] = part.group["lr"]
        self.step_all(self.optimizers_of(self._whole))
        if any(algorithm.is_due for algorithm in self._algorithms):
            self._join()

    def step_all(self, optimizers: list[Optimizer]) -> None:
        works = []
        for part, optimizer in zip(self._parts, optimizers, strict=True):
            optimizer.step()
            optimizer.zero_grad()  # views, which would keep the whole gradients
            works += self._gather([_flat(p) for p in part.parameters])
        for work in works:
            work.wait()

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
        bodies, own = self._bodies(flat)
        left = [rest for t in flat if len(rest := t[self._left(len(t))])]
        works = super()._reduce(left) if left else []
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

    def _gather(self, flat: list[Tensor]) -> list[dist.Work]:
        """Bring all else to tensors of which each process has its own share, and the rest."""
        bodies, own = self._bodies(flat)
        options = dist.distributed_c10d.AllgatherOptions()
        options.asyncOp = True
        group = dist.group.WORLD
        return [group.allgather_into_tensor_coalesced(bodies, own, options)] if bodies else []

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
        if self._parts:
            return
        for group in self._whole.param_groups:
            for places in in_buckets(group["params"], PART_BYTES):
                parameters = [group["params"][place] for place in places]
                states = {share: state for p in parameters for share, state in self._cut_up(p)}
                optimizer = AdamW([group | {"params": list(states)}], fused=True)
                optimizer.state.update(states)
                self._parts.append(Part(group, parameters, optimizer))

    def _cut_up(self, p: nn.Parameter) -> Iterator[tuple[nn.Parameter, dict[str, Tensor]]]:
        """Its shares, and the state of each: begun here, not in memory that a step leaves."""
        state = self._whole.state.pop(p, None)
        self._shares[p] = []
        both = self._own(p.numel()), self._left(p.numel())
        for at in [at for at in both if at.start < at.stop] or [slice(0, 0)]:
            share = nn.Parameter(_flat(p)[at])
            self._shares[p].append((at, share))
            mine = {key: torch.zeros_like(share.detach()) for key in MOMENTS[1:]}
            mine["step"] = torch.zeros((), device=p.device)
            if state:
                mine["step"].copy_(state["step"])
                for key in MOMENTS[1:]:
                    mine[key].copy_(_flat(state[key])[at])
            yield share, mine

    def _join(self) -> None:
        """Give the optimizer its whole state."""
        for part in self._parts:
            for p in part.parameters:
                self._whole.state[p] = self._state_of(p, part.optimizer)
        self._shares, self._parts = {}, []

    def _state_of(self, p: nn.Parameter, optimizer: Optimizer) -> dict[str, Tensor]:
        """That of a whole parameter."""
        states = [(at, optimizer.state[share]) for at, share in self._shares[p]]
        whole = {"step": states[0][1]["step"].clone()}
        for key in MOMENTS[1:]:
            whole[key] = torch.empty_like(p.detach())
            for at, state in states:
                _flat(whole[key])[at] = state[key]
        for work in self._gather([_flat(whole[key]) for key in MOMENTS[1:]]):
            work.wait()
        return whole

    def whole_state(self) -> dict[int, dict[str, Tensor]]:
        """That of the optimizer's state_dict, on the CPU of the first process, else empty."""
        found: list[dict[str, Tensor]] = []
        for part in self._parts:
            for p in part.parameters:
                state = self._state_of(p, part.optimizer)
                if self.ranks.rank == 0:
                    found.append({key: t.cpu() for key, t in state.items()})
        return dict(enumerate(found))


def _flat(t: Tensor) -> Tensor:
    """Its elements, without a copy. RuntimeError where they are not in order."""
    return t.detach().view(-1)
