"""A GPT's captured training step in E4M3, dense and two-way, beside bfloat16: time, and the loss at
equal tokens.

Each arm is alone on the GPU: model, masks, compiled blocks and CUDA graphs are made, some steps are
taken on text, and those that were replays are timed. The first arm comes once more at the end: how
far its two times are apart is what the order of the arms may have done.
"""

import gc
import math
from collections.abc import Iterator
from dataclasses import dataclass
from statistics import median

import torch
from torch import Tensor

from ..gpt.build import build_optimizer
from ..gpt.captured import CapturedStep
from ..gpt.data import Text
from ..gpt.flops import train_flops_per_token
from ..gpt.model import GPTConfig
from ..gpt.presets import PRESETS
from ..gpt.speed import compiled_blocks
from ..nn.float8 import to_float8_
from .gpt_gpu import make_gpt
from .noise import spread
from .records import DENSE, OTHER, OURS
from .two_way_mask import TWO_WAY

OP = "train_float8"
BFLOAT16, FLOAT8 = "bfloat16", "float8"
SPARSITY = 0.75
STEPS, LR, WARM_UP, SHOWN = 30, 3e-4, 10, 10  # losses are means of so many steps
AGAIN = "again"


@dataclass(frozen=True)
class Arm:
    mask: str
    dtype: str
    kind: str
    name: str


ARMS = (
    Arm("", BFLOAT16, DENSE, "dense"),
    Arm(TWO_WAY, FLOAT8, OURS, "two-way"),
    Arm("", FLOAT8, OTHER, "dense"),
    Arm(TWO_WAY, BFLOAT16, OURS, "two-way"),
    Arm("", BFLOAT16, OTHER, AGAIN),
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
    config = size.config
    text = Text(size.data, None, "bytes", 256)
    training, _ = text.batches(size.batch, config.block_size, seed=0)
    batches = [tuple(t.to(device) for t in training.get(i)) for i in range(size.steps)]
    for arm in ARMS:
        try:
            way = _measured(arm, size, batches, device)
        except Exception as error:  # the others are still measured
            failed = f"{type(error).__name__}: {(str(error).splitlines() or [''])[0]}"
            way = {"kind": arm.kind, "failed": failed}
        M = size.batch * config.block_size
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
        gc.collect()
        if device.type == "cuda":
            torch.cuda.empty_cache()


def _measured(arm: Arm, size: Size, batches: list, device: torch.device) -> dict:
    torch.manual_seed(0)
    is_cuda = device.type == "cuda"
    if is_cuda:
        torch.cuda.reset_peak_memory_stats()
    model = make_gpt(size.config, device, arm.mask, SPARSITY)
    optimizer = build_optimizer(model, LR)
    if arm.dtype == FLOAT8:
        to_float8_(model).follow(optimizer)
    step = CapturedStep(model, compiled_blocks(model), optimizer, [], torch.bfloat16)
    losses: list[Tensor] = []
    times = []
    with torch.enable_grad():
        for i, (x, y) in enumerate(batches):
            for group in optimizer.param_groups:
                group["lr"].fill_(LR * min(1.0, (i + 1) / WARM_UP))
            begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
            begin.record()
            loss, _ = step.compute_gradients(x, y)
            step.update()
            end.record()
            losses.append(loss.clone())
            if step.is_replayed:
                times.append((begin, end))
    end.synchronize()
    # The first replay captures.
    seconds = [1e-3 * begin.elapsed_time(end) for begin, end in times[1:]]
    peak = torch.cuda.max_memory_allocated() if is_cuda else 0
    shown = [part.mean().item() for part in torch.stack(losses).split(SHOWN)]
    return {
        **{"kind": arm.kind, "median_s": median(seconds), "min_s": min(seconds)},
        **{"spread": spread(seconds), "is_right": all(map(math.isfinite, shown))},
        **{"peak_bytes": peak, "step": len(losses), "loss": shown[-1], "error": 0.0},
        "note": " ".join(f"{loss:.4f}" for loss in shown),
    }
