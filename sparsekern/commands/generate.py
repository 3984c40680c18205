"""python -m sparsekern generate"""

import copy
import sys
import time
from pathlib import Path

import torch

from ..gpt import speed
from ..gpt.build import load_model
from ..gpt.config import MOST_SEED
from ..gpt.data import ByteTokenizer, Tokenizer
from ..gpt.flags import check_sparsity
from ..gpt.generate import check_sampling, generate
from ..gpt.model import GPT, GPTConfig
from ..gpt.presets import PRESETS, for_inference, random_gpt
from ..nn import SparseLinear, densify_
from ..report import demo as demo_report
from ..terminal import Progress


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
    keep_dense: bool,
    **sampling,
) -> None:
    if tokens < 1 or batch < 1 or not prompt:
        raise ValueError(
            "generate: expected a prompt, tokens >= 1 and batch >= 1, "
            f"got prompt {prompt!r}, tokens {tokens}, batch {batch}"
        )
    if not _is_utf8(prompt):
        raise ValueError(f"prompt: expected text in UTF-8, got {prompt!r}")
    check_sampling(tokens, sampling["temperature"], sampling["top_k"])  # before a model is made
    if bench and tokens < 2:
        raise ValueError(f"bench: expected at least 2 tokens, got {tokens}")
    if not 0 <= sampling["seed"] <= MOST_SEED:
        raise ValueError(f"seed: expected 0 to {MOST_SEED}, got {sampling['seed']}")
    place = chosen_device(device)
    kind = getattr(torch, dtype or ("bfloat16" if place.type == "cuda" else "float32"))
    if keep_dense and place.type != "cuda":
        raise ValueError("keep_dense: expected a GPU; on a CPU each call takes what is faster")
    if checkpoint:
        if random_weights or sparsity is not None:
            raise ValueError("checkpoint: its weights and zeros stay, give no others")
        models, tokenizer = trained_models(checkpoint, place, kind, batch, bench, keep_dense)
    else:
        if not random_weights:
            raise ValueError(f"preset: {preset} has no trained weights here, add --random-weights")
        kinds = sparsity or 0.0, place, kind, sampling["seed"], batch, bench, keep_dense
        models = random_models(preset, *kinds)
        tokenizer = ByteTokenizer()
    idx = tokenizer.encode(prompt)[None].long().repeat(batch, 1).to(place)
    if bench:
        with Progress(None, unit="model and round") as progress:
            found = speed.compare(models, idx, tokens, advance=progress.advance, **sampling)
        print(demo_report.generation_section(found))
        return
    began = time.perf_counter()
    with Progress(tokens, unit="token") as progress:
        drawn = generate(models["sparse"], idx, tokens, **sampling, advance=progress.advance)
    texts = drawn.tolist()
    took_s = time.perf_counter() - began
    for ids in texts:
        # What random weights choose is no text.
        print(tokenizer.decode(ids) if checkpoint else " ".join(map(str, ids)), end="\n\n")
    print(f"{batch} x {tokens} tokens in {took_s:.2f} s, after loading", file=sys.stderr)


def _is_utf8(text: str) -> bool:
    """Python has other bytes of a command line as surrogates, which nothing encodes."""
    return not any("\ud800" <= character <= "\udfff" for character in text)


def chosen_device(name: str | None) -> torch.device:
    count = torch.cuda.device_count()
    gpus = ["cuda", *(f"cuda:{i}" for i in range(count))] if count else []
    if name not in (None, "cpu", *gpus):
        known = f"one of {', '.join(['cpu', *gpus])}" if gpus else "cpu, this torch sees no GPU"
        raise ValueError(f"device: expected {known}, got {name!r}")
    return torch.device(name or ("cuda" if count else "cpu"))


def calls(batch: int, keep_dense: bool, config: GPTConfig) -> tuple[int, int]:
    """The least and the most tokens of a call that layers are packed for: prompts count where they
    may run dense."""
    return batch, batch * config.block_size if keep_dense else batch


def trained_models(
    path: Path,
    device: torch.device,
    dtype: torch.dtype,
    batch: int,
    with_dense: bool,
    keep_dense: bool,
) -> tuple[dict[str, GPT], Tokenizer]:
    model, tokenizer = load_model(path)
    model.requires_grad_(False)  # values in training are packed anew in each step
    if (with_dense or keep_dense) and not any(isinstance(m, SparseLinear) for m in model.modules()):
        name = "bench" if with_dense else "keep_dense"
        raise ValueError(f"{name}: expected a sparse model, {path} is dense")
    models = {}
    if with_dense:
        models["dense"] = densify_(copy.deepcopy(model)).to(device, dtype)
    tokens = calls(batch, keep_dense, model.config)
    models["sparse"] = for_inference(model.to(device, dtype), tokens, keep_dense)
    return models, tokenizer


def random_models(
    preset: str,
    sparsity: float,
    device: torch.device,
    dtype: torch.dtype,
    seed: int,
    batch: int,
    with_dense: bool,
    keep_dense: bool,
) -> dict[str, GPT]:
    check_sparsity(sparsity)
    if (with_dense or keep_dense) and not sparsity:
        name = "bench" if with_dense else "keep_dense"
        raise ValueError(f"{name}: expected a sparse model, give a sparsity above 0")
    wanted = {"dense": 0.0} if with_dense else {}
    config = PRESETS[preset]
    packed = calls(batch, keep_dense, config), keep_dense
    models = {}
    with Progress(config.n_layer * (1 + len(wanted)), unit="block") as progress:
        for name, zeros in (wanted | {"sparse": sparsity}).items():
            models[name] = random_gpt(config, zeros, device, dtype, seed, *packed, progress.advance)
    return models
