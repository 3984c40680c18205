"""Two-way masks: at most 2 of each 4 neighbours along both axes."""

import itertools
import math
from collections import Counter

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from sparsekern.sparsity import two_way
from sparsekern.sparsity.families import TwoWay
from sparsekern.sparsity.select import generator
from sparsekern.tensor import SparseTensor
from sparsekern.two_way import is_two_way

sizes = st.integers(0, 14)
seeds = st.integers(0, 2**32)


def is_legal(mask: Tensor) -> bool:
    """By the definition."""
    n, k = mask.shape
    rows = all(mask[i, j : j + 4].sum() <= 2 for i in range(n) for j in range(0, k, 4))
    return rows and all(mask[i : i + 4, j].sum() <= 2 for i in range(0, n, 4) for j in range(k))


def mask_of(places: Tensor, n: int, k: int) -> Tensor:
    return torch.zeros(n * k, dtype=torch.bool).index_fill_(0, places, True).view(n, k)


def randn(n: int, k: int, seed: int) -> Tensor:
    return torch.randn(n, k, generator=torch.Generator().manual_seed(seed))


def best_sum(scores: Tensor, count: int) -> float:
    """The largest sum of squares by brute force: all 7343 masks of each block, and all ways to
    share the count among the blocks. -inf: a place that must not be kept; no mask: -inf."""
    n, k = scores.shape
    legal = torch.from_numpy(two_way._places(two_way.legal_blocks())).bool()
    best = {0: 0.0}
    for i, j in itertools.product(range(0, n, 4), range(0, k, 4)):
        worth = torch.full((4, 4), -math.inf, dtype=torch.float64)
        part = scores[i : i + 4, j : j + 4].double()
        worth[: part.shape[0], : part.shape[1]] = part.square().masked_fill(part < 0, -math.inf)
        sums = torch.where(legal, worth.flatten(), 0.0).sum(1)
        of_block = {c: sums[legal.sum(1) == c].max().item() for c in range(9)}
        shared: dict[int, float] = {}
        for (a, x), (b, y) in itertools.product(best.items(), of_block.items()):
            shared[a + b] = max(shared.get(a + b, -math.inf), x + y)
        best = shared
    return best.get(count, -math.inf)


# Recognition


@given(sizes, sizes, st.floats(0, 1), seeds, st.sampled_from([1, 5, 2**22]))
def test_recognition_is_the_definition(n, k, density, seed, chunk):
    rng = np.random.default_rng(seed)
    mask = torch.from_numpy(rng.random((n, k)) < density**2)
    pattern = SparseTensor.from_dense(mask.float())
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("sparsekern.two_way.CHUNK", chunk)
        assert is_two_way(pattern.row_offsets, pattern.col_indices, k) == is_legal(mask)


@given(st.integers(1, 14), st.integers(1, 14), seeds)
def test_recognition_sees_one_place_too_many(n, k, seed):
    mask = mask_of(two_way.random_mask(n, k, two_way.most(n, k), generator(seed)), n, k)
    others = (~mask).flatten().nonzero().flatten()
    for places in (None, *others.tolist()):
        more = mask.clone()
        if places is not None:
            more.view(-1)[places] = True
        pattern = SparseTensor.from_dense(more.float())
        found = is_two_way(pattern.row_offsets, pattern.col_indices, k)
        assert found == is_legal(more)
        assert found or places is not None


# Random masks


@given(sizes, sizes, st.floats(0, 1), seeds)
def test_random_masks_are_legal_exact_and_repeat(n, k, share, seed):
    count = round(share * two_way.most(n, k))
    places = two_way.random_mask(n, k, count, generator(seed))
    assert places.dtype == torch.int64 and places.shape == (count,) and (places.diff() > 0).all()
    assert is_legal(mask_of(places, n, k))
    assert torch.equal(places, two_way.random_mask(n, k, count, generator(seed)))


@given(st.integers(0, 40), st.integers(0, 40))
def test_there_is_room_for_half_of_any_shape(n, k):
    assert two_way.most(n, k) >= math.ceil(n * k / 2)
    assert n % 4 or k % 4 or two_way.most(n, k) == n * k // 2
    with pytest.raises(ValueError, match="count: expected 0 to"):
        two_way.random_mask(n, k, two_way.most(n, k) + 1, generator(0))


@pytest.mark.parametrize(("n", "k", "count"), [(5, 5, 2), (5, 2, 3), (2, 5, 4), (3, 3, 5)])
def test_random_masks_are_uniform(n, k, count):
    """Chi-square over all legal masks of this size."""
    every = {
        places
        for places in itertools.combinations(range(n * k), count)
        if is_legal(mask_of(torch.tensor(places), n, k))
    }
    draws = 10 * len(every) + 1000
    found = Counter(
        tuple(two_way.random_mask(n, k, count, generator(seed)).tolist()) for seed in range(draws)
    )
    assert found.keys() <= every
    expected, free = draws / len(every), len(every) - 1
    statistic = sum((found[places] - expected) ** 2 / expected for places in every)
    assert abs(statistic - free) < 5 * (2 * free) ** 0.5 + 1


def test_a_draw_never_changes():
    """Checkpoints and ranks rely on it."""
    places = two_way.random_mask(64, 48, 768, generator(0, "blocks.0.mlp.up"))
    assert places[:8].tolist() == [6, 10, 11, 12, 18, 20, 22, 24]
    assert int((places * torch.arange(768)).sum()) == 606886237


def test_a_large_draw():
    places = two_way.random_mask(1030, 2050, 527_000, generator("large"))
    mask = mask_of(places, 1030, 2050)
    pattern = SparseTensor.from_dense(mask.float())
    assert mask.sum() == 527_000 and is_two_way(pattern.row_offsets, pattern.col_indices, 2050)
    # Rows and columns hold about their share: 512.5 and 257.5, with less variance than free ones.
    assert (mask.sum(1)[:1028] - 511.5).abs().max() < 5 * 384**0.5


# The best masks


@settings(max_examples=40)
@given(st.integers(1, 9), st.integers(1, 9), st.floats(0, 1), st.floats(0, 1), seeds)
def test_the_largest_sum_of_squares_of_any_count(n, k, share, stored, seed):
    """Against brute force, also where only some places are stored."""
    scores = randn(n, k, seed).abs()
    scores[torch.rand(n, k, generator=torch.Generator().manual_seed(seed)) > stored] = -math.inf
    room = two_way.Best(scores).room
    assert room == max(c for c in range(room + 2) if best_sum(scores, c) > -math.inf)
    assert room == TwoWay().room(scores > -math.inf)
    count = round(share * room)
    mask = two_way.largest({"": scores}, count)[""]
    assert mask.sum() == count and is_legal(mask) and (scores[mask] >= 0).all()
    assert scores[mask].double().square().sum().item() == pytest.approx(best_sum(scores, count))


@given(st.integers(1, 9), st.integers(1, 9), seeds)
def test_gains_never_grow(n, k, seed):
    gains = two_way.Best(randn(n, k, seed)).gains
    assert (gains.diff(dim=2) <= 0).all()


def test_several_layers_share_one_budget():
    layers = {"a": randn(8, 8, 0).abs(), "b": 3 * randn(4, 12, 1).abs(), "c": randn(0, 5, 2)}
    masks = two_way.largest(layers, 30)
    assert sum(int(mask.sum()) for mask in masks.values()) == 30
    found = sum(layers[n][mask].double().square().sum().item() for n, mask in masks.items())
    shares = [best_sum(layers["a"], i) + best_sum(layers["b"], 30 - i) for i in range(6, 30 + 1)]
    assert found == pytest.approx(max(shares))


@given(st.integers(1, 20), st.integers(1, 20), seeds, st.sampled_from([1, 3]))
def test_choices_do_not_depend_on_how_many_blocks_are_looked_at_together(n, k, seed, blocks):
    scores, count = randn(n, k, seed), two_way.most(n, k) // 2
    want = two_way.largest({"": scores}, count)[""]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(two_way, "CPU_BLOCKS", blocks)
        patch.setattr(two_way, "GPU_BLOCKS", 2 * blocks)
        assert torch.equal(two_way.largest({"": scores}, count)[""], want)


@pytest.mark.gpu
@pytest.mark.parametrize(("n", "k"), [(513, 770), (2048, 1024)])
def test_a_gpu_chooses_the_same(n, k):
    scores = randn(n, k, 0)
    count = n * k // 4
    mask = two_way.largest({"": scores}, count)[""]
    assert torch.equal(two_way.largest({"": scores.cuda()}, count)[""].cpu(), mask)
    pattern = SparseTensor.from_dense(mask.float())
    assert is_two_way(pattern.row_offsets.cuda(), pattern.col_indices.cuda(), k)
    free = SparseTensor.from_dense((scores > 0.67).float())
    assert not is_two_way(free.row_offsets.cuda(), free.col_indices.cuda(), k)


def test_equals_infinite_and_nan():
    assert two_way.largest({"": torch.zeros(4, 8)}, 9)[""].view(-1)[:4].tolist() == [1, 1, 0, 0]
    scores = torch.rand(8, 8)
    scores[1, 1], scores[6, 3], scores[5, 5] = math.nan, math.inf, math.inf
    mask = two_way.largest({"": scores}, 5)[""]
    assert mask[1, 1] and mask[6, 3] and mask[5, 5] and mask.sum() == 5
    tiny = two_way.largest({"": scores.nan_to_num(0, 0) * 1e-30}, 5)[""]
    assert torch.equal(tiny, two_way.largest({"": scores.nan_to_num(0, 0)}, 5)[""])


def test_one_huge_score_does_not_blur_the_others():
    """Not even where something must stay: each block is weighed by its own scores."""
    scores = randn(12, 12, 0).abs()
    scores[0, 5] = scores[9, 9] = math.inf
    want = two_way.largest({"": scores}, 41)[""]
    scores[:4, :4] = 0
    scores[1, 1] = 1e15
    got = two_way.largest({"": scores}, 41 + 1 - int(want[:4, :4].sum()))[""]
    assert got[1, 1] and torch.equal(got[4:], want[4:]) and torch.equal(got[:, 4:], want[:, 4:])


# Beside what stays


@settings(max_examples=40)
@given(st.integers(1, 9), st.integers(1, 9), st.floats(0, 1), st.floats(0, 1), seeds)
def test_growth_where_as_many_were_dropped(n, k, share, drop, seed):
    """It always fits, keeps all that stayed, and is the best that fits."""
    count = round(share * two_way.most(n, k))
    old = two_way.random_mask(n, k, count, generator(seed))
    kept = old[torch.randperm(count, generator=torch.Generator().manual_seed(seed))]
    kept = kept[round(drop * count) :].sort().values
    scores = randn(n, k, seed).abs()
    family = TwoWay()
    rows = [(i, scores[i : i + 2].clone()) for i in range(0, n, 2)]
    grown = family.grown(kept, rows, n, k, count - kept.shape[0])
    at_random = family.grown_at_random(kept, n, k, count - kept.shape[0], generator(seed))
    for places in (grown, at_random):
        assert places.shape == (count,) and (places.diff() > 0).all()
        assert torch.isin(kept, places).all() and is_legal(mask_of(places, n, k))
    new = grown[~torch.isin(grown, kept)]
    lifted = scores.double()
    lifted.view(-1)[kept] = 1000.0  # so that the best mask keeps them
    want = best_sum(lifted, count) - 1e6 * kept.shape[0]
    assert scores.view(-1)[new].double().square().sum().item() == pytest.approx(want, abs=1e-4)


def test_growth_without_room_moves_as_few_as_possible():
    """Row 3 and column 3 can take one more each, but not where they meet: one must move."""
    kept = torch.tensor([0, 1, 5, 6, 8, 10, 15])
    family = TwoWay()
    assert is_legal(mask_of(kept, 4, 4))
    grown = family.grown_at_random(kept, 4, 4, 1, generator(0))
    assert grown.shape == (8,) and is_legal(mask_of(grown, 4, 4))
    assert torch.isin(kept, grown).sum() == 6


def test_growth_without_a_score_is_none():
    kept = torch.tensor([0, 5])
    assert TwoWay().grown(kept, [(0, torch.zeros(4, 4))], 4, 4, 1) is None
    assert torch.equal(TwoWay().grown(kept, [(0, torch.zeros(4, 4))], 4, 4, 0), kept)


# More than half: on the way


@given(st.integers(1, 14), st.integers(1, 14), st.floats(0.5, 1), seeds)
def test_more_than_half_leads_to_half(n, k, density, seed):
    count = max(two_way.most(n, k), round(density * n * k))
    scores = randn(n, k, seed).abs()
    family = TwoWay()
    masks = [
        two_way.largest({"": scores}, count)[""],
        mask_of(family.random(n, k, count, generator(seed)), n, k),
    ]
    for mask in masks:
        assert mask.sum() == count and family.room(mask) == two_way.most(n, k)


def test_no_room():
    scores = torch.full((4, 8), -math.inf)
    scores[0] = 1
    with pytest.raises(ValueError, match="family: a two-way mask within what is stored .* 4 .* 5"):
        two_way.largest({"up": scores}, 5)
    with pytest.raises(ValueError, match="family: .* no room for 5 weights"):
        TwoWay().evenly(scores, 5)


def test_what_a_row_of_blocks_has_no_room_for_goes_to_others():
    scores = torch.rand(12, 16)
    scores[:4] = -math.inf
    mask = TwoWay().evenly(scores, 60)
    assert mask.view(3, -1).sum(1).tolist() == [0, 30, 30] and is_legal(mask)


@given(st.integers(1, 14), st.integers(1, 14), st.floats(0, 1), seeds)
def test_even_shares_among_rows_of_blocks(n, k, share, seed):
    count = round(share * n * k / 2)
    mask = TwoWay().evenly(randn(n, k, seed).abs(), count)
    assert mask.sum() == count and is_legal(mask)
    for i in range(0, n, 4):
        rows = mask[i : i + 4]
        assert abs(int(rows.sum()) - count * rows.shape[0] / n) <= 1


@pytest.mark.parametrize(
    ("sparsity", "entropy", "squares"),
    [(0.5, 0.41, 0.89), (0.6, 0.77, 0.93), (0.75, 0.94, 0.98), (0.9, 0.99, 1.00)],
)
def test_how_free_two_way_masks_are(sparsity, entropy, squares):
    """As docs/math.md says, relative to free masks: entropy, and squares of Gaussian weights."""
    n = 256
    count = round((1 - sparsity) * n * n)
    ways = [len(masks) for masks in two_way._masks_within(4, 4)]
    assert sum(ways) == 7343
    (chances,) = two_way._chances([ways], [n * n // 16], count)
    bits = sum(p * math.log2(w / p) for p, w in zip(chances, ways, strict=True) if p) / 16
    free = -sum(p * math.log2(p) for p in (sparsity, 1 - sparsity))
    assert bits / free == pytest.approx(entropy, abs=0.006)
    weight = randn(n, n, 0)
    kept = weight[two_way.largest({"": weight}, count)[""]].square().sum()
    assert kept / weight.square().flatten().topk(count).values.sum() == pytest.approx(
        squares, abs=0.008
    )
