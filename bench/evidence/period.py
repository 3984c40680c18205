"""A stretch of time on the GPUs of one machine: what each of them makes next, and what of the time
was lost. Where the files of the machine are lost afterwards, only runs that end before are begun,
and those that leave little of the time over."""

import math
import time
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path

from workers import Job, Pool, Worker

from . import plan
from .arms import MODEL, Task, folder_of, seconds_so_far
from .engine import Shape
from .pace import Pace, best_fit
from .plan import ARMS
from .study import Study

MARGIN_S = 8.0  # of a whole run, which may take longer than the last one like it


class Period:
    def __init__(
        self, study: Study, folder: Path, rows: Mapping[str, int], lost_at: float = math.inf
    ) -> None:
        """`folder`: of the runs' files, which are there until `lost_at`, a time of
        time.monotonic(). `rows`: as of Pace."""
        self._study, self._folder, self._rows, self._lost_at = study, folder, rows, lost_at
        self._captured: set[tuple[str, Shape]] = set()  # on which GPU
        self.spent: Counter[str] = Counter()  # seconds, by what became of the run

    def run(self, pool: Pool) -> None:
        """Make runs until the pool's time is up, and say what the time went to."""
        began = time.monotonic()
        pool.run(self.choose, self.finish)
        now = time.monotonic()
        killed = sum(now - worker.began for worker in pool.workers if worker.job)
        total, whole = (now - began) * len(pool.workers), self.spent["whole"]
        lost = self.spent["lost"] + killed
        self._study.say(
            f"{total:.0f} s of GPUs: {whole:.0f} in whole runs, {lost:.0f} in runs that were "
            f"stopped or failed, {total - whole - lost:.0f} in none"
        )

    def choose(self, gpu: str, under_way: Sequence[Job]) -> Job | None:
        """What a GPU makes next, beside these."""
        made = [Task(**job.settings) for job in under_way]
        # A model to start from is trained once: what needs one that is being trained waits.
        coming = {t for task in made for t in (task, task.start) if t and not self._is_trained(t)}
        free = [t for t in self._study.waiting() if t not in made and t.start not in coming]
        free.sort(key=lambda task: not self._so_far(task))
        pace = Pace(self._study.results.values(), self._rows)
        left = self._lost_at - MARGIN_S - time.monotonic()
        costs = [self.cost(pace, gpu, task) for task in free]
        if free and self._is_of_a_begun_sweep(free[0]) and costs[0] <= left:
            at = 0  # what it decides is waited for
        else:
            at = best_fit(costs, left)
        return None if at is None else Job(free[at].key, "arm", asdict(free[at]))

    def cost(self, pace: Pace, gpu: str, task: Task) -> float:
        """Seconds that are left of a run, with all that must come before it."""
        seconds = max(0.0, pace.seconds(task) - self._so_far(task))
        if (gpu, shape_of(task)) not in self._captured:
            seconds += pace.setup()
        if task.start and not self._is_trained(task.start):
            seconds += pace.pretraining(task.start)
        return seconds

    def finish(self, job: Job, worker: Worker, answer: dict) -> None:
        """As Study.finish."""
        kind = "whole" if "result" in answer else "lost"
        self.spent[kind] += time.monotonic() - worker.began
        self._captured.add((worker.gpu, shape_of(Task(**job.settings))))
        if "failed" in answer:  # the next process captures anew
            self._captured = {c for c in self._captured if c[0] != worker.gpu}
        self._study.finish(job, worker, answer)

    def _is_of_a_begun_sweep(self, task: Task) -> bool:
        return task.seed == plan.SWEEP_SEED and bool(self._study.losses(task.size, task.arm))

    def _is_trained(self, task: Task) -> bool:
        return (folder_of(self._folder, task) / MODEL).exists()

    def _so_far(self, task: Task) -> float:
        return seconds_so_far(folder_of(self._folder, task))


def shape_of(task: Task) -> Shape:
    return ARMS[task.arm].shape(plan.SIZES[task.size])
