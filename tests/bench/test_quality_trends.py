"""Rows of differences on the page of bench/quality.py, and what a section says of its runs."""

import numpy as np
import pytest
from quality_results import results
from scipy import stats

pytest_plugins = "quality_toy"

DENSE = [2.0, 2.01, 2.02]


def above(*costs: float, apart: float = 0.001) -> list[float]:
    """Losses of three seeds for each cost, which differ by `apart` beside dense."""
    return [x + cost + apart * i for cost in costs for i, x in enumerate(DENSE)]


def by_sparsity(evidence, costs: dict[str, list[float]]) -> list[dict]:
    return results(evidence, {"dense-normed": DENSE} | {f"{a}-normed": x for a, x in costs.items()})


def section(evidence, number: int, found: list[dict]) -> str:
    return evidence.page.text(found).split(f"\n## {number}. ")[1].split("\n## ")[0]


@pytest.mark.parametrize(
    ("costs", "apart", "says"),
    [
        ((0.1, 0.2, 0.4), 0.001, "**The cost grows from each to the next** (not planned): from"),
        ((0.4, 0.2, 0.1), 0.001, "**The cost shrinks from each to the next** (not planned): from"),
        ((0.3, 0.2, 0.4), 0.001, "**The cost does not go one way** (not planned): from 50 % to"),
        ((0.1, 0.2, 0.201), 0.01, "**The cost grows where the change is clear** (not planned): fr"),
        ((0.1, 0.101, 0.1), 0.01, "**Whether the cost grows or shrinks from each to the next is o"),
    ],
)
def test_a_row_says_whether_it_goes_one_way(evidence, costs, apart, says):
    """A difference that varies as the seeds do, in the first, and in the other two against it."""
    ways = zip(("50", "75", "90"), costs, (apart, 2 * apart, -apart), strict=True)
    found = by_sparsity(evidence, {arm: above(x, apart=y) for arm, x, y in ways})
    told = section(evidence, 4, found).split("\n\n")[1]
    assert told.startswith(f"Cost by sparsity: 50 % **worse** ({costs[0] + apart:+.3f}, ")
    assert says in told and "90 % have the best rate of 75 %" in told
    line = next(x for x in evidence.page.text(found).splitlines() if x.startswith("- **Cost by"))
    assert (
        line.startswith("- **Cost by sparsity** (section 4): 50 % **worse** (+")
        and line in (evidence.page.text(found).split("\n## What holds")[1].split("\n## ")[0])
    )


def test_a_row_that_is_not_whole_says_so(evidence):
    """Also which runs diverged, and nothing where all that has run is told elsewhere."""
    told = section(evidence, 4, by_sparsity(evidence, {"50": above(0.1), "75": above(0.2)}))
    assert "90 % not known yet, in nats" in told and "So far (not planned): from 50 % to" in told
    page = evidence.page.text(by_sparsity(evidence, {"75": above(0.2)}))
    assert "Cost by sparsity" not in page and "\n### 4. " in page
    found = by_sparsity(evidence, {"50": above(0.1), "75": above(0.2), "90": above(0.4)})
    del found[-1]["pretrained"], found[-1]["tuned"]
    told = section(evidence, 4, found)
    assert "; 90 % **worse** (+0.4" in told and "2 of 3 seeds), in nats" in told
    assert "not stable: 90 %, normed, seed 2 (diverged: in no figure)." in told
    assert "\n\nDiverged, in no figure: 90 %, normed, seed 2." in told
    found = by_sparsity(evidence, {"50": above(0.1)[:1]})
    assert "50 % **open, one seed** (+0.100, 1 of 3 seeds)" in section(evidence, 4, found)


@pytest.mark.parametrize(
    ("costs", "says"),
    [
        ((0.3, 0.002, 0.1), "25 % longer **equal within 0.02** (+0.003, "),
        ((0.3, 0.2, 0.1), "25 % longer **worse by more than 0.02** (+0.201, "),
        ((0.3, -0.2, 0.1), "25 % longer **better by more than 0.02** (-0.199, "),
    ],
)
def test_what_comes_back_is_told_beside_dense_that_is_trained_on_as_long(evidence, costs, says):
    """By seeds, each length beside its own dense; what a warm-up raises is not called unstable."""
    arms = {}
    for share, cost in zip((10, 25, 50), costs, strict=True):
        arms[f"more-{share}"] = [x - 0.001 * share for x in DENSE]
        arms[f"pruned-84-{share}"] = [x - 0.001 * share for x in above(cost)]
    found = by_sparsity(evidence, arms)
    for r in found[3:]:
        r["pretrained"]["curve"] = [3.0, 3.4, 2.5]
    told = section(evidence, 8, found)
    assert says in told and "; 50 % longer **worse by more than 0.02**" in told
    assert f"from 10 % longer to 25 % longer {costs[1] - costs[0]:+.3f}" in told
    assert (
        "not stable" not in told
        and "by sparsity, beside dense trained on as long: 75 % not" in told
    )
    assert "FLOPs of a model that is trained on are with those of dense" in told
    arms = next(x for x in told.splitlines() if x.startswith("| arm "))
    assert " code |" not in arms  # these were not fine-tuned, whatever dense was


def test_sizes_are_compared_as_two_samples(evidence):
    small = by_sparsity(evidence, {"75": [2.2, 2.22, 2.25]})
    assert "### 6. " in evidence.page.text(small)
    large = [
        r | {"size": "M", "key": f"M{r['key'][1:]}"}
        for r in by_sparsity(evidence, {"75": [2.1, 2.14, 2.13]})
    ]
    trends = evidence.trends
    step = trends.change(*trends.TRENDS[1].points, [*small, *large])
    want = stats.ttest_ind(
        np.subtract([2.1, 2.14, 2.13], DENSE),
        np.subtract([2.2, 2.22, 2.25], DENSE),
        equal_var=False,
    )
    assert step.mean == pytest.approx(0.34 / 3 - 0.64 / 3)
    assert step.of_95 == pytest.approx(tuple(want.confidence_interval(0.95)))
    told = section(evidence, 6, [*small, *large])
    assert "7 layers, 512 wide **worse** (+0.113, " in told
    assert "**The cost shrinks** (not planned): from 6 layers, 384 wide to 7 layers, 5" in told
    large[0]["pretrained"]["curve"] = [5.0, 3.0, 3.5]
    named = "not stable: dense, normed (7 layers, 512 wide), seed 0."
    assert named in section(evidence, 6, [*small, *large])
    assert "(no interval)" in section(evidence, 6, [*small, large[0], large[3]])


def test_what_was_not_as_predicted_names_its_section(evidence):
    """Sections 6 and 10 have a difference of the same name."""
    found = by_sparsity(evidence, {"75": above(0.5)})
    found += [r | {"size": "M", "key": f"M{r['key'][1:]}"} for r in found]
    page = evidence.page.text(found)
    (line,) = [x for x in page.splitlines() if x.startswith("- **Not as predicted**")]
    for number in (6, 10):
        assert f"75 % zeros, normed - dense, normed (held-out text; section {number})" in line
