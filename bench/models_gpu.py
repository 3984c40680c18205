"""Whole language models on a GPU, a prompt and a token at a time: dense, sparse, packed. See
run_gpu.py.

The shapes are those of published models, the weights random: only times are looked at. GPU machines
seldom have transformers, so it is the package's GPT that takes these shapes: its MLP has two
matrices for three, of as many weights together, and each head its own key and value. It reads a
prompt for the logits of its last token, and a token with a cache of CONTEXT others.
"""

import argparse
import copy
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from statistics import median

import torch
from torch import Tensor, nn

from sparsekern import accelerate_
from sparsekern.bench import records
from sparsekern.bench.machine import about_run, in_words
from sparsekern.bench.records import DENSE, OTHER, OURS
from sparsekern.bench.replay_gpu import CudaClock
from sparsekern.bench.turns import in_turns, on_gpu, on_host
from sparsekern.gpt.model import GPT, Cache, GPTConfig
from sparsekern.gpt.presets import UniformMask, for_inference
from sparsekern.nn.kinds import heads
from sparsekern.sparsity import Static
from sparsekern.terminal import table


@dataclass(frozen=True)
class Shape:
    name: str
    layers: int
    width: int
    heads: int
    inner: int
    vocabulary: int


SHAPES = (
    Shape("SmolLM2-135M", 30, 576, 9, 1536, 49152),
    Shape("LLaMA-3.2-1B", 16, 2048, 32, 8192, 128256),
)
SPARSITIES = (0.75, 0.9, 0.5)
PROMPTS, BATCHES, CONTEXT = (256, 2048), (1, 16), 256
ROUNDS = 7
AHEAD_S = 100e-6
TOLERANCE = 0.1  # of the whole model's output: bfloat16, in all layers

Way = Callable[[nn.Module], Tensor]


def make(shape: Shape, device: torch.device) -> GPT:
    """A dense model in bfloat16."""
    sizes = shape.layers, shape.heads, shape.width, max(PROMPTS) + 1, shape.vocabulary
    with device:
        model = GPT(GPTConfig(*sizes, bias=False, n_inner=3 * shape.inner // 2))
    return model.eval().to(torch.bfloat16).requires_grad_(False)


def prune_evenly_(model: nn.Module, sparsity: float) -> None:
    """Zeros at random in the linears of the blocks."""
    spared = heads(model)
    for name, module in model.named_modules():
        if isinstance(module, nn.Linear) and name not in spared:
            module.weight *= UniformMask(sparsity).mask(name, module.weight)


def reading(model: GPT, tokens: int) -> Way:
    """A prompt of so many tokens."""
    device = model.wte.weight.device
    ids = torch.randint(model.config.vocab_size, (1, tokens), device=device)
    cache, places = Cache(model, 1, tokens), torch.arange(tokens, device=device)
    return lambda m: m(ids, cache=cache, position=places)[0]


def stepping(model: GPT, batch: int) -> Way:
    """A token of each text of the batch, after CONTEXT others, whose keys are zero."""
    device = model.wte.weight.device
    ids = torch.randint(model.config.vocab_size, (batch, 1), device=device)
    cache, place = Cache(model, batch, CONTEXT + 64), torch.tensor([CONTEXT], device=device)
    return lambda m: m(ids, cache=cache, position=place)[0]


def captured(ways: dict[str, Callable[[], Tensor]]) -> dict[str, tuple[float, Tensor]]:
    """Seconds of each, in turn, and its output. On a GPU each is a CUDA graph."""
    is_gpu = torch.cuda.is_available()
    turns, outputs = {}, {}
    for name, way in ways.items():
        for _ in range(2):  # libraries allocate and kernels compile
            outputs[name] = way().float()
        replay = CudaClock().capture([way])[0] if is_gpu else way
        turns[name] = on_gpu(replay, AHEAD_S) if is_gpu else on_host(replay)
    taken = in_turns(turns, ROUNDS, warm_up=1)
    return {name: (median(taken[name]), outputs[name]) for name in ways}


def rows_of(case: dict, ways: dict[str, Callable[[], Tensor]]) -> list[dict]:
    """The first is the dense one."""
    found = captured(ways)
    want = next(iter(found.values()))[1]
    rows = []
    for name, (seconds, y) in found.items():
        error = ((y - want).norm() / want.norm()).item()
        row = {"contender": name, "kind": OURS if rows else DENSE, "median_s": seconds}
        rows.append(case | row | {"error": error, "is_right": error < TOLERANCE})
    return rows


def prompt(model: GPT, tokens: int, case: dict) -> list[dict]:
    way, sparse = reading(model, tokens), copy.deepcopy(model)
    began = time.perf_counter()
    report = accelerate_(sparse, way)
    eager = (
        ("dense, eager", report.before_s),
        ("accelerate_, eager", report.after_s),
        ("expected, eager", report.expected_after_s),
        ("the call of accelerate_", time.perf_counter() - began),
    )
    case = case | {"case": f"prompt of {tokens}", "M": tokens}
    rows = rows_of(case, {"dense": lambda: way(model), "accelerate_": lambda: way(sparse)})
    rows[1] |= {"kernel": f"{len(report.sparse)} of {len(report.layers)}"}
    same = {"kind": OTHER, "error": rows[1]["error"], "is_right": rows[1]["is_right"]}
    return rows + [case | same | {"contender": n, "median_s": s} for n, s in eager]


def token(model: GPT, batch: int, case: dict) -> list[dict]:
    way = stepping(model, batch)
    sparse = copy.deepcopy(model)
    Static(0.5, init_method="from_zeros").apply(sparse)
    packed = for_inference(copy.deepcopy(sparse), batch)
    ways = {"dense": model, "SparseLinear": sparse, "pack_": packed}
    case = case | {"case": f"1 token, batch {batch}", "M": batch, "batch": batch}
    return rows_of(case, {name: lambda m=m: way(m) for name, m in ways.items()})


def cases(shapes: tuple[Shape, ...], device: torch.device) -> Iterator[tuple[str, Callable]]:
    """What is to be measured, in words, and the function that does it."""
    for sparsity in SPARSITIES:
        for shape in shapes:
            model = make(shape, device)
            prune_evenly_(model, sparsity)
            case = {"op": "model", "model": shape.name, "layers": shape.layers, "threads": 0}
            case |= {"device": device.type, "dtype": "bfloat16", "sparsity": sparsity}
            about = f"{shape.name}, {sparsity:.0%}"
            for batch in BATCHES:
                yield f"{about}, batch {batch}", partial(token, model, batch, case)
            for tokens in PROMPTS:
                yield f"{about}, prompt of {tokens}", partial(prompt, model, tokens, case)


def measure(machine: dict, path: Path, args: argparse.Namespace) -> records.Run:
    """All cases that begin within args.limit_s, printed; the file is written after each."""
    start = time.monotonic()
    about = about_run("models", machine, args.commit) | {"is_whole": False, "left": []}
    found: list[dict] = []
    with torch.no_grad(), torch.cuda.stream(torch.cuda.Stream()):
        for name, run in cases(SHAPES, torch.device("cuda")):
            if time.monotonic() - start > args.limit_s:
                about["left"].append(name)
                continue
            found += run()
            print(f"{time.monotonic() - start:4.0f} s {name}", flush=True)
            records.write(path, about, found)
    about |= {"is_whole": not about["left"], "seconds": time.monotonic() - start}
    records.write(path, about, found)
    measured = records.read(path)
    print(f"{page(path.stem, measured)}\n{about['seconds']:.0f} s: {path}")
    return measured


def page(name: str, run: records.Run) -> str:
    header = ["model", "what", "zeros", "dense ms", "sparse", "packed", "sparse layers"]
    header += ["dense ms, eager", "after", "expected / after", "call, s"]
    rows = []
    for (model, case, sparsity), group in records.groups(
        run.records, lambda r: r["model"], lambda r: r["case"], lambda r: r["sparsity"]
    ).items():
        by = {r["contender"]: r["median_s"] for r in group}
        layers = next((r["kernel"] for r in group if r.get("kernel")), "all")
        sparse, packed = by.get("accelerate_", by.get("SparseLinear")), by.get("pack_")
        cells = [model, case, f"{sparsity:.0%}", f"{1e3 * by['dense']:.3f}"]
        cells += [f"{by['dense'] / sparse:.2f}", f"{by['dense'] / packed:.2f}" if packed else "-"]
        cells += [layers]
        if "dense, eager" in by:
            before, after = by["dense, eager"], by["accelerate_, eager"]
            cells += [f"{1e3 * before:.2f}", f"{before / after:.2f}"]
            cells += [f"{by['expected, eager'] / after:.2f}"]
            cells += [f"{by['the call of accelerate_']:.1f}"]
        else:
            cells += ["-"] * 4
        rows.append(cells)
    errors = [r["error"] for r in run.records if r.get("error") is not None]
    left = run.about["left"]
    return "\n".join(
        [
            f"# {name}",
            "",
            in_words(run.about, "bfloat16"),
            "",
            "GPTs of this package in the shapes of published models, but with two matrices in an "
            "MLP, of as many weights as their three, and with keys and values for each head. "
            "Weights are random, the zeros too, evenly in the linears of the blocks; the head, as "
            "wide as the vocabulary, stays dense. A prompt gives the logits of its last token, and "
            f"accelerate_ decides by eager calls; a token has {CONTEXT} others in its cache, and "
            "all layers are sparse. "
            f"Times of CUDA graphs of the whole model, medians of {ROUNDS} in turn; sparse, "
            "packed: times as fast as dense, below 1 a loss. Outputs differ from those of the "
            f"dense model in bfloat16 by {max(errors):.0e} of their norm at most."
            + (f" Not run: {', '.join(left)}." if left else ""),
            "",
            table(header, rows, left=2),
            "",
        ]
    )
