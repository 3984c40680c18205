"""Statistics of bench/quality.py, and a page that says what its results say."""

import json
from pathlib import Path

import numpy as np
import pytest
from quality_results import results
from scipy import stats

BENCH = Path(__file__).parents[2] / "bench"

pytest_plugins = "quality_toy"


def test_the_page_without_results_is_the_plan(evidence):
    page = evidence.page.text([])
    assert "**Not known yet.**" in page and "| found |" not in page and "nan" not in page
    for order in evidence.plan.PLAN:
        assert f"{order.number}. {order.question}" in page
        for arm in order.arms:
            assert evidence.plan.ARMS[arm].title in page


def test_the_page_of_a_part_of_the_runs(evidence):
    """One seed has no interval, an arm without a partner no difference, one without runs no row."""
    page = evidence.page.text(results(evidence, {"dense": [2.0, 2.01], "75": [2.1]}))
    first, primary = page.split("\n\n")[1], page.split("## ")[1]
    assert "**Not all runs are there yet.**" in first
    assert "against a small dense model of the same FLOPs: not run yet" in first
    assert "not shown to be equal, +0.1000 (1 seed)" in first and "nan" not in page
    assert (
        "+0.1000 (1 of 3 seeds)" in primary
        and "so far as predicted; one seed says nothing" in primary
    )
    second = page.split("\n## 2. ")[1].split("\n## ")[0]
    assert second.splitlines()[4].startswith("| dense |") and "|   0-1 |" in second
    assert "Not run yet, with their FLOPs: small dense, FLOPs of 75 % (0.52); dense" in second
    assert "| webnlg |" not in second  # nobody has it
    assert evidence.page.numbers([5, 0, 2, 1]) == "0-2, 5"


def test_the_page_is_what_its_results_make(evidence):
    kept = BENCH / "results" / "quality.jsonl"
    by_clock = evidence.clock.read(kept.with_name("quality-cpu.jsonl"))
    made = evidence.page.text(evidence.study.read([kept] if kept.exists() else []), by_clock)
    assert made == (BENCH.parent / "docs" / "quality.md").read_text()


def test_the_page_says_when_small_dense_is_as_good(evidence):
    small = {"dense": [2.0, 2.01, 2.02], "75": [2.1, 2.11, 2.12], "small": [2.1, 2.112, 2.119]}
    assert "**Not all runs are there yet.**" in evidence.page.text(results(evidence, small))
    small["short"] = [2.05, 2.06, 2.07]
    page = evidence.page.text(results(evidence, small)).split("\n\n")
    assert "small dense model of the same FLOPs is as good" in page[1]
    assert "Not all runs" not in page[1]
    assert "75 % zeros are **worse** than the dense model with the same FLOPs" in page[1]
    assert "with the same tokens: not shown to be equal, +0.100" in page[1]
    worse = small | {"small": [2.2, 2.21, 2.22]}
    assert "75 % zeros are better than a small" in evidence.page.text(results(evidence, worse))


@pytest.mark.parametrize(
    ("values", "so"),
    [
        ([0.001, 0.002, 0.0015], "as predicted; **equal within 0.02**"),
        ([0.1, 0.11, 0.12], "not as predicted; **different**"),
        ([0.0, 0.1, -0.1], "as predicted; open: neither equal within 0.02 nor different"),
        ([0.001], "as predicted; one seed says nothing of 0.02"),
    ],
)
def test_verdicts(evidence, values, so):
    differences = evidence.differences
    both = {"dense": [2.0] * len(values), "75": [2 + value for value in values]}
    found = differences.difference(results(evidence, both), "S", "75", "dense", "code")
    assert found.mean == pytest.approx(np.mean(values))
    prediction = evidence.plan.Prediction("75", "dense", "code", 0.0, 0.05, 0.02)
    assert differences.verdict(prediction, found) == so


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


def test_results_are_added_once(evidence, tmp_path):
    new = results(evidence, {"dense": [2.0]})
    (tmp_path / "new.jsonl").write_text("".join(json.dumps(r) + "\n" for r in new))
    kept, page = tmp_path / "kept.jsonl", tmp_path / "page.md"
    for _ in range(2):
        evidence.page.publish(kept, page, [tmp_path / "new.jsonl"], tmp_path / "cpu")
    assert len(kept.read_text().splitlines()) == 1 and "GPU" in page.read_text()
    (tmp_path / "other.jsonl").write_text(json.dumps(new[0] | {"key": "b", "recipe": "old"}) + "\n")
    with pytest.raises(ValueError, match="made by another plan"):
        evidence.page.publish(kept, page, [tmp_path / "other.jsonl"], tmp_path / "cpu")
