"""Train a GPT, dense or sparse: deterministic under a seed, and resumed bit for bit."""

import json
import statistics
from pathlib import Path

import torch

from ..files import alone_beside, atomic_write
from ..terminal import Progress
from . import lines
from .captured import why_eager
from .checkpoint import CHECKPOINT
from .config import TrainConfig
from .distributed import is_first_rank
from .flops import flop_ratio, train_flops_per_token
from .memory import peak_memory_bytes
from .parts import is_compiled
from .run import Run
from .start import begin

METRICS = "metrics.json"


def train(config: TrainConfig) -> dict:
    """Train to config.steps -> what metrics.json holds.

    Losses are nats per token; seconds are those of the training steps, without evaluations and
    checkpoints. Raises FloatingPointError when the loss or a gradient is no longer finite."""
    if not is_first_rank():
        return _whole(config)
    with alone_beside("out", Path(config.out) / CHECKPOINT):
        return _whole(config)


def _whole(config: TrainConfig) -> dict:
    if config.threads:
        torch.set_num_threads(config.threads)
    with Progress(None, unit="part", is_shown=is_first_rank()) as progress:
        run = begin(config, tell=progress.about)
    if run.ranks.device.type == "cuda":
        torch.cuda.reset_peak_memory_stats()
    start = run.step
    with Progress(config.steps, start, is_shown=is_first_rank()) as progress:
        progress.line(_plan(run))
        run.tell = progress.line
        try:
            _train(run, progress)
        except KeyboardInterrupt as stopped:
            raise KeyboardInterrupt(run.interrupted() if is_first_rank() else "") from stopped
        run.export()  # also by a resumed run that was finished: a kill may have come before
        result = _result(run)
        if is_first_rank():
            with atomic_write(run.path.with_name(METRICS)) as file:
                file.write(json.dumps(result, indent=1).encode())
        progress.line(lines.summary(result))
    return result


def _train(run: Run, progress: Progress) -> None:
    """All steps that are left, with their evaluations and checkpoints."""
    config, start = run.config, run.step
    while run.step < config.steps:
        run.compute_gradients()
        # Saved before the update: these weights have just shown a finite loss and gradient.
        if run.step > start and run.step % config.checkpoint_every == 0:
            run.save()
        # A run that was finished before has been evaluated there.
        if run.step % config.eval_every == 0 and not run.is_evaluated:
            run.evaluate()
            progress.line(_evaluation(run))
        run.update()
        progress.advance()
    if start < config.steps:
        run.evaluate()
        run.save()
        progress.line(_evaluation(run))


def _plan(run: Run) -> str:
    config = run.config
    text = lines.plan(
        config,
        run.model.config,
        _parameters(run),
        run.sparsity,
        run.text.tokenizer.name,
        len(run.text.training),
        run.step,
        run.ranks.size,
    )
    if run.ranks.device.type == "cuda":
        text += "\n" + lines.graphs(why_eager(run.ranks), is_compiled(config))
    if config.sparsity_config and run.settings is None:
        text += "\n" + lines.no_sparsity(config.sparsity_config)
    if run.loses_at_random:
        text += "\n" + lines.random_zeros(config.init_from)
    if run.lengthened_from:
        text += "\n" + lines.longer(config.steps, run.lengthened_from)
    if run.step == config.steps:
        text += "\n" + lines.finished(config.steps)
    return text


def _evaluation(run: Run) -> str:
    algorithm = run.parts.algorithm
    shows_sparsity = bool(algorithm and algorithm.resizes)
    history = run.history
    return lines.evaluation(run.config, history.losses, history.evaluations, shows_sparsity)


def _parameters(run: Run) -> int:
    return sum(p.numel() for p in run.model.parameters())


def _result(run: Run) -> dict:
    config, history, is_cuda = run.config, run.history, run.ranks.device.type == "cuda"
    return {
        "config": run.about()["config"],
        "threads": torch.get_num_threads(),
        "parameters": _parameters(run),
        "losses": history.losses,
        "seconds": history.seconds,
        "evaluations": history.evaluations,
        "step_s": statistics.median(history.seconds),
        "tokens_per_s": config.batch * config.context * run.step / sum(history.seconds),
        "sparsity": run.sparsity,
        "flops_per_token": train_flops_per_token(run.model.config, run.sparsity),
        "flop_ratio": flop_ratio(run.model.config, run.sparsity),
        "flops": history.flops,
        "source": history.source,
        "sent_bytes": run.parts.buckets.sent_bytes if run.parts.buckets else 0,
        "vocab_size": run.model.config.vocab_size,
        "peak_memory_bytes": peak_memory_bytes(),
        "peak_gpu_bytes": torch.cuda.max_memory_allocated() if is_cuda else 0,
    }
