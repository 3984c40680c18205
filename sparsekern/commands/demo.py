"""python -m sparsekern demo"""

import time
from pathlib import Path

import torch

from ..extras import require
from ..files import check_writable
from ..gpt import demo
from ..report import demo as demo_report
from .info import environment


def run_demo(out: Path) -> None:
    require("matplotlib", "demo")  # now, not after minutes of measuring
    sparsities = {"dense": 0.0, "sparse": demo.SPARSITY}
    for name, sparsity in sparsities.items():
        demo.refuse_other_runs(out / name, sparsity)
    check_writable("out", out / "report.md")
    out.mkdir(parents=True, exist_ok=True)
    torch.set_num_threads(demo.THREADS)
    began = time.perf_counter()
    sections: dict[str, str] = {}

    def at() -> str:
        return f"[{time.perf_counter() - began:.0f} s]"

    def say(text: str) -> None:
        print(f"{text}  {at()}", flush=True)

    def show(title: str, body: str) -> None:
        sections[title] = body
        say(f"\n## {title}")
        print(f"\n{body}", flush=True)

    show("Machine", demo_report.environment_section(environment()))
    dense, missing = demo.dense_calls()
    show(
        "Correctness",
        f"{demo_report.check_section(demo.check())}\n\n{demo_report.dense_section(dense)}",
    )
    print()
    timings = demo.time_kernels(dense, say)
    shape, threads = f"{demo.KERNEL_N} x {demo.KERNEL_K}", demo.KERNEL_THREADS
    show("Kernels", demo_report.kernel_section(timings, shape, threads, missing))

    print()
    configs = [demo.train_config(out, s) for s in sparsities.values()]
    steps = demo.time_steps(*configs, dense, say)
    show("One step, in turn", demo_report.steps_section(steps, demo.SPARSITY))
    count = demo.steps_in_time(steps["dense_s"] + steps["sparse_s"])
    runs = {}
    for name, sparsity in sparsities.items():
        say(f"\n## Training, {name}")
        print(flush=True)
        library = steps["best_dense"] if name == "dense" else demo.TORCH
        config = demo.train_config(out / name, sparsity, count)
        runs[name] = demo.train_in_subprocess(config, library)
    show("Training", demo_report.training_section(runs["dense"], runs["sparse"], steps))
    show("What to do next", demo_report.next_section(demo.next_steps(out, count)))

    labelled = {
        f"dense by {steps['best_dense']}": runs["dense"],
        f"{demo.SPARSITY:.0%} sparse": runs["sparse"],
    }
    written = demo_report.write(out, sections, timings, labelled)
    say(f"\nWrote {', '.join(map(str, written))}")
