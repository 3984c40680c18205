"""The output of a training run."""

import resource
import statistics
import sys
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING

import torch

from ..extras import require
from .flops import amdahl_cap, flop_ratio, multiply_adds, train_flops_per_token

if TYPE_CHECKING:
    from .train import Run


class Progress:
    """Lines, and on a terminal a tqdm bar below them."""

    def __init__(self, total: int, done: int, is_shown: bool = True, unit: str = "step") -> None:
        self._bar, self._is_shown = None, is_shown
        if is_shown and sys.stderr.isatty() and find_spec("tqdm"):
            tqdm = require("tqdm", "gpt").tqdm
            self._bar = tqdm(total=total, initial=done, unit=unit, leave=False)

    def advance(self) -> None:
        if self._bar:
            self._bar.update()

    def line(self, text: str) -> None:
        if self._bar:
            self._bar.write(text)
        elif self._is_shown:
            print(text, flush=True)

    def close(self) -> None:
        if self._bar:
            self._bar.close()


def peak_memory_bytes() -> int:
    """The most memory that this process ever had resident."""
    # Linux keeps ru_maxrss over exec, so a small child reports its large parent; VmHWM is its own.
    status = Path("/proc/self/status")
    if status.exists():
        return 1024 * int(status.read_text().split("VmHWM:")[1].split()[0])
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else 1024 * peak


def evaluation_line(run: "Run") -> str:
    config, evaluation = run.config, run.evaluations[-1]
    line = f"step {run.step:>5}/{config.steps}   validation loss {evaluation['loss']:.3f}"
    if run.algorithm and run.algorithm.resizes:
        line += f"   sparsity {evaluation['sparsity']:.1%}"
    if not run.losses:
        return line
    recent = statistics.mean(run.losses[-config.eval_every :])
    speed = config.batch * config.context * run.step / evaluation["seconds"]
    return f"{line}   training loss {recent:.3f}   {speed:>7,.0f} tokens/s"


def print_plan(run: "Run") -> None:
    config, c = run.config, run.model.config
    macs = multiply_adds(c)
    parameters = sum(p.numel() for p in run.model.parameters())
    rows = {
        "data": f"{config.data}: {run.tokens:,} training tokens, {config.tokenizer} tokenizer, "
        f"vocabulary {c.vocab_size:,}",
        "model": f"{c.n_layer} layers, width {c.n_embd}, {c.n_head} heads, context {c.block_size}: "
        f"{parameters:,} parameters at {run.sparsity:.0%} sparsity",
        "FLOPs": f"{train_flops_per_token(c, run.sparsity) / 1e6:.1f} M per token, "
        f"{flop_ratio(c, run.sparsity):.2f}x fewer than dense "
        f"(Amdahl cap {amdahl_cap(macs.linear / macs.total):.2f}x, with the linears free)",
        "run": f"steps {run.step} to {config.steps} of {config.batch} x {config.context} tokens, "
        f"{run.ranks.size} x {torch.get_num_threads()} threads, seed {config.seed}",
    }
    if config.sparsity_config and run.settings is None:
        rows["config"] = f"{config.sparsity_config} has no sparsity block: a dense run"
    if run.lengthened_from:
        rows["longer"] = (
            f"the learning rate is that of a run of {config.steps} steps from here on, changes of "
            f"the pattern keep the plan of {run.lengthened_from}"
        )
    print("\n".join(f"{name:<7}{text}" for name, text in rows.items()), flush=True)
