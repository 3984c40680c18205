"""run_gpu.py train-float8, of a small GPT on the emulator and a stand-in for cuSPARSELt."""

import itertools
import multiprocessing
import sys
from contextlib import nullcontext
from pathlib import Path

import pytest
import torch
from test_bench_gpu import rows_of
from test_bench_train_gpu import run_of, train_gpu  # noqa: F401

from sparsekern.bench import train_float8_gpu as train_float8
from sparsekern.bench.rates import derive
from sparsekern.gpt import captured
from sparsekern.gpt.model import GPTConfig
from sparsekern.nn.float8 import Scaling

sys.path.append(str(Path(__file__).parents[1] / "kernels" / "cuda"))
from emulated_cusparselt import (  # noqa: E402, F401
    cusparselt_library,
    emulated_cuda,
    emulator,
    float8_on_cpu,
    stand_in,
)


class Graph:
    def __init__(self, launch, aside, first):
        self.replay = launch


class Event:
    ticks = itertools.count(1)

    def __init__(self, enable_timing):
        self.at = 0

    def record(self):
        self.at = next(self.ticks)

    def synchronize(self):
        pass

    def elapsed_time(self, end):
        return end.at - self.at


@pytest.fixture
def on_cpu(monkeypatch, float8_on_cpu):  # noqa: F811
    monkeypatch.setattr(captured, "CudaGraph", Graph)
    monkeypatch.setattr(captured, "Aside", lambda device: nullcontext)
    monkeypatch.setattr(torch.cuda, "Event", Event)
    monkeypatch.setattr(train_float8, "compiled_twin", lambda model: model)


CPU = torch.device("cpu")


def tiny(folder):
    text = folder / "text.txt"
    text.write_text("".join(f"{i} green bottles\n" for i in range(200)))
    return train_float8.Size("tiny", GPTConfig(1, 2, 32, 16, 256), 1, str(text), steps=8)


def test_a_page_of_all_arms(train_gpu, on_cpu, tmp_path, monkeypatch):  # noqa: F811
    size = tiny(tmp_path)
    monkeypatch.setattr(train_float8, "SHOWN", 8)
    advance, advances = Scaling.advance, []
    monkeypatch.setattr(Scaling, "advance", lambda self: advances.append(advance(self)))
    cases = [derive(case) for case in train_float8.cases(size, CPU, train_float8.Training)]
    assert len(advances) == 2 * size.steps  # once a step, replayed or not
    assert len(cases) == 4 and all("losses" in train_gpu.in_short(case) for case in cases)
    page = train_gpu.PAGES["train-float8"]("name", run_of("train-float8", cases, tmp_path))
    rows = rows_of(page[page.index("| arm") :].partition("\n\n")[0])[1:]
    arms = ["two-way bfloat16", "two-way float8", "dense bfloat16", "dense float8"]
    assert sorted(row[0] for row in rows) == sorted(arms)
    losses = {row[0]: float(row[5]) for row in rows}
    for mask in ("two-way", "dense"):
        wide, narrow = (losses[f"{mask} {dtype}"] for dtype in ("bfloat16", "float8"))
        assert abs(wide - narrow) < 0.1
    assert all(row[2:4] == ["1.000", "1.000"] for row in rows)


def test_an_arm_that_fails_leaves_the_others(on_cpu, tmp_path, monkeypatch):
    def fail(*_):
        raise RuntimeError("no scales\nat all")

    monkeypatch.setattr(train_float8, "to_float8_", fail)
    size = tiny(tmp_path)
    arms = [train_float8.Training(arm, size, CPU) for arm in train_float8.ARMS]
    found = train_float8.race(arms, size.steps)
    assert [way.get("failed") for way in found].count("RuntimeError: no scales") == 2
    assert [way["step"] for way in found if "step" in way] == [size.steps] * 2


def test_an_arm_is_served_through_a_pipe(on_cpu, tmp_path):
    size = tiny(tmp_path)
    near, far = multiprocessing.Pipe()
    for steps in (size.steps, 1, 0):
        near.send(steps)
    train_float8._serve(train_float8.ARMS[0], size, CPU, far)
    assert [near.recv() for _ in range(3)] == [None] * 3
    assert near.recv()["step"] == size.steps


def test_an_arm_whose_process_ends_leaves_the_others(tmp_path):
    killed = train_float8.Remote(train_float8.ARMS[0], tiny(tmp_path), CPU)
    killed._process.kill()
    (way,) = train_float8.race([killed], 8)
    assert way == {"kind": "ours", "failed": "its process ended with -9"}
