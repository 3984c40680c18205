"""A GPT's captured training step in E4M3, dense and two-way, beside bfloat16: time, and the loss at
equal tokens.

All arms are on the GPU together, each with its CUDA graphs. Until it is captured an arm takes its
steps alone; then they all take one each in turn, on the same text, and their replays are timed.
"""

import copy
import gc
import math
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from statistics import median
from typing import Any

import torch
from torch import Tensor

from ..gpt.build import build_optimizer
from ..gpt.captured import CapturedStep
from ..gpt.data import Text
from ..gpt.flops import train_flops_per_token
from ..gpt.model import GPT, GPTConfig
from ..gpt.presets import PRESETS
from ..gpt.speed import memory_bytes
from ..nn.float8 import to_float8_
from .gpt_gpu import compiled_twin, make_gpt
from .noise import spread
from .records import DENSE, OTHER, OURS
from .two_way_mask import TWO_WAY

OP = "train_float8"
BFLOAT16, FLOAT8 = "bfloat16", "float8"
SPARSITY = 0.75
STEPS, LR, WARM_UP, SHOWN = 30, 3e-4, 10, 10  # losses are means of so many steps


@dataclass(frozen=True)
class Arm:
    mask: str
    dtype: str
    kind: str
    name: str


ARMS = (
    Arm(TWO_WAY, FLOAT8, OURS, "two-way"),
    Arm(TWO_WAY, BFLOAT16, OURS, "two-way"),
    Arm("", BFLOAT16, DENSE, "dense"),
    Arm("", FLOAT8, OTHER, "dense"),
)


@dataclass(frozen=True)
class Size:
    model: str
    config: GPTConfig
    batch: int
    data: str = "stdlib"
    steps: int = STEPS


SIZE = Size("gpt3-xl", PRESETS["gpt3-xl"], 4)
QUICK = Size("tiny", GPTConfig(2, 4, 128, 64, 256), 4, steps=5)


def cases(size: Size, device: torch.device) -> Iterator[dict]:
    """A record for each arm."""
    runs = race(prepared(size, device), batches_of(size, device))
    config = size.config
    M = size.batch * config.block_size
    for arm, way in runs.items():
        sparsity = SPARSITY if arm.mask else 0.0
        yield {
            **{"op": OP, "device": "cuda", "model": size.model, "layers": config.n_layer},
            **{"width": config.n_embd, "vocabulary": config.vocab_size},
            **{"context": config.block_size, "batch": size.batch, "M": M, "sparsity": sparsity},
            **{"dtype": arm.dtype, "threads": 0, "is_cold": False, "seed": 0, "lr": LR},
            **{"steps": size.steps, "mask": arm.mask or "none"},
            "useful_flop": M * train_flops_per_token(config, sparsity),
            "dense_flop": M * train_flops_per_token(config),
            "ways": {arm.name: way},
        }


def batches_of(size: Size, device: torch.device) -> list[tuple[Tensor, Tensor]]:
    text = Text(size.data, None, "bytes", 256)
    training, _ = text.batches(size.batch, size.config.block_size, seed=0)
    return [tuple(t.to(device) for t in training.get(i)) for i in range(size.steps)]


class Training:
    """The steps of an arm so far: their losses, and the times of its replays."""

    def __init__(self, arm: Arm, model: GPT):
        self.arm, self.failed = arm, ""
        self._model, self._beside = model, _allocated() - memory_bytes(model)
        self.losses: list[Tensor] = []
        self.times: list[tuple[torch.cuda.Event, torch.cuda.Event]] = []
        self.peak_bytes = 0

    def begin(self, batches: list[tuple[Tensor, Tensor]]) -> None:
        """The first steps, until they are captured."""
        self._attempt(self._begin, batches)
        gc.collect()
        if torch.cuda.is_initialized():
            self.peak_bytes = torch.cuda.max_memory_allocated() - self._beside
            torch.cuda.empty_cache()

    def step(self, x: Tensor, y: Tensor) -> None:
        """One more. After a failure nothing."""
        self._attempt(self._step, x, y)

    def _attempt(self, do: Callable[..., None], *arguments: Any) -> None:
        if self.failed:
            return
        try:
            do(*arguments)
        except Exception as error:  # the others are still measured
            self.failed = f"{type(error).__name__}: {(str(error).splitlines() or [''])[0]}"

    def _begin(self, batches: list[tuple[Tensor, Tensor]]) -> None:
        if torch.cuda.is_initialized():
            torch.cuda.reset_peak_memory_stats()
        model, optimizer = self._model, build_optimizer(self._model, LR)
        if self.arm.dtype == FLOAT8:
            to_float8_(model).follow(optimizer)
        self._optimizer = optimizer
        self._captured = CapturedStep(model, compiled_twin(model), optimizer, [], torch.bfloat16)
        for x, y in batches:
            self._step(x, y)
            if self.times:
                break

    def _step(self, x: Tensor, y: Tensor) -> None:
        for group in self._optimizer.param_groups:
            group["lr"].fill_(LR * min(1.0, (len(self.losses) + 1) / WARM_UP))
        begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        begin.record()
        with torch.enable_grad():
            loss, _ = self._captured.compute_gradients(x, y)
            self._captured.update()
        end.record()
        self.losses.append(loss.clone())
        if self._captured.is_replayed:
            self.times.append((begin, end))

    def way(self) -> dict:
        """Its part of the record."""
        if self.failed:
            return {"kind": self.arm.kind, "failed": self.failed}
        self.times[-1][1].synchronize()
        # The first replay captures.
        seconds = [1e-3 * begin.elapsed_time(end) for begin, end in self.times[1:]]
        shown = [part.mean().item() for part in torch.stack(self.losses).split(SHOWN)]
        return {
            **{"kind": self.arm.kind, "median_s": median(seconds), "min_s": min(seconds)},
            **{"spread": spread(seconds), "is_right": all(map(math.isfinite, shown))},
            **{"peak_bytes": self.peak_bytes, "step": len(self.losses), "loss": shown[-1]},
            **{"error": 0.0, "note": " ".join(f"{loss:.4f}" for loss in shown)},
        }


def prepared(size: Size, device: torch.device) -> Iterator[Training]:
    """Each arm; those of a mask begin with the same weights and places."""
    for mask in dict.fromkeys(arm.mask for arm in ARMS):
        torch.manual_seed(0)
        model = make_gpt(size.config, device, mask, SPARSITY)
        *arms, last = (arm for arm in ARMS if arm.mask == mask)
        for arm in arms:
            yield Training(arm, copy.deepcopy(model))
        yield Training(last, model)


def race(arms: Iterable[Training], batches: list[tuple[Tensor, Tensor]]) -> dict[Arm, dict]:
    """The steps of all arms: the first ones of each alone, and from its capture on in turns."""
    found = []
    for each in arms:
        each.begin(batches)
        found.append(each)
    first = min(len(each.losses) for each in found)
    for i in range(first, len(batches)):
        for each in found:
            if len(each.losses) == i:
                each.step(*batches[i])
    return {each.arm: each.way() for each in found}


def _allocated() -> int:
    return torch.cuda.memory_allocated() if torch.cuda.is_initialized() else 0
