"""How fast a GPT generates, dense against sparse: one harness, one run, rounds in turn."""

import time
from collections.abc import Callable
from statistics import median
from typing import TypeVar

import torch
from torch import Tensor, nn

from .generate import Decoder
from .llama import make
from .model import GPT

SIDES = ("dense", "sparse")

Key = TypeVar("Key")


def compare(
    models: dict[str, GPT],
    prompt: Tensor,
    count: int,
    rounds: int = 5,
    advance: Callable[[str], None] = lambda what: None,
    is_compiled: bool = True,
    **sampling,
) -> dict:
    """Generate `count` tokens after prompt int64 [B, T] with models["dense"] and models["sparse"].

    The first token and the steps after it are timed apart, every way that ways() knows of, on CUDA
    as replays of CUDA graphs. Each model's best way is the one with the lowest median; all the
    samples are in the result. `advance` is called after each model in each round."""
    if count < 2 or rounds < 1:
        raise ValueError(
            f"count, rounds: expected at least 2 tokens and 1 round, got {count} and {rounds}"
        )
    decoders = {
        (side, way): decoder
        for side in SIDES
        for way, decoder in ways(models[side], prompt, count, is_compiled, **sampling).items()
    }
    seconds = race(decoders, count - 1, rounds, lambda key: advance(", ".join(key)))

    batch, context = prompt.shape
    result = {"batch": batch, "context": context, "steps": count - 1, "rounds": rounds, **sampling}
    for side in SIDES:
        of_ways = {way: seconds[s, way] for s, way in seconds if s == side}
        best = min(of_ways, key=lambda way: median(of_ways[way]["step_s"]))
        result[side] = {
            "best": best,
            "tokens_per_s": batch / median(of_ways[best]["step_s"]),
            "first_token_s": median(of_ways[best]["first_token_s"]),
            "block_bytes": memory_bytes(models[side].blocks),
            "weight_bytes": memory_bytes(models[side]),
            "ways": of_ways,
        }
    dense, sparse = (result[side] for side in SIDES)
    result["speedup"] = sparse["tokens_per_s"] / dense["tokens_per_s"]
    for name in ("block_bytes", "weight_bytes"):
        result[f"{name}_ratio"] = sparse[name] / dense[name]
    return result


def race(
    decoders: dict[Key, Decoder],
    steps: int,
    rounds: int,
    advance: Callable[[Key], None] = lambda key: None,
    reads_prompt: bool = True,
) -> dict[Key, dict[str, list[float]]]:
    """Seconds to the first token, and of each of so many steps after it, of each round. Decoders
    take turns. `reads_prompt` as of Decoder.start."""
    seconds: dict[Key, dict[str, list[float]]] = {
        key: {"first_token_s": [], "step_s": []} for key in decoders
    }
    for _ in range(rounds):
        for key, decoder in decoders.items():
            first_token_s, step_s = _time(decoder, steps, reads_prompt)
            seconds[key]["first_token_s"].append(first_token_s)
            seconds[key]["step_s"].append(step_s)
            advance(key)
    return seconds


def ways(
    model: GPT, prompt: Tensor, count: int, is_compiled: bool = True, **sampling
) -> dict[str, Decoder]:
    """The kinds of step to time: on CUDA one graph of eager kernels, or of compiled blocks."""
    eager = Decoder(model, prompt, count, captures_prompt=True, **sampling)
    if not prompt.is_cuda:
        return {"eager": eager}
    if not is_compiled:
        return {"CUDA graph": eager}
    twin = compiled_blocks(model)
    compiled = Decoder(model, prompt, count, stepper=twin, captures_prompt=True, **sampling)
    return {"CUDA graph": eager, "CUDA graph, compiled": compiled}


def compiled_blocks(model: GPT) -> GPT:
    """A twin that shares all weights, with blocks, head and loss compiled by torch.compile; no
    gradient comes to its logits but by the loss.

    Blocks share a compilation. fullgraph: where there should be one too many it is an error. Sets
    options of torch.compile for the whole process: it would compile anew for each block, since each
    has sparse weights of a size of its own."""
    options = torch._dynamo.config
    options.force_parameter_static_shapes = False
    options.force_nn_module_property_static_shapes = False
    options.allow_unspec_int_on_nn_module = True
    options.recompile_limit = 64  # for all models, batches and sparsities together
    with torch.device("meta"):
        twin = make(model.config)
    for name, part in model.named_children():
        setattr(twin, name, part)
    twin.blocks = nn.ModuleList(torch.compile(block, fullgraph=True) for block in model.blocks)

    def score(x: Tensor, targets: Tensor) -> tuple[Tensor, Tensor]:
        logits, loss = model.score(x, targets)
        return logits.detach(), loss  # or zeros would be added to their gradient

    twin.score = torch.compile(score, fullgraph=True)
    return twin


def memory_bytes(module: nn.Module) -> int:
    """Bytes of all parameters and buffers, shared ones once."""
    return sum(t.nbytes for t in [*module.parameters(), *module.buffers()])


def _time(decoder: Decoder, steps: int, reads_prompt: bool) -> tuple[float, float]:
    """Seconds to the first token, and of each step after it."""
    began = _now(decoder)
    decoder.start(reads_prompt)
    read = _now(decoder)
    for _ in range(steps):
        decoder.step()
    return read - began, (_now(decoder) - read) / steps


def _now(decoder: Decoder) -> float:
    if decoder.tokens.is_cuda:
        torch.cuda.synchronize(decoder.tokens.device)
    return time.perf_counter()
