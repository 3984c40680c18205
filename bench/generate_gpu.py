"""Generation on a GPU: time to the first token, tokens per second and memory of one GPT in many
forms (generate_arms.py), for batches of texts and lengths of prompts.

python bench/run_gpu.py generate [--preset gpt3-6.7b] [--batches 1 16 64] [--prompts 16 512 2048]
                                 [--layers 32] [--sparsity 0.75]

writes results/<GPU>-generate-<preset>-<date>.csv, rewritten after each case, and prints a page.
First token and steps are replays of CUDA graphs, all arms in turn. Prompts of more tokens together
than --most-read are not read: there steps alone are timed. --limit-s: no case is begun after so
long, and the page names what is left out. --eager: arms that take the model's own forward, too;
--compiled: the dense blocks by torch.compile, with the first prompt of a batch.
"""

import argparse
import gc
import time
from collections.abc import Iterator, Sequence
from dataclasses import replace
from datetime import date
from pathlib import Path
from statistics import median

import pages
import torch
from generate_arms import Arm, Arms
from torch import Tensor

from sparsekern.bench import records
from sparsekern.bench.machine import about_cpu, about_gpu, about_run, gpu_under_load, in_words
from sparsekern.bench.records import DENSE, OTHER, OURS
from sparsekern.bench.turns import way
from sparsekern.gpt import speed
from sparsekern.gpt.generate import CACHE_MULTIPLE, Decoder, Pass, pass_of
from sparsekern.gpt.model import GPT, Cache, GPTConfig
from sparsekern.gpt.presets import PRESETS
from sparsekern.terminal import table

MOST_READ = 8192
CHECK_TOKENS = 17  # a prompt of 16, as is measured: cuSPARSELt's algorithms are timed once
ROUNDED = 0.2  # relative error that 8 bits may make of a block's logits


def random_prompt(config: GPTConfig, batch: int, context: int) -> Tensor:
    generator = torch.Generator().manual_seed(0)
    return torch.randint(config.vocab_size, (batch, context), generator=generator)


# Logits


def logits_of(prompt: Pass, step: Pass, model: GPT, idx: Tensor) -> Tensor:
    """float64 [2, B, V]: after all tokens but the last, which are a prompt, and after it."""
    cache = Cache(model, len(idx), CACHE_MULTIPLE)
    last = torch.tensor([idx.shape[1] - 1], device=idx.device)
    with torch.no_grad():
        first = prompt(idx[:, :-1], cache, None)[:, -1]
        return torch.stack([first, step(idx[:, -1:], cache, last)[:, -1]]).double()


def errors_of(arms: Arms, all_arms: Sequence[Arm], batch: int, device: str) -> dict[str, float]:
    """Relative error of the logits of one block of each arm, of a prompt or of a step, against the
    same weights in float64. ArithmeticError for an arm in 16 bits that errs twice as much as dense,
    and one in 8 that errs more than ROUNDED."""
    tokens = min(CHECK_TOKENS, arms.config.block_size)
    idx = random_prompt(arms.config, batch, tokens).to(device)
    exact: dict[str | None, Tensor] = {}
    errors: dict[str, float] = {}
    for arm in all_arms:
        if arm.mask not in exact:
            model = arms.exact(arm.mask)
            exact[arm.mask] = logits_of(pass_of(model, False), pass_of(model, False), model, idx)
        one = arms.of(arm.model.blocks[0], 1)
        prompt = pass_of(one, arm.fuses)
        step = pass_of(arms.of(arm.stepper.blocks[0], 1), arm.fuses) if arm.stepper else prompt
        want, got = exact[arm.mask], logits_of(prompt, step, one, idx)
        of_each = (got - want).flatten(1).norm(dim=1) / want.flatten(1).norm(dim=1)
        errors[arm.name] = error = of_each.max().item()
        limit = ROUNDED if arm.is_rounded else 2 * errors["dense"]
        if not error <= limit:
            raise ArithmeticError(f"{arm.name}: logits are wrong, batch {batch}: {errors}")
    return errors


# Times


def cases(
    preset: str, options: argparse.Namespace, left: list[str], device: str = "cuda"
) -> Iterator[dict]:
    """A case for each batch and prompt; into `left` go those that are not run, and why."""
    began = time.perf_counter()

    def tell(what: str) -> None:
        print(f"{time.perf_counter() - began:6.1f} s  {what}", flush=True)

    def is_late() -> bool:
        return time.perf_counter() - began > options.limit_s

    longest = max(options.prompts)
    config = replace(PRESETS[preset], block_size=longest + options.tokens)
    config = replace(config, n_layer=options.layers or config.n_layer)
    arms = Arms(config, options.sparsity, device)
    tell(f"{preset}, {config.n_layer} blocks: weights and masks")
    for batch in options.batches:
        if is_late():
            left.append(f"batch {batch} (no time)")
            continue
        made: list[Arm] = []
        for arm in arms.all(batch, longest, options.eager):
            if device == "cuda":
                torch.cuda.synchronize()
            tell(f"batch {batch}: {arm.name}, {bytes_of(arm) / 1e9:.1f} GB")
            made.append(arm)
        errors = errors_of(arms, made, batch, device)
        tell(f"errors: {', '.join(f'{name} {e:.1e}' for name, e in errors.items())}")
        for context in options.prompts:
            reason = too_large(config, batch, context, len(made), options)
            if reason := reason or ("no time" if is_late() else None):
                left.append(f"batch {batch}, prompt {context} ({reason})")
                continue
            prompt = random_prompt(config, batch, context).to(device)
            is_compiled = options.compiled and context == options.prompts[0]
            found = raced(made, prompt, options, is_compiled)
            yield case(preset, config, options, batch, context, made, errors, found)
            steps = {name: 1e6 * median(seconds["step_s"]) for name, seconds in found.items()}
            told = ", ".join(f"{name} {us:,.0f} us" for name, us in steps.items())
            tell(f"batch {batch}, prompt {context}: {told}")
            gc.collect()
            if device == "cuda":
                torch.cuda.empty_cache()


def raced(
    arms: Sequence[Arm], prompt: Tensor, options: argparse.Namespace, is_compiled: bool
) -> dict[str, dict[str, list[float]]]:
    """Seconds of the first token, where prompts are read, and of a step, of each arm."""
    batch, context = prompt.shape
    config, reads = arms[0].model.config, batch * context <= options.most_read
    length = -(-(context + options.tokens) // CACHE_MULTIPLE) * CACHE_MULTIPLE
    cache = Cache(arms[0].model, batch, length)
    how = {"cache": cache, "captures_prompt": reads}
    decoders = {}
    for arm in arms:
        pair = arm.model, prompt, options.tokens
        decoders[arm.name] = Decoder(*pair, stepper=arm.stepper, fuses=arm.fuses, **how)
    if is_compiled:
        twin = speed.compiled_blocks(arms[0].model)
        pair = arms[0].model, prompt, options.tokens
        decoders["dense, compiled"] = Decoder(*pair, stepper=twin, fuses=False, **how)
    assert config.block_size >= context + options.tokens
    found = speed.race(decoders, options.tokens - 1, options.rounds, reads_prompt=reads)
    if not reads:
        for seconds in found.values():
            del seconds["first_token_s"]
    return found


def case(
    preset: str,
    config: GPTConfig,
    options: argparse.Namespace,
    batch: int,
    context: int,
    arms: Sequence[Arm],
    errors: dict[str, float],
    found: dict[str, dict[str, list[float]]],
) -> dict:
    by_name = {arm.name: arm for arm in arms}
    ways = {}
    for name, seconds in found.items():
        arm = by_name.get(name, arms[0])  # compiled is the first one
        error = errors.get(name, errors[arms[0].name])
        ways[name] = way(arm.kind, seconds["step_s"], error, float("inf"))
        ways[name] |= {"bytes": bytes_of(arm), "weight_bytes": bytes_of(arm, with_head=True)}
        if "first_token_s" in seconds:
            ways[name]["first_token_s"] = median(seconds["first_token_s"])
    return {
        **{"op": "generate", "device": "cuda", "model": preset, "layers": config.n_layer},
        **{"width": config.n_embd, "vocabulary": config.vocab_size, "context": context},
        **{"batch": batch, "tokens": 1, "sparsity": options.sparsity, "threads": 0},
        "dtype": "bfloat16",
        "ways": ways,
    }


def bytes_of(arm: Arm, with_head: bool = False) -> int:
    """Of all blocks that it holds; embeddings and head once."""
    models = [arm.model, *([arm.stepper] if arm.stepper else [])]
    blocks = sum(speed.memory_bytes(model.blocks) for model in models)
    others = speed.memory_bytes(arm.model) - speed.memory_bytes(arm.model.blocks)
    return blocks + others * with_head


def too_large(
    config: GPTConfig, batch: int, context: int, arms: int, options: argparse.Namespace
) -> str | None:
    """Why a case is not run; None where it is."""
    if not torch.cuda.is_available():
        return None
    head = config.n_embd // config.n_head
    cache = 4 * config.n_layer * batch * (context + options.tokens) * config.kv_heads * head
    read = batch * context if batch * context <= options.most_read else 0
    # What captured prompts keep: of one block, and its inputs.
    graphs = arms * 2 * read * (2 * max(n for n, _ in config.linears) + 8 * config.n_embd)
    needed, free = cache + graphs, torch.cuda.mem_get_info()[0]
    if needed > 0.9 * free:
        return f"it takes about {needed / 1e9:.0f} GB, {free / 1e9:.0f} are free"
    return None


# Tables


def summary(found: Sequence[dict]) -> str:
    """Steps, first tokens and bytes, a line for each case."""
    kinds = {name: w["kind"] for each in found for name, w in each["ways"].items()}
    others = [name for name in kinds if kinds[name] in (OURS, OTHER)]
    steps, first, memory = [], [], []
    for each in found:
        ways = each["ways"]
        dense = {n: w for n, w in ways.items() if w["kind"] == DENSE}
        best = min(dense, key=lambda n: dense[n]["median_s"])
        best_s = dense[best]["median_s"]
        row = [each["model"], f"{each['batch']}", f"{each['context']}"]

        def cells(value, ways=ways) -> list[str]:
            return [value(ways[n]) if n in ways else "" for n in others]

        times = cells(lambda w, s=best_s: f"{s / w['median_s']:.2f}")
        steps.append([*row, f"{each['batch'] / best_s:,.0f}", best, *times])
        if "first_token_s" in ways[best]:
            least = min(w["first_token_s"] for w in dense.values())
            shares = cells(lambda w, s=least: f"{w['first_token_s'] / s:.2f}")
            first.append([*row, f"{1e3 * least:.2f}", *shares])
        if each["context"] == found[0]["context"]:
            shares = cells(lambda w, b=ways["dense"]["bytes"]: f"{w['bytes'] / b:.2f}")
            memory.append([*row[:2], f"{ways['dense']['bytes'] / 1e9:.1f}", *shares])
    head = ["model", "batch", "prompt"]
    return "\n\n".join(
        [
            "Tokens a second of the best dense arm, and how many times as fast others are:",
            table([*head, "dense, tokens/s", "best", *others], steps, left=1),
            "Milliseconds to the first token of the best dense arm, and shares of it:",
            table([*head, "dense, ms", *others], first, left=1),
            "Gigabytes of the dense blocks, and shares of them:",
            table([*head[:2], "dense, GB", *others], memory, left=1),
        ]
    )


def of_dense(found: Sequence[dict]) -> str:
    """Microseconds of a step of every dense arm, and of what is not fused."""
    names = list(dict.fromkeys(n for c in found for n in c["ways"]))
    rows = [
        [c["model"], f"{c['batch']}", f"{c['context']}"]
        + [f"{1e6 * c['ways'][n]['median_s']:,.0f}" if n in c["ways"] else "" for n in names]
        for c in found
    ]
    return table(["model", "batch", "prompt", *names], rows, left=1)


PAGE = """\
# {name}

{heading}

Generation with {what}, {sparsity:.0%} of the weights of the blocks zero, at random or two-way. All
blocks are copies of one, in memory of their own; dense weights have no zeros. First token (the
prompt read and a token sampled) and steps of one token for each text are replays of CUDA graphs,
medians of {rounds} rounds, all arms in turn; of a round {steps} steps. Prompts of more than
{most_read} tokens together were not read: there steps alone are timed. All arms take the fused pass
(sparsekern/gpt/fused.py) unless said. Best of dense: W as [N, K] or [K, N]. Packed: for the batch,
or for the batch and prompts, with dense copies where these are faster; two-way: 2:4 for prompts and
a packed layout for steps; two-way E4M3: 2:4 in E4M3 for prompts, a packed layout with values in
E4M3 for steps; dense E4M3: one scale for W and one for x. {left}

{summary}

Microseconds of a step:

{steps_us}

Errors of one block's logits against float64 weights, the worst of all batches: {errors}.
"""


def page(
    name: str,
    about: dict,
    found: Sequence[dict],
    left: Sequence[str],
    options: argparse.Namespace,
) -> str:
    errors: dict[str, float] = {}
    for each in found:
        for arm, w in each["ways"].items():
            errors[arm] = max(w["error"], errors.get(arm, 0.0))
    first = found[0]
    return PAGE.format(
        name=name,
        heading=in_words(about, "bfloat16"),
        what=f"{first['layers']} blocks of {first['model']}",
        sparsity=first["sparsity"],
        rounds=options.rounds,
        steps=options.tokens - 1,
        most_read=options.most_read,
        left=f"Not run: {', '.join(left)}." if left else "",
        summary=summary(found),
        steps_us=of_dense(found),
        errors=", ".join(f"{arm} {error:.1e}" for arm, error in errors.items()),
    )


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--preset", choices=PRESETS, default="gpt3-6.7b")
    parser.add_argument("--layers", type=int, help="as many blocks of it (all)")
    parser.add_argument("--sparsity", type=float, default=0.75)
    parser.add_argument("--batches", type=int, nargs="+", default=[1, 16, 64])
    parser.add_argument("--prompts", type=int, nargs="+", default=[16, 512, 2048])
    parser.add_argument("--tokens", type=int, default=17)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--most-read", type=int, default=MOST_READ)
    parser.add_argument("--limit-s", type=float, default=float("inf"))
    parser.add_argument("--eager", action="store_true")
    parser.add_argument("--compiled", action="store_true")
    parser.add_argument("--out", type=Path, default=pages.RESULTS, help="folder (%(default)s)")
    parser.add_argument("--commit", help="where there is no repository")
    options = parser.parse_args(arguments)
    for name, least in (("tokens", 2), ("rounds", 1), ("batches", 1), ("prompts", 1)):
        given = getattr(options, name)
        if min(given if isinstance(given, list) else [given]) < least:
            parser.error(f"--{name}: expected {least} or more, got {given}")
    if options.layers is not None and options.layers < 1:
        parser.error(f"--layers: expected 1 or more, got {options.layers}")
    if not 0 < options.sparsity < 1:
        parser.error(f"--sparsity: expected a number between 0 and 1, got {options.sparsity}")
    machine = about_cpu() | about_gpu() | {"under_load": gpu_under_load()}
    about = about_run("generate", machine, options.commit)
    name = f"{pages.slug(machine['gpu'])}-generate-{options.preset}-{date.today()}"
    path = options.out / f"{name}{records.SUFFIX}"
    done: list[dict] = []
    left: list[str] = []
    try:
        for each in cases(options.preset, options, left):
            done.append(each)
            records.write(path, about, records.flat(done))
    finally:  # what was measured is not lost
        if done:
            text = page(path.stem, about, done, left, options)
            path.with_suffix(".md").write_text(text)
            print(f"\n{text}\n{len(done)} cases: {path}")


if __name__ == "__main__":
    main()
