"""Generation: tokens per second with sparse linears against dense ones.

Under pytest, on a CPU: GPT-2 small. As a script, on a GPU: the larger presets with random weights.

python bench/bench_generate.py [--preset gpt3-6.7b] [--sparsities 0.75] [--batches 1 16 64]
                               [--prompts 16 512 2048] [--layers 32]

prints a section for each sparsity, batch, prompt and form of the weights and keeps all of them in
results/generate-<preset>-<GPU>-<date>.csv, rewritten after each. Sparse weights are packed for the
batch (the fewest bytes), and for batch and prompt with dense copies where these are faster. First
token and steps are replays of CUDA graphs, dense and sparse. --quick: 2 blocks of each of two
presets, fewer rounds, nothing compiled; in about a minute.
"""

import argparse
import copy
import gc
import itertools
import re
import time
from collections.abc import Iterator
from dataclasses import asdict, dataclass, replace
from datetime import date
from pathlib import Path
from statistics import median

import grids
import pytest
import torch
from torch import Tensor

from sparsekern import densify_, sparsify_
from sparsekern.bench import records
from sparsekern.bench.machine import about_cpu, about_gpu, about_run
from sparsekern.bench.race import Rival, ours, race
from sparsekern.bench.rates import derive
from sparsekern.bench.records import DENSE, OURS
from sparsekern.bench.turns import way as found
from sparsekern.gpt import speed
from sparsekern.gpt.generate import CACHE_MULTIPLE, Decoder
from sparsekern.gpt.model import GPT, Cache, GPTConfig
from sparsekern.gpt.presets import PRESETS, UniformMask, for_inference, random_gpt
from sparsekern.report.demo import generation_section
from sparsekern.terminal import table

RESULTS = Path(__file__).parent / "results"
# The allocator rounds each tensor up to 512 bytes, and libraries have workspaces; more than this
# would be weights that hide.
UNSEEN_MEMORY = 0.01
WORKSPACE_BYTES = 2**25
CHECK_TOKENS = 8
FORMS = {"packed": False, "with dense copies": True}
QUICK = ("gpt3-6.7b", "llama-like"), 2  # presets, blocks of each
MOST_TOKENS = 2**15  # of all prompts of a batch, in --quick: a pass takes as long as a round


@dataclass(frozen=True)
class Generation:
    """A model, and so many tokens after a prompt of `context` for each text of the batch."""

    model: str
    sparsity: float
    batch: int
    context: int
    tokens: int
    threads: int

    def __str__(self) -> str:
        return f"{self.model}-B{self.batch}-{self.sparsity:.0%}-{self.threads}T"


TINY = GPTConfig(n_layer=1, n_head=2, n_embd=32, block_size=64, vocab_size=256)


def workloads(quick: bool) -> list[Generation]:
    if quick:
        return [Generation("tiny", 0.75, 2, 4, 8, 1)]
    return [Generation("gpt2-small", 0.75, batch, 16, 32, 1) for batch in (1, 16)]


def random_prompt(config: GPTConfig, batch: int, context: int) -> Tensor:
    generator = torch.Generator().manual_seed(0)
    return torch.randint(config.vocab_size, (batch, context), generator=generator)


@pytest.mark.runs_on(workloads=workloads)
def test_generate(keep_race, is_quick, workload):
    config = PRESETS.get(workload.model, TINY)
    sparse = random_gpt(config, workload.sparsity)
    dense = densify_(copy.deepcopy(sparse))
    prompt = random_prompt(config, workload.batch, workload.context)
    decoders = [Decoder(m, prompt, workload.tokens, temperature=0) for m in (sparse, dense)]

    def run(decoder: Decoder) -> Tensor:
        decoder.start()
        for _ in range(workload.tokens - 1):
            decoder.step()
        return decoder.tokens

    assert torch.equal(*map(run, decoders))
    ways = race(
        ours(lambda: run(decoders[0])),
        [Rival("dense", DENSE, lambda: run(decoders[1]))],
        workload.threads,
        most_rounds=grids.most_rounds(is_quick),
    )
    info = {"op": "generate", "device": "cpu", **asdict(workload), "M": workload.batch}
    keep_race(info | {"ways": ways})


# On a GPU


def errors_of_one_block(
    config: GPTConfig,
    sparsity: float,
    batch: int,
    device: str,
    dtype: torch.dtype,
    keeps_dense: bool = False,
) -> dict[str, float]:
    """Relative error of the logits of a decoding step, against the same weights in fp64: of the
    sparse model and of its dense twin. ArithmeticError where the sparse one errs twice as much."""
    dense = random_gpt(replace(config, n_layer=1), 0.0, device, dtype)
    sparse = sparsify_(dense, UniformMask(sparsity))
    twin = densify_(copy.deepcopy(sparse))
    tokens = random_prompt(config, batch, CHECK_TOKENS).to(device)
    exact = decoded_logits(copy.deepcopy(twin).double(), tokens)
    packed = for_inference(sparse, (batch, batch * CHECK_TOKENS), keeps_dense)
    errors = {
        name: ((decoded_logits(model, tokens) - exact).norm() / exact.norm()).item()
        for name, model in {"dense": twin, "sparse": packed}.items()
    }
    if not errors["sparse"] <= 2 * errors["dense"]:
        raise ArithmeticError(f"logits are wrong at {sparsity:.0%}, batch {batch}: {errors}")
    return errors


@torch.no_grad()
def decoded_logits(model: GPT, tokens: Tensor) -> Tensor:
    """fp64 [B, V] after the last token, which alone is read through the cache."""
    cache = Cache(model, len(tokens), CACHE_MULTIPLE)
    places = torch.arange(tokens.shape[1], device=tokens.device)
    model(tokens[:, :-1], cache=cache, position=places[:-1])
    return model(tokens[:, -1:], cache=cache, position=places[-1:])[0][:, -1].double()


def build(
    config: GPTConfig,
    sparsity: float,
    device: str,
    dtype: torch.dtype,
    tokens: tuple[int, int] = (1, 1),
    keeps_dense: bool = False,
) -> GPT:
    """A random model for calls of so many tokens. Its memory is what its tensors say, or this
    fails."""
    began, before = time.perf_counter(), torch.cuda.memory_allocated()
    model = random_gpt(config, sparsity, device, dtype, tokens=tokens, keeps_dense=keeps_dense)
    gc.collect()
    held, counted = torch.cuda.memory_allocated() - before, speed.memory_bytes(model)
    most = (1 + UNSEEN_MEMORY) * counted + WORKSPACE_BYTES
    assert held <= most, f"{held} bytes are held, {counted} counted"
    print(f"{sparsity:.0%} sparse: built in {time.perf_counter() - began:.1f} s", flush=True)
    return model


def case(
    name: str,
    config: GPTConfig,
    sparsity: float,
    dtype: torch.dtype,
    run: dict,
    errors: dict[str, float],
) -> dict:
    """What speed.compare() found: a way is a model and how its steps are run."""
    ways = {
        f"{side}, {way}": {
            **found(kind, seconds["step_s"], errors[side], float("inf")),
            "bytes": run[side]["block_bytes"],
            "weight_bytes": run[side]["weight_bytes"],
            "first_token_s": median(seconds["first_token_s"]),
        }
        for side, kind in (("dense", DENSE), ("sparse", OURS))
        for way, seconds in run[side]["ways"].items()
    }
    return {
        **{"op": "generate", "device": "cuda", "model": name, "layers": config.n_layer},
        **{"width": config.n_embd, "vocabulary": config.vocab_size, "context": run["context"]},
        **{"batch": run["batch"], "tokens": 1, "sparsity": sparsity, "threads": 0},
        "dtype": str(dtype).removeprefix("torch."),
        "ways": ways,
    }


def cases(preset: str, options: argparse.Namespace, device: str = "cuda") -> Iterator[dict]:
    """A case for each sparsity, batch, form and prompt."""
    dtype, longest = torch.bfloat16, max(options.prompts)
    config = replace(PRESETS[preset], block_size=longest + options.tokens)
    config = replace(config, n_layer=options.layers or config.n_layer)
    dense = build(config, 0.0, device, dtype)
    for sparsity, batch in itertools.product(options.sparsities, options.batches):
        for form, keeps_dense in FORMS.items():
            tokens = (batch, batch * longest if keeps_dense else batch)
            sparse = build(config, sparsity, device, dtype, tokens, keeps_dense)
            errors = errors_of_one_block(config, sparsity, batch, device, dtype, keeps_dense)
            for context in options.prompts:
                if reason := too_large(config, batch, context, options):
                    print(f"Left out: {preset}, batch {batch}, prompt {context}: {reason}")
                    continue
                prompt = random_prompt(config, batch, context).to(device)
                models = {"dense": dense, "sparse": sparse}
                run = speed.compare(
                    models, prompt, options.tokens, options.rounds, is_compiled=options.compiled
                )
                print(f"\n## {preset}, {config.n_layer} blocks, {sparsity:.0%}, {form}\n")
                print(generation_section(run), flush=True)
                name = preset if form == "packed" else f"{preset}, {form}"
                yield case(name, config, sparsity, dtype, run, errors)
                del models
            print(f"Error of one block's logits: {errors}", flush=True)
            del sparse


def too_large(
    config: GPTConfig, batch: int, context: int, options: argparse.Namespace
) -> str | None:
    """Why a case is not run; None where it is."""
    if options.quick and batch * context > MOST_TOKENS:
        return f"more than {MOST_TOKENS} tokens, which take long"
    if not torch.cuda.is_available():
        return None
    # Of each decoder: the cache, and what a captured prompt keeps of one block and its inputs.
    head = config.n_embd // config.n_head
    cache = 4 * config.n_layer * batch * config.block_size * config.kv_heads * head
    prompt = 2 * batch * context * (2 * max(n for n, _ in config.linears) + 8 * config.n_embd)
    decoders = 2 * (1 + options.compiled)
    needed, free = decoders * (cache + prompt), torch.cuda.mem_get_info()[0]
    if needed > 0.9 * free:
        return f"it takes about {needed / 1e9:.0f} GB, {free / 1e9:.0f} are free; fewer --layers"
    return None


def summary(cases: list[dict]) -> str:
    """A line for each case: tokens/s, first token and bytes, of sparse over dense."""
    rows = []
    for each in map(derive, cases):
        dense, sparse = each["ways"][each["best_dense"]], each["ways"][each["ours"]]
        rows.append(
            [
                each["model"],
                f"{each['layers']}",
                f"{each['sparsity']:.0%}",
                f"{each['batch']}",
                f"{each['context']}",
                f"{each['batch'] / dense['median_s']:,.0f}",
                f"{each['speedup']:.2f}",
                f"{1e3 * dense['first_token_s']:.2f}",
                f"{sparse['first_token_s'] / dense['first_token_s']:.2f}",
                f"{sparse['bytes'] / dense['bytes']:.2f}",
            ]
        )
    header = ["model", "blocks", "zeros", "batch", "prompt", "dense tokens/s", "sparse, times"]
    header += ["dense first token ms", "sparse, of it", "blocks' bytes"]
    return table(header, rows, left=1)


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--preset", choices=PRESETS, help="(gpt3-6.7b; --quick: two)")
    parser.add_argument("--layers", type=int, help="as many blocks of it (all; --quick: 2)")
    parser.add_argument("--sparsities", type=float, nargs="+", default=[0.75])
    parser.add_argument("--batches", type=int, nargs="+", default=[1, 16, 64])
    parser.add_argument("--prompts", type=int, nargs="+", default=[16, 512, 2048])
    parser.add_argument("--tokens", type=int, default=64)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--quick", action="store_true")
    parser.add_argument("--out", type=Path, default=RESULTS, help="folder (%(default)s)")
    parser.add_argument("--commit", help="where there is no repository")
    options = parser.parse_args(arguments)
    presets = [options.preset] if options.preset else ["gpt3-6.7b"]
    options.compiled = not options.quick
    if options.quick:
        presets = [options.preset] if options.preset else list(QUICK[0])
        options.layers = options.layers or QUICK[1]
        options.tokens, options.rounds = 8, 3
    about = about_run("generate", about_cpu() | about_gpu(), options.commit)
    gpu = about["machine"]["gpu"]
    name = f"generate-{'quick' if options.quick else presets[0]}-{gpu}-{date.today()}"
    path = options.out / f"{re.sub(r'[^a-z0-9.]+', '-', name.lower())}{records.SUFFIX}"
    done: list[dict] = []
    for preset in presets:
        for each in cases(preset, options):
            done.append(each)
            records.write(path, about, records.flat(done))
        gc.collect()
        torch.cuda.empty_cache()
    print(f"\n{summary(done)}\n\n{len(done)} cases: {path}")


if __name__ == "__main__":
    main()
