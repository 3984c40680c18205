"""Which runs of the plan are done, which can be made now, and what is kept of them.

Results are JSON lines, one a run. Those of earlier periods are read from bench/results, new ones
are added to a file of this period, as soon as they are there.
"""

import json
import time
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import asdict, fields, replace
from pathlib import Path

from workers import Job, Worker

from sparsekern.files import atomic_write

from . import plan
from .arms import Task
from .plan import ARMS, Order
from .sweep import finite, rounded

RESULTS = "results.jsonl"
ABOUT = {"corpus", "device", "torch", "date", "commit"}
NEEDED = {"key", "size", "arm", "seed", "rate", "is_tuned"} | ABOUT  # of a result


def read(paths: Iterable[Path]) -> list[dict]:
    """The results in these files, each run once: the first that was written."""
    found: dict[str, dict] = {}
    for path in paths:
        for result in lines(path, NEEDED):
            found.setdefault(result["key"], result)
    return list(found.values())


def lines(path: Path, needed: set[str]) -> Iterator[dict]:
    """Results, one a line. ValueError names a line that is none, or lacks what is needed."""
    for number, line in enumerate(path.read_bytes().splitlines(), 1):
        try:
            result = json.loads(line)
            if missing := needed - set(result):
                raise ValueError(f"it lacks {', '.join(sorted(missing))}")
        except (ValueError, TypeError) as error:
            raise ValueError(f"{path}, line {number}: expected a result: {error}") from error
        yield result


def kept(path: Path, needed: set[str]) -> list[dict]:
    """The same as a list; nothing where there is no file."""
    return list(lines(path, needed)) if path.exists() else []


def add(path: Path, result: dict) -> None:
    """Whole lines at any time, whenever this is killed."""
    before = path.read_bytes() if path.exists() else b""
    with atomic_write(path) as file:
        file.write(before + json.dumps(result).encode() + b"\n")


def check_plan(results: Iterable[dict]) -> None:
    """ValueError where one of these is of an arm and size of the plan, but not as they are now."""
    for result in results:
        if result["arm"] in ARMS and result["size"] in plan.SIZES:
            check(Task(*(result.get(f.name, f.default) for f in fields(Task))), result)


def check(task: Task, result: dict) -> None:
    """ValueError unless `result` is one of this task and plan, and has its key."""
    default = {field.name: field.default for field in fields(Task)}
    wanted = asdict(task) | {"key": task.key, "recipe": task.recipe}
    for name, value in wanted.items():
        if result.get(name, default.get(name)) != value:
            raise ValueError(
                f"plan: expected {name} {value} of the earlier result {result['key']!r}, got "
                f"{result.get(name)}: it was made by another plan, which needs an --out of its own"
            )


def chosen(orders: Sequence[Order], names: Sequence[str]) -> list[Order]:
    """The orders of a plan that are named, the most wanted first: "7", or "7:75,two-way" for some
    of its arms alone, swept or run. All where none is named. ValueError where one is not there."""
    numbered, found = {str(order.number): order for order in orders}, []
    for name in names or numbered:
        number, colon, arms = name.partition(":")
        if number not in numbered:
            raise ValueError(f"orders: expected some of {', '.join(numbered)}, got {name}")
        order = numbered[number]
        wanted = arms.split(",") if colon else [*order.swept, *order.arms]
        if missing := {*wanted} - {*order.swept, *order.arms}:
            known = ", ".join(dict.fromkeys([*order.swept, *order.arms]))
            wrong = ", ".join(sorted(missing))
            raise ValueError(f"orders: expected arms of order {number}, {known}, got {wrong}")
        swept, made = (tuple(a for a in x if a in wanted) for x in (order.swept, order.arms))
        found.append(replace(order, swept=swept, arms=made))
    return found


class Study:
    """The results so far, in memory and in `folder`, and what comes next."""

    def __init__(
        self,
        orders: Sequence[Order],
        corpus: str,
        folder: Path,
        kept: Iterable[Path],
        about: dict,
    ) -> None:
        """`orders`: what to make, the most wanted first. `corpus`: the name of the text. `kept`:
        files of earlier results. ValueError where those are of another text or recipe."""
        self.about = {"corpus": corpus} | about
        self.orders = orders
        self.path = folder / RESULTS
        mine = [self.path] if self.path.exists() else []
        self.results = {result["key"]: result for result in read([*kept, *mine])}
        for result in self.results.values():
            if result["corpus"] != corpus:
                raise ValueError(
                    f"data: expected the text {result['corpus']} of earlier results, got {corpus}"
                )
        check_plan(self.results.values())
        self.failed: dict[str, str] = {}
        self.began = time.monotonic()

    # What comes next

    def tasks(self) -> Iterator[Task]:
        """All that is to be done and can be, in the order of the plan, done or not."""
        for order in self.orders:
            for arm in order.swept:
                start_rate = self.start_rate(order.size, arm)
                if start_rate is not None:
                    for rate in plan.next_rates(arm, self.losses(order.size, arm)):
                        yield Task(order.size, arm, plan.SWEEP_SEED, rate, False, start_rate)
            for seed in order.seeds:
                for arm in order.arms:
                    rate = self.rate(order.size, arm)
                    start_rate = self.start_rate(order.size, arm)
                    if None not in (rate, start_rate):
                        yield Task(order.size, arm, seed, rate, order.is_tuned, start_rate)

    def waiting(self) -> list[Task]:
        """ValueError where one of them was done at another rate."""
        left = []
        for task in dict.fromkeys(self.tasks()):
            if done := self.results.get(task.key):
                check(task, done)
            elif task.key not in self.failed:
                left.append(task)
        return left

    def without_rate(self) -> list[str]:
        """Arms that wait for a sweep which is not done."""
        named = {(order.size, arm) for order in self.orders for arm in order.arms if order.seeds}
        return [f"{size} {arm}" for size, arm in sorted(named) if self.rate(size, arm) is None]

    def losses(self, size: str, arm: str) -> dict[float, float]:
        """Rate -> loss on dev of the sweep so far, infinite where it diverged."""
        return {
            result["rate"]: finite(result.get("pretrained", {}).get("dev"))
            for result in self.results.values()
            if (result["size"], result["arm"], result["seed"]) == (size, arm, plan.SWEEP_SEED)
        }

    def rate(self, size: str, arm: str) -> float | None:
        """That of its sweep, or of the arm whose sweep it follows; None until that is done."""
        swept = ARMS[arm].rate_of or arm
        swept_at, share = plan.SWEPT_AT.get(size, (size, 1.0))
        best = plan.best_rate(swept, self.losses(swept_at, swept))
        return None if best is None else rounded(share * best)

    def start_rate(self, size: str, arm: str) -> float | None:
        """That of the arm it starts from, 0 where it starts from none."""
        return self.rate(size, ARMS[arm].start) if ARMS[arm].start else 0.0

    # What is kept

    def finish(self, job: Job, worker: Worker, answer: dict) -> None:
        """Keep what a worker says of a run, and say it."""
        seconds = time.monotonic() - worker.began
        if "result" in answer:
            about = self.about | {"device": worker.device, "recipe": Task(**job.settings).recipe}
            self.keep({"key": job.key} | job.settings | short(answer["result"]) | about)
        elif answer.get("is_final"):
            self.failed[job.key] = answer["failed"]
        self.say(f"{job.key}: {outcome(answer)}   {seconds:.1f} s on GPU {worker.gpu or '-'}")
        for line in answer.get("log", ()):
            print(f"    {line}", flush=True)

    def keep(self, result: dict) -> None:
        self.path.parent.mkdir(parents=True, exist_ok=True)
        add(self.path, result)
        self.results.setdefault(result["key"], result)

    def say(self, text: str) -> None:
        print(f"{time.monotonic() - self.began:6.1f} s   {text}", flush=True)


def short(part: object) -> object:
    """The same with numbers of 6 digits."""
    if isinstance(part, float):
        return float(f"{part:.6g}")
    if isinstance(part, dict):
        return {name: short(inner) for name, inner in part.items()}
    return [short(inner) for inner in part] if isinstance(part, list) else part


def outcome(answer: dict) -> str:
    """In a few words."""
    result = answer.get("result", {})
    if "pretrained" not in result:
        return result.get("diverged") or answer.get("stopped") or f"failed, {answer['failed']}"
    found = result["pretrained"]
    text = f"held-out {found['held-out']:.4f}, blimp {found['blimp']['percent']:.2f}"
    if "step_s" in found:
        text += f", {1e3 * found['step_s']:.2f} ms a step"
    for name, tuned in result.get("tuned", {}).items():
        score = f"{tuned['items']['percent']:.2f}" if "items" in tuned else f"{tuned['loss']:.4f}"
        text += f", {name} {score} at {tuned['rate']:g}"
    return text
