"""Recipes on a GPU: the same choices as on a CPU, and runs that change the device."""

import copy
from dataclasses import replace
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from tiny import TEXT
from torch import nn

from sparsekern.gpt import train
from sparsekern.gpt.checkpoint import CHECKPOINT, load_checkpoint
from sparsekern.gpt.config import TrainConfig, config_from, resumed_config
from sparsekern.gpt.prune import PruneConfig, prune
from sparsekern.gpt.start import begin
from sparsekern.sparsity import (
    GMP,
    SET,
    IterativePruning,
    Magnitude,
    RigL,
    SparseGPT,
    Static,
    Wanda,
)
from sparsekern.sparsity.pattern import places_of

pytestmark = pytest.mark.gpu


def layer() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(96, 64)).double()


def places(model: nn.Module) -> torch.Tensor:
    return places_of(model[0]).cpu()


@pytest.mark.parametrize(
    "make",
    [
        lambda: Static(0.75),
        lambda: Magnitude(0.75),
        lambda: SET(0.75, update={"freq": 1}),
        lambda: RigL(0.75, update={"freq": 1}, block_elems=1000),
        lambda: GMP({"type": "linear", "init": 0.2, "slope": 0.2}, update={"freq": 1}),
        lambda: IterativePruning(0.75, rounds=3, freq=1, rewind=1),
    ],
)
def test_choices_are_those_of_a_cpu(make):
    """In float64: a rounding must not decide."""
    found = []
    for device in ("cpu", "cuda"):
        model, algorithm = layer().to(device), make()
        algorithm.apply(model)
        optimizer = algorithm.apply(torch.optim.AdamW(model.parameters(), lr=1e-2))
        for step in range(3):
            x = torch.randn(8, 96, generator=torch.Generator().manual_seed(step)).double()
            optimizer.zero_grad()
            F.mse_loss(model(x.to(device)), torch.zeros(8, 64).double().to(device)).backward()
            optimizer.step()
        found.append((places(model), model[0].values.detach().cpu()))
    assert torch.equal(found[0][0], found[1][0])
    torch.testing.assert_close(found[0][1], found[1][1])


def test_a_rewinding_goes_on_from_a_checkpoint():
    """Which is read onto the CPU."""
    found = []
    for stop in (9, 2):
        model, algorithm = layer().cuda(), IterativePruning(0.75, rounds=2, freq=2, rewind=1)
        algorithm.apply(model)
        optimizer = algorithm.apply(torch.optim.SGD(model.parameters(), lr=1e-2))
        for step in range(4):
            if step == stop:
                state = algorithm.state_dict()
                early = {name: t.cpu() for name, t in state["early"].items()}
                others = [t.cpu() for t in state["early_others"]]
                algorithm.load_state_dict(state | {"early": early, "early_others": others})
            optimizer.zero_grad()
            model(torch.ones(8, 96).double().cuda()).square().sum().backward()
            optimizer.step()
        found.append((places(model), model[0].values.detach().cpu()))
    assert torch.equal(found[0][0], found[1][0]) and torch.equal(found[0][1], found[1][1])


@pytest.mark.parametrize("make", [Wanda, SparseGPT])
def test_calibrated_pruning(make):
    x = torch.randn(256, 96).double() @ torch.randn(96, 96).double()
    dense, errors = layer(), []
    for device in ("cpu", "cuda"):
        model = make(0.5, calibration=[x.to(device)]).apply(copy.deepcopy(dense).to(device))
        assert model[0].values.shape[0] == 96 * 64 // 2
        errors.append((model(x.to(device)).cpu() - dense(x)).norm().item())
    assert errors[0] == pytest.approx(errors[1], rel=0.02)


def test_training_in_bf16_resumes_on_a_cpu_and_is_pruned(tmp_path: Path):
    (tmp_path / "text.txt").write_text(TEXT)
    config = TrainConfig(
        data=str(tmp_path / "text.txt"),
        layers=2,
        heads=2,
        width=64,
        context=32,
        batch=8,
        steps=30,
        lr=3e-3,
        sparsity=0.75,
        algorithm="rigl",
        device="cuda",
        dtype="bfloat16",
        out=str(tmp_path / "run"),
        eval_every=10,
    )
    result = train.train(config)
    assert result["losses"][-1] < result["losses"][0] - 1 and result["peak_gpu_bytes"] > 0
    exact = train.train(replace(config, dtype="float32", device="cpu", out=str(tmp_path / "cpu")))
    assert result["losses"][-1] == pytest.approx(exact["losses"][-1], abs=0.3)
    shared = {"data": config.data, "batch": 8, "steps": 4, "device": "cuda", "dtype": "bfloat16"}
    start = {"init_from": config.out, "dense": True, "out": str(tmp_path / "dense")}
    dense = train.train(config_from(start | shared))
    before, after = result["evaluations"][-1]["loss"], dense["evaluations"][0]["loss"]
    assert after == pytest.approx(before, abs=0.02) and dense["sparsity"] == 0
    resumed = begin(resumed_config({"out": config.out, "device": "cpu"}))
    saved = load_checkpoint(Path(config.out) / CHECKPOINT)["model"]
    assert all(torch.equal(t.cpu(), saved[k]) for k, t in resumed.model.state_dict().items())
    for method in ("magnitude", "wanda", "sparsegpt"):
        out = str(tmp_path / method)
        rows = prune(PruneConfig(config.out, targets="0.8,0.9", steps=4, method=method, out=out))
        assert [round(row["sparsity"], 2) for row in rows] == [0.75, 0.8, 0.9]
