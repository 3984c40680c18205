"""Dense against 75 % zeros for the same minutes on a CPU, where the sparse kernels are faster.

Sparse weights are trained by sparsekern's own kernels, dense ones by torch. Both see their text in
the same order, as far as they come; the schedule follows the clock.
"""

import json
import time
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import numpy as np
import torch

from sparsekern.files import atomic_write
from sparsekern.gpt.build import build_optimizer
from sparsekern.gpt.model import GPT
from sparsekern.gpt.step import compute_gradients
from sparsekern.sparsity import Static

from . import build
from .arms import CURVE, WARM_UP_SHARE, curve
from .engine import Shape
from .rows import IDS
from .scores import Scores, score

SHAPE = Shape(4, 256, 4, batch=8)
ARMS = {"dense": 0.0, "75": 0.75}
RATES = (2e-3, 4e-3, 8e-3)
# 75 % less dense, nats a token of held-out text: a step that takes 0.6 to 0.8 of the time sees so
# many more tokens, where each token still counts (a few for each parameter).
PREDICTED, MARGIN = (-0.10, 0.10), 0.02


def run(corpus: build.Corpus, arm: str, minutes: float, rate: float, seed: int) -> dict:
    """Train for so many minutes, then score held-out text: one half of it for the choice of a rate
    (dev), the other one to report."""
    stream = corpus.arrays[build.TRAINING]
    context = corpus.arrays["code/training"].shape[1] - 1
    shape = replace(SHAPE, context=context, vocab_size=corpus.manifest["vocab_size"])
    torch.manual_seed(seed)
    model = GPT(shape.config())
    if ARMS[arm]:
        model = Static(ARMS[arm], seed=seed).apply(model)
    optimizer = build_optimizer(model, rate)
    losses: list[float] = []
    batches = windows(stream, context, shape.batch, seed)
    began = time.monotonic()
    while (gone := (time.monotonic() - began) / (60 * minutes)) < 1:
        now = min((gone + 1e-3) / WARM_UP_SHARE, (1 - gone) / (1 - WARM_UP_SHARE))
        for group in optimizer.param_groups:
            group["lr"] = rate * now
        batch = next(batches)
        loss, _ = compute_gradients(model, batch[:, :-1], batch[:, 1:])
        optimizer.step()
        losses.append(float(loss))
    seconds = time.monotonic() - began
    held_out = [rows for name, rows in corpus.arrays.items() if name.startswith("held-out/")]
    dev, test = (
        Scores.together([score(model, rows[half::2], torch.float32) for rows in held_out]).loss
        for half in (0, 1)
    )
    tokens = len(losses) * shape.tokens
    return {
        "arm": arm,
        "seed": seed,
        "rate": rate,
        "minutes": minutes,
        "seconds": round(seconds, 1),
        "steps": len(losses),
        "tokens": tokens,
        "tokens_per_s": round(tokens / seconds, 1),
        "dev": round(dev, 5),
        "held-out": round(test, 5),
        "curve": curve(losses) if len(losses) >= CURVE else losses,
        "threads": torch.get_num_threads(),
        "corpus": corpus.id,
    }


def windows(stream: np.ndarray, context: int, batch: int, seed: int) -> Iterator[torch.Tensor]:
    """int64 [batch, context + 1], pass after pass."""
    rng = np.random.default_rng(seed)
    while True:
        starts = rng.permutation(np.arange(0, len(stream) - context - 1, context))
        for i in range(0, len(starts) - batch + 1, batch):
            rows = stream[starts[i : i + batch, None] + np.arange(context + 1)]
            yield torch.from_numpy((rows & IDS).astype(np.int64))


def key(result: dict) -> tuple:
    return tuple(result[name] for name in ("arm", "seed", "rate", "minutes", "threads", "corpus"))


def read(path: Path) -> list[dict]:
    return [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []


def keep(path: Path, result: dict) -> None:
    """Add a result; the last one of its kind stays."""
    kept = [other for other in read(path) if key(other) != key(result)]
    lines = "".join(json.dumps(one) + "\n" for one in [*kept, result])
    with atomic_write(path) as file:
        file.write(lines.encode())
