"""A GPT's captured training step in E4M3, dense and two-way, beside bfloat16: time, and the loss at
equal tokens.

All arms are on the GPU together, each in a process of its own with its CUDA graphs, so that they
are made beside one another. Then they take steps in turn, on the same text, and their replays are
timed; in a turn all but the first, before which the GPU waits for the host.
"""

import gc
import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from multiprocessing import get_context
from multiprocessing.connection import Connection
from statistics import median
from typing import Any

import torch
from torch import Tensor

from ..gpt.build import build_optimizer
from ..gpt.captured import CapturedStep
from ..gpt.data import Text
from ..gpt.model import GPTConfig
from ..gpt.presets import PRESETS
from ..nn.float8 import to_float8_
from .gpt_gpu import compiled_twin, fields_of, flops_of, make_gpt
from .noise import spread
from .records import DENSE, OTHER, OURS
from .two_way_mask import TWO_WAY

OP = "train_float8"
BFLOAT16, FLOAT8 = "bfloat16", "float8"
SPARSITY = 0.75
STEPS, LR, WARM_UP, SHOWN = 30, 3e-4, 10, 10  # losses are means of so many steps
TURN = 4  # steps


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
QUICK = Size("tiny", GPTConfig(2, 4, 128, 64, 256), 4, steps=8)


def cases(
    size: Size, device: torch.device, start: "Callable[..., Training | Remote] | None" = None
) -> Iterator[dict]:
    """A record for each arm. `start` makes one: by default a Remote."""
    arms = [(start or Remote)(arm, size, device) for arm in ARMS]
    for arm, way in zip(ARMS, race(arms, size.steps), strict=True):
        sparsity = SPARSITY if arm.mask else 0.0
        fields = fields_of(size.model, size.config, size.batch, sparsity)
        yield {
            **{"op": OP, "device": "cuda", **fields, "mask": arm.mask or "none"},
            **{"dtype": arm.dtype, "threads": 0, "is_cold": False, "seed": 0, "lr": LR},
            **{"steps": size.steps, **flops_of(size.config, fields["M"], sparsity)},
            "ways": {arm.name: way},
        }


def race(arms: "Sequence[Training | Remote]", steps: int) -> list[dict]:
    """The part of the record of each, after so many steps."""
    for arm in arms:
        arm.begin()
    for _ in range(0, steps, TURN):
        for arm in arms:
            arm.take(TURN)
    return [arm.way() for arm in arms]


def batches_of(size: Size, device: torch.device) -> list[tuple[Tensor, Tensor]]:
    text = Text(size.data, None, "bytes", 256)
    training, _ = text.batches(size.batch, size.config.block_size, seed=0)
    return [tuple(t.to(device) for t in training.get(i)) for i in range(size.steps)]


class Training:
    """The steps of an arm so far: their losses, and the times of its replays. Arms of a mask begin
    with the same weights and places. After a failure it takes no more steps."""

    def __init__(self, arm: Arm, size: Size, device: torch.device):
        self._arm, self._size, self._device = arm, size, device
        self._failed = ""
        self._losses: list[Tensor] = []
        self._times: list[tuple[torch.cuda.Event, torch.cuda.Event]] = []
        self._peak_bytes = 0

    def begin(self) -> None:
        """The first steps, until they are captured."""
        self._attempt(self._begin)
        gc.collect()
        if self._device.type == "cuda":
            self._peak_bytes = torch.cuda.max_memory_allocated()
            torch.cuda.empty_cache()

    def take(self, steps: int) -> None:
        """So many more, or as many as there are."""
        self._attempt(self._take, steps)

    def _attempt(self, do: Callable[..., None], *arguments: Any) -> None:
        if self._failed:
            return
        try:
            do(*arguments)
        except Exception as error:  # the others are still measured
            self._failed = in_short(error)

    def _begin(self) -> None:
        size, device = self._size, self._device
        self._batches = batches_of(size, device)
        torch.manual_seed(0)
        model = make_gpt(size.config, device, self._arm.mask, SPARSITY)
        self._optimizer = build_optimizer(model, LR)
        if self._arm.dtype == FLOAT8:
            to_float8_(model).follow(self._optimizer)
        stepper = compiled_twin(model)
        self._captured = CapturedStep(model, stepper, self._optimizer, [], torch.bfloat16)
        while not self._captured.is_replayed and len(self._losses) < size.steps:
            self._step()
        self._times.clear()  # it captured

    def _take(self, steps: int) -> None:
        before = len(self._times)
        for _ in range(min(steps, self._size.steps - len(self._losses))):
            self._step()
        if self._device.type == "cuda":
            torch.cuda.synchronize()
        del self._times[before : before + 1]

    def _step(self) -> None:
        x, y = self._batches[len(self._losses)]
        for group in self._optimizer.param_groups:
            group["lr"].fill_(LR * min(1.0, (len(self._losses) + 1) / WARM_UP))
        begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        begin.record()
        with torch.enable_grad():
            loss, _ = self._captured.compute_gradients(x, y)
            self._captured.update()
        end.record()
        self._losses.append(loss.clone())
        if self._captured.is_replayed:
            self._times.append((begin, end))

    def way(self) -> dict:
        """Its part of the record."""
        if self._failed:
            return {"kind": self._arm.kind, "failed": self._failed}
        seconds = [1e-3 * begin.elapsed_time(end) for begin, end in self._times]
        shown = [part.mean().item() for part in torch.stack(self._losses).split(SHOWN)]
        return {
            **{"kind": self._arm.kind, "median_s": median(seconds), "min_s": min(seconds)},
            **{"spread": spread(seconds), "is_right": all(map(math.isfinite, shown))},
            **{"peak_bytes": self._peak_bytes, "step": len(self._losses), "loss": shown[-1]},
            **{"error": 0.0, "note": " ".join(f"{loss:.4f}" for loss in shown)},
        }


class Remote:
    """A Training in a process of its own. It begins at once; begin() waits until it has."""

    def __init__(self, arm: Arm, size: Size, device: torch.device):
        self._kind, self._failed = arm.kind, ""
        context = get_context("spawn")
        self._pipe, far = context.Pipe()
        self._process = context.Process(target=_serve, args=(arm, size, device, far), daemon=True)
        self._process.start()
        far.close()

    def begin(self) -> None:
        self._receive()

    def take(self, steps: int) -> None:
        self._ask(steps)

    def way(self) -> dict:
        way = self._ask(0)
        self._process.join()
        return way or {"kind": self._kind, "failed": self._failed}

    def _ask(self, steps: int) -> dict | None:
        if self._failed:
            return None
        try:
            self._pipe.send(steps)
        except OSError as error:
            self._failed = in_short(error)
        return self._receive()

    def _receive(self) -> dict | None:
        if not self._failed:
            try:
                return self._pipe.recv()
            except EOFError:
                self._process.join()
                self._failed = f"its process ended with {self._process.exitcode}"
        return None


def _serve(arm: Arm, size: Size, device: torch.device, pipe: Connection) -> None:
    """The process of a Remote: asked for steps until that is 0, then for its way."""
    stream = torch.cuda.stream(torch.cuda.Stream()) if device.type == "cuda" else nullcontext()
    with torch.no_grad(), stream:  # graphs cannot be captured on the default stream
        training = Training(arm, size, device)
        training.begin()
        pipe.send(None)
        while steps := pipe.recv():
            training.take(steps)
            pipe.send(None)
        pipe.send(training.way())


def in_short(error: Exception) -> str:
    return f"{type(error).__name__}: {(str(error).splitlines() or [''])[0]}"
