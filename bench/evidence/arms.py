"""One arm, from its first weights to its last score; what stops it can go on from its files."""

import base64
import hashlib
import itertools
import json
import math
import time
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import torch

from sparsekern.files import atomic_write

from . import build, masks, plan
from .engine import Engine, Program, Shape
from .plan import Arm, Size
from .scores import Scores
from .sweep import finite, one_more

WARM_UP_SHARE = 0.05  # then straight down to zero
CHUNK = 200  # steps between two looks at the clock
CURVE = 20  # points of a loss curve that are kept
DONE, MODEL = "done.json", "pretrained.pt"
TRAINED_ON_FROM = 1000  # the number of the first pass of a model that is trained on


class OutOfTime(Exception):
    """A run stopped at its deadline; called again it goes on."""


class Data:
    """What is trained on in one stream on a device, and rows to score on the host."""

    def __init__(self, corpus: build.Corpus, device: str) -> None:
        self.corpus = corpus
        self.rows = {n: a for n, a in corpus.arrays.items() if not n.endswith(build.TRAINING)}
        self.starts = {}
        training = corpus.arrays[build.TRAINING]
        self.tokens, self.length = len(training), corpus.arrays["code/training"].shape[1]
        parts, at = [training], len(training)
        for task in plan.TASKS:
            rows = corpus.arrays[f"{task}/training"]
            self.starts[task] = at + np.arange(len(rows)) * self.length
            parts.append(rows.ravel())
            at += rows.size
        stream = np.concatenate(parts).view(np.int16)
        self.stream = torch.from_numpy(stream).to(device)

    def size(self, name: str) -> Size:
        """Of the plan, with the vocabulary and context of this text."""
        given = plan.SIZES[name]
        vocab_size = self.corpus.manifest["vocab_size"]
        shapes = (
            replace(shape, vocab_size=vocab_size, context=self.length - 1)
            for shape in (given.shape, given.small)
        )
        return Size(*shapes, given.tokens)

    def pretraining(self, size: Size, arm: Arm, seed: int, rate: float) -> Program:
        """Passes over all of the text in windows, each in another order and with another start;
        other ones where a model is trained on."""
        shape, steps = arm.shape(size), arm.steps(size)
        needed, starts = steps * shape.batch, []
        made = passes(self.tokens, shape.context, seed, TRAINED_ON_FROM if arm.start else 0)
        while sum(map(len, starts)) < needed:
            starts.append(next(made))
        changes = arm.sparsity.changes(steps, seed)
        scale = 1 / arm.sparsity.density(steps) if arm.is_scaled else 1.0
        return program(np.concatenate(starts)[:needed], shape.batch, rate, changes, scale)

    def tuning(self, size: Size, arm: Arm, task: str, seed: int, rate: float) -> Program:
        """Passes over the task's rows."""
        rng = np.random.default_rng((seed, len(task)))
        passes = plan.TASKS[task] * arm.tuning_passes
        starts = np.concatenate([rng.permutation(self.starts[task]) for _ in range(passes)])
        batch = arm.shape(size).batch
        steps = max(1, len(starts) // batch)
        return program(np.resize(starts, steps * batch), batch, rate, {})

    def most_steps(self, size: Size) -> int:
        """Of any program of this size."""
        rows = max(plan.TASKS[task] * len(self.starts[task]) for task in plan.TASKS)
        longest = max(arm.tuning_passes for arm in plan.ARMS.values())
        return max(size.steps, longest * rows // size.shape.batch, 1)


def passes(tokens: int, context: int, seed: int, first: int = 0) -> Iterator[np.ndarray]:
    """Where windows of a stream begin, pass after pass, from this one on: each in another order and
    with another start."""
    for number in itertools.count(first):
        rng = np.random.default_rng((seed, number))
        shift = int(rng.integers(context))
        yield rng.permutation(np.arange(shift, tokens - context - 1, context))


def program(
    starts: np.ndarray, batch: int, rate: float, changes: dict, scale: float = 1.0
) -> Program:
    steps = len(starts) // batch
    return Program(starts.reshape(steps, batch), rates(steps, rate), changes, scale)


def rates(steps: int, highest: float) -> np.ndarray:
    """A linear warm-up, then straight down to zero after the last step."""
    warm = max(1, math.ceil(WARM_UP_SHARE * steps))
    step = np.arange(steps)
    down = (steps - step) / max(1, steps - warm + 1)
    return highest * np.minimum((step + 1) / warm, down)


@dataclass(frozen=True)
class Task:
    """One run of the plan: what a worker is told."""

    size: str
    arm: str
    seed: int
    rate: float
    is_tuned: bool
    start_rate: float = 0.0  # of the arm that it starts from

    @property
    def key(self) -> str:
        """A name of it in the plan, where it has no second rate."""
        is_swept = self.seed == plan.SWEEP_SEED
        return (
            f"{self.size} {self.arm} {f'rate {self.rate:g}' if is_swept else f'seed {self.seed}'}"
        )

    @property
    def start(self) -> "Task | None":
        """What it begins with the weights of: the run of the plan, where that has this seed."""
        arm, is_tuned = plan.ARMS[self.arm].start, self.seed != plan.SWEEP_SEED
        return Task(self.size, arm, self.seed, self.start_rate, is_tuned) if arm else None

    @property
    def recipe(self) -> str:
        """A name of all in the plan that such a run follows, beside what stands here."""
        arm = replace(plan.ARMS[self.arm], title="", rate_of="")
        tuning = (plan.TASKS, plan.FIRST_TUNING_RATES, plan.LEAST_TUNING_RATE)
        patterns = (masks.UPDATE_EVERY, masks.STOP_SHARE, masks.DROP_FRACTION)
        gradual = (masks.GRADUAL_FROM, masks.GRADUAL_TO, masks.GRADUAL_EVERY)
        parts = (plan.SIZES[self.size], arm, WARM_UP_SHARE, patterns, gradual)
        parts += (tuning, plan.MOST_TUNING_RATE) if self.is_tuned else ()
        parts += (arm.start, arm.share, masks.ROUNDS, masks.ROUNDS_TO) if arm.start else ()
        parts += ("scaled",) if arm.is_scaled else ()
        parts += ("normed",) if arm.is_normed else ()
        return hashlib.sha256(repr(parts).encode()).hexdigest()[:12]


class Runner:
    """Runs tasks on one device. Engines stay, one for each shape."""

    def __init__(self, data: Data, folder: Path, dtype: torch.dtype) -> None:
        self.data, self.folder, self._dtype = data, folder / data.corpus.id, dtype
        self._engines: dict[Shape, Engine] = {}

    @property
    def shapes(self) -> int:
        """How many it has captured a step of."""
        return len(self._engines)

    def engine(self, task: Task) -> Engine:
        shape = plan.ARMS[task.arm].shape(self.data.size(task.size))
        if shape not in self._engines:
            most = max(self.data.most_steps(self.data.size(name)) for name in plan.SIZES)
            self._engines[shape] = Engine(shape, self.data.stream, most, self._dtype)
        return self._engines[shape]

    def run(self, task: Task, deadline: float) -> dict:
        """The result of a task; its `setup_s` is what came before: the step was captured, the model
        that it starts from was trained. OutOfTime at the deadline, FloatingPointError where it
        diverged."""
        asked = time.monotonic()
        self.engine(task)
        if task.start:
            self._pretrained(task.start, deadline)
        began, folder = time.monotonic(), self._folder(task)
        done = _read(folder / DONE)
        try:
            done |= self._pretrained(task, deadline)
            if task.is_tuned:
                self._tune(task, folder, done, deadline)
        finally:
            done["seconds"] = done.get("seconds", 0.0) + time.monotonic() - began
            _write(folder / DONE, done)
        return done | {"setup_s": began - asked}

    def _folder(self, task: Task) -> Path:
        folder = folder_of(self.folder, task)
        folder.mkdir(parents=True, exist_ok=True)
        return folder

    # Before

    def _pretrained(self, task: Task, deadline: float) -> dict:
        """What is known of a run whose model is trained, or has been."""
        folder = self._folder(task)
        done = _read(folder / DONE)
        if "pretrained" not in done:
            done["pretrained"] = self._pretrain(task, folder, deadline)
            _write(folder / DONE, done)
        return done

    def _pretrain(self, task: Task, folder: Path, deadline: float) -> dict:
        size, arm = self.data.size(task.size), plan.ARMS[task.arm]
        engine, path = self.engine(task), folder / "state.pt"
        began = time.monotonic()
        if arm.is_scratch:
            nothing = Program(np.empty((0, 1)), np.empty(0), {})
            engine.begin(arm.shape(size).weights(task.seed), masks.dense(engine.weights), nothing)
        else:
            made = self.data.pretraining(size, arm, task.seed, task.rate)
            if path.exists():
                engine.resume(torch.load(path, map_location="cpu"), made)
            else:
                weights = self._first_weights(task)
                linear = {name: weights[f"{name}.weight"] for name in engine.weights}
                for weight in linear.values():
                    weight *= made.scale**0.5
                engine.begin(weights, arm.sparsity.first(linear, task.seed), made)
            first = engine.steps
            while not engine.is_done:
                engine.run(engine.steps + CHUNK)
                losses = engine.losses()  # waits for the GPU
                if not math.isfinite(losses[-1]):
                    raise FloatingPointError(f"loss is {losses[-1]} at step {engine.steps}")
                if time.monotonic() > deadline and not engine.is_done:
                    _save(path, engine.state())
                    raise OutOfTime(f"stopped at step {engine.steps} of {made.steps}")
            step_s = (time.monotonic() - began) / max(1, engine.steps - first)
        found = self._scores(engine) | {"density": engine.density(), "flops": arm.flops(size)}
        if not arm.is_scratch:
            tokens = engine.steps * engine.shape.tokens
            found |= {
                "steps": engine.steps,
                "tokens": tokens,
                "passes": tokens / self.data.tokens,
                "step_s": step_s,
                "curve": curve(losses),
            }
        found["parameters"] = sum(p.numel() for p in engine.model.parameters())
        if task.is_tuned or any(other.start == task.arm for other in plan.ARMS.values()):
            last = {name: mask.bool() for name, mask in engine.masks.items()}
            _save(folder / MODEL, {"model": engine.copy(), "masks": last})
        path.unlink(missing_ok=True)
        return found

    def _first_weights(self, task: Task) -> dict[str, torch.Tensor]:
        """On the host."""
        if task.start:
            return torch.load(self._folder(task.start) / MODEL, map_location="cpu")["model"]
        return plan.ARMS[task.arm].shape(self.data.size(task.size)).weights(task.seed)

    def _scores(self, engine: Engine) -> dict:
        """Held-out text by domain, every other row to choose rates by, and what is asked without
        fine-tuning."""
        domains = {n: r for n, r in self.data.rows.items() if n.startswith("held-out/")}
        dev = Scores.together([engine.score(rows[::2]) for rows in domains.values()])
        scores = {n.partition("/")[2]: engine.score(rows[1::2]) for n, rows in domains.items()}
        cloze, pairs = engine.score(self.data.rows["cloze"]), engine.score(self.data.rows["blimp"])
        is_right = pairs.nats[::2] < pairs.nats[1::2]
        return {
            "dev": dev.loss,
            "held-out": Scores.together(list(scores.values())).loss,
            "domains": {name: found.loss for name, found in scores.items()},
            "cloze": items(cloze.right),
            "cloze_loss": cloze.loss,
            "blimp": {"percent": 100 * float(is_right.mean()), "count": len(is_right)},
        }

    # After

    def _tune(self, task: Task, folder: Path, done: dict, deadline: float) -> None:
        saved = torch.load(folder / MODEL, map_location="cpu")
        ways = ["dense", "sparse"] if plan.ARMS[task.arm].is_tuned_sparse else ["dense"]
        tuned = done.setdefault("tuned", {})
        for way in ways:
            for name in plan.TASKS:
                found = tuned.setdefault(f"{name} {way}", {"dev": {}})
                while (rate := _next_tuning_rate(found["dev"])) is not None:
                    if time.monotonic() > deadline:
                        raise OutOfTime(f"stopped before {name}, {way}, at {rate:g}")
                    self._tune_once(task, name, way, rate, saved, found)
                    _write(folder / DONE, done)

    def _tune_once(
        self, task: Task, name: str, way: str, rate: float, saved: dict, found: dict
    ) -> None:
        """Fine-tune at one rate; where it is the best so far on dev, score test too."""
        size, arm, engine = self.data.size(task.size), plan.ARMS[task.arm], self.engine(task)
        first = saved["masks"] if way == "sparse" else masks.dense(engine.weights)
        made = self.data.tuning(size, arm, name, task.seed, rate)
        engine.begin(saved["model"], first, made)
        engine.run(made.steps)
        dev = engine.score(self.data.rows[f"{name}/dev"])
        loss = -float(dev.right.mean()) if name == "sentiment" else dev.loss
        before = min((x for x in found["dev"].values() if x is not None), default=math.inf)
        found["dev"][f"{rate:g}"] = loss if math.isfinite(loss) else None
        if loss < before:
            test = engine.score(self.data.rows[f"{name}/test"])
            found |= {"rate": rate, "loss": test.loss, "steps": made.steps}
            if name == "sentiment":
                found["items"] = items(test.right)


def _next_tuning_rate(dev: dict[str, float | None]) -> float | None:
    losses = {float(r): finite(loss) for r, loss in dev.items()}
    bounds = plan.LEAST_TUNING_RATE, plan.MOST_TUNING_RATE
    return one_more(plan.FIRST_TUNING_RATES, losses, *bounds)


def folder_of(runs: Path, task: Task) -> Path:
    """Of a run's files: what is known, a checkpoint of what was stopped, the trained model."""
    name = f"{task.key} rate {task.rate:g} {'tuned' if task.is_tuned else 'trained'} {task.recipe}"
    if task.start:
        name += f" from {task.start.recipe} rate {task.start_rate:g}"
    return runs / name.replace(" ", "-")


def seconds_so_far(folder: Path) -> float:
    """Of a run that was stopped."""
    return _read(folder / DONE).get("seconds", 0.0)


def items(right: np.ndarray) -> dict:
    """The share that is right, in percent, and each of them as a bit."""
    packed = base64.b64encode(np.packbits(right)).decode()
    return {"percent": 100 * float(right.mean()), "count": len(right), "bits": packed}


def unpacked(found: dict) -> np.ndarray:
    """The items of a score as bool [count]."""
    packed = np.frombuffer(base64.b64decode(found["bits"]), np.uint8)
    return np.unpackbits(packed)[: found["count"]].astype(bool)


def curve(losses: list[float]) -> list[float]:
    """Means of CURVE stretches of the losses."""
    return [round(float(part.mean()), 4) for part in np.array_split(losses, CURVE) if len(part)]


def _read(path: Path) -> dict:
    return json.loads(path.read_text()) if path.exists() else {}


def _write(path: Path, content: dict) -> None:
    with atomic_write(path) as file:
        file.write(json.dumps(content).encode())


def _save(path: Path, state: dict[str, object]) -> None:
    with atomic_write(path) as file:
        torch.save(state, file)
