"""Memory of a GPT's training step, measured: dense, and 75 % zeros under both kinds of masks.

Steps are eager: compiled ones keep less. Each model is alone on the GPU. Then the largest number of
sequences that fits, in the whole of it and in as much as smaller GPUs have.
"""

import gc
import math
from collections.abc import Callable, Iterator
from functools import partial
from statistics import median

import torch

from ..gpt.model import GPTConfig
from ..gpt.presets import PRESETS
from ..gpt.step import compute_gradients
from .gpt_gpu import DTYPE, FREE, TWO_WAY, capturable_optimizer, fields_of, make_gpt
from .memory_gpu import Meter
from .products_gpu import NAME
from .records import DENSE, OURS
from .replay_gpu import CudaClock

MODEL, SPARSITY, BATCH = "gpt3-xl", 0.75, 4
ARMS = (("", 0.0), (FREE, SPARSITY), (TWO_WAY, SPARSITY))  # mask, sparsity
GIB = 2**30
LIMITS_GIB: tuple[int | None, ...] = (24, 40, 80, None)  # None: all that there is
ROUNDS = 3
MASK_OF_DENSE = "none"


def cases(with_largest: bool, model: str = MODEL) -> Iterator[dict]:
    """A record for each model with BATCH sequences, and for the most that fit in each limit."""
    for mask, sparsity in ARMS:
        gc.collect()
        torch.cuda.empty_cache()
        arm = Arm(PRESETS[model], mask, sparsity)
        yield _case(model, arm, BATCH, "", arm.measure(BATCH))
        for limit in LIMITS_GIB if with_largest else ():
            name = f"within {limit} GiB" if limit else "within the GPU"
            if found := arm.within(limit):
                batch, way = found
                yield _case(model, arm, batch, name, way | {"note": f"{batch + 1} do not fit"})
            else:
                failed = {"failed": "no sequence fits", "is_right": True}
                yield _case(model, arm, 0, name, failed)
        del arm


class Arm:
    """A model with its optimizer."""

    def __init__(self, config: GPTConfig, mask: str, sparsity: float) -> None:
        device = torch.device("cuda")
        self.config, self.mask, self.sparsity = config, mask, sparsity
        self.clock, self._meter = CudaClock(frees_cache=True), Meter(device)
        torch.manual_seed(0)
        self._model = make_gpt(config, device, mask, sparsity)
        self._meter.built(self._model)
        self._optimizer = capturable_optimizer(self._model, device)
        self._peaks: dict[int, int] = {}  # bytes, by the number of sequences

    def step(self, batch: int) -> Callable[[dict], torch.Tensor]:
        """A step of so many sequences -> its loss. Memory goes to the dict."""
        shape = batch, self.config.block_size
        x = torch.randint(self.config.vocab_size, shape, device="cuda")
        y = x.roll(-1, dims=1)

        def run(info: dict) -> torch.Tensor:
            with self._meter.step(info):
                with torch.enable_grad():
                    loss, _ = compute_gradients(self._model, x, y, DTYPE)
                self._optimizer.step()
            return loss

        return run

    def measure(self, batch: int) -> dict:
        """Memory and time of steps, and the pool of one that is captured."""
        info: dict = {}
        run = self.step(batch)
        run(info)
        loss = run(info).item()
        self._peaks[batch] = info["peak_bytes"]
        found = self._timed(run, loss, info)
        replay, _ = self.clock.capture([partial(run, info)])
        found["pool_bytes"] = self.clock.captured_bytes
        del replay
        self._free()
        return found

    def _timed(self, run: Callable[[dict], torch.Tensor], loss: float, info: dict) -> dict:
        """`info` with the time of a step."""
        seconds = [self.clock.once(partial(run, info)) for _ in range(ROUNDS)]
        times = {"median_s": median(seconds), "min_s": min(seconds)}
        return info | times | {"is_right": math.isfinite(loss), "loss": loss}

    def _free(self) -> None:
        self._model.zero_grad()
        torch.cuda.empty_cache()

    def within(self, limit_gib: int | None) -> tuple[int, dict] | None:
        """The most sequences whose step fits in a part of the memory, and what was found of it.

        The peak grows evenly with the sequences, which says where to begin to try."""
        total_bytes = torch.cuda.get_device_properties(0).total_memory
        limit_bytes = min(total_bytes, limit_gib * GIB) if limit_gib else total_bytes
        for batch in (BATCH // 2, BATCH):
            if batch not in self._peaks:
                info: dict = {}
                self.step(batch)(info)
                self._peaks[batch] = info["peak_bytes"]
        (few, less), (many, more) = sorted(self._peaks.items())
        a_sequence = (more - less) / (many - few)
        batch = max(1, int(many + (limit_bytes - more) / a_sequence))
        torch.cuda.set_per_process_memory_fraction(limit_bytes / total_bytes)
        try:
            best = None
            while batch and (best := self._try(batch)) is None:
                batch -= 1
            if best is None:
                return None
            while (other := self._try(batch + 1)) is not None:
                batch, best = batch + 1, other
            return batch, best
        finally:
            torch.cuda.set_per_process_memory_fraction(1.0)

    def _try(self, batch: int) -> dict | None:
        """None where it does not fit."""
        self._free()
        info: dict = {}
        try:
            run = self.step(batch)
            loss = run(info).item()
            found = self._timed(run, loss, info)
        except torch.OutOfMemoryError:
            found = None
        self._free()
        return found


def _case(model: str, arm: Arm, batch: int, name: str, way: dict) -> dict:
    is_sparse = bool(arm.mask)
    kind = OURS if is_sparse else DENSE
    return {
        **{"op": "train_memory", "case": name, "device": "cuda"},
        **fields_of(model, arm.config, batch, arm.sparsity),
        **{"mask": arm.mask or MASK_OF_DENSE},
        **{"dtype": str(DTYPE).removeprefix("torch."), "threads": 0},
        "ways": {NAME if is_sparse else "dense": {"kind": kind} | way},
    }
