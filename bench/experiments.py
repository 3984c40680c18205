"""The sparsity experiments: what sparse pre-training and iterative pruning cost in loss, and save.

    python bench/experiments.py --out RESULTS --work SCRATCH --device cuda --minutes 9

One GPT on the Python sources of this machine's packages (held out by package), each arm pre-trained
sparse on the same tokens and fine-tuned dense on Shakespeare; and the dense model pruned. Every
learning rate is the best of the same sweep for each arm. Stop it at any time and call it again:
what is done is in RESULTS/experiments.json, runs that were stopped go on from their checkpoint in
SCRATCH. Where SCRATCH is lost, a run that others start from is made again when they need it.
"""

import argparse
import json
import math
import platform
import shutil
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from datetime import date
from pathlib import Path

import torch
from experiments_page import page, plot

from sparsekern import __version__
from sparsekern.bench.machine import processor
from sparsekern.gpt.checkpoint import CHECKPOINT, atomic_write, load_checkpoint
from sparsekern.gpt.config import TrainConfig, config_from, resumed_config
from sparsekern.gpt.data import PREPARED, prepare, tokenizer_from_state
from sparsekern.gpt.flops import amdahl_cap, multiply_adds
from sparsekern.gpt.prune import PruneConfig, prune
from sparsekern.gpt.train import OutOfTime, train

REPOSITORY = Path(__file__).parents[1]


@dataclass(frozen=True)
class Preset:
    """What is trained, on what, for how long."""

    pretrain_data: str
    finetune_data: str
    tokenizer: str
    model: dict
    batch: int
    steps: int  # of pre-training
    sweep_steps: int
    finetune_steps: int
    finetune_batch: int
    prune_steps: int  # of recovery, each round
    learning_rates: tuple[float, ...]
    finetune_rates: tuple[float, ...]
    prune_rate: float
    arms: tuple[float, ...] = (0.0, 0.75, 0.5, 0.9)
    prune_to: tuple[float, ...] = (0.5, 0.75, 0.838, 0.9)
    seeds: tuple[int, ...] = (0, 1, 2)
    seed_arms: tuple[float, ...] = (0.0, 0.75)
    eval_batches: int = 16
    dtype: str = "bfloat16"
    vocab_size: int = 8192

    def cap(self) -> float:
        """How much training FLOPs would fall with the linear layers free."""
        vocab_size = 256 if self.tokenizer == "bytes" else self.vocab_size
        macs = multiply_adds(TrainConfig(**self.model).model(vocab_size))
        return amdahl_cap(macs.linear / macs.total)


PRESETS = {
    # 29.6M parameters, 25.2M of them in the blocks' linear layers; 39.3M tokens of pre-training.
    "h200": Preset(
        "packages",
        "shakespeare",
        "bpe",
        {"layers": 8, "heads": 8, "width": 512, "context": 512},
        batch=64,
        steps=1200,
        sweep_steps=200,
        finetune_steps=300,
        finetune_batch=16,
        prune_steps=100,
        learning_rates=(3e-4, 6e-4, 1.2e-3, 2.4e-3, 4.8e-3, 9.6e-3),
        finetune_rates=(1e-4, 3e-4, 1e-3),
        prune_rate=3e-4,
    ),
    # A minute on two cores: that everything runs, not that anything is learned.
    "smoke": Preset(
        str(REPOSITORY / "sparsekern"),
        str(REPOSITORY / "tests"),
        "bytes",
        {"layers": 1, "heads": 2, "width": 32, "context": 16},
        batch=4,
        steps=8,
        sweep_steps=4,
        finetune_steps=4,
        finetune_batch=4,
        prune_steps=2,
        learning_rates=(1e-3, 3e-3),
        finetune_rates=(1e-3,),
        prune_rate=1e-3,
        arms=(0.0, 0.75),
        prune_to=(0.5, 0.9),
        seeds=(0, 1),
        eval_batches=1,
        dtype="float32",
    ),
}


@dataclass
class Experiments:
    preset: Preset
    out: Path
    work: Path
    device: str
    deadline: float = math.inf
    results: dict = field(default_factory=dict)

    def __post_init__(self) -> None:
        self.path = self.out / "experiments.json"
        if self.path.exists():
            self.results = json.loads(self.path.read_text())

    # Bookkeeping

    def once(self, key: str, work: Callable[[], dict]) -> dict:
        """The result of `work`, of now or of an earlier call."""
        if key not in self.results:
            if time.monotonic() > self.deadline:
                raise OutOfTime(f"before {key}")
            began = time.perf_counter()
            print(f"\n== {key}", flush=True)
            result = work()
            self.results[key] = result | {"wall_s": time.perf_counter() - began}
            self.save()
        return self.results[key]

    def save(self) -> None:
        with atomic_write(self.path) as file:
            file.write(json.dumps(self.results, indent=1).encode())

    def train(self, key: str, settings: dict) -> dict:
        """One training run in SCRATCH/key, resumed where it was stopped."""
        folder = self.work / key.replace(" ", "-")
        if (folder / CHECKPOINT).exists():
            config = resumed_config({"out": str(folder), "device": self.device})
        else:
            config = config_from(settings | {"out": str(folder), "device": self.device})
        metrics = train(config, self.deadline)
        names = ("config", "parameters", "evaluations", "step_s", "tokens_per_s", "sparsity")
        names += ("flops", "flop_ratio", "source", "peak_memory_bytes", "peak_gpu_bytes")
        return {name: metrics[name] for name in names} | {
            "loss": metrics["evaluations"][-1]["loss"],
            "steps_s": sum(metrics["seconds"]),
        }

    def folder(self, key: str, settings: dict) -> Path:
        """Where the finished run `key` lies; it is made again if SCRATCH was lost."""
        folder = self.work / key.replace(" ", "-")
        done = folder / CHECKPOINT
        if not done.exists() or len(load_checkpoint(done)["losses"]) < settings["steps"]:
            print(f"\n== {key}, again: its checkpoint is gone", flush=True)
            self.train(key, settings)
        return folder

    # The parts

    def data(self, name: str) -> str:
        """Encode both texts once, with one tokenizer: a folder in SCRATCH."""
        p, folders = self.preset, {n: self.work / n for n in ("pretrain", "finetune")}
        for which, source in (("pretrain", p.pretrain_data), ("finetune", p.finetune_data)):
            if (folders[which] / PREPARED[0]).exists():
                continue
            tokenizer = p.tokenizer
            if which == "finetune":
                state = json.loads((folders["pretrain"] / PREPARED[0]).read_text())
                tokenizer = tokenizer_from_state(state)
            prepare(source, tokenizer, folders[which], p.vocab_size)
        return str(folders[name])

    def pretraining(self, sparsity: float, seed: int, lr: float, steps: int) -> dict:
        p = self.preset
        return p.model | {
            "data": self.data("pretrain"),
            "tokenizer": p.tokenizer,
            "vocab_size": p.vocab_size,
            "sparsity": sparsity,
            "batch": p.batch,
            "steps": steps,
            "lr": lr,
            "seed": seed,
            "dtype": p.dtype,
            "eval_every": max(1, steps // 8),
            "eval_batches": p.eval_batches,
            "checkpoint_every": max(1, steps // 8),
        }

    def best_rate(self, sparsity: float) -> float:
        """The learning rate whose short run ends lowest."""
        p = self.preset
        losses = {}
        for lr in p.learning_rates:
            key = f"sweep {sparsity} lr {lr}"
            settings = self.pretraining(sparsity, 0, lr, p.sweep_steps)
            losses[lr] = self.once(key, lambda k=key, s=settings: self.train(k, s))["loss"]
            shutil.rmtree(self.work / key.replace(" ", "-"), ignore_errors=True)
        return min(losses, key=losses.get)

    def arm(self, sparsity: float, seed: int) -> None:
        """Sparse pre-training, then dense fine-tuning."""
        p = self.preset
        settings = self.pretraining(sparsity, seed, self.best_rate(sparsity), p.steps)
        key = f"pretrain {sparsity} seed {seed}"
        self.once(key, lambda: self.train(key, settings))
        # Other seeds take the rate that the first one found.
        rates = p.finetune_rates if seed == p.seeds[0] else (self.best_finetune_rate(sparsity),)
        for lr in rates:
            tuned = f"finetune {sparsity} seed {seed} lr {lr}"
            self.once(tuned, lambda k=tuned, r=lr: self.finetune(k, key, settings, seed, r))
            shutil.rmtree(self.work / tuned.replace(" ", "-"), ignore_errors=True)
        # Checkpoints are large, and pruning alone needs one after this.
        if sparsity or seed != p.seeds[0]:
            shutil.rmtree(self.work / key.replace(" ", "-"), ignore_errors=True)

    def finetune(self, key: str, source: str, settings: dict, seed: int, lr: float) -> dict:
        p = self.preset
        return self.train(
            key,
            {
                "init_from": str(self.folder(source, settings)),
                "dense": True,
                "data": self.data("finetune"),
                "batch": p.finetune_batch,
                "steps": p.finetune_steps,
                "lr": lr,
                "seed": seed,
                "dtype": p.dtype,
                "eval_every": max(1, p.finetune_steps // 4),
                "eval_batches": p.eval_batches,
                "checkpoint_every": p.finetune_steps,
            },
        )

    def best_finetune_rate(self, sparsity: float) -> float:
        p = self.preset
        seed = p.seeds[0]
        return min(
            p.finetune_rates,
            key=lambda lr: self.results[f"finetune {sparsity} seed {seed} lr {lr}"]["loss"],
        )

    def pruning(self) -> None:
        """The dense model: in rounds, at once with as many steps, at once without any."""
        p, seed = self.preset, self.preset.seeds[0]
        settings = self.pretraining(0.0, seed, self.best_rate(0.0), p.steps)
        source = f"pretrain 0.0 seed {seed}"

        def pruned(key: str, **given) -> dict:
            config = PruneConfig(
                source=str(self.folder(source, settings)),
                out=str(self.work / key.replace(" ", "-")),
                lr=p.prune_rate,
                device=self.device,
                **given,
            )
            rows = prune(config)
            shutil.rmtree(config.out, ignore_errors=True)
            return {"rows": rows}

        # What as many more steps do to the model that is not pruned.
        total = p.prune_steps * len(p.prune_to)
        key = "prune control"
        control = settings | {"steps": total, "lr": p.prune_rate, "seed": seed + 1}
        for name in ("sparsity", *p.model, "tokenizer", "vocab_size"):
            control.pop(name)
        control |= {"eval_every": p.prune_steps, "checkpoint_every": total}
        self.once(
            key,
            lambda: self.train(
                key, control | {"init_from": str(self.folder(source, settings)), "dense": True}
            ),
        )
        targets = ",".join(map(str, p.prune_to))
        self.once("prune rounds", lambda: pruned("prune rounds", targets=targets, steps=total))
        for method in ("magnitude", "wanda", "sparsegpt"):
            for target in p.prune_to:
                key = f"prune {method} {target}"
                given = {"targets": str(target), "method": method, "steps": 0}
                self.once(key, lambda k=key, g=given: pruned(k, **g))
        for i, target in enumerate(p.prune_to):
            key, steps = f"prune once {target}", p.prune_steps * (i + 1)
            given = {"targets": str(target), "steps": steps}
            self.once(key, lambda k=key, g=given: pruned(k, **g))

    def run(self) -> None:
        p = self.preset
        if "machine" not in self.results:
            self.results["machine"] = machine(self.device)
        for sparsity in p.arms:
            self.best_rate(sparsity)
        # The runs that others start from come right before these.
        for sparsity in p.arms:
            self.arm(sparsity, p.seeds[0])
            if sparsity == 0.0:
                self.pruning()
        for seed in p.seeds[1:]:
            for sparsity in p.seed_arms:
                self.arm(sparsity, seed)


def machine(device: str) -> dict:
    commit = subprocess.run(
        ["git", "-C", REPOSITORY, "rev-parse", "HEAD"], capture_output=True, text=True
    )
    return {
        "device": torch.cuda.get_device_name() if device == "cuda" else processor(),
        "torch": torch.__version__,
        "python": platform.python_version(),
        "sparsekern": __version__,
        "commit": commit.stdout.strip() or "unknown",
        "date": date.today().isoformat(),
    }


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, required=True, help="small: results, page, plot")
    parser.add_argument("--work", type=Path, required=True, help="large: tokens, checkpoints")
    parser.add_argument("--preset", choices=PRESETS, default="h200")
    for name in ("pretrain", "finetune"):
        parser.add_argument(f"--{name}-data", help="other text than the preset's, as of train")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--minutes", type=float, default=math.inf, help="then stop, resumable")
    options = parser.parse_args()
    deadline = time.monotonic() + 60 * options.minutes
    texts = {f"{name}_data": getattr(options, f"{name}_data") for name in ("pretrain", "finetune")}
    preset = replace(PRESETS[options.preset], **{k: v for k, v in texts.items() if v})
    all_of_it = Experiments(preset, options.out, options.work, options.device, deadline)
    code = 0
    try:
        all_of_it.run()
        print("\nall done")
    except OutOfTime as stopped:
        print(f"\nout of time: {stopped}; call again to continue")
        code = 3
    all_of_it.save()
    (options.out / "experiments.md").write_text(page(all_of_it.results, preset.cap()))
    try:
        plot(all_of_it.results, options.out / "experiments.png")
    except ImportError as error:
        print(f"no plot: {error}")
    return code


if __name__ == "__main__":
    sys.exit(main())
