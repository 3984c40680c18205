"""Sparsity algorithms: exact counts, reproducible masks, clear refusals."""

import re
import subprocess
import sys

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from sparsekern import Static, sparsity

INITS = ("random", "magnitude")


@given(st.integers(0, 9), st.integers(0, 9), st.floats(0, 1), st.sampled_from(INITS), st.integers())
def test_exact_count(n, k, s, init, seed):
    mask = Static(s, init, seed).mask("layer", torch.randn(n, k))
    assert mask.shape == (n, k) and mask.dtype == torch.bool
    assert mask.sum() == round((1 - s) * n * k)


def test_random_mask_depends_on_seed_and_name_alone():
    def mask(name="a", seed=0, weight=None):
        return Static(0.5, seed=seed).mask(name, torch.zeros(8, 8) if weight is None else weight)

    want = mask()
    torch.manual_seed(1)
    assert torch.equal(mask(weight=torch.randn(8, 8).bfloat16()), want)
    assert not torch.equal(mask(name="b"), want)
    assert not torch.equal(mask(seed=1), want)
    assert not torch.equal(mask(name="b", seed=1), mask(name="b"))


def test_random_mask_leaves_the_global_generator_alone():
    before = torch.get_rng_state()
    Static(0.5).mask("a", torch.zeros(8, 8))
    assert torch.equal(torch.get_rng_state(), before)


def test_random_mask_is_the_same_in_another_process():
    code = (
        "import torch, sparsekern;"
        "mask = sparsekern.Static(0.75, seed=3).mask('h.0.mlp', torch.zeros(4, 6));"
        "print(mask.int().flatten().tolist())"
    )
    printed = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    mask = Static(0.75, seed=3).mask("h.0.mlp", torch.zeros(4, 6))
    assert printed.stdout.strip() == str(mask.int().flatten().tolist()), printed.stderr


def test_random_mask_is_uniform():
    """Each place is kept as often as the others, over many seeds."""
    count = sum(Static(0.75, seed=s).mask("a", torch.zeros(8, 8)).float() for s in range(400))
    # 400 draws of probability 1/4: 100 +- 8.7; 64 places stay within 5 deviations.
    assert (count - 100).abs().max() < 5 * (400 * 0.25 * 0.75) ** 0.5


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
def test_magnitude_keeps_the_largest(dtype):
    weight = torch.randn(16, 16, dtype=dtype)
    mask = Static(0.75, "magnitude").mask("a", weight)
    assert weight[mask].abs().min() >= weight[~mask].abs().max()


def test_magnitude_keeps_the_first_of_equals_and_nan():
    mask = Static(0.5, "magnitude").mask("a", torch.ones(2, 4))
    assert mask.tolist() == [[True] * 4, [False] * 4]
    weight = torch.tensor([[1.0, 2.0], [3.0, torch.nan]])
    assert Static(0.75, "magnitude").mask("a", weight).tolist() == [[False, False], [False, True]]


@pytest.mark.parametrize("value", [-0.1, 1.5, float("nan")])
def test_wrong_sparsity(value):
    text = re.escape(f"sparsity: expected a number in [0, 1], got {value}")
    with pytest.raises(ValueError, match=text):
        Static(value)


def test_wrong_init():
    with pytest.raises(
        ValueError, match="init_method: expected one of random, magnitude, topk, .*, got 'largest'"
    ):
        Static(0.5, init_method="largest")


def test_registry():
    assert sparsity.get("static", sparsity=0.5, seed=2) == Static(0.5, seed=2)
    with pytest.raises(ValueError, match="algorithm: expected one of .*static.*, got 'statik'"):
        sparsity.get("statik")
