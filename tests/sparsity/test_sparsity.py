"""Sparsity algorithms: exact counts, reproducible masks, clear refusals."""

import hashlib
import re
import subprocess
import sys
import tracemalloc

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from sparsekern import Static, sparsity
from sparsekern.sparsity.select import (
    _mark,
    _sort,
    generator,
    largest,
    merged,
    random_outside,
    random_places,
)
from sparsekern.testing import random_mask

INITS = ("random", "magnitude")


SHARES = st.floats(0, 1, exclude_max=True)


@given(st.integers(0, 9), st.integers(0, 9), SHARES, st.sampled_from(INITS), st.integers())
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


# Random choices


@given(st.integers(0, 3000), st.floats(0, 1), st.integers(0, 9))
def test_random_places_are_different_ascending_and_as_many_as_asked_for(size, density, seed):
    count = round(density * size)
    places = random_places(size, count, generator(seed))
    assert places.dtype == torch.int64 and places.shape == (count,)
    assert (places.diff() > 0).all() and (not count or 0 <= places[0] <= places[-1] < size)


@given(st.integers(1, 5000), st.floats(0, 0.5), st.integers(0, 9))
def test_both_ways_to_choose_choose_the_same(size, density, seed):
    """With a byte for each place, and in O(count) memory."""
    count = round(density * size)
    assert _mark(size, count, generator(seed)).tolist() == (
        _sort(size, count, generator(seed)).tolist() if count else []
    )


@pytest.mark.parametrize("count", [3, 20, 33, 63])
def test_random_places_are_uniform(count):
    """Chi-square of places and of pairs of neighbours, over 1500 choices of 64 places."""
    chosen = torch.zeros(1500, 64)
    for seed in range(1500):
        chosen[seed, random_places(64, count, generator("uniform", seed))] = 1
    p = count / 64
    # Of one choice the places correlate by -1/63: the statistic is chi-square of 63, times 64/63.
    expected, variance = 1500 * p, 1500 * p * (1 - p)
    statistic = ((chosen.sum(0) - expected) ** 2 / variance).sum().item() * 63 / 64
    assert 63 - 5 * 126**0.5 < statistic < 63 + 5 * 126**0.5
    pair = count * (count - 1) / (64 * 63)
    pairs = (chosen[:, :-1] * chosen[:, 1:]).sum(0)
    assert (pairs - 1500 * pair).abs().max() <= 5 * (1500 * pair * (1 - pair)) ** 0.5


def test_a_choice_never_changes():
    """Checkpoints and ranks rely on it: from the key alone, on every machine and release."""
    places = random_places(16384 * 4096, 1000, generator(0, "blocks.0.mlp.up", 100))
    digest = hashlib.sha256(places.numpy().astype("<i8").tobytes()).hexdigest()
    assert places[:3].tolist() == [79305, 79802, 97130]
    assert digest[:16] == "3b4b5e89866bb15c"


def test_choices_beyond_32_bits():
    size = 2**33 + 7
    places = random_places(size, 2000, generator("large"))
    assert (places.diff() > 0).all() and (places > 2**32).float().mean() == pytest.approx(0.5, 0.1)
    new = random_outside(places, size, 2000, generator("more"))
    assert (new.diff() > 0).all() and not torch.isin(new, places).any()
    assert new[-1] > 2**32 and new[-1] < size


def test_a_choice_takes_memory_for_what_it_chooses():
    """64 MiB of places, of which one in 512 is chosen: 32 bytes of each, and a chunk of draws."""
    count = 2**26 // 512
    tracemalloc.start()
    try:
        random_places(2**26, count, generator(1))
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert peak < 64 * count


@pytest.mark.parametrize(("kept", "count"), [(0, 5), (5, 0), (12, 12), (20, 4), (23, 1)])
def test_random_outside_is_disjoint(kept, count):
    there = random_places(24, kept, generator("kept"))
    new = random_outside(there, 24, count, generator("new"))
    both = merged(there, new)
    assert both.tolist() == sorted({*there.tolist(), *new.tolist()}) and len(both) == kept + count
    with pytest.raises(ValueError, match=f"count: expected 0 to {24 - kept}, got {25 - kept}"):
        random_outside(there, 24, 25 - kept, generator("new"))


def test_largest_of_many_equals():
    scores = torch.tensor([2.0, 1, 1, 3, 1, 2, 1])
    for count, want in enumerate(([], [3], [0, 3], [0, 3, 5], [0, 1, 3, 5], [0, 1, 2, 3, 5])):
        assert largest(scores, count).tolist() == want


def test_the_mask_of_a_recorded_measurement_stays():
    """bench/results names its masks by their generator."""
    permutation = torch.randperm(35 * 11, generator=torch.Generator().manual_seed(4))
    mask = random_mask(35, 11, 0.8, torch.Generator().manual_seed(4))
    assert mask.flatten().nonzero().flatten().tolist() == permutation[:77].sort().values.tolist()
