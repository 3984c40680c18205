"""Rows of differences on the page of bench/quality.py, and what a section says of its runs."""

import numpy as np
import pytest
from quality_results import results, rows
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
        ((0.1, 0.2, 0.4), 0.001, "**The cost grows from each to the next**"),
        ((0.4, 0.2, 0.1), 0.001, "**The cost shrinks from each to the next**"),
        ((0.3, 0.2, 0.4), 0.001, "**The cost does not go one way**"),
        ((0.1, 0.2, 0.201), 0.01, "**The cost grows where the change is clear**"),
        (
            (0.1, 0.101, 0.1),
            0.01,
            "**Whether the cost grows or shrinks from each to the next is open**",
        ),
    ],
)
def test_a_row_says_whether_it_goes_one_way(evidence, costs, apart, says):
    """A difference that varies as the seeds do, in the first, and in the other two against it."""
    ways = zip(("50", "75", "90"), costs, (apart, 2 * apart, -apart), strict=True)
    found = by_sparsity(evidence, {arm: above(x, apart=y) for arm, x, y in ways})
    title, told, way = section(evidence, 4, found).split("\n\n")[2:5]
    assert title == "Cost by sparsity, in nats a token of held-out text:"
    _, _, first, *others = rows(told)
    assert first[:2] == ["50 %", "**worse**"] and first[3] == "-"
    assert first[2].startswith(f"{costs[0] + apart:+.3f}, ")
    means = [x + y for x, y in zip(costs, (apart, 2 * apart, -apart), strict=True)]
    for row, step in zip(others, np.diff(means), strict=True):
        assert row[3].startswith(f"{step:+.3f} (")
    assert way.startswith(f"{says} (not planned). 50 % and 90 % have the best rate of 75 %")
    holds = evidence.page.text(found).split("\n## What holds")[1].split("\n## ")[0]
    assert f"\n- Cost by sparsity: {says} (not planned)." in holds
    assert ["50 % - dense", "held-out text", "worse"] in [row[:3] for row in rows(holds)]


def test_a_row_that_is_not_whole_says_so(evidence):
    """Also which runs diverged, and nothing where all that has run is told elsewhere."""
    page = evidence.page.text(by_sparsity(evidence, {"50": above(0.1), "75": above(0.2)}))
    told = page.split("\n## 4. ")[1].split("\n## ")[0]
    assert ["90 %", "not known yet", "-", "-"] in rows(told) and "The cost grows" not in page
    assert "+0.100 (+" in next(row for row in rows(told) if row[0] == "75 % (section 10)")[3]
    page = evidence.page.text(by_sparsity(evidence, {"75": above(0.2)}))
    assert "Cost by sparsity" not in page and "\n### 4. " in page
    found = by_sparsity(evidence, {"50": above(0.1), "75": above(0.2), "90": above(0.4)})
    del found[-1]["pretrained"], found[-1]["tuned"]
    told = section(evidence, 4, found)
    row = next(row for row in rows(told) if row[:2] == ["90 %", "**worse**"])
    assert row[2].startswith("+0.4") and row[2].endswith(", 2 of 3 seeds")
    assert "not stable: 90 %, seed 2 (diverged: in no figure)." in told
    assert "\n\nDiverged, in no figure: 90 %, seed 2." in told
    found = by_sparsity(evidence, {"50": above(0.1)[:1]})
    want = ["50 %", "**open, one seed**", "+0.100, 1 of 3 seeds", "-"]
    assert want in rows(section(evidence, 4, found))


@pytest.mark.parametrize(
    ("costs", "says"),
    [
        ((0.3, 0.002, 0.1), ["25 % longer", "**equal within 0.02**", "+0.003"]),
        ((0.3, 0.2, 0.1), ["25 % longer", "**worse by more than 0.02**", "+0.201"]),
        ((0.3, -0.2, 0.1), ["25 % longer", "**better by more than 0.02**", "-0.199"]),
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
    lengths, sparsities = (part.split("\n\n")[1] for part in told.split("Dense pruned ")[1:])
    row, last = rows(lengths)[3:]
    assert [*row[:2], row[2].split(", ")[0]] == says
    assert row[3].startswith(f"{costs[1] - costs[0]:+.3f} (")
    assert last[:2] == ["50 % longer", "**worse by more than 0.02**"]
    assert "not stable" not in told
    assert ["75 %", "not known yet", "-", "-"] in rows(sparsities)
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
    first, then = rows(told)[2:4]
    assert first[0] == "6 layers, 384 wide (section 10)" and first[3] == "-"
    assert then[:2] == ["7 layers, 512 wide", "**worse**"] and then[2].startswith("+0.113, ")
    assert then[3].startswith("-0.100 (") and "**The cost shrinks** (not planned)." in told
    large[0]["pretrained"]["curve"] = [5.0, 3.0, 3.5]
    named = "not stable: dense (7 layers, 512 wide), seed 0."
    assert named in section(evidence, 6, [*small, *large])
    assert "(no interval)" in section(evidence, 6, [*small, large[0], large[3]])


def test_what_was_not_as_predicted_names_its_section(evidence):
    """Sections 6 and 10 have a difference of the same name."""
    found = by_sparsity(evidence, {"75": above(0.5)})
    found += [r | {"size": "M", "key": f"M{r['key'][1:]}"} for r in found]
    page = evidence.page.text(found)
    holds = page.split("\n## What holds")[1].split("\n## ")[0]
    for number, mark in ((6, ""), (10, ", normed")):
        told = rows(holds.split(f"(section {number}; ")[1].split("\n\n**")[0])
        assert [f"75 % zeros{mark} - dense{mark}", "held-out text", "worse", "**no**"] in told
