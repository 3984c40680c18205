"""Training on several GPUs: starts the processes of sparsekern/bench/scale_gpu.py under torchrun,
and makes the page of what they found, with what was predicted (sparsekern/bench/scaling.py)."""

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import pages
import torch

from sparsekern.bench import records, scaling
from sparsekern.bench.gpt_gpu import FREE, TWO_WAY
from sparsekern.bench.machine import about_run, in_words
from sparsekern.bench.records import Run
from sparsekern.bench.scale_gpu import (
    ACCUMULATED,
    ALONE,
    FSDP,
    LOSSES,
    NO_MASK,
    ROUNDS,
    SENT,
    SPARSITY,
    TOGETHER,
)
from sparsekern.gpt.flops import multiply_adds
from sparsekern.gpt.model import GPTConfig
from sparsekern.gpt.presets import PRESETS
from sparsekern.terminal import table

WHOLE, CELLS = "scale", "scale-cells"  # benchmarks: all, and chosen ones
PARALLEL = {ALONE: "none", TOGETHER: "ddp", FSDP: "fsdp"}
MASKS = {NO_MASK: "dense", FREE: f"{SPARSITY:.0%} free", TWO_WAY: f"{SPARSITY:.0%} two-way"}
MODELS = PRESETS | {"gpt3-13b": GPTConfig(40, 40, 5120, 2048, 50304)}
MANY = (8, 64, 256, 1024)
# Times of 13B's steps over those of XL: by its FLOPs, and what wider matrices gain or lose (4096
# wide beside XL: bench/results/nvidia-h200-train-large-bfloat16-2026-11-29.md).
WIDER = {NO_MASK: 1.0, FREE: 1.101 / 1.068, TWO_WAY: 1.228 / 1.237}

PAGE = """\
# {name}

{heading}

Steps of `train --device cuda --parallel ddp` and `fsdp`: one process a GPU, every one with the
whole model, with fsdp a share of gradients and AdamW; forward, backward, what is sent, clipping and
AdamW captured in CUDA graphs, blocks compiled, products in bfloat16, weights, gradients and what is
sent in float32, of sparse weights at nnz. Medians of {rounds} rounds, the first three in turn:

- alone: each GPU by itself, nothing sent; the slowest of them, and in brackets the fastest;
- ddp, fsdp: together. Efficiency is the fastest GPU alone over this (weak scaling: as many
  sequences for each GPU). Exposed is how much longer it takes than the slowest;
- accumulated: one GPU with the sequences of all, one micro-batch after the other. It computes what
  all together do: strong scaling is its time over that of together.

Predicted in brackets (sparsekern/bench/scaling.py): exposed milliseconds, from the time alone; with
figures of data sheets, before anything was measured, and with figures fitted to two GPUs with ddp.
Sent: bytes of the gradients. GB: the most that tensors take at a time, where no other way is
captured. Losses: the largest difference from those of accumulated, where it was measured, else from
those of ddp, over {losses} steps from the same weights. Times dense: of the same way; of ddp: how
many times as fast as ddp.

{steps}

## All-reduces

Of one float32 tensor. GB/s: what leaves a GPU, 2 (n - 1) / n of the bytes over the time.

{reductions}

## On paper

Predicted, not measured: {sequences} sequences for each GPU, step times of one GPU measured above
(13B: those of XL by FLOPs, with what wider matrices gain or lose), links as
sparsekern/bench/scaling.py has them. Efficiency and, for sparse weights, times dense tokens/s; in
brackets the dearest and the cheapest links that are thought likely. 13B dense has 206 GB of
weights, gradients and AdamW, so it must be sharded, which sends as many bytes; 13B at 75 % has
about 70 GB and fits whole.

{paper}
"""


def counts() -> list[int]:
    """How many GPUs work together: the powers of two that are there."""
    visible = torch.cuda.device_count()
    return [2**i for i in range(visible.bit_length()) if 2 <= 2**i <= visible] or [1]


def measure(machine: dict, path: Path, args: argparse.Namespace) -> Run:
    """All cases on each number of GPUs; the file is written after each number. Prints the page."""
    began = time.monotonic()
    benchmark = CELLS if args.cells else WHOLE
    about = about_run(benchmark, machine, args.commit) | {"is_whole": False}
    found: list[dict] = []
    codes = []
    for gpus in [args.gpus] if args.gpus else counts():
        print(f"{gpus} GPUs", flush=True)
        cases, code = cases_on(gpus, args)
        found += cases
        codes.append(code)
        records.write(path, about, records.flat(found))
    failed = [w["failed"] for case in found for w in case["ways"].values() if "failed" in w]
    is_whole = not failed and not any(codes)
    about |= {"is_whole": is_whole, "seconds": time.monotonic() - began}
    records.write(path, about, records.flat(found))
    run = records.read(path)
    print(page(path.stem, run))
    return run


def cases_on(gpus: int, args: argparse.Namespace) -> tuple[list[dict], int]:
    """What as many processes find, and their exit status: what came before a failure is kept."""
    with tempfile.TemporaryDirectory() as folder:
        out = Path(folder) / "cases.jsonl"
        command = [sys.executable, "-m", "torch.distributed.run", "--standalone"]
        command += [f"--nproc-per-node={gpus}", "-m", "sparsekern.bench.scale_gpu"]
        command += [f"--out={out}", f"--limit-s={args.limit_s}", "--ways", *args.ways]
        command += ["--cells", *args.cells] if args.cells else []
        paths = os.pathsep.join(filter(None, sys.path))
        env = {"OMP_NUM_THREADS": "4"} | os.environ | {"PYTHONPATH": paths}
        code = subprocess.run(command, env=env).returncode
        lines = out.read_text().splitlines() if out.exists() else []
    if code:
        print(f"bench-gpu: {gpus} processes ended with {code}", file=sys.stderr)
    return [json.loads(line) for line in lines], code


def steps(cases: list[dict]) -> str:
    times = {
        (case["model"], case["gpus"], case["mask"], name): way["median_s"]
        for case in cases
        for name, way in case["ways"].items()
        if "failed" not in way
    }
    header = ["model", "mask", "parallel", "GPUs", "alone ms", "together ms", "tokens/s"]
    header += ["efficiency", "strong", "exposed ms (predicted)", "sent MB", "GB a GPU", "losses"]
    header += ["times dense", "of ddp"]
    lines = []
    for case in cases:
        shown = [name for name in SENT if name in case["ways"]] or [ALONE]
        for name in shown:
            line = [case["model"], MASKS[case["mask"]], PARALLEL[name], str(case["gpus"])]
            line += _figures(case, name, times)
            lines.append([*line, *[""] * (len(header) - len(line))])
    return table(header, lines, left=3)


def _figures(case: dict, name: str, times: dict[tuple, float]) -> list[str]:
    """What stands behind the words of a line."""
    ways = case["ways"]
    way, alone, accumulated = (ways.get(w, {}) for w in (name, ALONE, ACCUMULATED))
    if "failed" in way:
        return [way["failed"]]
    seconds = way["median_s"]
    alone_s, tokens = alone.get("median_s"), case["M"] * case["gpus"]
    found = [f"{1e3 * alone_s:.2f} ({1e3 * alone['min_s']:.2f})" if alone else ""]
    found += [f"{1e3 * seconds:.2f}", f"{tokens / seconds:,.0f}"]
    if name == ALONE:
        return found
    found += [f"{alone['min_s'] / seconds:.3f}" if alone else ""]
    found += [f"{accumulated['median_s'] / seconds:.3f}" if accumulated else ""]
    exposed = ""
    if alone_s:
        predicted = [
            1e3 * predict(case, alone_s, links, name == FSDP).exposed_s
            for links in (scaling.BEFORE, scaling.MEASURED)
        ]
        exposed = f"{1e3 * (seconds - alone_s):.2f} ({', '.join(f'{ms:.1f}' for ms in predicted)})"
    found += [exposed, f"{way['sent_bytes'] / 1e6:,.0f}", f"{way['peak_bytes'] / 1e9:.1f}"]
    has_other = accumulated or (name == FSDP and TOGETHER in ways)
    found += [f"{way['error']:.1e}" if has_other else ""]
    key = case["model"], case["gpus"]
    for other in (NO_MASK, name), (case["mask"], TOGETHER):
        of_other = times.get((*key, *other))
        found.append(f"{of_other / seconds:.3f}" if of_other else "not measured")
    return found


def predict(
    case: dict,
    alone_s: float,
    links: scaling.Links,
    is_sharded: bool = False,
    gpus: int = 0,
    model: str = "",
) -> scaling.Step:
    config = MODELS[model or case["model"]]
    gpus = gpus or case["gpus"]
    return scaling.predict(config, case["sparsity"], alone_s, gpus, links, is_sharded)


def reductions(cases: list[dict]) -> str:
    found: dict[int, dict[int, float]] = {}
    for case in cases:
        (way,) = case["ways"].values()
        found.setdefault(way["bytes"], {})[case["gpus"]] = way["median_s"]
    columns = sorted({case["gpus"] for case in cases})
    lines = []
    for nbytes, times in found.items():
        line = [f"{nbytes / 1024:,.0f}"]
        for gpus in columns:
            seconds, sent = times.get(gpus), 2 * (gpus - 1) / gpus * nbytes
            line.append(f"{1e6 * seconds:.0f} us, {sent / seconds / 1e9:.0f}" if seconds else "")
        lines.append(line)
    if not lines:
        return ""
    return table(["KiB", *(f"{gpus} GPUs: time, GB/s" for gpus in columns)], lines, left=1)


def paper(cases: list[dict]) -> str:
    """A line for each model and mask, a column for each number of GPUs."""
    lines = []
    of_xl = [c for c in cases if c["model"] == "gpt3-xl" and ALONE in c["ways"]]
    most = max((case["gpus"] for case in of_xl), default=0)
    alone = {c["mask"]: c["ways"][ALONE]["median_s"] for c in of_xl if c["gpus"] == most}
    for model in ("gpt3-xl", "gpt3-13b"):
        by_mask = {mask: _alone_s(model, mask, seconds) for mask, seconds in alone.items()}
        for mask in by_mask:
            case = next(c for c in of_xl if c["mask"] == mask)
            cells = []
            for gpus in MANY:
                texts = []
                for links in (scaling.MEASURED, scaling.DEAR, scaling.CHEAP):
                    step = predict(case, by_mask[mask], links, gpus=gpus, model=model)
                    texts.append(f"{by_mask[mask] / step.step_s:.2f}")
                cell = f"{texts[0]} ({texts[1]} to {texts[2]})"
                if mask != NO_MASK and NO_MASK in alone:
                    ratios = [
                        _times_dense(case, by_mask, links, gpus, model)
                        for links in (scaling.MEASURED, scaling.DEAR, scaling.CHEAP)
                    ]
                    cell += f", {ratios[0]:.2f} ({ratios[2]:.2f} to {ratios[1]:.2f})"
                cells.append(cell)
            lines.append([model, MASKS[mask], f"{1e3 * by_mask[mask]:.0f}", *cells])
    if not lines:
        return ""
    return table(["model", "mask", "alone ms", *(f"{n} GPUs" for n in MANY)], lines, left=2)


def _alone_s(model: str, mask: str, xl_s: float) -> float:
    """Of a step of as many sequences; XL's was measured."""
    if model == "gpt3-xl":
        return xl_s
    ratio = multiply_adds(MODELS[model]).total / multiply_adds(MODELS["gpt3-xl"]).total
    return xl_s * ratio * WIDER[mask]


def _times_dense(
    case: dict, alone: dict[str, float], links: scaling.Links, gpus: int, model: str
) -> float:
    of = {"gpus": gpus, "model": model}
    dense = predict(case | {"sparsity": 0.0}, alone[NO_MASK], links, **of)
    return dense.step_s / predict(case, alone[case["mask"]], links, **of).step_s


def steps_in(cases: list[dict]) -> list[dict]:
    return [case for case in cases if case["op"] == "scale"]


def update(name: str, run: Run) -> None:
    """The section in docs/. Of chosen cells earlier runs are below, where no later one has them."""
    benchmark, found = run.about["benchmark"], {name: run}
    if benchmark == CELLS:
        paths = sorted(pages.RESULTS.glob(f"*-{CELLS}-*{records.SUFFIX}"), reverse=True)
        found |= {path.stem: records.read(path) for path in paths if path.stem != name}
    texts: list[str] = []
    shown: set[tuple] = set()
    for stem, each in found.items():
        cells = {
            (c["model"], c["mask"], c["gpus"]): c for c in steps_in(records.cases(each.records))
        }
        if cases := [case for cell, case in cells.items() if cell not in shown]:
            path = f"bench/results/{stem}.md"
            about = f"{in_words(each.about, 'bfloat16')} Details: [{path}](../{path})."
            texts.append(f"{steps(cases)}\n\n{about}")
        shown |= cells.keys()
    pages.replace_section(pages.BENCHMARKS, benchmark, "\n\n".join(texts))


def page(name: str, run: Run) -> str:
    cases = records.cases(run.records)
    of_steps = steps_in(cases)
    return PAGE.format(
        name=name,
        heading=in_words(run.about, "bfloat16"),
        rounds=ROUNDS,
        losses=LOSSES,
        steps=steps(of_steps),
        reductions=reductions([case for case in cases if case["op"] == "all_reduce"])
        or pages.NOT_RUN,
        sequences=next((c["batch"] for c in of_steps if c["model"] == "gpt3-xl"), 4),
        paper=paper(of_steps) or pages.NOT_RUN,
    )
