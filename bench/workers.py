"""A pool of worker processes, one a GPU. A crash costs one run and no other."""

import json
import os
import selectors
import subprocess
import time
from collections import Counter
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

ATTEMPTS = 2  # at a run that fails
GRACE_S = 15  # after the deadline, for runs to stop by themselves
LOG_LINES = 6  # shown of a worker that ended by itself


@dataclass(frozen=True)
class Job:
    key: str
    kind: str  # which function of the worker
    settings: dict


class Worker:
    """A process that makes one run after another on one GPU."""

    def __init__(self, command: list[str], gpu: str, threads: int, log: Path) -> None:
        self.command, self.gpu, self.threads, self.log = command, gpu, threads, log
        self.device: str | None = None  # its name, once the process is ready
        self.job: Job | None = None
        self.began = 0.0
        environment = os.environ | {"CUDA_VISIBLE_DEVICES": gpu, "PYTHONUNBUFFERED": "1"}
        environment.setdefault("OMP_NUM_THREADS", str(threads))
        with open(log, "ab") as file:
            self.process = subprocess.Popen(
                command,
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=file,
                env=environment,
                text=True,
            )

    @property
    def is_idle(self) -> bool:
        return self.device is not None and self.job is None

    def give(self, job: Job, deadline: float) -> None:
        self.job, self.began = job, time.monotonic()
        message = {"key": job.key, "kind": job.kind, "settings": job.settings}
        with suppress(OSError):  # where it has just ended, its answer will say so
            print(json.dumps(message | {"deadline": deadline}), file=self.process.stdin, flush=True)

    def answer(self) -> dict:
        """Waits for a line of the process."""
        line = self.process.stdout.readline()
        if line:
            return json.loads(line)
        last = self.log.read_text(errors="replace").splitlines()[-LOG_LINES:]
        return {"failed": f"ended with code {self.process.wait()}", "log": last}

    def again(self) -> "Worker":
        """Another process in the place of this one."""
        self.end()
        return Worker(self.command, self.gpu, self.threads, self.log)

    def end(self) -> None:
        self.process.kill()
        with suppress(OSError):  # what it did not read any more
            self.process.stdin.close()
        self.process.wait()
        self.process.stdout.close()


class Pool:
    """A worker on each GPU, until a time of time.monotonic()."""

    def __init__(self, command: list[str], gpus: list[str], logs: Path, deadline: float) -> None:
        logs.mkdir(parents=True, exist_ok=True)
        threads = max(1, (os.cpu_count() or 1) // len(gpus))
        self.workers = [
            Worker(command, gpu, threads, logs / f"worker-{gpu or 'cpu'}.txt") for gpu in gpus
        ]
        self.deadline = deadline
        self.failures: Counter[str] = Counter()

    def run(
        self,
        choose: Callable[[str, list[Job]], Job | None],
        finish: Callable[[Job, Worker, dict], None],
    ) -> None:
        """Make what `choose` says comes next on a GPU, beside the runs under way, and hand each
        answer to `finish`, until nothing comes next or the time is up."""
        while True:
            under_way = [worker.job for worker in self.workers if worker.job]
            left = self.deadline - time.monotonic()
            is_waiting = False  # for a worker that is starting
            free = [worker for worker in self.workers if not worker.job and left > 0]
            for worker in sorted(free, key=lambda worker: not worker.is_idle):
                if job := choose(worker.gpu, under_way):
                    under_way.append(job)
                    is_waiting |= not worker.is_idle
                    if worker.is_idle:
                        worker.give(job, self.deadline)
            is_busy = any(worker.job for worker in self.workers)
            if not is_busy and not is_waiting or left < -GRACE_S:
                if not self.workers:
                    raise RuntimeError("no worker has started")
                return
            for worker in self._heard(left + GRACE_S):
                self._take(worker, finish)

    def _heard(self, seconds: float) -> list[Worker]:
        """The workers that have something to say within this time."""
        with selectors.DefaultSelector() as selector:
            for worker in self.workers:
                selector.register(worker.process.stdout, selectors.EVENT_READ, worker)
            timeout = None if seconds == float("inf") else max(0.0, seconds)
            return [key.data for key, _ in selector.select(timeout)]

    def _take(self, worker: Worker, finish: Callable[[Job, Worker, dict], None]) -> None:
        answer, job = worker.answer(), worker.job
        if "device" in answer:
            worker.device = answer["device"]
            return
        worker.job = None
        if "failed" in answer:
            # A process whose run failed has ended, or is about to.
            at = self.workers.index(worker)
            if worker.device is None:  # the next one would not start either
                self.workers.pop(at).end()
            else:
                self.workers[at] = worker.again()
        if job is None:
            print(f"a worker {answer['failed']}", *answer.get("log", ()), sep="\n", flush=True)
            return
        if "failed" in answer:
            self.failures[job.key] += 1
            answer["is_final"] = self.failures[job.key] >= ATTEMPTS
        finish(job, worker, answer)

    def close(self) -> None:
        for worker in self.workers:
            worker.end()
