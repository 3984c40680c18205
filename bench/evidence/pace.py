"""How long runs take, judged by those that are done, and which one to begin so that little of the
time is left over: a run that is cut off at the end of a period is lost with its machine."""

import math
import statistics
from collections.abc import Iterable, Mapping, Sequence

from sparsekern.gpt.flops import train_flops_per_token

from . import plan
from .arms import Task
from .engine import Shape
from .plan import ARMS, SIZES

LAST = 5  # runs whose median counts: the step has become faster
TUNING_RATES = 3.5  # tried in the mean
MORE_THAN_STEPS = 1.08  # seconds of a run, times those of its steps: scores
SETUP_S = 40.0  # to capture a step, until one has told
SLACK_S = 5.0  # left over for the sake of the order of the plan


class Pace:
    def __init__(self, results: Iterable[dict], rows: Mapping[str, int]) -> None:
        """`rows`: of each task, to train on."""
        self._done = [r for r in results if "pretrained" in r and "seconds" in r]
        self._rows = rows

    def seconds(self, task: Task) -> float:
        """Of a run without what comes before it; 0 where nothing is known."""
        same = [
            r["seconds"]
            for r in self._done
            if (r["size"], r["arm"], r["is_tuned"]) == (task.size, task.arm, task.is_tuned)
        ]
        return statistics.median(same[-LAST:]) if same else self._by_steps(task)

    def pretraining(self, task: Task) -> float:
        """Of the first part of a run."""
        return self.seconds(Task(task.size, task.arm, plan.SWEEP_SEED, task.rate, False))

    def setup(self) -> float:
        """To capture a step, as the last one told."""
        told = [r["setup_s"] for r in self._done if r.get("setup_s", 0) > 1 and not is_started(r)]
        return told[-1] if told else SETUP_S

    def _by_steps(self, task: Task) -> float:
        arm, size = ARMS[task.arm], SIZES[task.size]
        steps = float(arm.steps(size))
        if task.is_tuned:
            ways = 1 + arm.is_tuned_sparse
            for name, passes in plan.TASKS.items():
                of_one = self._rows.get(name, 0) * passes * arm.tuning_passes / size.shape.batch
                steps += of_one * ways * TUNING_RATES
        return MORE_THAN_STEPS * steps * self._step(arm.shape(size))

    def _step(self, shape: Shape) -> float:
        """Seconds of a step of this shape; where none is known as its FLOPs say, from others."""
        known: dict[Shape, list[float]] = {}
        for r in self._done:
            if "step_s" in r["pretrained"] and r["arm"] in ARMS and r["size"] in SIZES:
                of = ARMS[r["arm"]].shape(SIZES[r["size"]])
                known.setdefault(of, []).append(r["pretrained"]["step_s"])
        if shape in known:
            return statistics.median(known[shape][-LAST:])
        found = [statistics.median(s[-LAST:]) * flops(shape) / flops(of) for of, s in known.items()]
        return statistics.median(found) if found else 0.0


def is_started(result: dict) -> bool:
    return result["arm"] in ARMS and bool(ARMS[result["arm"]].start)


def flops(shape: Shape) -> float:
    """Of a step."""
    return shape.tokens * train_flops_per_token(shape.config())


def best_fit(costs: Sequence[float], left: float) -> int | None:
    """Which of these runs, in seconds, the most wanted first, to begin with `left` seconds to go on
    this GPU: the first one after which the others fill the rest within SLACK_S as well as after
    any. None where none would end in time."""
    if not math.isfinite(left):
        return 0 if costs else None
    whole = [math.ceil(cost) for cost in costs]
    wasted: dict[int, int] = {}
    for i, cost in enumerate(whole):
        room = int(left) - cost
        if room < 0:
            continue
        # Bit n: some of the others take n seconds together.
        sums, within = 1, (1 << room + 1) - 1
        for j, other in enumerate(whole):
            if j != i and other <= room:
                sums |= (sums << other) & within
        wasted[i] = room + 1 - sums.bit_length()
    least = min(wasted.values(), default=0)
    return next((i for i, seconds in wasted.items() if seconds <= least + SLACK_S), None)
