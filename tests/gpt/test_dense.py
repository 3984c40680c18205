"""The dense libraries that the demo holds sparse products against."""

import subprocess
import sys

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from sparsekern import SparseLinear
from sparsekern.gpt import demo, dense


def test_libraries_that_run_here_are_right():
    found, missing = dense.libraries()
    assert found.keys() | missing.keys() == {*dense.LIBRARIES, dense.PACKED}
    assert dense.TORCH in found and dense.NUMPY in found


def test_a_wrong_library_takes_no_part(monkeypatch):
    def wrong(x, weight, bias=None):
        return F.linear(x, weight, bias) * 1.001

    def absent(x, weight, bias=None):
        raise NotImplementedError("no such operator\nand more")

    monkeypatch.setattr(dense, "LIBRARIES", {"wrong": wrong, "absent": absent})
    found, missing = dense.libraries()
    assert "wrong" not in found and missing["wrong"].startswith("wrong by ")
    assert missing["absent"] == "no such operator"


@pytest.mark.parametrize("library", dense.LIBRARIES)
def test_a_model_by_a_library_computes_the_same(library):
    if library not in dense.libraries()[0]:
        pytest.skip(f"no {library} here")
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(12, 20), nn.GELU(), nn.Linear(20, 8, bias=False))
    x = torch.randn(2, 5, 12, requires_grad=True)
    inputs = [x, *model.parameters()]
    want = model(x)
    gradients = torch.autograd.grad(want.square().sum(), inputs)
    dense.use_(model, dense.LIBRARIES[library])
    got = model(x)
    torch.testing.assert_close(got, want)
    for mine, theirs in zip(
        torch.autograd.grad(got.square().sum(), inputs), gradients, strict=True
    ):
        torch.testing.assert_close(mine, theirs)


def test_a_command_runs_with_its_linears_by_a_library():
    command = [sys.executable, "-m", "sparsekern.gpt.dense", dense.NUMPY, "train", "--steps=many"]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 2 and "--steps" in done.stderr


@pytest.mark.parametrize(
    ("step_s", "steps"), [(0.1, 60), (1.0, 30), (100.0, 12)], ids=["fast", "slow", "very slow"]
)
def test_a_slow_machine_trains_fewer_steps(step_s, steps):
    assert demo.steps_in_time(step_s) == steps


def test_linears_are_timed_with_their_bias_on_both_sides(monkeypatch):
    layer = SparseLinear.from_linear(nn.Linear(6, 4))
    seen = {"dense": [], "sparse": []}

    def library(x, weight, bias=None):
        seen["dense"].append(bias)

    def once(fns):
        return {name: [fn() or 0.0] for name, fn in fns.items()}

    monkeypatch.setattr(demo, "_in_turn", once)
    monkeypatch.setattr(torch.autograd, "grad", lambda y, of, dy: seen["sparse"].extend(of))
    demo.time_linears([layer], library)
    assert seen["dense"] == [layer.bias, None, None]  # y, then dx and dW
    assert [p for p in seen["sparse"] if p is layer.bias]


def test_what_the_linears_foretell():
    """Linears three times as fast, AdamW on a quarter of the values, the rest as it is."""
    parts = {"linear forward": 1.0, "linear backward": 2.0, "linear AdamW": 0.4, "rest": 1.0}
    assert demo.predicted(parts, {"dense": 3.0, "sparse": 1.0}, 0.25) == pytest.approx(2.1)
