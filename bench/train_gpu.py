"""Training on a GPU: whole steps, their three products alone, and their memory. See run_gpu.py."""

import argparse
import json
import math
import re
import time
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pages
import tables_train as tables
import torch

from sparsekern.bench import gpt_gpu, records, replay_gpu
from sparsekern.bench import least_size_gpu as least_size
from sparsekern.bench import train_float8_gpu as train_float8
from sparsekern.bench import train_memory_gpu as train_memory
from sparsekern.bench import train_products_gpu as products
from sparsekern.bench.machine import about_run, in_words, source
from sparsekern.bench.measure_gpu import ROUNDS
from sparsekern.bench.rates import case_name, derive, derived
from sparsekern.bench.records import OTHER, OURS, Run
from sparsekern.kernels import crossover

LEAST_SIZES = Path(crossover.__file__).with_name("least_sizes.json")

LEAST = """\
# {name}

{heading}

How many times as fast as W written out (`expand`) products on sparse tensor cores are, forward and
input gradient together, by tokens and by the rows and columns of a square W. W from memory.
Dispatch takes them from the size on from which no larger one loses
(sparsekern/kernels/least_sizes.json).

{sizes}
"""

STEPS = """\
# {name}

{heading}

A training step of a GPT: forward, backward, clipping and AdamW; products in bfloat16 by autocast,
weights and their optimizer in float32. Each model runs as it is (eager), with compiled blocks, and
compiled and captured whole in a CUDA graph; the large ones in the last form alone. Medians of
{rounds} rounds, all forms in turn. Gradients are held to fp64, at most {tolerance:g} times as far
from it as those of dense. "two-way": at most two of four neighbours along both axes of each weight.
Below 1 is a loss.

{steps}
"""

PRODUCTS = """\
# {name}

{heading}

The three products of a linear layer in training, {tokens} tokens, {sparsity:.0%} zeros unless said:
times the best dense call of cuBLAS and cuBLASLt on the same operands, in any layout. Together: the
sum of the three best dense times over the sum of ours. Medians of {rounds} replays of a CUDA graph,
all in turn, each call on another copy of its operands; results held to fp64. "two-way": at most two
of four neighbours along both axes of W. Below 1 is a loss. FP8 is other work, shown beside: dense,
E4M3 operands with one scale a tensor; from operands in 8 bits, and with their casts in plain torch,
W's too. Errors: ours at most {errors}, those of FP8 {fp8_errors}.

{products}

## Written out, collected, filled

What goes between the stored values and tensor cores: W written out, the gradient collected, and the
operands of 2:4 products of W and of W^T filled. Bytes of both sides and of the places, and the
share of the copy bandwidth ({copy:.2f} TB/s, measured in the same run). Every call reads and writes
other memory.

{write_outs}
"""

FLOAT8 = """\
# {name}

{heading}

A training step of GPT-3 XL or the like, captured with compiled blocks: forward, backward, clipping
and AdamW, on bytes of Python's library. float8: the linears of the blocks in E4M3, forward and both
gradients, by delayed scaling (docs/guide/train.md); all else, and bfloat16, by autocast. two-way:
{sparsity:.0%} zeros, at most two of four neighbours along both axes. All arms were on the GPU
together, each in a process: {turn} steps of each in turn, {steps} in all; medians of the replays
but the first of a turn. Losses are those of the same batches; the two arms of a mask begin with the
same weights. Below 1 is a loss.

{arms}
"""

MEMORY = """\
# {name}

{heading}

GB (1e9 bytes) of a training step: weights, gradients and AdamW in float32, products in bfloat16 by
autocast. Predicted by the sizes of all tensors (sparsekern/bench/memory_gpu.py), measured by
torch's allocator, which rounds up and holds workspaces of libraries. Places: indices in int32,
bitmaps, and the tails of 2:4 operands. State: all that is there between steps. The peak has
activations and loss too, which sparse weights do not make smaller; it is predicted for eager
steps. Steps here are eager. Each model is alone on the GPU.

{memory}

## The most that fits

Sequences in a step, and tokens a second (the median of {rounds} eager steps), where torch's
allocator may have so much. One sequence more was tried each time, and did not fit.

{largest}
"""


def measure(args: argparse.Namespace, machine: dict, path: Path) -> Run:
    """All cases; the file is written after each, so that nothing is lost with a later one."""
    start = time.monotonic()
    about = about_run(args.verb, machine, args.commit) | {"is_whole": False}
    if model := getattr(args, "model", None):
        about["part"] = model
    found: list[dict] = []
    # Graphs cannot be captured on the default stream.
    with torch.no_grad(), torch.cuda.stream(torch.cuda.Stream()):
        for case in cases(args):
            found.append(derive(case))
            print(f"{time.monotonic() - start:4.0f} s {in_short(case)}", flush=True)
            records.write(path, about, records.flat(found))
    about |= {"is_whole": True, "seconds": time.monotonic() - start}
    records.write(path, about, records.flat(found))
    return records.read(path)


def cases(args: argparse.Namespace) -> Iterator[dict]:
    """What a verb of run_gpu.py measures."""
    if args.verb == "train":
        return whole_steps(args.quick, args.model)
    if args.verb == "train-float8":
        size = train_float8.QUICK if args.quick else train_float8.SIZE
        return train_float8.cases(size, torch.device("cuda"))
    if args.verb == "train-products":
        return three_products(args.quick, args.dtype)
    if args.verb == "least-size":
        dtype = getattr(torch, args.dtype)
        return least_size.cases(replay_gpu.CudaClock(), torch.device("cuda"), dtype)
    return train_memory.cases(args.largest)


def add_flags(verb: str, parser: argparse.ArgumentParser) -> None:
    if verb == "train-memory":
        parser.add_argument("--largest", action="store_true", help="the most that fits, too")
    elif verb != "least-size":
        parser.add_argument("--quick", action="store_true")
    if verb in ("train-products", "least-size"):
        kinds = ("bfloat16", "float16")
        parser.add_argument("--dtype", choices=kinds, default=kinds[0])
    if verb == "train":
        models = [step.model for step in gpt_gpu.STEPS]
        parser.add_argument("--model", choices=models, help="one of the models alone")


def check_of_one_measurement(runs: list[Run]) -> None:
    """SystemExit unless these are of one benchmark, machine, torch, commit and type."""

    def identity(run: Run) -> tuple:
        about, dtypes = run.about, sorted({record["dtype"] for record in run.records})
        machine = about["machine"]
        return about["benchmark"], machine["gpu"], machine["torch"], about["commit"]["id"], *dtypes

    if len(found := set(map(identity, runs))) > 1:
        raise SystemExit(f"bench-gpu: expected parts of one measurement, got {found}")


def joined(runs: list[Run]) -> Run:
    """The run of these models, of which each was measured alone, about the machine of the first."""
    models = [step.model for step in gpt_gpu.STEPS]
    parts = [run.about.get("part", "") for run in runs]
    if len(set(parts)) < len(parts) or not set(parts) <= set(models):
        raise SystemExit(
            f"bench-gpu: expected a file each of {', '.join(models)}, got {', '.join(parts)}"
        )
    places = sorted(runs, key=lambda run: models.index(run.about["part"]))
    check_of_one_measurement(places)
    about = {name: value for name, value in places[0].about.items() if name != "part"}
    about |= {
        "is_whole": all(run.about["is_whole"] for run in runs),
        "seconds": sum(run.about["seconds"] for run in runs),
    }
    return Run(about, [record for run in places for record in run.records])


def in_short(case: dict) -> str:
    """A line of progress."""
    text = case_name(case)
    if "speedup" in case:
        return f"{text}: {case['speedup']:.3f}"
    (way,) = list(case["ways"].values())[-1:]
    if "failed" in way:
        return f"{text}: {way['failed']}"
    if "loss" in way:
        return f"{text}: {1e3 * way['median_s']:.2f} ms, losses {way['note']}"
    if "peak_bytes" in way:
        return f"{text} {case.get('case', '')}: {way['peak_bytes'] / 1e9:.1f} GB"
    return f"{text}: {1e6 * way['median_s']:.1f} us"


def whole_steps(quick: bool, model: str | None) -> Iterator[dict]:
    steps = [gpt_gpu.QUICK] if quick else gpt_gpu.STEPS
    for step in steps:
        if model in (None, step.model):
            clock = replay_gpu.CudaClock(frees_cache=True)
            yield from gpt_gpu.training_steps(step, clock, torch.device("cuda"))
            torch.cuda.empty_cache()


def three_products(quick: bool, dtype: str) -> Iterator[dict]:
    sizes = products.FLOAT16 if dtype == "float16" else products.SIZES
    if quick:
        sizes = replace(products.QUICK, dtype=getattr(torch, dtype))
    return products.cases(sizes, replay_gpu.CudaClock(), torch.Generator("cuda"))


def page_of_steps(name: str, run: Run) -> str:
    return STEPS.format(
        name=name,
        heading=in_words(run.about, "bfloat16"),
        rounds=ROUNDS,
        tolerance=gpt_gpu.TOLERANCE,
        steps=tables.steps(derived(run)),
    )


def page_of_products(name: str, run: Run) -> str:
    cases = derived(run)
    three = [case for case in cases if case["op"] in products.OPS]
    errors = {
        kind: max(
            (w.get("error", 0.0) for c in three for w in c["ways"].values() if w["kind"] == kind),
            default=math.nan,
        )
        for kind in (OURS, OTHER)
    }
    limit = run.about["machine"]["ceilings"]["cuda"]["bytes_per_s"]["memory"]
    written_out = [case for case in cases if case["op"] not in products.OPS]
    return PRODUCTS.format(
        name=name,
        heading=in_words(run.about, three[0]["dtype"]),
        tokens=three[0]["M"],
        sparsity=three[0]["sparsity"],
        rounds=products.ROUNDS,
        errors=f"{errors[OURS]:.0e}",
        fp8_errors=f"{errors[OTHER]:.0e}",
        products=tables.products(three),
        copy=limit / 1e12,
        write_outs=tables.write_outs(written_out, limit) if written_out else pages.NOT_RUN,
    )


def page_of_float8(name: str, run: Run) -> str:
    cases = derived(run)
    return FLOAT8.format(
        name=name,
        heading=in_words(run.about, "bfloat16"),
        sparsity=train_float8.SPARSITY,
        steps=cases[0]["steps"],
        turn=train_float8.TURN,
        arms=tables.float8_arms(cases),
    )


def page_of_memory(name: str, run: Run) -> str:
    cases = derived(run)
    steps = [case for case in cases if not case.get("case")]
    within = [case for case in cases if case.get("case")]
    return MEMORY.format(
        name=name,
        heading=in_words(run.about, "bfloat16"),
        rounds=train_memory.ROUNDS,
        memory=tables.memory(steps),
        largest=tables.largest(cases) if within else pages.NOT_RUN,
    )


def page_of_least_sizes(name: str, run: Run) -> str:
    cases = derived(run)
    return LEAST.format(
        name=name,
        heading=in_words(run.about, cases[0]["dtype"]),
        sizes="\n\n".join(
            f"`{row.name}`, {row.sparsity:.0%} zeros, {tables.MASKS[row.mask]} masks:\n\n"
            + tables.least_sizes(cases, row)
            for row in least_size.ROWS
        ),
    )


SECTIONS = {"train": tables.forms, "train-products": tables.products, "train-memory": tables.memory}
PAGES = {
    "train": page_of_steps,
    "train-products": page_of_products,
    "train-memory": page_of_memory,
    "train-float8": page_of_float8,
    "least-size": page_of_least_sizes,
}


def publish(name: str, run: Run) -> None:
    """The table, its page, and its section in docs/benchmarks.md, or the data that dispatch
    reads."""
    benchmark = run.about["benchmark"]
    pages.publish(pages.RESULTS, name, run, PAGES[benchmark](name, run), None)
    if benchmark in SECTIONS and run.records[0]["dtype"] == "bfloat16":
        pages.replace_section(pages.BENCHMARKS, benchmark, section(name, run))
    elif benchmark == "least-size":
        update_least_sizes(run)


def update_least_sizes(run: Run) -> None:
    """Replaces what the file says of these rows, of this capability and dtype; the rest stays."""
    capability, measured = run.about["machine"]["capability"], source(run.about)
    data, cases = json.loads(LEAST_SIZES.read_text()), derived(run)
    dtype = cases[0]["dtype"]
    for row in least_size.ROWS:
        entry = data.setdefault(row.name, {}).setdefault(capability, {})
        entry.setdefault("measured", {})[dtype] = measured
        entry[dtype] = least_size.summarize(cases, row)
    text = json.dumps(data, indent=1)
    lists = re.compile(r"\[\n\s+\[.*?\]\n\s+\]", re.DOTALL)  # a line each
    text = lists.sub(lambda pairs: json.dumps(json.loads(pairs[0])), text)
    LEAST_SIZES.write_text(text + "\n")


def section(name: str, run: Run) -> str:
    """The run in docs/."""
    cases, path = derived(run), f"bench/results/{name}.md"
    if run.about["benchmark"] == "train-memory":
        cases = [case for case in cases if not case.get("case")]
    if run.about["benchmark"] == "train-products":
        cases = [case for case in cases if case["op"] in products.OPS]
    text = SECTIONS[run.about["benchmark"]](cases)
    return f"{text}\n\n{in_words(run.about, 'bfloat16')} Details: [{path}](../{path})."
