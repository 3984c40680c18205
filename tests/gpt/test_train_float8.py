"""train --dtype float8: on the emulator with a stand-in for cuSPARSELt, and on a GPU."""

import sys
from contextlib import nullcontext
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from tiny import final, interrupt, tiny_config

from sparsekern.cli import main
from sparsekern.gpt import captured, parts, train
from sparsekern.gpt import config as configs
from sparsekern.gpt.config import resumed_config
from sparsekern.gpt.prune import PruneConfig, prune
from sparsekern.nn.float8 import Float8Linear, Float8SparseLinear

sys.path.append(str(Path(__file__).parents[1] / "kernels" / "cuda"))
from emulated_cusparselt import (  # noqa: E402, F401
    cusparselt_library,
    emulated_cuda,
    emulator,
    float8_on_cpu,
    stand_in,
)

TWO_WAY = {"sparsity": 0.75, "family": "two-way"}


@pytest.fixture
def on_cpu(monkeypatch, float8_on_cpu):  # noqa: F811
    monkeypatch.setattr(configs, "check_float8", lambda config: None)


@pytest.mark.parametrize("settings", [{}, TWO_WAY | {"algorithm": "rigl"}], ids=str)
def test_losses_are_those_of_float32_and_a_resumed_run_goes_on(
    settings, tmp_path, monkeypatch, on_cpu
):
    config = tiny_config(tmp_path, steps=4, lr=1e-2, micro_batch=1, **settings)
    exact = train.train(config)
    config = replace(config, dtype="float8", out=str(tmp_path / "float8"))
    whole = train.train(config)
    for a, b in zip(whole["losses"], exact["losses"], strict=True):
        assert 0 < abs(a - b) < 0.05
    assert whole["losses"][-1] < whole["losses"][0]
    config = replace(config, out=str(tmp_path / "again"))
    interrupt(monkeypatch, config, 3)
    assert final(config)["float8"]["has_begun"]
    resumed = train.train(resumed_config({"out": config.out}))
    assert resumed["losses"] == whole["losses"]


def test_the_layers_of_the_blocks_are_in_float8(tmp_path, on_cpu):
    for settings, kind in (({}, Float8Linear), (TWO_WAY, Float8SparseLinear)):
        run = train.begin(tiny_config(tmp_path, dtype="float8", **settings))
        blocks = [type(m) for m in run.model.blocks.modules() if hasattr(m, "in_features")]
        assert blocks == [kind] * 4 and type(run.model.lm_head) is torch.nn.Linear
        run.compute_gradients()
        run.update()
        assert all(p.isfinite().all() for p in run.model.parameters())


@pytest.mark.parametrize(
    "flags, message",
    [
        ([], "dtype: float8 needs device cuda, got cpu"),
        (["--device=cuda", "--parallel=ddp"], "float8 trains in one process, got parallel ddp"),
        (["--device=cuda", "--batch=1", "--context=24"], "in multiples of 16, got 24"),
    ],
)
def test_what_cannot_be_is_said_before_any_work(flags, message, tmp_path, capsys):
    out = f"--out={tmp_path / 'run'}"
    assert main(["train", "--dtype=float8", out, *flags]) != 0
    assert message in capsys.readouterr().err
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("settings", [{"sparsity": 0.75}, {"width": 48}], ids=str)
def test_other_masks_and_sizes_are_refused(settings, tmp_path, on_cpu):
    message = "two-way pattern" if "sparsity" in settings else "multiples of 32"
    with pytest.raises(ValueError, match=rf"float8: blocks.0.attention.*{message}"):
        train.begin(tiny_config(tmp_path, dtype="float8", **settings))


def test_first_steps_are_not_captured(tmp_path, monkeypatch, on_cpu):
    monkeypatch.setattr(captured, "CudaGraph", lambda launch, *_: SimpleNamespace(replay=launch))
    monkeypatch.setattr(captured, "Aside", lambda device: nullcontext)
    monkeypatch.setattr(parts, "why_eager", lambda ranks: None)
    replayed = {}
    for kind in ("as made", "from 0"):
        run = train.begin(tiny_config(tmp_path, dtype="float8", **TWO_WAY))
        if kind == "from 0":
            torch.nn.init.zeros_(run.model.blocks[0].mlp.down.values)
        replayed[kind] = []
        for _ in range(4):
            run.compute_gradients()
            replayed[kind].append(run.parts.is_replayed)
            run.update()
    assert replayed == {"as made": [False] * 2 + [True] * 2, "from 0": [False] * 3 + [True]}


def test_a_step_is_captured_anew_where_scales_have_no_room(tmp_path, monkeypatch, on_cpu):
    class Graph:
        def __init__(self, launch, *_):
            self._launch = launch

        def replay(self):  # of what was captured: nothing waits for the GPU in it
            with monkeypatch.context() as inside:
                inside.setattr(torch.cuda, "is_current_stream_capturing", lambda: True)
                self._launch()

    monkeypatch.setattr(captured, "CudaGraph", Graph)
    monkeypatch.setattr(captured, "Aside", lambda device: nullcontext)
    monkeypatch.setattr(captured, "SETTLED_EVERY", 3)
    monkeypatch.setattr(parts, "why_eager", lambda ranks: None)
    run = train.begin(tiny_config(tmp_path, dtype="float8", **TWO_WAY))
    replayed, exponents = [], []
    for step in range(8):
        run.compute_gradients()
        replayed.append(run.parts.is_replayed)
        exponents.append(run.parts.scaling.exponents.tolist())
        run.update()
        if step == 2:
            with torch.no_grad():
                run.model.blocks[0].mlp.up.values.mul_(64)
    assert replayed == [False] * 2 + [True] * 3 + [False] + [True] * 2
    assert exponents[4][:2] == exponents[5][:2] and exponents[4][2] > exponents[5][2] + 3


@pytest.mark.parametrize("dtype, got", [("", "was trained in float8"), ("float8", "got float8")])
def test_prune_is_for_other_dtypes(dtype, got, tmp_path, on_cpu):
    run = tiny_config(tmp_path, steps=1, context=32, dtype="float8")
    train.train(run)
    out = tmp_path / "pruned"
    config = PruneConfig(run.out, target=0.5, rounds=1, steps=1, dtype=dtype, out=str(out))
    with pytest.raises(ValueError, match=f"dtype: prune expected float32 or bfloat16, .*{got}"):
        prune(config)
    assert not out.exists()


@pytest.mark.gpu
@pytest.mark.parametrize("settings", [{}, TWO_WAY], ids=str)
def test_captured_steps_learn_as_in_bfloat16(settings, tmp_path, capsys):
    sizes = {"width": 64, "context": 64, "batch": 4, "steps": 12, "lr": 1e-2, "device": "cuda"}
    losses = []
    for dtype in ("bfloat16", "float8"):
        config = tiny_config(tmp_path, **sizes, **settings, dtype=dtype, out=str(tmp_path / dtype))
        losses.append(train.train(config)["losses"])
    assert "eager from here on" not in capsys.readouterr().out
    assert losses[1] == pytest.approx(losses[0], abs=0.1) and losses[1][-1] < losses[1][0] - 1
