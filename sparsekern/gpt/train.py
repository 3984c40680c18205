"""Train a GPT, dense or sparse: deterministic under a seed, and resumed bit for bit."""

import json
import math
import statistics
import time
import zlib
from dataclasses import asdict, replace
from importlib.util import find_spec
from pathlib import Path

import torch
from torch import Tensor, nn

from ..files import atomic_write
from ..nn import densify_
from ..sparsity import GMP, Group, RigL
from ..sparsity.pattern import check_same_on_all_ranks
from ..weights import save_weights
from .build import (
    FINAL_LR_SHARE,
    build_model,
    build_optimizer,
    learning_rate,
    load_model,
    model_from_state,
)
from .checkpoint import CHECKPOINT, WEIGHTS, about, load_checkpoint, save_checkpoint
from .config import TrainConfig, check_methods, config_from, resumed_config
from .continued import from_sparse
from .data import Batches, load_tokens, tokenizer_from_state
from .distributed import Ranks, load_optimizer, whole_state
from .flops import (
    dense_gradient_flops_per_token,
    flop_ratio,
    linear_sparsity,
    train_flops_per_token,
)
from .model import GPT
from .progress import Progress, evaluation_line, peak_memory_bytes, print_plan

__all__ = [
    "CHECKPOINT",
    "FINAL_LR_SHARE",
    "TrainConfig",
    "config_from",
    "load_model",
    "resumed_config",
    "train",
]

GRADIENT_CLIP = 1.0
EVAL_BATCHES = 4
VALIDATION_SEED = 0

METRICS = "metrics.json"


def compute_gradients(
    model: nn.Module, x: Tensor, y: Tensor, dtype: torch.dtype = torch.float32
) -> tuple[float, float]:
    """Forward, backward and clipping of one batch -> loss and gradient norm before clipping."""
    model.zero_grad()
    with torch.autocast(x.device.type, dtype, enabled=dtype != torch.float32):
        loss = model(x, y)[1]
    loss.backward()
    norm = nn.utils.clip_grad_norm_(model.parameters(), GRADIENT_CLIP)
    return loss.item(), whole_state(norm).item()


@torch.no_grad()
def evaluate(
    model: GPT,
    batches: Batches,
    count: int = EVAL_BATCHES,
    dtype: torch.dtype = torch.float32,
    device: torch.device | str = "cpu",
) -> float:
    """Mean loss in nats per token over the same `count` batches at each call."""
    model.eval()
    losses = []
    with torch.autocast(torch.device(device).type, dtype, enabled=dtype != torch.float32):
        for i in range(count):
            x, y = (t.to(device) for t in batches.get(i))
            losses.append(model(x, y)[1].item())
    model.train()
    return sum(losses) / len(losses)


class Run:
    """One training run: what a checkpoint holds, and how to take it one step further."""

    def __init__(self, config: TrainConfig, start: dict | None = None) -> None:
        """With `start`, what another run's checkpoint holds, it begins with its weights."""
        self.config = config
        self.dtype = getattr(torch, config.dtype)
        self.path = Path(config.out) / CHECKPOINT
        saved = load_checkpoint(self.path) if config.resume else None
        if self.path.exists() and not saved and not start:
            raise ValueError(f"out: {self.path} exists already; resume it or choose another folder")
        folder = next(p for p in self.path.parents if p.exists())
        if not folder.is_dir():
            raise ValueError(f"out: expected a folder, {folder} is none")
        source = start
        if config.init_from and not saved:
            source = load_checkpoint(config.init_from)
        self.settings = saved["sparsity"] if saved else config.sparsity_settings()
        check_methods(self.settings)
        with about(self.path if saved else None):
            config.make_algorithm(self.settings)  # mistakes show before any work

        self._load_data(saved or source)
        if saved and saved["data_crc32"] != self.data_crc32:
            raise ValueError(f"data: {config.data} changed since {self.path} was written")
        self.ranks = Ranks(config.parallel, config.device)
        if config.batch % self.ranks.size:
            raise ValueError(f"batch: expected a multiple of {self.ranks.size}, got {config.batch}")

        self._forget()
        self.source: dict | None = None  # what it took to make the weights that this run began with
        self.lengthened_from = 0  # steps that it had when it was finished before
        if saved:
            before = saved["config"]["steps"]
            self.lengthened_from = before if config.steps > before else 0
            self.losses, self.seconds = saved["losses"], saved["seconds"]
            self.evaluations = saved["evaluations"]
            self.flops, self.source = saved["flops"], saved["source"]
            self._build(saved, self.path)
        elif source:
            spent = {"flops": source["flops"], "seconds": sum(source["seconds"])}
            self.source = spent | {"steps": len(source["losses"]), "before": source["source"]}
            self._build(self._start_from(source))
        else:
            model = build_model(config, self.tokenizer.vocab_size)
            self._build({"model": model.state_dict()})

    def restart(self, config: TrainConfig, state: dict) -> None:
        """Begin anew on the same data, with other settings and the weights of `state`."""
        self.config = config
        self._forget()
        self._make_batches()
        self._build({"model": state["model"]})

    def _forget(self) -> None:
        self.losses: list[float] = []  # of each step, before its update
        self.seconds: list[float] = []  # of each step
        self.evaluations: list[dict] = []
        self.flops = 0.0

    def _load_data(self, state: dict | None) -> None:
        config = self.config
        tokenizer = tokenizer_from_state(state["tokenizer"]) if state else None
        self.tokenizer, *self.splits = load_tokens(
            config.data, tokenizer, config.tokenizer, config.vocab_size
        )
        self.tokens = len(self.splits[0])
        self.data_crc32 = zlib.crc32(self.splits[0].numpy())
        self._make_batches()

    def _make_batches(self) -> None:
        shape = self.config.batch, self.config.context
        self.training = Batches(self.splits[0], *shape, self.config.seed)
        # The same windows for every seed, so that their losses compare.
        self.validation = Batches(self.splits[1], *shape, VALIDATION_SEED)

    def _start_from(self, source: dict) -> dict:
        """The state of this run before its first step, from the last of another run."""
        config = self.config
        model = model_from_state(config.model(self.tokenizer.vocab_size), source["model"])
        optimizer = build_optimizer(model, config.lr)
        if config.optimizer_state == "keep":
            load_optimizer(optimizer, source["optimizer"])
        if config.dense:
            densify_(model, optimizer)
        if self.settings is not None:
            if config.optimizer_state == "keep":
                raise ValueError("optimizer_state: keep needs the pattern of init_from, or dense")
            self.settings = from_sparse(model, self.settings, config)
            model = config.make_algorithm(self.settings).apply(model)
            optimizer = build_optimizer(model, config.lr)
        return {"model": model.state_dict(), "optimizer": optimizer.state_dict()}

    def _build(self, state: dict, path: Path | None = None) -> None:
        """Model, optimizer and algorithm from whole tensors, placed as `parallel` says. `path`: the
        file that they are from."""
        config = self.config
        with about(path):
            model = model_from_state(config.model(self.tokenizer.vocab_size), state["model"])
        self.model = model.to(self.ranks.device)
        self.algorithm = config.make_algorithm(self.settings)
        if self.algorithm:
            self.model = self.algorithm.apply(self.model)
        self.is_rebuilt = False
        self.wrapped = self.ranks.wrap(self.model)
        self.optimizer = build_optimizer(self.model, config.lr)
        if "optimizer" in state:
            with about(path):
                load_optimizer(self.optimizer, state["optimizer"])
        if not self.algorithm:
            return
        self.is_rebuilt = config.parallel == "fsdp" and self.algorithm.resizes
        if not self.is_rebuilt:
            self.algorithm.apply(self.optimizer)
        elif not isinstance(self.algorithm, GMP) or getattr(self.algorithm, "rewind", None):
            kind = type(self.algorithm).__name__
            raise NotImplementedError(f"parallel: {kind} changes its size; fsdp cannot, use ddp")
        if "algorithm" in state:
            with about(path):
                self.algorithm.load_state_dict(state["algorithm"])
        check_same_on_all_ranks(self.algorithm.layers)

    @property
    def step(self) -> int:
        """Updates made so far."""
        return len(self.losses)

    @property
    def sparsity(self) -> float:
        return linear_sparsity(self.model)

    def state(self) -> dict:
        """The contents of a checkpoint, in whole tensors. All ranks must call it together."""
        return {
            "config": self.about()["config"],
            "sparsity": self.settings,
            "tokenizer": self.tokenizer.state(),
            "data_crc32": self.data_crc32,
            "model": whole_state(dict(self.model.state_dict())),
            "optimizer": whole_state(self.optimizer.state_dict()),
            "algorithm": self.algorithm.state_dict() if self.algorithm else {},
            "losses": self.losses,
            "seconds": self.seconds,
            "evaluations": self.evaluations,
            "flops": self.flops,
            "source": self.source,
        }

    def save(self) -> None:
        state = self.state()
        if self.ranks.rank == 0:
            save_checkpoint(self.path, state)

    def about(self) -> dict:
        """Metadata of the exported weights: the same, whether the run was resumed or not."""
        config = asdict(replace(self.config, resume=False))
        return {"config": config, "tokenizer": self.tokenizer.state(), "step": self.step}

    def export(self) -> None:
        """The weights alone, for other programs."""
        state = whole_state(dict(self.model.state_dict()))
        if self.ranks.rank == 0 and find_spec("safetensors"):
            model = model_from_state(self.model.config, state)
            save_weights(model, self.path.with_name(WEIGHTS), **self.about())

    def evaluate(self) -> None:
        config = self.config
        loss = evaluate(
            self.model, self.validation, config.eval_batches, self.dtype, self.ranks.device
        )
        if config.parallel == "fsdp":
            self.model.reshard()  # a forward pass alone leaves whole weights, which do not train
        self.check_finite("validation loss", loss)
        seconds = sum(self.seconds)
        self.evaluations.append(
            {"step": self.step, "seconds": seconds, "loss": loss, "sparsity": self.sparsity}
        )

    def compute_gradients(self) -> float:
        for group in self.optimizer.param_groups:
            group["lr"] = learning_rate(self.config, self.step)
        x, y = map(self.ranks.part, self.training.get(self.step))
        loss, norm = compute_gradients(self.wrapped, x, y, self.dtype)
        loss = self.ranks.mean(loss)
        self.check_finite("loss", loss)
        self.check_finite("gradient norm", norm)
        return loss

    def update(self) -> None:
        """The optimizer's step, and with it the algorithm's."""
        config, model = self.config, self.model.config
        before = self.sparsity
        flops = train_flops_per_token(model, before)
        parts = self.algorithm.algorithms if isinstance(self.algorithm, Group) else [self.algorithm]
        if any(isinstance(part, RigL) and part.is_due for part in parts):
            flops += dense_gradient_flops_per_token(model, before)
        self.flops += config.batch * config.context * flops
        self.optimizer.step()
        if self.is_rebuilt:
            self._update_whole()
        elif self.sparsity != before and config.parallel == "ddp":
            self.wrapped = self.ranks.wrap(self.model)  # its buckets have the sizes of before

    def _update_whole(self) -> None:
        """The algorithm's step on whole tensors: FSDP2's shards cannot change their size."""
        due = self.algorithm.is_due
        self.algorithm.steps += 1
        if not due:
            return
        state = self.state()
        model = model_from_state(self.model.config, state["model"])
        algorithm = self.config.make_algorithm(self.settings)
        algorithm.apply(model)
        optimizer = build_optimizer(model, self.config.lr)
        load_optimizer(optimizer, state["optimizer"])
        algorithm.apply(optimizer)
        algorithm.load_state_dict(state["algorithm"])
        algorithm.update_pattern()
        whole = {"model": model.state_dict(), "optimizer": optimizer.state_dict()}
        self._build(whole | {"algorithm": algorithm.state_dict()})

    def check_finite(self, what: str, value: float) -> None:
        if not math.isfinite(value):
            kept = f"{self.path} is the last good one" if self.path.exists() else "none was written"
            raise FloatingPointError(f"{what} is {value} at step {self.step}; checkpoint: {kept}")


class OutOfTime(Exception):
    """A run stopped at its deadline, with a checkpoint to resume from."""


def train(config: TrainConfig, deadline: float = math.inf) -> dict:
    """Train to config.steps -> what metrics.json holds.

    Losses are nats per token; seconds are those of the training steps, without evaluations and
    checkpoints. Raises FloatingPointError when the loss or a gradient is no longer finite, and
    OutOfTime when time.monotonic() passes `deadline` before the last step."""
    if config.threads:
        torch.set_num_threads(config.threads)
    run = Run(config)
    is_first = run.ranks.rank == 0
    if run.ranks.device.type == "cuda":
        torch.cuda.reset_peak_memory_stats()
    if is_first:
        print_plan(run)
        if run.step == config.steps:
            print(f"done   all {run.step} steps were made before; --resume --steps MORE goes on")
    progress = Progress(config.steps, run.step, is_first)
    start = run.step
    while run.step < config.steps:
        began = time.perf_counter()
        loss = run.compute_gradients()
        gradient_s = time.perf_counter() - began
        is_late = time.monotonic() > deadline
        # Saved before the update: these weights have just shown a finite loss and gradient.
        if run.step > start and (is_late or run.step % config.checkpoint_every == 0):
            run.save()
        if is_late:
            raise OutOfTime(f"stopped at step {run.step} of {config.steps}")
        # A run that was finished before has been evaluated there.
        is_new = not run.evaluations or run.evaluations[-1]["step"] < run.step
        if run.step % config.eval_every == 0 and is_new:
            run.evaluate()
            progress.line(evaluation_line(run))
        began = time.perf_counter()
        run.update()
        run.seconds.append(gradient_s + time.perf_counter() - began)
        run.losses.append(loss)
        progress.advance()
    if start < config.steps:
        run.evaluate()
        run.save()
        progress.line(evaluation_line(run))
    run.export()  # also by a resumed run that was finished: a kill may have come before
    progress.close()

    result = _result(run)
    if is_first:
        with atomic_write(run.path.with_name(METRICS)) as file:
            file.write(json.dumps(result, indent=1).encode())
    progress.line(
        f"done   {sum(run.seconds):.1f} s in steps, {1e3 * result['step_s']:.1f} ms each (median), "
        f"{result['tokens_per_s']:,.0f} tokens/s, "
        f"{result['peak_memory_bytes'] / 2**20:.0f} MiB peak memory"
    )
    return result


def _result(run: Run) -> dict:
    config, is_cuda = run.config, run.ranks.device.type == "cuda"
    return {
        "config": run.about()["config"],
        "threads": torch.get_num_threads(),
        "parameters": sum(p.numel() for p in run.model.parameters()),
        "losses": run.losses,
        "seconds": run.seconds,
        "evaluations": run.evaluations,
        "step_s": statistics.median(run.seconds),
        "tokens_per_s": config.batch * config.context * run.step / sum(run.seconds),
        "sparsity": run.sparsity,
        "flops_per_token": train_flops_per_token(run.model.config, run.sparsity),
        "flop_ratio": flop_ratio(run.model.config, run.sparsity),
        "flops": run.flops,
        "source": run.source,
        "vocab_size": run.model.config.vocab_size,
        "peak_memory_bytes": peak_memory_bytes(),
        "peak_gpu_bytes": torch.cuda.max_memory_allocated() if is_cuda else 0,
    }
