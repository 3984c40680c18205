"""Models of transformers on a GPU: a prompt and a token at a time, dense, sparse and packed. See
run_gpu.py.

The sizes are those of published models, the weights random: only times are looked at, and nothing
is downloaded. A language model reads a prompt for the logits of its last token, and a token of each
text with CONTEXT others in its cache; an encoder reads texts. Each way is a CUDA graph of the whole
model. With --compiled: some layers of one, with what torch.compile makes of them, which takes half
a minute for a whole model.
"""

import argparse
import copy
import time
import traceback
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property, partial
from pathlib import Path
from statistics import median
from typing import Any

import torch
from torch import Tensor, nn

from sparsekern import accelerate_
from sparsekern.bench import records
from sparsekern.bench.machine import about_run, in_words
from sparsekern.bench.records import DENSE, OTHER, OURS
from sparsekern.bench.replay_gpu import CudaClock
from sparsekern.bench.turns import in_turns, on_gpu, on_host
from sparsekern.extras import require
from sparsekern.gpt.presets import UniformMask
from sparsekern.nn import pack_
from sparsekern.nn.heads import heads
from sparsekern.sparsity import Static
from sparsekern.terminal import table


@dataclass(frozen=True)
class Shape:
    name: str
    layers: int
    width: int
    heads: int
    key_heads: int
    inner: int
    vocabulary: int
    is_tied: bool = True
    kind: str = "llama"


SHAPES = (
    Shape("SmolLM2-135M", 30, 576, 9, 3, 1536, 49152),
    Shape("LLaMA-3.2-1B", 16, 2048, 32, 8, 8192, 128256),
    Shape("all-MiniLM-L6-v2", 6, 384, 12, 12, 1536, 30522, kind="bert"),
    Shape("LLaMA-3.1-8B", 32, 4096, 32, 8, 14336, 128256, is_tied=False),
)
PLAIN, COMPILED = "models", "models-compiled"  # benchmarks
SPARSITIES = (0.75, 0.9, 0.5)
PROMPTS, BATCHES, CONTEXT = (256, 2048), (1, 16), 256
TEXTS = ((1, 128), (32, 128))  # that an encoder reads
LAYERS = Shape("2 layers of LLaMA-3.1-8B", 2, 4096, 32, 8, 14336, 128, is_tied=False)
GROUPS = (("q_proj", "k_proj", "v_proj"), ("gate_proj", "up_proj"))
ROUNDS = 7
AHEAD_S = 400e-6  # graphs of some hundred kernels
TOLERANCE = 0.1  # of the whole model's output: bfloat16, in all layers

Way = Callable[[nn.Module], Tensor]


def make(shape: Shape, device: torch.device) -> nn.Module:
    """A dense model in bfloat16."""
    from transformers import AutoModel, AutoModelForCausalLM, BertConfig, LlamaConfig

    sizes = {"num_hidden_layers": shape.layers, "hidden_size": shape.width}
    sizes |= {"num_attention_heads": shape.heads, "intermediate_size": shape.inner}
    sizes |= {"vocab_size": shape.vocabulary}
    config: Any
    if shape.kind == "bert":
        config, kind = BertConfig(**sizes), AutoModel
    else:
        sizes |= {"num_key_value_heads": shape.key_heads, "tie_word_embeddings": shape.is_tied}
        sizes |= {"max_position_embeddings": 2 * max(PROMPTS)}
        config, kind = LlamaConfig(**sizes), AutoModelForCausalLM
    with device:
        model = kind.from_config(config, dtype=torch.bfloat16)
    return model.eval().requires_grad_(False)


def prune_evenly_(model: nn.Module, sparsity: float) -> None:
    """Zeros at random in the linears of the blocks."""
    spared = heads(model)
    for name, module in model.named_modules():
        if isinstance(module, nn.Linear) and name not in spared:
            module.weight *= UniformMask(sparsity).mask(name, module.weight)


class Made:
    """A model and what is made of it, each once, when it is asked for."""

    def __init__(self, shape: Shape, sparsity: float, device: torch.device):
        self.shape, self.sparsity, self.device = shape, sparsity, device
        self._packed: dict[int, nn.Module] = {}

    @cached_property
    def dense(self) -> nn.Module:
        model = make(self.shape, self.device)
        prune_evenly_(model, self.sparsity)
        return model

    @cached_property
    def sparse(self) -> nn.Module:
        model = copy.deepcopy(self.dense)
        Static(0.5, init_method="from_zeros").apply(model)
        return model

    def packed(self, batch: int) -> nn.Module:
        """For so many tokens and for prompts: layers may keep dense copies for these."""
        if batch not in self._packed:
            groups = GROUPS if self.shape.kind == "llama" else ()
            model, tokens = copy.deepcopy(self.sparse), (batch, max(PROMPTS))
            self._packed[batch] = pack_(model, tokens, dense=True, groups=groups)
        return self._packed[batch]

    def ids(self, *size: int) -> Tensor:
        return torch.randint(self.shape.vocabulary, size, device=self.device)


def reading(made: Made, texts: int, tokens: int) -> Way:
    """So many texts of so many tokens; of a language model, the logits of their last tokens."""
    ids = made.ids(texts, tokens)
    if made.shape.kind == "bert":
        return lambda m: m(ids).last_hidden_state
    return lambda m: m(ids, use_cache=True, logits_to_keep=1).logits


def stepping(made: Made, batch: int) -> Way:
    """A token of each text of the batch, after CONTEXT others, whose keys are zero."""
    from transformers import StaticCache

    ids, size = made.ids(batch, 1), CONTEXT + 64
    cache = StaticCache(made.dense.config, max_cache_len=size)
    made.dense(ids, past_key_values=cache)  # makes its tensors
    lengths = [layer.cumulative_length for layer in cache.layers]
    place = torch.tensor([[CONTEXT]], device=made.device)
    mask = (torch.arange(size, device=made.device) <= CONTEXT).expand(batch, 1, 1, size)

    def step(model: nn.Module) -> Tensor:
        torch._foreach_zero_(lengths)  # each call adds to them
        torch._foreach_add_(lengths, CONTEXT)
        fixed = {"attention_mask": mask, "position_ids": place, "past_key_values": cache}
        return model(ids, **fixed).logits

    return step


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
    """The first is the dense one, and so is what has dense in its name."""
    found = captured(ways)
    want = next(iter(found.values()))[1]
    rows = []
    for name, (seconds, y) in found.items():
        error = ((y - want).norm() / want.norm()).item()
        row = {"contender": name, "kind": DENSE if "dense" in name else OURS, "median_s": seconds}
        rows.append(case | row | {"error": error, "is_right": error < TOLERANCE})
    return rows


def prompt(made: Made, texts: int, tokens: int, case: dict) -> list[dict]:
    way, sparse = reading(made, texts, tokens), copy.deepcopy(made.dense)
    began = time.perf_counter()
    report = accelerate_(sparse, way)
    eager = (
        ("eager, before", report.before_s),
        ("eager, accelerate_", report.after_s),
        ("eager, expected", report.expected_after_s),
        ("the call of accelerate_", time.perf_counter() - began),
    )
    what = f"prompt of {tokens}" if texts == 1 else f"{texts} texts of {tokens}"
    case = case | {"case": what, "M": texts * tokens}
    models = {"dense": made.dense, "accelerate_": sparse, "pack_": made.packed(1)}
    rows = rows_of(case, {name: partial(way, m) for name, m in models.items()})
    rows[1] |= {"kernel": f"{len(report.sparse)} of {len(report.layers)}"}
    same = {"kind": OTHER, "error": rows[1]["error"], "is_right": rows[1]["is_right"]}
    return rows + [case | same | {"contender": n, "median_s": s} for n, s in eager]


def token(made: Made, batch: int, case: dict) -> list[dict]:
    way = stepping(made, batch)
    models = {"dense": made.dense, "SparseLinear": made.sparse, "pack_": made.packed(batch)}
    case = case | {"case": f"1 token, batch {batch}", "M": batch, "batch": batch}
    return rows_of(case, {name: partial(way, m) for name, m in models.items()})


def compiled(made: Made, what: str, case: dict) -> list[dict]:
    """A token or a prompt, compiled, and as they are beside, to be compared in the same minute."""
    tokens = 1 if what == "token" else PROMPTS[0]
    way = stepping(made, 1) if what == "token" else reading(made, 1, tokens)
    ways = {"dense": partial(way, made.dense), "pack_": partial(way, made.packed(1))}
    for name, model in list(ways.items()):
        faster: Any = torch.compile(model.args[0], dynamic=False)
        ways[f"{name}, compiled"] = partial(way, faster)
    return rows_of(case | {"case": what, "M": tokens}, ways)


def cases(
    shapes: Sequence[Shape], sparsities: Sequence[float], device: torch.device
) -> Iterator[tuple[str, Callable[[], list[dict]]]]:
    """What is to be measured, in words, and the function that does it. Nothing is made before."""
    for sparsity in sparsities:
        for shape in shapes:
            made = Made(shape, sparsity, device)
            case, about = case_of(made), f"{shape.name}, {sparsity:.0%}"
            is_llama = shape.kind == "llama"
            for batch in BATCHES if is_llama else ():
                yield f"{about}, batch {batch}", partial(token, made, batch, case)
            for texts, tokens in [(1, n) for n in PROMPTS] if is_llama else TEXTS:
                name = f"{about}, {texts} x {tokens} tokens"
                yield name, partial(prompt, made, texts, tokens, case)


def compiled_cases(
    shape: Shape, sparsities: Sequence[float], device: torch.device
) -> Iterator[tuple[str, Callable[[], list[dict]]]]:
    """The same of layers that are compiled."""
    for sparsity in sparsities:
        made = Made(shape, sparsity, device)
        for what in ("token", "prompt"):
            name = f"{shape.name}, {sparsity:.0%}, {what}, compiled"
            yield name, partial(compiled, made, what, case_of(made))


def case_of(made: Made) -> dict:
    shape = made.shape
    case = {"op": "model", "model": shape.name, "layers": shape.layers, "threads": 0}
    return case | {"device": made.device.type, "dtype": "bfloat16", "sparsity": made.sparsity}


def benchmark(args: argparse.Namespace) -> str:
    return COMPILED if args.compiled else PLAIN


def measure(machine: dict, path: Path, args: argparse.Namespace) -> records.Run:
    """All cases that begin within args.limit_s, printed; the file is written after each. One that
    fails is named, and the others go on."""
    require("transformers", "hf")
    path = path.with_name(f"{benchmark(args)}-bfloat16.csv")
    start = time.monotonic()
    about = about_run(benchmark(args), machine, args.commit)
    about |= {"is_whole": False, "left": [], "failed": {}}
    found: list[dict] = []
    with torch.no_grad(), torch.cuda.stream(torch.cuda.Stream()):
        gpu = torch.device("cuda")
        todo = cases(SHAPES, args.sparsities, gpu)
        if args.compiled:
            todo = compiled_cases(LAYERS, args.sparsities, gpu)
        for name, run in todo:
            if time.monotonic() - start > args.limit_s:
                about["left"].append(name)
                continue
            rows: list[dict] = []
            try:
                rows = run()
            except Exception as error:
                about["failed"][name] = f"{type(error).__name__}: {error}"[:300]
                traceback.print_exc(limit=-4)
            found += rows
            told = ", ".join(f"{r['contender']} {1e3 * r['median_s']:.3f} ms" for r in rows)
            print(f"{time.monotonic() - start:4.0f} s {name}: {told}", flush=True)
            records.write(path, about, found)
    about |= {"is_whole": not (about["left"] or about["failed"])}
    about |= {"seconds": time.monotonic() - start}
    records.write(path, about, found)
    measured = records.read(path)
    print(f"{page(path.stem, measured)}\n{about['seconds']:.0f} s: {path}")
    return measured


def joined(runs: Sequence[records.Run]) -> records.Run:
    """The run of several that measured other sparsities, about the machine of the first."""
    about = dict(runs[0].about)
    about["is_whole"] = all(run.about["is_whole"] for run in runs)
    about["left"] = [name for run in runs for name in run.about["left"]]
    about["failed"] = {n: why for run in runs for n, why in run.about["failed"].items()}
    return records.Run(about, [record for run in runs for record in run.records])


def page(name: str, run: records.Run) -> str:
    errors = [r["error"] for r in run.records if r.get("error") is not None]
    about, is_compiled = run.about, run.about["benchmark"] == COMPILED
    what = (
        "Milliseconds of CUDA graphs of some layers as they are and after torch.compile, with a "
        "head of 128 words; packed: the faster packed one, times as fast as the faster dense one."
        if is_compiled
        else f"Times of CUDA graphs of the whole model as transformers runs it, not compiled, "
        f"medians of {ROUNDS} in turn; sparse, packed: times as fast as dense, below 1 a loss. "
        "Sparse is what accelerate_ made for the prompt by eager calls, and all layers as "
        "SparseLinear for a token."
    )
    untold = [f"Not run: {', '.join(about['left'])}."] if about["left"] else []
    untold += [f"Failed: {name} ({why})." for name, why in about.get("failed", {}).items()]
    return "\n".join(
        [
            f"# {name}",
            "",
            in_words(about, "bfloat16"),
            "",
            "Models of transformers in the sizes of published ones. Weights are random, the zeros "
            "too, evenly in the linears of the blocks; heads as wide as the vocabulary stay dense. "
            "A prompt gives the logits of its last token; a token has "
            f"{CONTEXT} others of its text in the cache. "
            f"{what} Packed is `pack_(model, (batch, "
            f"{max(PROMPTS)}), dense=True, groups=...)`, one model for prompts and tokens. "
            "Outputs differ from those of the "
            f"dense model in bfloat16 by {max(errors, default=0.0):.0e} of their norm at most.",
            *untold,
            "",
            _compiled_table(run) if is_compiled else _plain_table(run),
            "",
        ]
    )


def _plain_table(run: records.Run) -> str:
    header = ["model", "what", "zeros", "dense ms", "sparse", "packed", "sparse layers"]
    header += ["eager ms, dense", "accelerate_", "expected / after", "call, s"]
    rows = []
    for (model, case, sparsity), by in _by_case(run):
        s = {name: r["median_s"] for name, r in by.items()}
        sparse = "accelerate_" if "accelerate_" in s else "SparseLinear"
        cells = [model, case, f"{sparsity:.0%}", f"{1e3 * s['dense']:.3f}"]
        cells += [f"{s['dense'] / s[way]:.2f}" for way in (sparse, "pack_")]
        cells += [by[sparse].get("kernel", "all")]
        if "eager, before" in s:
            before, after, expected = (
                s[f"eager, {x}"] for x in ("before", "accelerate_", "expected")
            )
            cells += [f"{1e3 * before:.2f}", f"{before / after:.2f}", f"{expected / after:.2f}"]
            cells += [f"{s['the call of accelerate_']:.1f}"]
        else:
            cells += ["-"] * 4
        rows.append(cells)
    return table(header, rows, left=2)


def _compiled_table(run: records.Run) -> str:
    ways = ("dense", "dense, compiled", "pack_", "pack_, compiled")
    rows = []
    for (model, case, sparsity), by in _by_case(run):
        dense, dense_compiled, packed, packed_compiled = (by[way]["median_s"] for way in ways)
        gain = min(dense, dense_compiled) / min(packed, packed_compiled)
        times = [f"{1e3 * by[way]['median_s']:.3f}" for way in ways]
        rows.append([model, case, f"{sparsity:.0%}", *times, f"{gain:.2f}"])
    return table(["model", "what", "zeros", *ways, "packed"], rows, left=2)


def _by_case(run: records.Run) -> list[tuple[tuple, dict[str, dict]]]:
    keys = (lambda r: r["model"], lambda r: r["case"], lambda r: r["sparsity"])
    found = records.groups(run.records, *keys).items()
    return [(key, {r["contender"]: r for r in group}) for key, group in found]
