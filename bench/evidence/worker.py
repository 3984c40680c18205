"""A process that makes the runs that come as lines of JSON, one after the other, on one device.

Answers go to stdout, a line each; what the runs print goes to stderr. It ends when stdin does.
"""

import json
import os
import queue
import sys
import threading
import traceback
from pathlib import Path
from typing import TextIO

import torch

from sparsekern.bench.machine import processor

from . import build
from .arms import Data, OutOfTime, Runner, Task

DTYPES = {"cuda": torch.bfloat16, "cpu": torch.float32}


def answer(runner: Runner, message: dict) -> dict:
    """The result of a run, or why there is none."""
    try:
        result = runner.run(Task(**message["settings"]), message["deadline"])
    except OutOfTime as stopped:
        return {"stopped": str(stopped)}
    except FloatingPointError as error:  # a result too: this rate is too high
        return {"result": {"diverged": str(error)}}
    except Exception as error:
        traceback.print_exc()
        return {"failed": f"{type(error).__name__}: {error}"}
    return {"result": result}


def runner(data: Path, work: Path, device: str) -> Runner:
    return Runner(Data(build.load(data), device), work, DTYPES[device])


def read_messages(stream: TextIO, messages: queue.Queue) -> None:
    for line in stream:
        messages.put(json.loads(line))
    os._exit(0)  # also in the middle of a run: nobody waits for it any more


def serve(data: Path, work: Path, device: str) -> None:
    replies = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)

    def reply(what: dict) -> None:
        print(json.dumps(what), file=replies, flush=True)

    messages: queue.Queue = queue.Queue()
    threading.Thread(target=read_messages, args=(sys.stdin, messages), daemon=True).start()
    made = runner(data, work, device)
    reply({"device": torch.cuda.get_device_name() if device == "cuda" else processor()})
    while True:
        message = messages.get()
        print(f"\n== {message['key']}", flush=True)
        found = answer(made, message)
        reply(found)
        if "failed" in found:
            os._exit(1)  # a CUDA error would meet the next run too
