"""The lines that a training run prints, out of plain values."""

import statistics

import torch

from .config import TrainConfig
from .distributed import first_line
from .flops import amdahl_cap, flop_ratio, multiply_adds, train_flops_per_token
from .model import GPTConfig


def plan(
    config: TrainConfig,
    shape: GPTConfig,
    parameters: int,
    sparsity: float,
    tokenizer: str,
    tokens: int,
    step: int,
    ranks: int,
) -> str:
    """What is about to run, from `step` on."""
    macs = multiply_adds(shape)
    saved = f"{flop_ratio(shape, sparsity):.2f}x fewer than dense "
    saved += f"(Amdahl cap {amdahl_cap(macs.linear / macs.total):.2f}x, with the linears free)"
    rows = {
        "data": f"{config.data}: {tokens:,} training tokens, {tokenizer} tokenizer, "
        f"vocabulary {shape.vocab_size:,}",
        "model": f"{shape.n_layer} layers, width {shape.n_embd}, {shape.n_head} heads, "
        f"context {shape.block_size}: {parameters:,} parameters at {sparsity:.0%} sparsity",
        "FLOPs": f"{train_flops_per_token(shape, sparsity) / 1e6:.1f} M per token, "
        f"{saved if sparsity else 'dense'}",
        "run": f"steps {step} to {config.steps} of {config.batch} x {config.context} tokens, "
        f"processes x threads {ranks} x {torch.get_num_threads()}, seed {config.seed}",
        "out": f"{config.out}",
    }
    return "\n".join(f"{name:<7}{text}" for name, text in rows.items())


def graphs(why_not: str | None, is_compiled: bool) -> str:
    """How the steps are taken on a GPU."""
    if why_not:
        return f"steps  eager: {why_not}"
    blocks = "; the blocks are compiled first, which takes a while" if is_compiled else ""
    return f"steps  captured in CUDA graphs{blocks}"


def eager(error: Exception) -> str:
    """Steps are not captured after all."""
    why = f"{type(error).__name__}: {first_line(error)}"
    return f"steps  eager from here on, no CUDA graph: {why}"


def no_sparsity(path: str) -> str:
    return f"config {path} has no sparsity block: a dense run"


def random_zeros(source: str) -> str:
    return (
        f"zeros  at random places, whatever {source} has learnt there; --init-method magnitude "
        "keeps its largest weights"
    )


def longer(steps: int, before: int) -> str:
    return (
        f"longer the learning rate is that of a run of {steps} steps from here on, changes of the "
        f"pattern keep the plan of {before}"
    )


def finished(steps: int) -> str:
    return f"done   all {steps} steps were made before; --resume --steps MORE goes on"


def evaluation(
    config: TrainConfig, losses: list[float], evaluations: list[dict], shows_sparsity: bool
) -> str:
    """Of the last evaluation: `losses` of the steps so far, and the speed since the one before."""
    step, found = len(losses), evaluations[-1]
    line = f"step {step:>5}/{config.steps}   validation loss {found['loss']:.3f}"
    if shows_sparsity:
        line += f"   sparsity {found['sparsity']:.1%}"
    if not losses:
        return line
    recent = statistics.mean(losses[-config.eval_every :])
    before = evaluations[-2] if len(evaluations) > 1 else {"step": 0, "seconds": 0.0}
    steps, seconds = step - before["step"], found["seconds"] - before["seconds"]
    speed = config.batch * config.context * steps / seconds
    return f"{line}   training loss {recent:.3f}   {speed:>7,.0f} tokens/s"


def summary(result: dict) -> str:
    """Of what metrics.json holds."""
    return (
        f"done   {sum(result['seconds']):.1f} s in steps, {1e3 * result['step_s']:.1f} ms each "
        f"(median), {result['tokens_per_s']:,.0f} tokens/s, "
        f"{result['peak_memory_bytes'] / 2**20:.0f} MiB peak memory"
    )
