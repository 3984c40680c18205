"""Differences of bench/quality.py: intervals, what they show, and their digits."""

import numpy as np
import pytest
from quality_results import results
from scipy import stats

pytest_plugins = "quality_toy"


@pytest.mark.parametrize(
    ("values", "metric", "says"),
    [
        ([0.001, 0.002, 0.0015], "code", "equal within 0.02"),
        ([0.1, 0.11, 0.12], "code", "worse by more than 0.02"),
        ([0.1, 0.11, 0.12], "blimp", "better by more than 0.02"),
        ([-0.03, -0.02, -0.025], "code", "better"),
        ([0.0, 0.1, -0.1], "code", "open"),
        ([0.001], "code", "open, one seed"),
    ],
)
def test_what_an_arm_is_beside_another(evidence, values, metric, says):
    differences = evidence.differences
    both = {"dense": [2.0] * len(values), "75": [2 + value for value in values]}
    found = differences.difference(results(evidence, both), "S", "75", "dense", "code")
    assert found.mean == pytest.approx(np.mean(values))
    assert differences.standing(found, metric, 0.02) == says


@pytest.mark.parametrize(
    ("mean", "low", "high", "told"),
    [
        (0.1997, 0.2, 0.35, "+0.1997"),
        (0.2003, 0.2, 0.35, "+0.2003"),
        (0.35004, 0.2, 0.35, "+0.35004"),
        (0.2, 0.2, 0.35, "+0.200"),
        (0.2 - 1e-12, 0.2, 0.35, "+0.200"),
        (0.1234, 0.2, 0.35, "+0.123"),
        (-0.0001, 0.0, 0.05, "-0.0001"),
    ],
)
def test_a_difference_has_the_digits_that_tell_whether_it_was_predicted(
    evidence, mean, low, high, told
):
    found = evidence.differences.Difference([0], [mean], None, None)
    prediction = evidence.plan.Prediction("75", "dense", "held-out", low, high)
    assert evidence.answer.shown(found, prediction=prediction) == f"{told}, 1 seed"
    ends = evidence.differences.Difference([0], [0.1], (0.0004, 0.2), None)
    assert evidence.answer.shown(ends) == "+0.100, +0.0004 to +0.200, 1 seed"


def test_intervals_are_those_of_scipy_and_cover_seeds_and_items(evidence):
    interval, values = evidence.differences.interval, [0.1, 0.13, 0.09]
    for share in (0.90, 0.95):
        want = stats.t.interval(share, 2, loc=np.mean(values), scale=stats.sem(values))
        assert interval(values, share) == pytest.approx(want)
        # Equal within a margin is what two one-sided tests at 5 % say.
        margin = interval(values, 0.90)[1]
        test = stats.ttest_1samp(values, margin, alternative="less")
        assert test.pvalue == pytest.approx(0.05)
    assert interval([1.0], 0.95) is None
    # As many as they say hold the truth, also where seeds differ more than items.
    rng, held = np.random.default_rng(0), 0
    for _ in range(400):
        apart = rng.normal(0, 1, (3, 1)) + rng.normal(0, 1, (3, 50))
        low, high = interval(list(apart.mean(1)), 0.95, stats.sem(apart.mean(0)))
        held += low <= 0 <= high
    assert held >= 0.93 * 400


def test_shares_cover_seeds_and_items(evidence):
    both = {"dense": [2.0] * 4, "75": [2.0] * 4}
    found = evidence.differences.difference(results(evidence, both), "S", "75", "dense", "cloze")
    low, high = found.of_95
    # Items of two models with independent errors of 20 %: 4 points over 200 items, four seeds, so
    # 2 points of their mean, of the items alone and of the seeds alone: 2 (3.9^2 + 6.4^2)^0.5.
    assert low < found.mean < high and 6 < high - low < 24
