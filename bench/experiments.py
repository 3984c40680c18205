"""The sparsity experiments: what sparse pre-training and iterative pruning cost in loss, and save.

    python bench/experiments.py --out RESULTS --work SCRATCH --device cuda --minutes 6.5

One GPT on the Python sources of this machine's packages (held out by package), each arm pre-trained
sparse on the same tokens and fine-tuned dense on Shakespeare; and the dense model pruned. Every
learning rate is the best of the same sweep for each arm.

Runs that do not wait for each other are made at the same time, by several processes on each GPU.
Losses do not depend on that, times do: steps are timed first, on a GPU that does nothing else, and
those are the only times kept. Stop it at any time and call it again: what is done is in
RESULTS/experiments.csv, runs that were stopped go on from their checkpoint in SCRATCH. Where
SCRATCH is lost, a run that others start from is made again when they need it.
"""

import argparse
import json
import math
import os
import platform
import shutil
import sys
import time
import zlib
from collections.abc import Iterator
from dataclasses import replace
from datetime import date
from pathlib import Path

import numpy as np
import torch
from experiments_page import page, plot
from experiments_presets import PRESETS, Preset
from workers import Job, Pool, Worker

from sparsekern import __version__
from sparsekern.bench import records
from sparsekern.bench.machine import git
from sparsekern.bench.runs import add_times, flat, nested
from sparsekern.gpt.data import PREPARED, prepare, tokenizer_from_state
from sparsekern.gpt.train import METRICS

WORKER = Path(__file__).with_name("experiments_worker.py")


class Experiments:
    """The results so far, in OUT, and what can be made from them."""

    def __init__(self, preset: Preset, out: Path, work: Path, device: str, about: dict) -> None:
        self.preset, self.work, self.device, self.about = preset, work, device, about
        self.began = time.monotonic()
        self.path = out / "experiments.csv"
        self.results: dict = nested(records.read(self.path)) if self.path.exists() else {}
        self.failed: dict[str, str] = {}  # key -> why, in this call
        self.results["failed"] = self.failed

    def make(self, gpus: list[str], per_gpu: int, deadline: float) -> str | None:
        """All that is missing -> the key of what comes next when time is up."""
        waiting = next(iter(self.plan()), None)
        if waiting is None or time.monotonic() > deadline:
            return waiting and waiting.key
        command = [sys.executable, str(WORKER), self.device]
        pool = Pool(command, gpus, per_gpu, self.work / "logs", deadline)
        try:
            self.say("data")
            self.data()
            self.say(f"data is there: {self.results['data']}")
            return pool.run(self.ready, self.finish)
        finally:
            pool.close()

    # Bookkeeping

    def ready(self) -> Iterator[Job]:
        return (job for job in self.plan() if job.key not in self.failed)

    def finish(self, job: Job, worker: Worker, answer: dict) -> None:
        """Keep what a worker says of a run, and say it."""
        if "result" in answer:
            about = self.results.setdefault("machine", {"device": worker.device} | self.about)
            if worker.device not in (about["device"], *about.get("also", ())):
                about.setdefault("also", []).append(worker.device)
            # A run that was made again keeps its first result.
            self.results.setdefault(job.key, answer["result"])
            if not job.key.startswith("pretrain"):
                shutil.rmtree(self.folder(job.key), ignore_errors=True)
        elif answer.get("is_final"):
            self.failed[job.key] = answer["failed"]
        self.save()
        seconds = time.monotonic() - worker.began
        place = f"GPU {worker.gpu}" if worker.gpu else "the CPU"
        self.say(f"{job.key}: {outcome(answer)}   {seconds:.1f} s on {place}")
        for line in answer.get("log", ()):
            print(f"    {line}", flush=True)

    def say(self, text: str) -> None:
        print(f"{time.monotonic() - self.began:6.1f} s   {text}", flush=True)

    def save(self) -> None:
        add_times(self.results)
        run = flat(self.results)
        records.write(self.path, run.about, run.records)

    def folder(self, key: str) -> Path:
        return self.work / key.replace(" ", "-")

    def new(self, key: str, kind: str, settings: dict, is_alone: bool = False) -> Iterator[Job]:
        """The run, unless there is a result."""
        if key not in self.results:
            own = {"out": str(self.folder(key)), "device": self.device}
            yield Job(key, kind, settings | own, is_alone)

    def from_source(self, source: str, jobs: list[Job]) -> Iterator[Job]:
        """Runs that begin with the weights of another, as soon as these are there."""
        if not jobs or self.loss(source) is None:
            return
        if (self.folder(source) / METRICS).exists():
            yield from jobs
        else:  # SCRATCH was lost
            config = self.results[source]["config"]
            sparsity = float(source.split()[1])
            settings = self.pretraining(sparsity, config["seed"], config["lr"], config["steps"])
            here = {"out": str(self.folder(source)), "device": self.device}
            yield Job(source, "train", settings | here)

    def loss(self, key: str) -> float | None:
        """None before the run has ended, and where it diverged."""
        return self.results.get(key, {}).get("loss")

    def has_ended(self, key: str) -> bool:
        return key in self.results or key in self.failed

    def best(self, keys: dict[float, str]) -> float | None:
        """The rate whose run ended lowest, once all have ended."""
        if not all(map(self.has_ended, keys.values())):
            return None
        losses = {rate: self.loss(key) for rate, key in keys.items()}
        return min((r for r, x in losses.items() if x is not None), key=losses.get, default=None)

    # The parts

    def plan(self) -> Iterator[Job]:
        """Jobs that can run now and have not, the most valuable first."""
        p, first = self.preset, self.preset.seeds[0]
        yield from self.timing()
        for sparsity in p.arms:
            yield from self.sweep(sparsity)
        for sparsity in p.arms:
            yield from self.pretrain(sparsity, first)
        for sparsity in p.arms:
            yield from self.finetune(sparsity, first)
        yield from self.pruning()
        # Other seeds would slow the first one, which more depends on.
        if all(self.has_ended(f"pretrain {sparsity} seed {first}") for sparsity in p.arms):
            for seed in p.seeds[1:]:
                for sparsity in p.seed_arms:
                    yield from self.pretrain(sparsity, seed)
                    yield from self.finetune(sparsity, seed)

    def data(self) -> None:
        """Encode both texts once, with one tokenizer, in folders of SCRATCH."""
        p, facts = self.preset, {}
        tokenizer = p.tokenizer
        for name, source in (("pretrain", p.pretrain_data), ("finetune", p.finetune_data)):
            folder = self.work / name
            if not (folder / PREPARED[0]).exists():
                prepare(source, tokenizer, folder, p.vocab_size)
            tokenizer = tokenizer_from_state(json.loads((folder / PREPARED[0]).read_text()))
            splits = [np.load(folder / file) for file in PREPARED[1:]]
            facts[name] = {"source": source, "tokens": [len(tokens) for tokens in splits]}
            facts[name]["crc32"] = [zlib.crc32(tokens) for tokens in splits]
        if self.results.setdefault("data", facts) != facts:
            raise ValueError(f"data: not the text of {self.path}; choose another --out")

    def timing(self) -> Iterator[Job]:
        p = self.preset
        runs = {str(s): self.pretraining(s, 0, 1e-4, p.steps) for s in {*p.arms, *p.prune_to}}
        runs["finetune"] = runs["0.0"] | self.tuning(0, 1e-4)
        own = {"out": str(self.folder("times")), "device": self.device}
        runs = {name: settings | own for name, settings in sorted(runs.items())}
        yield from self.new("times", "time", {"runs": runs}, is_alone=True)

    def pretraining(self, sparsity: float, seed: int, lr: float, steps: int) -> dict:
        p = self.preset
        vocabulary = {"vocab_size": p.vocab_size} if p.tokenizer == "bpe" else {}
        return (
            p.model
            | vocabulary
            | {
                "data": str(self.work / "pretrain"),
                "tokenizer": p.tokenizer,
                "sparsity": sparsity,
                "batch": p.batch,
                "steps": steps,
                "lr": lr,
                "seed": seed,
                "dtype": p.dtype,
                "eval_every": max(1, steps // 8) if steps == p.steps else steps,
                "eval_batches": p.eval_batches,
                "checkpoint_every": steps,
            }
        )

    def sweep_keys(self, sparsity: float) -> dict[float, str]:
        return {lr: f"sweep {sparsity} lr {lr}" for lr in self.preset.learning_rates}

    def sweep(self, sparsity: float) -> Iterator[Job]:
        for lr, key in self.sweep_keys(sparsity).items():
            settings = self.pretraining(sparsity, 0, lr, self.preset.sweep_steps)
            yield from self.new(key, "train", settings)

    def pretrain(self, sparsity: float, seed: int) -> Iterator[Job]:
        lr = self.best(self.sweep_keys(sparsity))
        if lr is not None:
            settings = self.pretraining(sparsity, seed, lr, self.preset.steps)
            yield from self.new(f"pretrain {sparsity} seed {seed}", "train", settings)

    def tuning(self, seed: int, lr: float) -> dict:
        p = self.preset
        return {
            "data": str(self.work / "finetune"),
            "batch": p.finetune_batch,
            "steps": p.finetune_steps,
            "lr": lr,
            "seed": seed,
            "dtype": p.dtype,
            "eval_every": max(1, p.finetune_steps // 4),
            "eval_batches": p.eval_batches,
            "checkpoint_every": p.finetune_steps,
        }

    def finetune(self, sparsity: float, seed: int) -> Iterator[Job]:
        """Jobs of the first seed at all rates, of the others at the rate that it found."""
        p, first = self.preset, self.preset.seeds[0]
        rates = p.finetune_rates
        if seed != first:
            keys = {lr: f"finetune {sparsity} seed {first} lr {lr}" for lr in rates}
            best = self.best(keys)
            rates = () if best is None else (best,)
        source = f"pretrain {sparsity} seed {seed}"
        start = {"init_from": str(self.folder(source)), "dense": True}
        jobs = []
        for lr in rates:
            key = f"finetune {sparsity} seed {seed} lr {lr}"
            jobs += self.new(key, "train", start | self.tuning(seed, lr))
        yield from self.from_source(source, jobs)

    def pruning(self) -> Iterator[Job]:
        """The dense model: in rounds, at once with as many steps, at once without any."""
        p, seed = self.preset, self.preset.seeds[0]
        source = f"pretrain 0.0 seed {seed}"
        total = p.prune_steps * len(p.prune_to)
        # What as many more steps do to the model that is not pruned.
        control = self.pretraining(0.0, seed + 1, p.prune_rate, total)
        for name in ("sparsity", *p.model, "tokenizer", "vocab_size"):
            control.pop(name, None)
        control |= {"init_from": str(self.folder(source)), "dense": True}
        jobs = [*self.new("prune control", "train", control | {"eval_every": p.prune_steps})]

        def add(key: str, **given) -> None:
            settings = {"source": str(self.folder(source)), "lr": p.prune_rate} | given
            jobs.extend(self.new(f"prune {key}", "prune", settings))

        add("rounds", targets=",".join(map(str, p.prune_to)), steps=total)
        for i, target in reversed([*enumerate(p.prune_to, 1)]):  # the longest first
            add(f"once {target}", targets=str(target), steps=p.prune_steps * i)
        for method in ("sparsegpt", "wanda", "magnitude"):
            for target in p.prune_to:
                add(f"{method} {target}", targets=str(target), method=method, steps=0)
        yield from self.from_source(source, jobs)


def outcome(answer: dict) -> str:
    """In a few words."""
    result = answer.get("result", {})
    if "rows" in result:
        return "loss " + ", ".join(f"{row['loss']:.4f}" for row in result["rows"])
    if result.get("loss"):
        return f"loss {result['loss']:.4f}"
    if "times" in result:
        return ", ".join(f"{k} {1e3 * v['step_s']:.1f} ms" for k, v in result["times"].items())
    return result.get("diverged") or answer.get("stopped") or f"failed, {answer['failed']}"


def machine(places: str, commit: str) -> dict:
    return {
        "runs at once": places,
        "torch": torch.__version__,
        "python": platform.python_version(),
        "sparsekern": __version__,
        "commit": commit or git("rev-parse", "HEAD") or "unknown",
        "date": date.today().isoformat(),
    }


def visible_gpus() -> list[str]:
    given = os.environ.get("CUDA_VISIBLE_DEVICES")
    found = given.split(",") if given else [str(i) for i in range(torch.cuda.device_count())]
    if not found:
        raise ValueError("device: expected cpu, this torch sees no GPU, got cuda")
    return found


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, required=True, help="small: results, page, plots")
    parser.add_argument("--work", type=Path, required=True, help="large: tokens, checkpoints")
    parser.add_argument("--preset", choices=PRESETS, default="h200")
    for name in ("pretrain", "finetune"):
        parser.add_argument(f"--{name}-data", help="other text than the preset's, as of train")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--gpus", help="as 0,1; all that are visible")
    parser.add_argument("--per-gpu", type=int, help="processes on each (5), or on the CPU (1)")
    parser.add_argument("--minutes", type=float, default=math.inf, help="then stop, resumable")
    parser.add_argument("--commit", default="", help="of the sources, where git does not say it")
    options = parser.parse_args()
    texts = {f"{name}_data": getattr(options, f"{name}_data") for name in ("pretrain", "finetune")}
    preset = replace(PRESETS[options.preset], **{k: v for k, v in texts.items() if v})
    gpus, per_gpu = [""], options.per_gpu or 1
    if options.device == "cuda":
        gpus = options.gpus.split(",") if options.gpus else visible_gpus()
        per_gpu = options.per_gpu or 5
    about = machine(f"{len(gpus)} x {per_gpu}", options.commit)
    experiments = Experiments(preset, options.out, options.work, options.device, about)
    try:
        left = experiments.make(gpus, per_gpu, experiments.began + 60 * options.minutes)
    finally:
        experiments.save()
    pictures: list[str] = []
    try:
        pictures = plot(experiments.results, options.out)
    except ImportError as error:
        print(f"no plot: {error}")
    (options.out / "experiments.md").write_text(page(experiments.results, preset.cap(), pictures))
    if left:
        print(f"out of time: before {left}; call again to continue")
    elif experiments.failed:
        print(f"failed: {', '.join(experiments.failed)}; call again to try anew")
    else:
        print("all done")
    return 3 if left or experiments.failed else 0


if __name__ == "__main__":
    sys.exit(main())
