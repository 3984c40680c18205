"""A process that makes the runs that come as lines of JSON, one after the other, on one device.

Answers go to stdout, a line each; what the runs print goes to stderr. It ends when stdin does.
"""

import json
import lzma
import os
import queue
import sys
import threading
import traceback
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import TextIO

import torch

from sparsekern.bench.machine import processor
from sparsekern.files import atomic_write

from . import build
from .arms import Data, OutOfTime, Runner, Task

COMPILED = "compiled"
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


def runner(corpus: build.Corpus, work: Path, device: str) -> Runner:
    return Runner(Data(corpus, device), work, DTYPES[device])


def load_compiled(folder: Path) -> None:
    """What torch.compile made in an earlier period: half a minute for each shape. What another
    version of torch made, and what is broken, is told and made again."""
    for path in sorted(folder.glob(f"{COMPILED}-*.xz")):
        try:
            torch.compiler.load_cache_artifacts(lzma.decompress(path.read_bytes()))
        except Exception as error:  # anything: a pickle of another torch
            print(f"{path.name}: not used: {type(error).__name__}: {error}", flush=True)


def save_compiled(folder: Path, gpu: str) -> None:
    if found := torch.compiler.save_cache_artifacts():
        with atomic_write(folder / f"{COMPILED}-{gpu}.xz") as file:
            file.write(lzma.compress(found[0], preset=1))


def read_messages(stream: TextIO, messages: queue.Queue) -> None:
    for line in stream:
        messages.put(json.loads(line))
    os._exit(0)  # also in the middle of a run: nobody waits for it any more


def listen() -> tuple[queue.Queue, Callable[[dict], None]]:
    """Messages as they come, and a function that replies. What is printed goes to stderr now."""
    replies = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)

    def reply(what: dict) -> None:
        print(json.dumps(what), file=replies, flush=True)

    messages: queue.Queue = queue.Queue()
    threading.Thread(target=read_messages, args=(sys.stdin, messages), daemon=True).start()
    return messages, reply


def serve(data: Path, work: Path, out: Path, device: str) -> None:
    """Runs in WORK; what is small enough to be carried to another machine in OUT."""
    messages, reply = listen()
    with ThreadPoolExecutor() as pool:  # seconds each
        corpus = pool.submit(build.load, data)
        load_compiled(out)
    made, shapes = runner(corpus.result(), work, device), 0
    reply({"device": torch.cuda.get_device_name() if device == "cuda" else processor()})
    while True:
        message = messages.get()
        print(f"\n== {message['key']}", flush=True)
        found = answer(made, message)
        reply(found)
        if "failed" in found:
            os._exit(1)  # a CUDA error would meet the next run too
        if made.shapes > shapes:
            shapes = made.shapes
            save_compiled(out, os.environ.get("CUDA_VISIBLE_DEVICES", ""))
