"""The parser of `sparsekern COMMAND`, which is also `python -m sparsekern COMMAND`.

It imports no torch: help and usage errors come at once. A command is imported when it runs.
"""

import argparse
import difflib
import os
import sys
import traceback
from collections.abc import Callable
from dataclasses import fields
from importlib import import_module
from pathlib import Path

from . import __version__, _load
from .commands import BENCH_OUT, wafer
from .gpt.flags import PRESET_NAMES, PruneFlags, TrainFlags

DTYPES = ("float32", "bfloat16", "float16")
# What a user or a machine causes, told in words by who raises it.
MISTAKES = (ValueError, ImportError, OSError, ArithmeticError, NotImplementedError)


class Parser(argparse.ArgumentParser):
    def parse_known_args(self, args=None, namespace=None):
        """An unknown flag is an error here, where the flags of its command are known."""
        known, unknown = super().parse_known_args(args, namespace)
        if unknown:
            given = unknown[0].partition("=")[0]
            close = difflib.get_close_matches(given, self._option_string_actions, 1, 0.75)
            meant = f"; did you mean {close[0]}?" if close else ""
            self.error(f"unrecognized arguments: {' '.join(unknown)}{meant}")
        return known, unknown

    def error(self, message: str) -> None:
        self.exit(2, f"sparsekern: error: {message}\n")


def main(arguments: list[str] | None = None) -> int:
    options = vars(make_parser().parse_args(arguments))
    run = options.pop("run")
    return guarded(lambda: run(**options) or 0)


def make_parser() -> Parser:
    """Of all commands; `run` is what the one given does."""
    parser = Parser(
        prog="sparsekern",
        description="Unstructured sparse weights behind torch.matmul, where they pay",
        epilog="sparsekern COMMAND --help lists the options of a command.",
    )
    parser.add_argument("--version", action="version", version=f"sparsekern {__version__}")
    parser.set_defaults(run=list_commands(parser))
    commands = parser.add_subparsers(metavar="COMMAND", title="commands")

    info = commands.add_parser("info", help="what this installation can use, and why not the rest")
    info.set_defaults(run=command("info", "run_info"))

    trainer = commands.add_parser("train", help="train a GPT, dense or sparse")
    trainer.set_defaults(run=command("train", "run_train"))
    for field in fields(TrainFlags):
        add_flag(trainer, field)
    trainer.add_argument(
        "--help-algorithm",
        metavar="NAME",
        nargs="?",
        const="",
        default=argparse.SUPPRESS,
        help="show the keys of an algorithm for --sparsity-config, and exit; without NAME list all",
    )

    pruner = commands.add_parser(
        "prune", help="prune a model: of transformers at once, a GPT of `train` in rounds"
    )
    pruner.set_defaults(run=command("prune", "run_prune"))
    for field in fields(PruneFlags):
        add_flag(pruner, field)

    generator = commands.add_parser("generate", help="text from a GPT, or how fast it comes")
    generator.set_defaults(run=command("generate", "run_generate"))
    add_generate_flags(generator)

    demonstration = commands.add_parser("demo", help="kernels, training, text and a report")
    demonstration.set_defaults(run=command("demo", "run_demo"))
    demonstration.add_argument("--out", type=Path, default=Path("out"), help="folder (%(default)s)")

    add_bench_flags(commands.add_parser("bench", help="how fast the products are here"))

    reporter = commands.add_parser("report", help="one page of everything that was measured")
    reporter.set_defaults(run=command("report", "run_report"))
    for flag, folder in (("results", "bench/results"), ("out", "out/report")):
        about = {"type": Path, "default": Path(folder), "help": "folder (%(default)s)"}
        reporter.add_argument(f"--{flag}", **about)

    wafer_parser = commands.add_parser("wafer", help="what the same masks would do on a wafer")
    wafer_parser.set_defaults(run=list_commands(wafer_parser))
    wafer.add_commands(
        wafer_parser,
        command("wafer_masks", "checkpoint_weights"),
        command("wafer_masks", "benchmark_mask"),
    )
    return parser


def list_commands(parser: argparse.ArgumentParser) -> Callable:
    """What runs where a command is missing: a usage error that helps."""

    def run(**options: object) -> int:
        parser.print_help(sys.stderr)
        return 2

    return run


def command(module: str, name: str) -> Callable:
    """A function of `commands`, imported when it is called."""

    def run(*arguments: object, **options: object) -> object:
        _load()
        return getattr(import_module(f"{__package__}.commands.{module}"), name)(
            *arguments, **options
        )

    return run


def guarded(run: Callable[[], int]) -> int:
    """The exit code of `run`. An error is one line; SPARSEKERN_DEBUG=1 adds its traceback."""
    try:
        return run()
    except KeyboardInterrupt as error:
        print(f"sparsekern: interrupted {error}".rstrip(), file=sys.stderr)
        return 130
    except BrokenPipeError:  # who reads our output has seen enough
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 141
    except Exception as error:
        if os.environ.get("SPARSEKERN_DEBUG") == "1":
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
        *field.metadata.get("also", ()),
        type=field.metadata.get("type", filled if field.type is str else field.type),
        choices=field.metadata.get("choices"),
        default=argparse.SUPPRESS,
        help=text.replace("%", "%%"),
    )


def filled(text: str) -> str:
    """What stands behind a flag. Nothing is a variable of a shell that was not set."""
    if not text:
        raise argparse.ArgumentTypeError("expected a value, got ''")
    return text


def add_generate_flags(parser: argparse.ArgumentParser) -> None:
    model = parser.add_mutually_exclusive_group(required=True)
    model.add_argument("--checkpoint", type=Path, help="a training run: its folder or a file in it")
    model.add_argument("--preset", choices=PRESET_NAMES, help="the shape of a well-known model")
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
        ("keep-dense", "on a GPU: dense copies of layers, for a fast prompt; more memory"),
    ):
        parser.add_argument(f"--{flag}", action="store_true", help=text)


def add_bench_flags(parser: argparse.ArgumentParser) -> None:
    parser.set_defaults(run=command("bench", "run_bench"))
    parser.add_argument("--quick", action="store_true", help="one small shape, few rounds")
    parser.add_argument("--device", choices=("cpu", "cuda"), help="cuda where there is one")
    parser.add_argument(
        "--calibrate",
        action="store_true",
        help="measure from which density on dense is faster, for dispatch to use from now on",
    )
    parser.add_argument(
        "--out",
        type=Path,
        help=f"a .csv file ({BENCH_OUT}; with --calibrate JSON, beside what dispatch reads)",
    )
    parser.add_argument("--commit", help="where there is no repository")
    commands = parser.add_subparsers()
    added = commands.add_parser("compare", help="fails where NEW is slower than OLD")
    added.set_defaults(run=command("bench", "run_compare"))
    added.add_argument("old", type=Path)
    added.add_argument("new", type=Path)
    added.add_argument(
        "--threshold", type=float, default=0.1, help="share that is no regression (%(default)s)"
    )
