"""What must hold before GPU time is spent on the plan: speed, resuming, and the same losses by
sparsekern's sparse kernels as by masked dense weights."""

import json
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from sparsekern.bench.machine import processor
from sparsekern.files import atomic_write
from sparsekern.gpt.build import build_optimizer
from sparsekern.gpt.captured import CapturedStep
from sparsekern.gpt.flops import train_flops_per_token
from sparsekern.gpt.model import GPT
from sparsekern.gpt.speed import compiled_blocks
from sparsekern.gpt.step import compute_gradients
from sparsekern.sparsity import Static

from . import build
from .arms import Data, program
from .engine import Engine, Program
from .masks import Sparsity
from .plan import Size
from .worker import DTYPES

STEPS, FIRST, LAST, RESUMED_AT = 200, 10, 50, 30  # FIRST: not timed
RATE, SEED = 2e-3, 0
Say = Callable[[str], None]
MOST_APART = {"cuda": 0.02, "cpu": 1e-3}  # nats, mean of the LAST steps


def check(folder: Path, out: Path, device: str, name: str, about: dict) -> int:
    """Writes OUT/check.json, a line, with `about` in it -> the exit code."""
    began = time.monotonic()

    def say(text: str) -> None:
        print(f"{time.monotonic() - began:6.1f} s   {text}", flush=True)

    data = Data(build.load(folder), device)
    size, steps = data.size(name), STEPS if name != "toy" else 20
    say(f"text {data.corpus.id}, {data.tokens:,} tokens")
    engine = Engine(size.shape, data.stream, data.most_steps(size), DTYPES[device])
    say("captured")
    weights = size.shape.weights(SEED)
    masks = Sparsity("static", 0.75).first(engine.weights, SEED)
    made = short(data, size, steps)
    found: dict[str, object] = {"size": name, "corpus": data.corpus.id, "steps": steps} | about
    found["device"] = torch.cuda.get_device_name() if device == "cuda" else processor()

    engine.begin(weights, masks, made)
    masked = time_steps(engine, found, say)
    score(engine, data, found, say)
    apart = resume(engine, (weights, masks, made), masked, found, say)
    kernels, found["sparse_step_s"] = with_sparse_kernels(data, size, weights, made, device)
    compare(kernels, masked, MOST_APART[device], found, say)
    out.mkdir(parents=True, exist_ok=True)
    with atomic_write(out / "check.json") as file:
        file.write(json.dumps(found).encode() + b"\n")
    return 0 if found["is_same"] and apart < MOST_APART[device] else 1


def time_steps(engine: Engine, found: dict, say: Say) -> list[float]:
    """The losses of all steps of a program that has begun."""
    engine.run(FIRST)
    engine.losses()
    start = time.monotonic()
    steps = found["steps"]
    engine.run(steps)
    losses = engine.losses()
    found["step_s"] = (time.monotonic() - start) / (steps - FIRST)
    found["tokens_per_s"] = engine.shape.tokens / found["step_s"]
    found["flops_per_s"] = found["tokens_per_s"] * train_flops_per_token(engine.shape.config())
    if engine.device.type == "cuda":
        found["peak_bytes"] = torch.cuda.max_memory_allocated()
    say(
        f"{found['tokens_per_s']:,.0f} tokens/s, {1e3 * found['step_s']:.2f} ms a step, "
        f"{found['flops_per_s'] / 1e12:.3g} TFLOP/s of a dense step"
    )
    return losses


def score(engine: Engine, data: Data, found: dict, say: Say) -> None:
    start = time.monotonic()
    scores = {n: engine.score(data.rows[n]).loss for n in ("cloze", "blimp", "code/dev")}
    found["scores"], found["score_s"] = scores, time.monotonic() - start
    say(f"scores in {found['score_s']:.2f} s: {scores}")


def resume(engine: Engine, given: tuple, masked: list[float], found: dict, say: Say) -> float:
    """How far losses are from `masked` where a run of this (weights, masks, program) is stopped
    and goes on."""
    program = given[-1]
    engine.begin(*given)
    engine.run(min(RESUMED_AT, program.steps // 2))
    state = engine.state()
    engine.begin(*given)  # something else in between
    engine.run(3)
    engine.resume(state, program)
    engine.run(program.steps)
    found["is_resumed_exactly"] = engine.losses() == masked
    apart = max(abs(a - b) for a, b in zip(engine.losses(), masked, strict=True))
    found["resumed_apart"] = apart
    say(f"resumed: {'the same' if found['is_resumed_exactly'] else f'up to {apart:.2g} apart'}")
    return apart


def compare(kernels: list[float], masked: list[float], limit: float, found: dict, say: Say) -> None:
    """Losses by the sparse kernels with those of masked dense weights."""
    difference = np.array(kernels) - np.array(masked)
    found["masked"], found["sparse"] = masked[::10], kernels[::10]
    found["apart_first"] = float(np.abs(difference[:FIRST]).max())
    found["apart_last"] = float(difference[-LAST:].mean())
    found["is_same"] = abs(found["apart_last"]) < limit
    say(
        f"sparse kernels less masked dense: at most {found['apart_first']:.2g} in the first "
        f"{FIRST} steps, {found['apart_last']:+.2g} in the mean of the last {LAST} "
        f"(limit {limit:g}); {1e3 * found['sparse_step_s']:.2f} ms a step"
    )


def short(data: Data, size: Size, steps: int) -> Program:
    """The first steps of a run, with a schedule of their own."""
    context, batch = size.shape.context, size.shape.batch
    windows = np.arange(0, data.tokens - context - 1, context)
    starts = np.random.default_rng(SEED).permutation(windows)
    return program(np.resize(starts, steps * batch), batch, RATE, {})


def with_sparse_kernels(
    data: Data, size: Size, weights: dict[str, Tensor], program: Program, device: str
) -> tuple[list[float], float]:
    """Losses of the same steps, taken by sparsekern's own captured step on its sparse layers, in
    compiled blocks as `train` has them, and the seconds of a step."""
    model = GPT(size.shape.config())
    model.load_state_dict(weights)
    model = Static(0.75, seed=SEED).apply(model).to(device)
    optimizer = build_optimizer(model, RATE)
    dtype = DTYPES[device]
    captured = None
    if device == "cuda":
        captured = CapturedStep(model, compiled_blocks(model), optimizer, [], dtype)
    offsets = torch.arange(size.shape.context + 1, device=device)
    losses: list[Tensor] = []
    for step, (starts, rate) in enumerate(zip(program.starts, program.rates, strict=True)):
        if step == FIRST:
            losses[-1].item()  # waits for the GPU
            began = time.monotonic()
        places = torch.from_numpy(starts).to(device)[:, None] + offsets
        window = data.stream[places].long()
        x, y = window[:, :-1].contiguous(), window[:, 1:].contiguous()
        for group in optimizer.param_groups:
            if captured:
                group["lr"].fill_(rate)
            else:
                group["lr"] = float(rate)
        if captured:
            loss, _ = captured.compute_gradients(x, y)
            losses.append(loss.clone())
            captured.update()
        else:
            loss, _ = compute_gradients(model, x, y, dtype)
            losses.append(loss)
            optimizer.step()
    told = [float(loss) for loss in losses]
    return told, (time.monotonic() - began) / (program.steps - FIRST)
