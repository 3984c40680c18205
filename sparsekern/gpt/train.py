"""Train a GPT, dense or sparse: deterministic under a seed, and resumed bit for bit."""

import json
import math
import resource
import statistics
import sys
import time
import zlib
from dataclasses import asdict, dataclass, field
from importlib.util import find_spec
from pathlib import Path

import torch
from torch import Tensor, nn

from .. import sparsity as algorithms
from ..extras import require
from ..nn import sparsify_
from .checkpoint import atomic_write, load_checkpoint, save_checkpoint
from .data import (
    TOKENIZERS,
    Batches,
    Tokenizer,
    load_text,
    make_tokenizer,
    split_text,
    tokenizer_from_state,
)
from .flops import amdahl_cap, flop_ratio, multiply_adds, train_flops_per_token
from .model import GPT, GPTConfig

BETAS = (0.9, 0.95)
WEIGHT_DECAY = 0.1
GRADIENT_CLIP = 1.0
WARMUP_SHARE = 0.1  # of all steps, with the learning rate rising from 0
FINAL_LR_SHARE = 0.1  # of the highest learning rate, reached by a cosine
EVAL_BATCHES = 4

CHECKPOINT = "checkpoint.pt"
METRICS = "metrics.json"


def _flag(default: object, text: str, **argument: object) -> object:
    """A field that is also a command-line flag."""
    return field(default=default, metadata={"help": text, **argument})


@dataclass(frozen=True)
class TrainConfig:
    data: str = _flag("stdlib", "shakespeare, stdlib (Python's own library), a file or a folder")
    tokenizer: str = _flag("bytes", "how text becomes tokens", choices=TOKENIZERS)
    vocab_size: int = _flag(2048, "vocabulary of the bpe tokenizer")
    sparsity: float = _flag(0.0, "share of zeros in the linear layers of the blocks, 0 = dense")
    algorithm: str = _flag("static", "how the zeros are chosen")
    init: str = _flag("random", "which weights stay", choices=("random", "magnitude"))
    layers: int = _flag(4, "number of blocks")
    heads: int = _flag(8, "attention heads")
    width: int = _flag(512, "size of the residual stream")
    context: int = _flag(128, "tokens that the model sees")
    batch: int = _flag(8, "sequences per step")
    steps: int = _flag(200, "optimizer steps in all")
    lr: float = _flag(6e-4, "highest learning rate")
    seed: int = _flag(0, "fixes weights, zeros and batches")
    threads: int = _flag(0, "CPU threads, 0 = torch's own choice")
    out: str = _flag("out/train", "folder for checkpoint.pt and metrics.json")
    resume: bool = _flag(False, "continue from OUT/checkpoint.pt; other flags come from there")
    eval_every: int = _flag(50, "steps between evaluations")
    checkpoint_every: int = _flag(50, "steps between checkpoints")

    def __post_init__(self) -> None:
        for name in ("batch", "steps", "eval_every", "checkpoint_every"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} must be at least 1, got {getattr(self, name)}")
        for name in ("seed", "threads"):
            if getattr(self, name) < 0:
                raise ValueError(f"{name} must not be negative, got {getattr(self, name)}")
        if not 0 <= self.sparsity < 1:
            raise ValueError(f"sparsity must be at least 0 and below 1, got {self.sparsity}")
        if not 0 < self.lr < math.inf:
            raise ValueError(f"lr must be positive and finite, got {self.lr}")

    def model(self, vocab_size: int) -> GPTConfig:
        return GPTConfig(self.layers, self.heads, self.width, self.context, vocab_size)


# A resumed run may change these; any other change would make it another run.
FREE_ON_RESUME = ("out", "resume", "threads", "eval_every", "checkpoint_every")


def resumed_config(given: dict) -> TrainConfig:
    """The config of the checkpoint in the folder given["out"], with `given` on top.

    Raises ValueError if `given` would change what the run computes."""
    given = given | {"resume": True}
    path = Path(given.get("out", TrainConfig.out)) / CHECKPOINT
    saved = load_checkpoint(path)["config"]
    for name in given.keys() - set(FREE_ON_RESUME):
        if given[name] != saved[name]:
            raise ValueError(
                f"{name} is {saved[name]} in {path}, got {given[name]}; a resumed run keeps it"
            )
    return TrainConfig(**saved | given)


def build_model(config: TrainConfig, vocab_size: int) -> GPT:
    """The same weights and the same zeros for the same config."""
    algorithm = algorithms.get(
        config.algorithm, sparsity=config.sparsity, init_method=config.init, seed=config.seed
    )
    torch.manual_seed(config.seed)
    model = GPT(config.model(vocab_size))
    return sparsify_(model, algorithm) if config.sparsity else model


def build_optimizer(model: nn.Module, lr: float) -> torch.optim.AdamW:
    """AdamW that decays matrices and the values of sparse matrices, not biases and norms."""
    decayed, others = [], []
    for name, parameter in model.named_parameters():
        is_weight = parameter.ndim > 1 or name.endswith(".values")
        (decayed if is_weight else others).append(parameter)
    groups = [
        {"params": decayed, "weight_decay": WEIGHT_DECAY},
        {"params": others, "weight_decay": 0.0},
    ]
    return torch.optim.AdamW(groups, lr=lr, betas=BETAS, fused=True)


def compute_gradients(model: GPT, x: Tensor, y: Tensor) -> tuple[float, float]:
    """Forward, backward and clipping of one batch -> loss and gradient norm before clipping."""
    model.zero_grad()
    loss = model(x, y)[1]
    loss.backward()
    norm = nn.utils.clip_grad_norm_(model.parameters(), GRADIENT_CLIP)
    return loss.item(), norm.item()


def learning_rate(config: TrainConfig, step: int) -> float:
    """A linear warm-up, then a cosine down to FINAL_LR_SHARE."""
    warmup = math.ceil(WARMUP_SHARE * config.steps)
    if step < warmup:
        return config.lr * (step + 1) / warmup
    done = (step - warmup) / max(1, config.steps - warmup)
    cosine = (1 + math.cos(math.pi * done)) / 2
    return config.lr * (FINAL_LR_SHARE + (1 - FINAL_LR_SHARE) * cosine)


@torch.no_grad()
def evaluate(model: GPT, batches: Batches) -> float:
    """Mean loss in nats per token over the same EVAL_BATCHES batches at each call."""
    model.eval()
    losses = [model(*batches.get(i))[1].item() for i in range(EVAL_BATCHES)]
    model.train()
    return sum(losses) / len(losses)


def peak_memory_bytes() -> int:
    """The most memory that this process ever had resident."""
    # Linux keeps ru_maxrss over exec, so a small child reports its large parent; VmHWM is its own.
    status = Path("/proc/self/status")
    if status.exists():
        return 1024 * int(status.read_text().split("VmHWM:")[1].split()[0])
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else 1024 * peak


def load_model(path: Path) -> tuple[GPT, Tokenizer]:
    """The trained model and its tokenizer."""
    state = load_checkpoint(path)
    tokenizer = tokenizer_from_state(state["tokenizer"])
    model = build_model(TrainConfig(**state["config"]), tokenizer.vocab_size)
    model.load_state_dict(state["model"])
    return model, tokenizer


class _Progress:
    """Lines, and on a terminal a tqdm bar below them."""

    def __init__(self, total: int, done: int) -> None:
        self._bar = None
        if sys.stderr.isatty() and find_spec("tqdm"):
            tqdm = require("tqdm", "gpt").tqdm
            self._bar = tqdm(total=total, initial=done, unit="step", leave=False)

    def advance(self) -> None:
        if self._bar:
            self._bar.update()

    def line(self, text: str) -> None:
        if self._bar:
            self._bar.write(text)
        else:
            print(text, flush=True)

    def close(self) -> None:
        if self._bar:
            self._bar.close()


class Run:
    """One training run: what a checkpoint holds, and how to take it one step further."""

    def __init__(self, config: TrainConfig) -> None:
        self.config = config
        self.path = Path(config.out) / CHECKPOINT
        saved = load_checkpoint(self.path) if config.resume else None
        if self.path.exists() and not saved:
            raise ValueError(f"out: {self.path} exists already; resume it or choose another folder")

        training, validation = split_text(load_text(config.data), config.data)
        if saved:
            self.tokenizer = tokenizer_from_state(saved["tokenizer"])
        else:
            self.tokenizer = make_tokenizer(config.tokenizer, training, config.vocab_size)
        tokens = self.tokenizer.encode(training)
        self.tokens = len(tokens)
        self.data_crc32 = zlib.crc32(tokens.numpy())
        shape = (config.batch, config.context, config.seed)
        self.training = Batches(tokens, *shape)
        self.validation = Batches(self.tokenizer.encode(validation), *shape)

        self.model = build_model(config, self.tokenizer.vocab_size)
        self.optimizer = build_optimizer(self.model, config.lr)
        self.losses: list[float] = []  # of each step, before its update
        self.seconds: list[float] = []  # of each step
        self.evaluations: list[dict] = []
        if saved:
            if saved["data_crc32"] != self.data_crc32:
                raise ValueError(f"data: {config.data} changed since {self.path} was written")
            self.model.load_state_dict(saved["model"])
            self.optimizer.load_state_dict(saved["optimizer"])
            self.losses, self.seconds = saved["losses"], saved["seconds"]
            self.evaluations = saved["evaluations"]

    @property
    def step(self) -> int:
        """Updates made so far."""
        return len(self.losses)

    def save(self) -> None:
        state = {
            "config": asdict(self.config),
            "tokenizer": self.tokenizer.state(),
            "data_crc32": self.data_crc32,
            "model": self.model.state_dict(),
            "optimizer": self.optimizer.state_dict(),
            "losses": self.losses,
            "seconds": self.seconds,
            "evaluations": self.evaluations,
        }
        save_checkpoint(self.path, state)

    def evaluate(self) -> None:
        loss = evaluate(self.model, self.validation)
        self.check_finite("validation loss", loss)
        seconds = sum(self.seconds)
        self.evaluations.append({"step": self.step, "seconds": seconds, "loss": loss})

    def compute_gradients(self) -> float:
        for group in self.optimizer.param_groups:
            group["lr"] = learning_rate(self.config, self.step)
        loss, norm = compute_gradients(self.model, *self.training.get(self.step))
        self.check_finite("loss", loss)
        self.check_finite("gradient norm", norm)
        return loss

    def check_finite(self, what: str, value: float) -> None:
        if not math.isfinite(value):
            kept = f"{self.path} is the last good one" if self.path.exists() else "none was written"
            raise FloatingPointError(f"{what} is {value} at step {self.step}; checkpoint: {kept}")


def train(config: TrainConfig) -> dict:
    """Train to config.steps -> what metrics.json holds.

    Losses are nats per token; seconds are those of the training steps, without evaluations and
    checkpoints. Raises FloatingPointError when the loss or a gradient is no longer finite."""
    if config.threads:
        torch.set_num_threads(config.threads)
    run = Run(config)
    _print_plan(run)
    progress = _Progress(config.steps, run.step)
    start = run.step
    while run.step < config.steps:
        began = time.perf_counter()
        loss = run.compute_gradients()
        gradient_s = time.perf_counter() - began
        # Saved before the update: these weights have just shown a finite loss and gradient.
        if run.step > start and run.step % config.checkpoint_every == 0:
            run.save()
        if run.step % config.eval_every == 0:
            run.evaluate()
            progress.line(_evaluation_line(run))
        began = time.perf_counter()
        run.optimizer.step()
        run.seconds.append(gradient_s + time.perf_counter() - began)
        run.losses.append(loss)
        progress.advance()
    if start < config.steps:
        run.evaluate()
        run.save()
        progress.line(_evaluation_line(run))
    progress.close()

    result = _result(run)
    with atomic_write(run.path.with_name(METRICS)) as file:
        file.write(json.dumps(result, indent=1).encode())
    print(
        f"done   {sum(run.seconds):.1f} s in steps, {1e3 * result['step_s']:.1f} ms each (median), "
        f"{result['tokens_per_s']:,.0f} tokens/s, "
        f"{result['peak_memory_bytes'] / 2**20:.0f} MiB peak memory",
        flush=True,
    )
    return result


def _result(run: Run) -> dict:
    config = run.config
    return {
        "config": asdict(config),
        "threads": torch.get_num_threads(),
        "parameters": sum(p.numel() for p in run.model.parameters()),
        "losses": run.losses,
        "seconds": run.seconds,
        "evaluations": run.evaluations,
        "step_s": statistics.median(run.seconds),
        "tokens_per_s": config.batch * config.context * run.step / sum(run.seconds),
        "flops_per_token": train_flops_per_token(run.model.config, config.sparsity),
        "flop_ratio": flop_ratio(run.model.config, config.sparsity),
        "peak_memory_bytes": peak_memory_bytes(),
    }


def _evaluation_line(run: Run) -> str:
    config, evaluation = run.config, run.evaluations[-1]
    line = f"step {run.step:>5}/{config.steps}   validation loss {evaluation['loss']:.3f}"
    if not run.losses:
        return line
    recent = statistics.mean(run.losses[-config.eval_every :])
    speed = config.batch * config.context * run.step / evaluation["seconds"]
    return f"{line}   training loss {recent:.3f}   {speed:>7,.0f} tokens/s"


def _print_plan(run: Run) -> None:
    config, c = run.config, run.model.config
    macs = multiply_adds(c)
    parameters = sum(p.numel() for p in run.model.parameters())
    rows = {
        "data": f"{config.data}: {run.tokens:,} training tokens, {config.tokenizer} tokenizer, "
        f"vocabulary {c.vocab_size:,}",
        "model": f"{c.n_layer} layers, width {c.n_embd}, {c.n_head} heads, context {c.block_size}: "
        f"{parameters:,} parameters at {config.sparsity:.0%} sparsity",
        "FLOPs": f"{train_flops_per_token(c, config.sparsity) / 1e6:.1f} M per token, "
        f"{flop_ratio(c, config.sparsity):.2f}x fewer than dense "
        f"(Amdahl cap {amdahl_cap(macs.linear / macs.total):.2f}x, with the linears free)",
        "run": f"steps {run.step} to {config.steps} of {config.batch} x {config.context} tokens, "
        f"{torch.get_num_threads()} threads, seed {config.seed}",
    }
    print("\n".join(f"{name:<7}{text}" for name, text in rows.items()), flush=True)
