"""A page of bench/quality.py that says what its results say."""

import json
import math
from pathlib import Path

import numpy as np
import pytest
from quality_results import results, rows

BENCH = Path(__file__).parents[2] / "bench"

pytest_plugins = "quality_toy"


def test_the_page_without_results_is_the_plan(evidence):
    page = evidence.page.text([])
    assert "**Not known yet.**" in page and "| found |" not in page and "nan" not in page
    left = [line for line in page.splitlines() if line.startswith("- 10. ")]
    assert len(left) == 1 and "dense, normed. 12 of 12 runs." in left[0]
    for order in evidence.plan.PLAN:
        assert f"{order.number}. {order.question}" in page
        for arm in order.arms:
            assert evidence.tables.title(order, arm) in page


def test_the_page_of_a_part_of_the_runs(evidence):
    """One seed has no interval, an arm without a partner no difference, one without runs no row."""
    page = evidence.page.text(results(evidence, {"dense": [2.0, 2.01], "75": [2.1]}))
    _, first, primary, *_ = page.split("\n\n")
    assert "**Runs are missing or diverged.** **Whether 75 % zeros are worse than" in first
    assert "(+0.100, 1 of 3 seeds).  \nFor the same FLOPs" in first and "nan" not in page
    assert "a small dense model was not run yet" in first
    assert ["dense", "1.00", "2.005", "+0.100, 1 of 3 seeds", "**open, one seed**"] in rows(primary)
    assert ["75 % zeros", "0.51", "2.100", "-", "-"] in rows(primary)
    assert ["small dense", "0.52", "-", "-", "-"] in rows(primary)
    second = page.split("\n## 2. ")[1].split("\n## ")[0]
    assert second.splitlines()[4].startswith("| dense  ") and "|   0-1 |" in second
    assert "Not run yet, with their FLOPs: small dense (0.52); dense, fewer" in second
    assert "| WebNLG |" not in second  # nobody has it
    later = page.split("\n### 3. ")[1].split("\n###")[0]
    assert "2.0" not in later and "(0.57)" in later  # what dense came to is not told again
    assert evidence.tables.numbers([5, 0, 2, 1]) == "0-2, 5"


def test_the_choice_of_rates_gives_a_hint(evidence):
    """Of the best rate of each, where all three have begun."""
    swept = [
        r | {"seed": evidence.plan.SWEEP_SEED, "key": f"{r['arm']} {i}", "tuned": {}}
        for i, r in enumerate(results(evidence, {"dense": [2.0, 3.0], "75": [2.1], "small": [2.2]}))
    ]
    for r, loss in zip(swept, (3.1, 3.2, 3.3, 3.4), strict=True):
        r["pretrained"] = r["pretrained"] | {"dev": loss}
    hint = "dense 3.10, 75 % zeros 3.30, the small dense model of the same FLOPs 3.40 nats"
    assert hint in evidence.answer.first_words(swept)
    assert "A hint" not in evidence.answer.first_words(swept[:-1])


def in_training(found: dict, curve: list[float]) -> dict:
    return found | {"pretrained": found["pretrained"] | {"curve": curve}}


def diverged(found: dict) -> dict:
    return {name: part for name, part in found.items() if name not in ("pretrained", "tuned")}


def of_order_10(evidence, dense: float, sparse: float, seeds: int = 3) -> list[dict]:
    losses = {"dense": dense, "75": sparse, "small": 2.0, "short": 2.0}
    each = {f"{a}-normed": [x + 0.001 * i for i in range(seeds)] for a, x in losses.items()}
    return results(evidence, each)


def test_the_page_says_what_a_norm_changes(evidence):
    """First that it trains stably, with a hint of the sweeps, then the answer."""
    words = evidence.answer.stable_words
    swept = results(evidence, {f"{a}-normed": [2.0] for a in ("dense", "75", "small")})
    plain = results(evidence, {"75": [2.1], "scratch": [2.9]})
    for r in swept:
        r |= {"seed": evidence.plan.SWEEP_SEED, "tuned": {}}
        r["pretrained"] = r["pretrained"] | {"dev": 3.1, "curve": [5.0, 3.1]}
    plain[0] = in_training(plain[0], [5.0, 3.0, 3.5])
    assert words(plain) == ""
    told = words([*plain, *swept])
    assert "unstable in 0 of 3 runs (the choice of rates included), without one in 1 of 1" in told
    assert "These were not fine-tuned yet." in told
    assert "A hint from the choice of rates (section 10)" in told and "dense 3.10" in told
    made = results(evidence, {"75-normed": [2.1, 2.11, 2.12], "small-normed": [2.0, 2.01, 2.02]})
    told = words([*plain, *swept, *made])
    assert "a small dense model is better than 75 % zeros** (+0.100" in told and "hint" not in told
    assert "**Runs are missing or diverged.**" in told
    # Pruning raises the loss, and so does the new warm-up of a model that is trained on.
    pruned = results(evidence, {"gradual-normed": [2.0], "more-25-normed": [2.0]})
    told = words([*swept, *(in_training(r, [5.0, 3.0, 3.5]) for r in pruned)])
    assert "unstable in 0 of 3 runs" in told


@pytest.mark.parametrize(
    ("sparse", "says"),
    [
        (2.1, "better than 75 % zeros** (+0.100"),
        (2.0, "as good as 75 % zeros** (+0.000"),
        (1.9, "worse than 75 % zeros** (-0.100"),
    ],
)
def test_the_answer_of_stable_training_is_told_first(evidence, sparse, says):
    plain = results(evidence, {a: [2.5, 2.6, 2.4] for a in ("dense", "75", "small", "short")})
    plain[3] = in_training(plain[3], [5.0, 3.0, 3.5])
    normed = of_order_10(evidence, 1.95, sparse)
    page = evidence.page.text([*plain, *normed])
    _, first, outcome, measured, _, more, *_ = page.split("\n\n")
    assert first.startswith("*Is a model that is trained with 75 % of its weights at zero")
    assert f"a small dense model is {says}" in first and "a norm of queries" in measured
    assert "missing" not in first and "not stable" not in first
    beside_small = next(row for row in rows(outcome) if row[0] == "small dense")
    assert beside_small[1:3] == ["0.52", "2.001"]
    assert beside_small[3].startswith(f"{sparse - 2.0:+.3f}, ")
    before, stable, second = more.split("\n- ")
    assert "**Before fine-tuning**, the same differences by held-out text:\n" in before
    assert f"\n  - beside the dense model: {sparse - 1.95:+.3f}" in before
    assert "beside a small dense model (not planned): " in before
    assert "(section 10) training of" in stable and "not stable" not in stable
    assert "unstable in 0 of 12 runs (" in stable and "without one in 1 of 12" in stable
    assert second.startswith("**Without that norm**, as was planned first (section 2), 75 % zeros ")
    for arm in ("dense", "small dense", "dense, fewer tokens"):
        assert f" beside {arm}: equal within 0.02" in second
    assert "not stable (*rise* in section 2): 75 % zeros, seed 0." in second
    holds = page.split("\n## What holds")[1].split("\n## ")[0]
    assert holds.index("| 75 % zeros, normed - small") < holds.index("| 75 % zeros - small")
    assert "(section 2; without the norm, as was planned first; 3 seeds)" in holds
    for number, mark in ((10, ", normed"), (2, "")):
        told = rows(page.split(f"\n## {number}. ")[1].split("\n## ")[0])
        assert [row[0] for row in told].count(f"75 % zeros{mark} - small dense{mark}") >= 1
    # One seed has no interval, so the plain answer leads.
    page = evidence.page.text([*plain, *of_order_10(evidence, 1.95, sparse, seeds=1)])
    assert "norm" not in "".join(page.split("\n\n")[1:4])
    assert "\n- **With a norm of queries and keys** (section 10)" in page.split("\n\n")[5]


@pytest.mark.parametrize(
    ("losses", "says"),
    [
        ([1.951, 1.952, 1.953], "75 % zeros are **as good as the dense model** (+0.001"),
        ([2.05, 2.051, 2.052], "75 % zeros are **still worse than the dense model** (+0.100"),
        ([1.9, 2.05, 2.2], "whether 75 % zeros are worse than the dense model **is open** (+0.099"),
    ],
)
def test_the_answer_tells_what_dense_last_steps_change(evidence, losses, says):
    notes = evidence.answer.notes
    normed = of_order_10(evidence, 1.95, 2.0)
    assert "trained in the last" not in notes(normed)
    told = notes([*normed, *results(evidence, {"75-dense-normed": losses})])
    where = "in the last 13 % of pre-training (section 3; 0.57 of the FLOPs)"
    assert told.startswith(f"- **Dense last steps**: with all weights trained {where}, {says}")


def test_a_run_of_stable_training_that_was_not_is_named(evidence):
    """Also one that diverged, which counts as unstable and is missing in the answer."""
    normed = of_order_10(evidence, 1.95, 2.0)
    normed[4] = in_training(normed[4], [5.0, 3.0, 3.5])
    notes = evidence.answer.notes(normed)
    assert "*rise* in section 10): 75 % zeros, normed, seed 1." in notes and "1 of 12" in notes
    normed[4] = diverged(normed[4])
    first, notes = evidence.answer.first_words(normed), evidence.answer.notes(normed)
    assert first.startswith("**Runs are missing or diverged.** ") and "1 of 12 runs" in notes
    assert "75 % zeros, normed, seed 1 (diverged: in no figure)." in notes


def test_a_table_has_what_its_arms_are_compared_with(evidence):
    """With its FLOPs: a difference may be bought."""
    order = evidence.answer.order_of(3)
    arms = ("75-dense-normed", "short-normed", "75-normed", "small-normed")
    found = results(evidence, {arm: [2.0] for arm in arms})
    rows = evidence.tables.arms(order, found, None).splitlines()[2:5]
    titles = [[cell.strip() for cell in row.split("|")[1:3]] for row in rows]
    assert titles == [
        ["dense, fewer tokens", "0.51"],
        ["75 % zeros", "0.51"],
        ["75 %, dense for the last 13 %", "0.57"],
    ]
    assert evidence.tables.arms(order, found[1:], None).startswith("Not run yet")


def test_a_run_that_diverged_is_called_so(evidence):
    found = results(evidence, {"dense": [2.0, 2.01], "75": [2.1, 2.11]})
    del found[-1]["pretrained"], found[-1]["tuned"]
    page = evidence.page.text(found)
    assert (
        "| 75 % zeros |    1 |      diverged |" in page
        and " 0.001 |     0 |" in page
        and "**Runs are missing or" in page
    )


def test_the_page_is_what_its_results_make(evidence):
    kept = BENCH / "results" / "quality.jsonl"
    by_clock = evidence.clock.read(kept.with_name("quality-cpu.jsonl"))
    checked = evidence.page.read_check(kept.with_name("quality-check.jsonl"))
    needed = evidence.converged.NEEDED
    others = evidence.study.kept(kept.with_name("quality-converged.jsonl"), needed)
    found = evidence.study.read([kept] if kept.exists() else [])
    made = evidence.page.text(found, by_clock, checked, others)
    assert made == (BENCH.parent / "docs" / "quality.md").read_text()


def test_the_page_says_when_small_dense_is_as_good(evidence):
    small = {"dense": [2.0, 2.01, 2.02], "75": [2.1, 2.11, 2.12], "small": [2.1, 2.112, 2.119]}
    assert "**Runs are missing or diverged.**" in evidence.page.text(results(evidence, small))
    small["short"] = [2.05, 2.06, 2.07]
    page = evidence.page.text(results(evidence, small)).split("\n\n")
    assert "**a small dense model is as good as 75 % zeros** (" in page[1]
    assert "Runs are missing" not in page[1]
    assert "**the dense model on fewer tokens is better than 75 % zeros** (+0.050, " in page[1]
    answers = page[1].split("  \n")[1:]  # a line for each, after the question
    assert len(answers) == 3 and "same text (+0.100, " in answers[0]
    assert answers[0].startswith("**75 % zeros cost quality: ")
    holds = rows("\n\n".join(page).split("## What holds")[1].split("\n## ")[0])
    assert ["75 % zeros - small dense", "code", "**equal within 0.02**", "yes"] in holds
    worse = small | {"small": [2.2, 2.21, 2.22]}
    assert "small dense model is worse than" in evidence.page.text(results(evidence, worse))
    kept = small | {"dense": [2.1, 2.112, 2.119]}
    assert "75 % zeros keep the quality" in evidence.page.text(results(evidence, kept))


def test_the_best_rate_at_the_end_of_a_sweep_is_called_so(evidence):
    assert evidence.tables.sweep_ends({}, False) == ""
    told = evidence.tables.sweep_ends({1e-3: 2.0, 2e-3: 1.9, 4e-3: 1.8}, False)
    assert told == " (not done, **the best so far is at the end**)"
    found = results(evidence, {"75": [2.1, 2.2]})
    order = evidence.plan.PLAN[1]
    told = evidence.tables.tuning_ends(order, found)
    assert "of each of 4 fine-tunings has others" in told
    found[1]["tuned"]["code dense"]["dev"] = {"0.001": 2.0, "0.003": None}
    told = evidence.tables.tuning_ends(order, found)
    assert "in 1 of 4" in told and told.endswith(": 75 % zeros, seed 1, code dense.")
    assert "3 rates" in evidence.tables.sweep_ends({1e-3: 2.0, 2e-3: 1.7, 4e-3: 1.8}, True)
    nothing = {5e-4: np.inf, 1e-3: np.inf}
    assert "**" not in evidence.tables.tried("75", nothing, True)
    assert evidence.tables.sweep_ends(nothing, True) == " (2 rates, all diverged)"
    for diverged in (np.inf, np.nan):
        losses = {5e-4: diverged, 1e-3: 2.0, 2e-3: 1.7, 4e-3: diverged}
        told = evidence.tables.tried("75", losses, True)
        assert told.endswith(": 0.0005: diverged, 0.001: 2.000, 0.002: **1.700**, 0.004: diverged")


@pytest.mark.parametrize("of_dev", [math.nan, math.inf, None])
def test_a_score_that_is_not_finite_is_never_the_best(evidence, of_dev):
    """As JSON has it: a NaN is less than nothing, and nothing is less than it."""
    swept = [
        r | {"seed": evidence.plan.SWEEP_SEED, "rate": rate, "pretrained": {"dev": dev}}
        for r, rate, dev in zip(
            results(evidence, {"75": [0.0] * 3}),
            (1e-3, 2e-3, 4e-3),
            (of_dev, 2.0, 2.1),
            strict=True,
        )
    ]
    losses = evidence.tables.swept("S", "75", swept)
    assert losses == {1e-3: math.inf, 2e-3: 2.0, 4e-3: 2.1}
    assert evidence.plan.best_rate("75", losses | {8e-3: 3.0, 1.6e-2: of_dev or math.inf}) == 2e-3
    clock = [{"arm": "75", "seed": evidence.plan.SWEEP_SEED, "rate": 1e-3, "dev": of_dev}]
    assert evidence.clock.losses(clock, "75") == {1e-3: math.inf}
    assert evidence.answer.hint([{**r, "arm": a} for r in swept[:1] for a in ("dense", "75")]) == ""
    for metric in ("held-out", "code"):
        result = {"pretrained": {"held-out": of_dev}, "tuned": {"code dense": {"loss": of_dev}}}
        assert evidence.differences.value(result, metric) is None


def test_the_page_says_which_runs_were_not_stable(evidence):
    found = results(evidence, {"dense": [2.0, 2.0], "75": [2.0, 2.0]})
    assert "| rise |" not in evidence.page.text(found)
    found[2]["pretrained"]["curve"] = [5.0, 3.0, 3.001, 2.5]
    found[3]["pretrained"]["curve"] = [5.0, 3.0, 3.5, 3.25, 3.7, 2.5]
    told = evidence.tables.seeds(evidence.plan.PLAN[1], found).splitlines()[-2:]
    assert [row.split("|")[-2].strip() for row in told] == ["-", "+0.70"]
    first = evidence.page.text(found).split("## What is compared")[0]
    assert "not stable (*rise* in section 2): 75 % zeros, seed 1." in first


def test_the_page_has_the_time_by_sparse_kernels(evidence):
    """Of arms of the shape that was timed, which had no norms of queries and keys."""
    checked = {"size": "S", "steps": 200, "step_s": 0.01, "sparse_step_s": 0.0125}
    checked |= {"apart_first": 0.0123, "apart_last": -0.0004, "is_same": True}
    checked |= {name: "x" for name in ("device", "torch", "date", "commit")}
    found = results(evidence, {"dense": [2.0], "75": [2.1]})
    assert "by kernels" not in evidence.page.text(found)
    page = evidence.page.text(found, checked=checked)
    rows = page.split("\n## 2. ")[1].splitlines()
    of_75 = dict(zip(*([c.strip() for c in rows[i].split("|")] for i in (2, 5)), strict=True))
    assert float(of_75["by kernels"]) == round(10 * 0.0125) and "**0.80 times as fast**" in page
    told = " ".join(page.split())
    assert "in 200 steps of 6 layers, 384 wide, with 75 % zeros and no norm" in told
    assert "(12.50 ms a step beside 10.00, both" in told and "losses are -0.0004 nats" in told
    assert "last 50 steps, within the limit of 0.02, and at most 0.012 in one of the first" in told
    page = evidence.page.text(found, checked=checked | {"apart_last": 0.03, "is_same": False})
    assert "+0.0300 nats" in page and "**more than the limit of 0.02**" in page
    normed = results(evidence, {"75-normed": [2.1]})
    assert "by kernels" not in evidence.tables.arms(evidence.plan.PLAN[9], normed, checked)


def test_the_picture_has_a_row_for_each_arm_that_ran(evidence):
    pytest.importorskip("matplotlib")
    drawn, picture = evidence.picture.drawn, evidence.picture.picture
    assert not drawn(results(evidence, {"dense": [2.0]}))
    losses = {"dense": [2.0, 2.01], "75": [2.1, 2.11], "small": [2.1], "scratch": [2.9]}
    (panel,) = picture(drawn(results(evidence, losses))).axes
    rows = [label.get_text().partition("\n")[0] for label in panel.get_yticklabels()]
    assert rows == ["75 % zeros", "dense: better", "small dense: open", "not pre-trained"]
    assert [text.get_text() for text in panel.texts] == ["+0.80 →"]
    assert panel.get_xlim()[1] < 0.5 and panel.get_title() == "Beside 75 % zeros"
    both = [*results(evidence, losses), *of_order_10(evidence, 1.95, 2.0)]
    panels = picture(drawn(both)).axes
    titles = [panel.get_title() for panel in panels]
    way = "without a norm (planned first)"
    assert titles == ["Beside 75 % zeros, with a norm", f"Beside 75 % zeros, {way}"]
    rows = [label.get_text().partition("\n")[0] for label in panels[0].get_yticklabels()]
    want = ["75 % zeros", "dense: better", "small dense: equal", "dense, fewer tokens: equal"]
    assert rows == want


def test_single_answers_are_kept_of_what_is_reported(evidence):
    (result,) = results(evidence, {"dense": [2.0]})
    assert evidence.page.without_items(result) == result
    cloze = evidence.page.without_items(result | {"seed": evidence.plan.SWEEP_SEED})["pretrained"]
    assert set(result["pretrained"]["cloze"]) - set(cloze["cloze"]) == {"bits"}


def test_results_are_added_once(evidence, tmp_path):
    pytest.importorskip("matplotlib")
    new = results(evidence, {"dense": [2.0]})
    (tmp_path / "new.jsonl").write_text("".join(json.dumps(r) + "\n" for r in new))
    kept, page = tmp_path / "kept.jsonl", tmp_path / "page.md"
    others = [tmp_path / name for name in ("cpu", "check", "converged")]
    for _ in range(2):
        evidence.page.publish(kept, page, [tmp_path / "new.jsonl"], *others)
    assert len(kept.read_text().splitlines()) == 1 and "GPU" in page.read_text()
    assert not (tmp_path / "quality.png").exists()
    more = results(evidence, {"dense": [2.0, 2.0], "75": [2.1, 2.1]})
    (tmp_path / "new.jsonl").write_text("".join(json.dumps(r) + "\n" for r in more))
    evidence.page.publish(kept, page, [tmp_path / "new.jsonl"], *others)
    assert "](quality.png)" in page.read_text() and (tmp_path / "quality.png").exists()
    assert len(kept.read_text().splitlines()) == 4
    (tmp_path / "other.jsonl").write_text(json.dumps(new[0] | {"key": "b", "recipe": "old"}) + "\n")
    with pytest.raises(ValueError, match="made by another plan"):
        evidence.page.publish(kept, page, [tmp_path / "other.jsonl"], *others)


@pytest.mark.parametrize(
    ("file", "change", "words"),
    [
        ("kept", {"seed": 7}, "expected key S dense seed 7 of the earlier result 'S dense seed 0'"),
        ("kept", {"arm": "75"}, "expected key S 75 seed 0 of the earlier result"),
        ("kept", {"device": None}, "kept, line 1: expected a result: it lacks device"),
        ("cpu", {"held-out": None}, "cpu, line 1: expected a result: it lacks held-out"),
        ("check", {"sparse_step_s": None}, "check, line 1: expected a result: it lacks sparse_s"),
        ("converged", {"rate": None}, "converged, line 1: expected a result: it lacks rate"),
        ("check", {"corpus": "other"}, "expected one text, got several"),
        ("converged", {"corpus": "other"}, "expected one text, got several"),
        ("cpu", {"corpus": "other"}, "expected one text, got several"),
    ],
)
def test_results_that_are_not_what_they_say_are_refused(evidence, tmp_path, file, change, words):
    """`change`: None of what is left out."""
    names = ("corpus", "device", "torch", "date", "commit")
    of = {"kept": results(evidence, {"dense": [2.0]})[0]}
    about = {name: of["kept"][name] for name in names}
    of["cpu"] = about | {"arm": "75", "seed": 0, "rate": 0.004, "minutes": 5.0, "threads": 1}
    of["cpu"] |= {"dev": 3.0, "held-out": 3.0, "tokens": 9, "tokens_per_s": 9.0}
    of["check"] = about | {"size": "S", "steps": 200, "step_s": 0.01, "sparse_step_s": 0.01}
    of["check"] |= {"apart_first": 0.0, "apart_last": 0.0, "is_same": True}
    of["converged"] = about | {"stage": "50", "rate": 1e-4, "dev": 3.0, "model": "a model"}

    def publish() -> None:
        for name, result in of.items():
            left = {key: value for key, value in result.items() if value is not None}
            (tmp_path / name).write_text(json.dumps(left) + "\n")
        kept, *others = (tmp_path / name for name in of)
        evidence.page.publish(kept, tmp_path / "page.md", [], *others)

    publish()
    of[file] = of[file] | change
    with pytest.raises(ValueError, match=words):
        publish()
