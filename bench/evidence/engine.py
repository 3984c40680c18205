"""One shape of a GPT, and a training step of it in two CUDA graphs for all arms of that shape.

Weights, masks, learning rates and the places of the text that a run reads are tensors: a run writes
them, then the host only replays. The first graph is forward and backward, the second masks the
gradients, clips them and takes the step of AdamW; between two steps patterns may move. A masked
weight has no gradient and no momentum, so it stays zero: what is computed is what sparsekern's
sparse layers compute, by dense kernels. Without a GPU the same functions run as they are.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field

import numpy as np
import torch
from torch import Tensor, nn

from sparsekern.gpt.build import build_optimizer
from sparsekern.gpt.graphs import Aside, CudaGraph
from sparsekern.gpt.model import GPT, GPTConfig
from sparsekern.gpt.step import GRADIENT_CLIP

from .masks import Change, Masks
from .normed import norm_attention
from .rows import IDS, NOT_A_TARGET
from .scores import Scores, score

WARM_UPS = 3
IGNORED = -100  # of cross_entropy


@dataclass(frozen=True)
class Shape:
    """`is_normed`: its queries and keys are. (No part of the repr, by which results know it.)"""

    layers: int
    width: int
    heads: int
    context: int = 512
    vocab_size: int = 8192
    batch: int = 64
    is_normed: bool = field(default=False, repr=False)

    @property
    def in_words(self) -> str:
        return f"{self.layers} layers, {self.width} wide"

    @property
    def tokens(self) -> int:
        """Of a step."""
        return self.batch * self.context

    def config(self) -> GPTConfig:
        return GPTConfig(self.layers, self.heads, self.width, self.context, self.vocab_size)

    def model(self) -> GPT:
        model = GPT(self.config())
        return norm_attention(model) if self.is_normed else model

    def weights(self, seed: int) -> dict[str, Tensor]:
        """First weights, on the host: the same for every device."""
        torch.manual_seed(seed)
        return self.model().state_dict()


@dataclass
class Program:
    """What the steps of a run read and how far they go.

    `starts`: places in the stream, int64 [steps, batch]; `rates`: float32 [steps]; `changes`: of
    patterns, by the step after which they come, counted from 1. `scale`: of the rates, for linear
    layers of the blocks, whose first weights have its root (SµPar, Dey et al. 2024, "Sparse maximal
    update parameterization").
    """

    starts: np.ndarray
    rates: np.ndarray
    changes: Mapping[int, Change]
    scale: float = 1.0

    @property
    def steps(self) -> int:
        return len(self.rates)


class Engine:
    def __init__(
        self, shape: Shape, stream: Tensor, most_steps: int, dtype: torch.dtype = torch.bfloat16
    ) -> None:
        """`stream`: int16, on the device, what rows.py says; all that any run of it reads."""
        self.shape, self.device, self._dtype = shape, stream.device, dtype
        self._stream = stream
        self.model = shape.model().to(self.device)
        self.optimizer = build_optimizer(self.model, 0.0)
        is_cuda = self.device.type == "cuda"
        self.weights = {
            name: module.weight
            for name, module in self.model.blocks.named_modules(prefix="blocks")
            if isinstance(module, nn.Linear)
        }
        self._rate, self._linear_rate, self._scale = torch.zeros(3, 1, device=self.device)[:, 0]
        for group in self.optimizer.param_groups:
            group |= {"lr": self._rate, "capturable": is_cuda}
        self._split_group()
        self.masks = {name: torch.ones_like(w) for name, w in self.weights.items()}
        self._starts = torch.zeros(most_steps, shape.batch, dtype=torch.int64, device=self.device)
        self._rates = torch.zeros(most_steps, device=self.device)
        self._losses = torch.zeros(most_steps, device=self.device)
        self._at = torch.zeros(1, dtype=torch.int64, device=self.device)
        self._offsets = torch.arange(shape.context + 1, device=self.device)
        self._stepper, self._loss = self.model, loss_and_gradient
        if is_cuda:
            self._stepper = torch.compile(self.model, dynamic=False)
            self._loss = torch.compile(loss_and_gradient, dynamic=False)
        self._program = Program(np.empty((0, shape.batch)), np.empty(0), {})
        self.steps = 0  # of the program, made so far
        self._gradients, self._update = self._compute_gradients, self._take_step
        if is_cuda:
            self._capture()
        else:
            self._gradients()
            self._update()

    def _split_group(self) -> None:
        """Give the linear layers of the blocks a rate of their own."""
        linear = set(self.weights.values())
        for group in list(self.optimizer.param_groups):
            own = [p for p in group["params"] if p in linear]
            if own:
                group["params"] = [p for p in group["params"] if p not in linear]
                self.optimizer.add_param_group(group | {"params": own, "lr": self._linear_rate})

    # The step

    def _compute_gradients(self) -> None:
        starts = self._starts.index_select(0, self._at)[0]
        window = self._stream[starts[:, None] + self._offsets].long()
        x = window[:, :-1] & int(IDS)
        y = window[:, 1:].masked_fill(window[:, 1:] >= int(NOT_A_TARGET), IGNORED)
        self.model.zero_grad(set_to_none=True)
        with self._autocast():
            logits = self._stepper(x)[0]
        loss, gradient = self._loss(logits.detach().flatten(0, 1), y.flatten())
        logits.backward(gradient.view_as(logits))
        self._losses.index_copy_(0, self._at, loss[None])

    def _autocast(self) -> torch.autocast:
        kind = self.device.type
        return torch.autocast(kind, self._dtype, enabled=self._dtype != torch.float32)

    def _take_step(self) -> None:
        gradients = [weight.grad for weight in self.weights.values()]
        torch._foreach_mul_(gradients, list(self.masks.values()))
        nn.utils.clip_grad_norm_(self.model.parameters(), GRADIENT_CLIP)
        self._rate.copy_(self._rates.index_select(0, self._at)[0])
        torch.mul(self._rate, self._scale, out=self._linear_rate)
        self.optimizer.step()
        self._at += 1

    def _capture(self) -> None:
        aside = Aside(self.device)
        with aside():
            for _ in range(WARM_UPS):
                self._at.zero_()
                self._gradients()
                self._update()
        first = CudaGraph(self._compute_gradients, aside)
        self._gradients = first.replay
        self._update = CudaGraph(self._take_step, aside, first).replay

    # A run

    @torch.no_grad()
    def begin(self, weights: Mapping[str, Tensor], masks: Masks, program: Program) -> None:
        """Start a run with these weights, and an optimizer that has seen nothing."""
        self.model.load_state_dict(weights)
        for state in self.optimizer.state.values():
            for part in state.values():
                part.zero_()
        self._set_masks(masks)
        self._write(program)
        self.steps = 0
        self._at.zero_()
        self._losses.zero_()

    def _write(self, program: Program) -> None:
        if program.steps > len(self._rates):
            raise ValueError(
                f"program: expected at most {len(self._rates)} steps, got {program.steps}"
            )
        self._program = program
        self._scale.fill_(program.scale)
        self._starts[: program.steps] = torch.from_numpy(program.starts).to(self.device)
        self._rates[: program.steps] = torch.from_numpy(program.rates).float().to(self.device)

    def run(self, until: int) -> None:
        """The steps before `until`. Nothing waits for the GPU but a change of patterns."""
        while self.steps < min(until, self._program.steps):
            self._gradients()
            change = self._program.changes.get(self.steps + 1)
            dense = {}
            if change:
                dense = {name: weight.grad.clone() for name, weight in self.weights.items()}
            self._update()
            self.steps += 1
            if change:
                now = {name: mask.bool() for name, mask in self.masks.items()}
                self._set_masks(change(self.steps, self.weights, dense, now))

    @torch.no_grad()
    def _set_masks(self, masks: Masks) -> None:
        """What is not kept becomes zero, its momentum too."""
        for name, weight in self.weights.items():
            mask = self.masks[name].copy_(masks[name])
            weight.mul_(mask)
            state = self.optimizer.state[weight]
            for part in ("exp_avg", "exp_avg_sq"):
                state[part].mul_(mask)

    @property
    def is_done(self) -> bool:
        return self.steps == self._program.steps

    def losses(self) -> list[float]:
        """Of the steps so far, before their updates, in nats a target."""
        return self._losses[: self.steps].tolist()

    def density(self) -> float:
        """Of the blocks' linear layers, by their masks."""
        masks = self.masks.values()
        return sum(float(mask.sum()) for mask in masks) / sum(mask.numel() for mask in masks)

    def copy(self) -> dict[str, Tensor]:
        """The weights of now."""
        return {name: t.detach().clone() for name, t in self.model.state_dict().items()}

    # Its files

    def state(self) -> dict:
        """All that a run needs to go on, on the host, but its program."""
        return {
            "steps": self.steps,
            "model": _on_host(self.model.state_dict()),
            "optimizer": [_on_host(self.optimizer.state[p]) for p in self.model.parameters()],
            "masks": {name: mask.bool().cpu() for name, mask in self.masks.items()},
            "losses": self._losses[: self.steps].cpu().clone(),
        }

    @torch.no_grad()
    def resume(self, state: dict, program: Program) -> None:
        self.begin(state["model"], state["masks"], program)
        for parameter, saved in zip(self.model.parameters(), state["optimizer"], strict=True):
            for name, part in self.optimizer.state[parameter].items():
                part.copy_(saved[name])
        self.steps = state["steps"]
        self._at.fill_(self.steps)
        self._losses[: self.steps] = state["losses"].to(self.device)

    def score(self, rows: np.ndarray) -> Scores:
        """What the model of now makes of rows (rows.py)."""
        return score(self.model, rows, self._dtype)


def loss_and_gradient(logits: Tensor, y: Tensor) -> tuple[Tensor, Tensor]:
    """Cross entropy of logits [M, V] at targets y [M], in nats a target that is not IGNORED, fp32,
    and its gradient as the logits are. Compiled, it reads them once for both."""
    is_target = y != IGNORED
    count = is_target.sum().clamp(min=1)
    logs = logits.float().log_softmax(-1)
    nats = -logs.gather(1, y.clamp(min=0)[:, None])[:, 0]
    places = torch.arange(logits.shape[1], device=logits.device)
    gradient = (logs.exp() - (places == y[:, None]).float()) * (is_target / count)[:, None]
    return (nats * is_target).sum() / count, gradient.to(logits.dtype)


def _on_host(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    return {name: t.detach().cpu().clone() for name, t in tensors.items()}
