"""Dense against 75 % zeros for the same minutes on a CPU, where the sparse kernels are faster.

Sparse weights are trained by sparsekern's own kernels, dense ones by torch. Both see their text in
the same order, as far as they come; the schedule follows the clock. The arms run at the same time,
each on one core, and change cores from run to run. First each has its rate swept, by runs of these
minutes too, since shorter ones favour rates that are too high for them; then both are trained at
their best ones, seed by seed.
"""

import json
import math
import os
import time
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np
import torch
from workers import Job, Worker

from sparsekern.bench.machine import processor
from sparsekern.files import atomic_write
from sparsekern.gpt.build import build_optimizer
from sparsekern.gpt.model import GPT
from sparsekern.gpt.step import compute_gradients
from sparsekern.sparsity import Static

from . import build, study, worker
from .arms import CURVE, WARM_UP_SHARE, curve
from .engine import Shape
from .plan import SWEEP_SEED
from .rows import IDS
from .scores import Scores, score
from .sweep import best, beyond_the_end, finite, rounded

SHAPE = Shape(4, 256, 4, batch=4)
ARMS = {"dense": 0.0, "75": 0.75}
RATES, TRIED = (1e-3, 2e-3, 4e-3), 4  # the first ones to try, and how many at least
DEV_ROWS, HELD_OUT_ROWS = slice(0, None, 16), slice(1, None, 8)  # that a core scores in a minute
KEY = ("arm", "seed", "rate", "minutes", "threads", "corpus")
NEEDED = {*KEY, "dev", "held-out", "tokens", "tokens_per_s"} | study.ABOUT
# 75 % less dense, nats a token of held-out text, written down after a rough probe of both: a step
# takes about 0.7 of the time, so half a doubling more of tokens, each doubling 0.3 to 0.4 at less
# than one token a parameter, where zeros cost little yet.
PREDICTED, MARGIN = (-0.20, 0.0), 0.02


# A run


def run(corpus: build.Corpus, arm: str, minutes: float, rate: float, seed: int) -> dict:
    """Train for so many minutes, then score held-out text: some rows for the choice of a rate
    (dev), others to report."""
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
        "dev": scored(corpus, model, DEV_ROWS),
        "held-out": scored(corpus, model, HELD_OUT_ROWS) if seed != SWEEP_SEED else None,
        "curve": curve(losses) if len(losses) >= CURVE else losses,
        "threads": torch.get_num_threads(),
        "corpus": corpus.id,
    }


def scored(corpus: build.Corpus, model: GPT, rows: slice) -> float | None:
    """Nats a token of these rows of each domain of held-out text; None where it is not finite."""
    held_out = [found for name, found in corpus.arrays.items() if name.startswith("held-out/")]
    loss = Scores.together([score(model, found[rows], torch.float32) for found in held_out]).loss
    return round(loss, 5) if math.isfinite(loss) else None


def windows(stream: np.ndarray, context: int, batch: int, seed: int) -> Iterator[torch.Tensor]:
    """int64 [batch, context + 1], pass after pass."""
    rng = np.random.default_rng(seed)
    while True:
        starts = rng.permutation(np.arange(0, len(stream) - context - 1, context))
        for i in range(0, len(starts) - batch + 1, batch):
            rows = stream[starts[i : i + batch, None] + np.arange(context + 1)]
            yield torch.from_numpy((rows & IDS).astype(np.int64))


def serve(data: Path) -> None:
    """A process that makes the runs that it is told to, each with one thread on the core named."""
    messages, reply = worker.listen()
    corpus = build.load(data)
    torch.set_num_threads(1)
    reply({"device": processor()})
    while True:
        message = messages.get()
        settings = dict(message["settings"])
        os.sched_setaffinity(0, {settings.pop("core")})
        reply({"result": run(corpus, **settings)})


# All of them


class Turns:
    """The runs that are done, in a file, and those that come next on two cores."""

    def __init__(
        self,
        path: Path,
        corpus: str,
        cores: Sequence[int],
        minutes: float,
        seeds: Sequence[int],
        about: dict,
    ) -> None:
        """`minutes`: of each run. ValueError where the file has runs of another text or of other
        minutes."""
        self.path, self.about, self.cores = path, about, cores
        self.minutes, self.seeds = minutes, seeds
        results = read(path)
        for result in results:
            expect("data", result["corpus"], corpus, path)
            expect("minutes", result["minutes"], minutes, path)
        self.results = paired(results)

    def coming(self) -> list[dict]:
        """Runs to be made at the same time, at most one of each arm; none where all are done."""
        tried = {arm: losses(self.results, arm) for arm in ARMS}
        for rate in RATES:
            if lacking := [arm for arm in ARMS if rate not in tried[arm]]:
                return [self._settings(arm, rate, SWEEP_SEED) for arm in lacking]
        least, most = min(map(len, tried.values())), max(map(len, tried.values()))
        if least < max(most, TRIED) or any(is_at_end(found) for found in tried.values()):
            arms = [arm for arm in ARMS if len(tried[arm]) == least]
            return [self._settings(arm, next_rate(tried[arm]), SWEEP_SEED) for arm in arms]
        done = {(r["arm"], r["seed"]) for r in self.results}
        for seed in self.seeds:
            if lacking := [arm for arm in ARMS if (arm, seed) not in done]:
                rates = {arm: best(tried[arm]) for arm in lacking}
                return [self._settings(arm, rates[arm], seed) for arm in lacking]
        return []

    def _settings(self, arm: str, rate: float, seed: int) -> dict:
        made = sum(r["arm"] == arm for r in self.results)
        core = self.cores[([*ARMS].index(arm) + made) % len(self.cores)]
        return {"arm": arm, "minutes": self.minutes, "rate": rate, "seed": seed, "core": core}

    def choose(self, core: str, under_way: Sequence[Job]) -> Job | None:
        """What a core makes next. It waits for the other one."""
        taken = {job.key for job in under_way}
        for settings in self.coming():
            name = f"{settings['arm']}, rate {settings['rate']:g}, seed {settings['seed']}"
            if str(settings["core"]) == core and name not in taken:
                return Job(name, "clock", settings)
        return None

    def finish(self, job: Job, worker: Worker, answer: dict) -> None:
        """RuntimeError where a run fails again."""
        if "result" not in answer:
            if answer["is_final"]:
                raise RuntimeError(f"{job.key}: {answer['failed']}: {answer.get('log')}")
            return
        found = answer["result"] | self.about | {"device": worker.device}
        found |= {"core": job.settings["core"], "load": round(os.getloadavg()[0], 2)}
        self.results.append(found)
        keep(self.path, found)
        told = f"dev {found['dev']}, held-out {found['held-out']}"
        print(f"{job.key}: {told}, {found['tokens_per_s']:,.0f} tokens/s", flush=True)


def expect(name: str, earlier: object, given: object, path: Path) -> None:
    if earlier != given:
        raise ValueError(f"{name}: expected {earlier}, as the runs in {path}, got {given}")


def paired(results: Sequence[dict]) -> list[dict]:
    """Without a last run of an arm that the other one has none beside: it was stopped, and both are
    made again, so that both have a neighbour."""
    of = [[r for r in results if r["arm"] == arm] for arm in ARMS]
    return [r for runs in of for r in runs[: min(map(len, of))]]


def losses(results: Iterable[dict], arm: str) -> dict[float, float]:
    """Rate -> loss on dev of the sweep so far."""
    return {
        r["rate"]: finite(r["dev"]) for r in results if (r["arm"], r["seed"]) == (arm, SWEEP_SEED)
    }


def is_at_end(tried: dict[float, float]) -> bool:
    return beyond_the_end(tried, 2.0) is not None


def next_rate(tried: dict[float, float]) -> float:
    """Beyond the end where the best one is the last, else beside the best one."""
    if (beyond := beyond_the_end(tried, 2.0)) is not None:
        return beyond
    found, factor = best(tried), math.sqrt(2)
    while True:
        for rate in (rounded(found * factor), rounded(found / factor)):
            if rate not in tried:
                return rate
        factor = math.sqrt(factor)


def key(result: dict) -> tuple:
    return tuple(result[name] for name in KEY)


def read(path: Path) -> list[dict]:
    """Nothing where there is no file. ValueError names a line that is none of `keep`."""
    return study.kept(path, NEEDED)


def keep(path: Path, result: dict) -> None:
    """Add a result; the last one of its kind stays."""
    kept = [other for other in read(path) if key(other) != key(result)]
    lines = "".join(json.dumps(one) + "\n" for one in [*kept, result])
    with atomic_write(path) as file:
        file.write(lines.encode())
