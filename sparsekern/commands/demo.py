"""python -m sparsekern demo"""

import time
from pathlib import Path

import torch

from ..extras import require
from ..gpt import demo
from ..report import demo as demo_report
from .info import environment


def run_demo(out: Path) -> None:
    require("matplotlib", "demo")  # now, not after minutes of measuring
    out.mkdir(parents=True, exist_ok=True)
    torch.set_num_threads(demo.THREADS)
    began = time.perf_counter()
    sections: dict[str, str] = {}

    def show(title: str, body: str) -> None:
        sections[title] = body
        print(f"\n## {title}  [{time.perf_counter() - began:.0f} s]\n\n{body}", flush=True)

    show("Machine", demo_report.environment_section(environment()))
    show("Correctness", demo_report.check_section(demo.check()))
    timings = demo.time_kernels()
    shape = f"{demo.KERNEL_N} x {demo.KERNEL_K}"
    show("Kernels", demo_report.kernel_section(timings, shape, demo.THREADS))

    configs = {
        "dense": demo.train_config(out / "dense", 0.0),
        "sparse": demo.train_config(out / "sparse", demo.SPARSITY),
    }
    runs = {}
    for name, config in configs.items():
        print(f"\n## Training, {name}\n", flush=True)
        runs[name] = demo.train_in_subprocess(config)
    steps = demo.time_steps(configs["dense"], configs["sparse"])
    show("Dense against sparse", demo_report.training_section(runs["dense"], runs["sparse"], steps))
    show("Where the time goes", demo_report.profile_section(steps))
    show("Sample", demo_report.sample_section(demo.sample(out / "sparse")))

    labelled = {"dense": runs["dense"], f"{demo.SPARSITY:.0%} sparse": runs["sparse"]}
    written = demo_report.write(out, sections, timings, labelled)
    print(f"\nWrote {', '.join(map(str, written))} in {time.perf_counter() - began:.0f} s.")
