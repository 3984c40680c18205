"""One process of experiments.py: it makes the runs that come as lines of JSON, one after the other.

Answers go to stdout, a line each; what the runs print goes to stderr. It ends when stdin does.
"""

import gc
import json
import os
import queue
import shutil
import statistics
import sys
import threading
import traceback
from functools import partial
from pathlib import Path
from typing import TextIO

import torch

from sparsekern import SparseTensor, matmul
from sparsekern.bench.machine import processor
from sparsekern.bench.turns import in_turns, on_host
from sparsekern.gpt.checkpoint import CHECKPOINT
from sparsekern.gpt.config import TrainConfig, config_from, resumed_config
from sparsekern.gpt.prune import PruneConfig, latencies, prune
from sparsekern.gpt.run import Run
from sparsekern.gpt.start import begin
from sparsekern.gpt.train import OutOfTime, train

TIMED_STEPS, WARM_UP_STEPS = 30, 6  # of each run in turn


def train_run(settings: dict, deadline: float) -> dict:
    """A training run, resumed where it was stopped; without times, since others run beside it."""
    given = {name: settings[name] for name in ("out", "device")}
    if (Path(settings["out"]) / CHECKPOINT).exists():
        metrics = train(resumed_config(given), deadline)
    else:
        metrics = train(config_from(settings), deadline)
    names = ("config", "parameters", "sparsity", "flops", "flop_ratio", "peak_gpu_bytes")
    evaluations, source = metrics["evaluations"], metrics["source"]
    return {name: metrics[name] for name in names} | {
        "loss": evaluations[-1]["loss"],
        "evaluations": [{name: e[name] for name in ("step", "loss")} for e in evaluations],
        "source": source and {name: source[name] for name in ("flops", "steps")},
    }


def prune_run(settings: dict, deadline: float) -> dict:
    timed = ("latency_s", "dense_latency_s", "train_s")
    rows = prune(PruneConfig(**settings))
    return {"rows": [{k: v for k, v in row.items() if k not in timed} for row in rows]}


def time_runs(settings: dict, deadline: float) -> dict:
    """Seconds of a step of each run in turn, and of a forward pass of one sequence: as it is, and
    densified. For a GPU of its own."""
    runs = {name: begin(TrainConfig(**given)) for name, given in settings["runs"].items()}

    def step(run: Run) -> None:
        run.compute_gradients()
        run.update()
        if run.ranks.device.type == "cuda":
            torch.cuda.synchronize()

    turns = {name: on_host(partial(step, run)) for name, run in runs.items()}
    found = {}
    for name, seconds in in_turns(turns, TIMED_STEPS, warm_up=WARM_UP_STEPS).items():
        found[name] = {"step_s": statistics.median(seconds)}
        found[name] |= {"least_s": min(seconds), "most_s": max(seconds)}
        found[name]["latency_s"], found[name]["dense_latency_s"] = latencies(runs[name])
    return {"times": found}


KINDS = {"train": train_run, "prune": prune_run, "time": time_runs}


def answer(message: dict) -> dict:
    """The result of a run, or why there is none."""
    try:
        result = KINDS[message["kind"]](message["settings"], message["deadline"])
    except OutOfTime as stopped:
        return {"stopped": str(stopped)}
    except FloatingPointError as error:  # a result too: this rate is too high
        shutil.rmtree(message["settings"]["out"], ignore_errors=True)
        return {"result": {"loss": None, "diverged": str(error)}}
    except Exception as error:
        traceback.print_exc()
        return {"failed": f"{type(error).__name__}: {error}"}
    return {"result": result}


def read_messages(stream: TextIO, messages: queue.Queue) -> None:
    for line in stream:
        messages.put(json.loads(line))
    os._exit(0)  # also in the middle of a run: nobody waits for it any more


def warm_up(device: str) -> str:
    """Start the GPU and have its kernels compiled -> its name, or the processor's."""
    x = torch.ones(256, 64, device=device, dtype=torch.bfloat16, requires_grad=True)
    W = SparseTensor.from_dense(torch.eye(64, device=device, dtype=torch.bfloat16))
    W.values.requires_grad_()
    try:
        matmul(x, W.T).sum().backward()
    except Exception:  # dense runs may work all the same
        traceback.print_exc()
    return torch.cuda.get_device_name() if device == "cuda" else processor()


def main(device: str) -> None:
    replies = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)

    def reply(what: dict) -> None:
        print(json.dumps(what), file=replies, flush=True)

    messages: queue.Queue = queue.Queue()
    reply({"device": warm_up(device)})
    threading.Thread(target=read_messages, args=(sys.stdin, messages), daemon=True).start()
    while True:
        message = messages.get()
        print(f"\n== {message['key']}", flush=True)
        found = answer(message)
        if device == "cuda" and "failed" not in found:
            gc.collect()
            torch.cuda.empty_cache()  # others share the GPU
        reply(found)
        if "failed" in found:
            os._exit(1)  # a CUDA error would meet the next run too


if __name__ == "__main__":
    main(sys.argv[1])
