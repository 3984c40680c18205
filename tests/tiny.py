"""Runs so small that they take a second: their text, their settings, and what they leave."""

import math
import re
from pathlib import Path

import pytest
import torch

from sparsekern import SparseTensor
from sparsekern.gpt import run
from sparsekern.gpt.checkpoint import load_checkpoint
from sparsekern.gpt.config import TrainConfig, changed
from sparsekern.gpt.data import Batches
from sparsekern.gpt.train import train

TEXT = "".join(f"{i} bottles of beer on the wall, {i} bottles of beer.\n" for i in range(99, 0, -1))

UNITS = "step|part|round|block|token|mesh|measurement|product|crossover|model and round"
PROGRESS = re.compile(
    rf"({UNITS}) \d+(/\d+)?(: .*)?|making the model|reading .+|round \d+: pruning to [\d.]+%|"
    r"(learning a vocabulary from|encoding) [\d,]+ characters"
)


def besides_progress(stderr: str) -> list[str]:
    """Its lines but those that tell, on a slow machine, how far a run is."""
    return [line for line in stderr.splitlines() if not PROGRESS.fullmatch(line)]


def tiny_config(folder: Path, **settings) -> TrainConfig:
    """Trains on folder/text.txt, which it writes, into folder/run."""
    (folder / "text.txt").write_text(TEXT)
    given = dict(
        data=str(folder / "text.txt"),
        layers=1,
        heads=2,
        width=32,
        context=16,
        batch=2,
        steps=6,
        threads=1,
        out=str(folder / "run"),
        eval_every=3,
        eval_batches=1,
        checkpoint_every=2,
    )
    return TrainConfig(**given | settings)


def flags(config: TrainConfig) -> list[str]:
    """The same on the command line."""
    given = changed(config).items()
    return ["train", *(f"--{name.replace('_', '-')}={value}" for name, value in given)]


@pytest.fixture
def training(tmp_path: Path) -> list[str]:
    """A command that trains in tmp_path, without its sparsity."""
    text = "".join(f"{i} bottles of beer on the wall.\n" for i in range(200))
    (tmp_path / "text.txt").write_text(text)
    shape = "--layers=2 --heads=2 --width=32 --context=16 --batch=2 --steps=3 --threads=1"
    data = f"--data={tmp_path / 'text.txt'} --out={tmp_path / 'run'} --eval-every=9"
    return ["train", *shape.split(), *data.split()]


def nan_at(monkeypatch: pytest.MonkeyPatch, call: int) -> None:
    """NaN for the loss of this call of compute_gradients; the first is 1."""
    compute, calls = run.compute_gradients, []

    def compute_with_nan(*args):
        calls.append(args)
        loss, norm = compute(*args)
        return (loss * math.nan if len(calls) == call else loss), norm

    monkeypatch.setattr(run, "compute_gradients", compute_with_nan)


def interrupt_at(monkeypatch: pytest.MonkeyPatch, step: int) -> None:
    """Ctrl-C when a run asks for the batch of this step."""
    get = Batches.get

    def interrupted(self: Batches, i: int):
        if i == step:
            raise KeyboardInterrupt
        return get(self, i)

    monkeypatch.setattr(Batches, "get", interrupted)


def interrupt(monkeypatch: pytest.MonkeyPatch, config: TrainConfig, step: int) -> str:
    """A run that Ctrl-C ends in this step -> what the user is told."""
    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt) as stopped:
        interrupt_at(patch, step)
        train(config)
    return str(stopped.value)


def final(config: TrainConfig) -> dict:
    """What its checkpoint holds."""
    return load_checkpoint(config.out)


def same(a, b) -> bool:
    """Whether all that is nested in them is equal, tensors bit for bit."""
    if isinstance(a, dict):
        return a.keys() == b.keys() and all(same(a[k], b[k]) for k in a)
    if isinstance(a, list):
        return len(a) == len(b) and all(map(same, a, b))
    if isinstance(a, SparseTensor):
        return same(
            [a.row_offsets, a.col_indices, a.values], [b.row_offsets, b.col_indices, b.values]
        )
    return torch.equal(a, b) if isinstance(a, torch.Tensor) else a == b


def states_equal(a: TrainConfig, b: TrainConfig) -> bool:
    """Weights, patterns, optimizer, losses and FLOPs. The seconds differ, and the folders."""
    a, b = final(a), final(b)
    for state in (a, b):
        for evaluation in state["evaluations"]:
            del evaluation["seconds"]
        del state["seconds"], state["config"], state["source"]
    return same(a, b)
