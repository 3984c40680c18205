"""A model that others have trained on far more text than can be had here, pruned and trained on.

SmolLM2-135M-Instruct (2T tokens), out of a package, in 4 bits that are written out. Zeros are added
step by step, by Wanda; after each step the weights that are left train on, by the mean of cross
entropy and of the divergence from the model as it came. Dense weights train on in the same way, as
long: what they learn of this text is no merit of zeros. Masked dense weights, as in engine.py.
"""

import copy
import fcntl
import hashlib
import itertools
import math
import os
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from sparsekern.bench.machine import processor
from sparsekern.files import atomic_write
from sparsekern.gpt.build import build_optimizer
from sparsekern.gpt.step import GRADIENT_CLIP
from sparsekern.nn import SparseLinear
from sparsekern.sparsity import Wanda
from sparsekern.sparsity.pattern import places_of

from . import build, study
from .arms import passes, rates
from .masks import Masks, at
from .retold import Rows, Text, kept, retold
from .scores import Scores, score_rows
from .sweep import finite, one_more
from .worker import DTYPES

MODEL = "SmolLM2-135M-Instruct"
BATCH, STAGE_TOKENS, CALIBRATION_ROWS = 64, 25_000_000, 128
RATES, LEAST_RATE, MOST_RATE = (1e-4, 3e-4, 1e-3), 1e-6, 1e-2
SEED = 0
LOOKS = 10  # at some held-out text, while a stage trains
LOOK_ROWS = 8  # every so many of the rows of dev


@dataclass(frozen=True)
class Stage:
    """`start`: the stage whose weights it begins with, the model as it came where there is none;
    `length`: times STAGE_TOKENS; `rate_of`: the stage whose rate it takes, swept where none."""

    title: str
    sparsity: float = 0.0
    start: str = ""
    length: int = 1
    rate_of: str = ""


STAGES = {
    "50": Stage("50 % zeros", 0.5),
    "60": Stage("then 60 %", 0.6, "50", rate_of="50"),
    "70": Stage("then 70 %", 0.7, "60", rate_of="50"),
    "75": Stage("then 75 %", 0.75, "70", rate_of="50"),
    "80": Stage("then 80 %", 0.8, "75", rate_of="50"),
    "dense": Stage("dense"),
    "dense-3": Stage("dense, three times as long", length=3, rate_of="dense"),
    "dense-5": Stage("dense, five times as long", length=5, rate_of="dense"),
    "70-at-once": Stage("70 % at once, three times as long", 0.7, length=3, rate_of="50"),
}
# Nats a token of held-out text: the first less the second, with as many tokens. Written down before
# the first run; single runs, so no interval.
PREDICTED = (
    ("50", "dense", 0.10, 0.25),
    ("70", "dense-3", 0.35, 0.70),
    ("80", "dense-5", 0.70, 1.30),
    ("70-at-once", "70", -0.05, 0.15),
)
NEEDED = {"stage", "rate", "dev", "model"} | study.ABOUT


class Parts:
    """What all stages share: the model as it came, which teaches, one that trains, their text, and
    where they run. `pruned`: by start and sparsity, masks and scores before training."""

    def __init__(self, model: nn.Module, text: Text, device: str) -> None:
        self.text, self.device = text, device
        self.length = text.rows["code/test"].ids.shape[1] - 1
        self.dtype = DTYPES[device]
        self.model, self.student = model.to(device), copy.deepcopy(model).to(device)
        self.pruned: dict[tuple[str, float], tuple[Masks, dict]] = {}
        self.teach, self.learn, self.loss = logits_of(self.model), logits_of(self.student), loss_of
        if device == "cuda":  # once for all stages
            for name in ("teach", "learn", "loss"):
                setattr(self, name, torch.compile(getattr(self, name), dynamic=False))

    def autocast(self) -> torch.autocast:
        return torch.autocast(self.device, self.dtype, enabled=self.dtype != torch.float32)


def load(
    folder: Path, data: Path, work: Path, device: str, tell: Callable[[str], None]
) -> tuple[Parts, dict]:
    """The model of the one .gguf file in a folder, and what names it and its text, which is made
    once for each WORK."""
    from transformers import AutoModelForCausalLM, AutoTokenizer

    found = sorted(folder.glob("*.gguf"))
    if len(found) != 1:
        raise ValueError(f"model: expected one .gguf file in {folder}, got {len(found)}")
    (path,) = found
    sha256, corpus = hashlib.sha256(path.read_bytes()).hexdigest()[:12], build.identity(data)
    model = AutoModelForCausalLM.from_pretrained(folder, gguf_file=path.name, dtype=torch.float32)

    def make() -> Text:
        tokenizer = AutoTokenizer.from_pretrained(folder, gguf_file=path.name)

        def encode(texts: list[str]) -> list[list[int]]:
            return tokenizer(texts, add_special_tokens=False).input_ids if texts else []

        tell(f"the text in the tokens of {MODEL}: a minute or more")
        old = build.load(data), build.load_tokenizer(data)
        return retold(*old, encode, tokenizer.unk_token_id)

    text = kept(work / f"text-{corpus}-{sha256}.npz", make)
    tell(f"{len(text.training):,} tokens of {MODEL}")
    named = torch.cuda.get_device_name() if device == "cuda" else processor()
    about = {"corpus": corpus, "model": sha256, "device": named}
    return Parts(model, text, device), about


def linears(model: nn.Module) -> dict[str, nn.Linear]:
    """All but the head, which is the embedding."""
    return {
        name: module
        for name, module in model.named_modules()
        if isinstance(module, nn.Linear) and module is not model.lm_head
    }


def pruned(parts: Parts, model: nn.Module, sparsity: float) -> Masks:
    """By Wanda, of the weights that are left."""
    length, stream = parts.length, parts.text.training
    starts = np.random.default_rng(SEED).permutation(len(stream) // length)[:CALIBRATION_ROWS]
    rows = stream[starts[:, None] * length + np.arange(length)].astype(np.int64)
    batches = list(torch.from_numpy(rows).to(parts.device).split(16))
    wanda = Wanda(sparsity, calibration=batches)
    twin = wanda.apply(copy.deepcopy(model).eval(), prune_again=True)
    layers = {n: layer for n, layer in twin.named_modules() if isinstance(layer, SparseLinear)}
    weights = {name: linear.weight for name, linear in linears(model).items()}
    if layers.keys() != weights.keys():
        raise RuntimeError(f"pruned {len(layers)} layers of {len(weights)}")
    return {name: at(places_of(layers[name]), weight) for name, weight in weights.items()}


@torch.no_grad()
def mask_(model: nn.Module, masks: Masks) -> None:
    """Its weights, in place."""
    weights = linears(model)
    for name, mask in masks.items():
        weights[name].weight.mul_(mask)


# Scores


def hidden_of(model: nn.Module) -> Callable[[Tensor], Tensor]:
    """What the head gets. The model's own forward, where it is compiled, makes a mask [B, 1, T, T]
    in each call, which the fast kernels of attention do not take."""
    inner = model.model

    def hidden(x: Tensor) -> Tensor:
        y, at = inner.embed_tokens(x), torch.arange(x.shape[1], device=x.device)[None]
        rotary = inner.rotary_emb(y, position_ids=at)
        for layer in inner.layers:
            y = layer(y, position_ids=at, position_embeddings=rotary)
        return inner.norm(y)

    return hidden


def logits_of(model: nn.Module) -> Callable[[Tensor], Tensor]:
    """Of tokens int64 [B, T]: [B T, V]."""
    hidden = hidden_of(model)
    return lambda x: model.lm_head(hidden(x)).flatten(0, 1)


def scored(parts: Parts, model: nn.Module, rows: Rows) -> Scores:
    return score_rows(model, hidden_of(model), rows.ids, rows.is_target, parts.dtype)


def scores(parts: Parts, model: nn.Module) -> dict:
    """Held-out text by domain, every other row of it to choose rates by, code and BLiMP."""
    rows = parts.text.rows
    domains = {n: r for n, r in rows.items() if n.startswith("held-out/")}
    found = {n.partition("/")[2]: scored(parts, model, r[1::2]) for n, r in domains.items()}
    sentences = scored(parts, model, rows["blimp"]).nats
    return {
        "dev": dev_loss(parts, model, 2),
        "held-out": Scores.together(list(found.values())).loss,
        "domains": {name: part.loss for name, part in found.items()},
        "code": scored(parts, model, rows["code/test"]).loss,
        "blimp": 100 * float((sentences[::2] < sentences[1::2]).mean()),
    }


def dev_loss(parts: Parts, model: nn.Module, every: int) -> float:
    """Of every so many rows of held-out text, an even number: the others are reported."""
    domains = [r for n, r in parts.text.rows.items() if n.startswith("held-out/")]
    return Scores.together([scored(parts, model, rows[::every]) for rows in domains]).loss


# Training


def windows(text: Text, length: int) -> Iterator[Tensor]:
    """int64 [BATCH, length + 1]."""
    for starts in passes(len(text.training), length, SEED):
        for i in range(0, len(starts) - BATCH + 1, BATCH):
            rows = text.training[starts[i : i + BATCH, None] + np.arange(length + 1)]
            yield torch.from_numpy(rows.astype(np.int64))


def loss_of(logits: Tensor, taught: Tensor, y: Tensor) -> Tensor:
    """The mean of cross entropy at targets y [M] and of the divergence from what the model as it
    came makes of them, nats a token; logits [M, V]."""
    logs, wanted = logits.float().log_softmax(-1), taught.float().log_softmax(-1)
    divergence = (wanted.exp() * (wanted - logs)).sum(-1).mean()
    return (F.nll_loss(logs, y) + divergence) / 2


def train(
    parts: Parts, masks: Masks, steps: int, rate: float, before: int
) -> tuple[list[list[float]], float]:
    """The student's: some looks at held-out text, [tokens, loss] each, and tokens a second without
    them. `before`: steps whose text it has seen, so that it reads on. FloatingPointError where the
    loss is not finite."""
    model, length = parts.student, parts.length
    optimizer = build_optimizer(model, rate)
    batches = itertools.islice(windows(parts.text, length), before, None)
    weights, looks, seconds = linears(model), [], 0.0
    ends = {round(steps * (i + 1) / LOOKS) for i in range(LOOKS)}
    model.train()
    began = time.monotonic()
    for step, now in enumerate(rates(steps, rate), 1):
        for group in optimizer.param_groups:
            group["lr"] = float(now)
        batch = next(batches).to(parts.device)
        x, y = batch[:, :-1], batch[:, 1:].flatten()
        with parts.autocast():
            with torch.no_grad():
                taught = parts.teach(x)
            loss = parts.loss(parts.learn(x), taught, y)
        loss.backward()
        if masks:  # zeros have no gradient, so that they stay, and clipping does not count them
            gradients = [weights[name].weight.grad for name in masks]
            torch._foreach_mul_(gradients, list(masks.values()))
        nn.utils.clip_grad_norm_(model.parameters(), GRADIENT_CLIP)
        optimizer.step()
        optimizer.zero_grad()
        if step in ends:
            if not math.isfinite(found := float(loss.detach())):
                raise FloatingPointError(f"loss is {found} at step {step}")
            seconds += time.monotonic() - began
            looks.append([step * BATCH * length, round(dev_loss(parts, model, 2 * LOOK_ROWS), 4)])
            began = time.monotonic()
    return looks, steps * BATCH * length / seconds


def steps_of(parts: Parts, name: str) -> int:
    return max(1, STAGES[name].length * STAGE_TOKENS // (BATCH * parts.length))


def steps_before(parts: Parts, name: str) -> int:
    """Of the stages that it begins with."""
    start = STAGES[name].start
    return steps_before(parts, start) + steps_of(parts, start) if start else 0


def first_weights(parts: Parts, name: str, work: Path, results: Sequence[dict]) -> dict:
    if not (start := STAGES[name].start):
        return parts.model.state_dict()
    rate = best(results, start)
    path = path_of(work, start, rate)
    if not path.exists():  # it stayed on a machine that is gone
        run(parts, start, rate, work, results)
    return torch.load(path, map_location=parts.device)


def run(parts: Parts, name: str, rate: float, work: Path, results: Sequence[dict]) -> dict:
    """One stage at one rate: what was found, and the model in WORK/name-rate.pt."""
    stage, model, began = STAGES[name], parts.student, time.monotonic()
    model.load_state_dict(first_weights(parts, name, work, results))
    key = stage.start, stage.sparsity
    if known := parts.pruned.get(key):
        masks, before = known
        mask_(model, masks)
    else:
        masks = pruned(parts, model, stage.sparsity) if stage.sparsity else {}
        mask_(model, masks)
        before = scores(parts, model)
        parts.pruned[key] = masks, before
    steps = steps_of(parts, name)
    curve, speed = train(parts, masks, steps, rate, steps_before(parts, name))
    with atomic_write(path_of(work, name, rate)) as file:
        torch.save(model.state_dict(), file)
    kept = sum(int(mask.sum()) for mask in masks.values())
    return {
        "stage": name,
        "rate": rate,
        "tokens": steps * BATCH * parts.length,
        "density": kept / sum(m.numel() for m in masks.values()) if masks else 1.0,
        "before": before,
        **scores(parts, model),
        "curve": curve,
        "tokens_per_s": speed,
        "seconds": time.monotonic() - began,
    }


def path_of(work: Path, name: str, rate: float) -> Path:
    return work / f"{name}-{rate:g}.pt"


# All of them


def add(path: Path, result: dict) -> None:
    """As study.add; other processes that add theirs wait."""
    folder = os.open(path.parent, os.O_RDONLY)
    try:
        fcntl.flock(folder, fcntl.LOCK_EX)
        study.add(path, result)
    finally:
        os.close(folder)


def tried(results: Sequence[dict], name: str) -> dict[float, float]:
    """Rate -> loss on dev, infinite where training diverged."""
    return {r["rate"]: finite(r["dev"]) for r in results if r["stage"] == name}


def is_done(results: Sequence[dict], name: str) -> bool:
    done = tried(results, name)
    return bool(done) and (bool(STAGES[name].rate_of) or next_rate(results, name) is None)


def next_rate(results: Sequence[dict], name: str) -> float | None:
    """None where a stage is done. ValueError where the stage whose rate it takes is not."""
    done, of = tried(results, name), STAGES[name].rate_of
    if of:
        return None if done else best(results, of)
    return one_more(RATES, done, LEAST_RATE, MOST_RATE)


def best(results: Sequence[dict], name: str) -> float:
    """The rate of a stage that is done."""
    if not is_done(results, name):
        raise ValueError(f"stages: {name} is not done, which another one begins with")
    done = tried(results, name)
    return min(done, key=done.__getitem__)


def needs(name: str) -> set[str]:
    """The stages to be done before."""
    return {STAGES[name].start, STAGES[name].rate_of} - {""}


def make(
    parts: Parts,
    names: Sequence[str],
    work: Path,
    results: Callable[[], list[dict]],
    keep: Callable[[dict], None],
) -> None:
    """The named stages, as far as they are not done, in their order, but one that cannot be begun
    yet after the others. `results`: of now, also those of other processes. ValueError where a stage
    is left that cannot be begun."""
    left = list(dict.fromkeys(names))
    while left := [name for name in left if not is_done(results(), name)]:
        now = results()
        ready = [name for name in left if all(is_done(now, other) for other in needs(name))]
        if not ready:
            missing = sorted({n for name in left for n in needs(name) if not is_done(now, n)})
            told = f"{', '.join(missing)} to be done before {', '.join(left)}"
            raise ValueError(f"stages: expected {told}")
        rate = next_rate(now, ready[0])
        try:
            keep(run(parts, ready[0], rate, work, now))
        except FloatingPointError as error:
            keep({"stage": ready[0], "rate": rate, "dev": None, "failed": str(error)})
