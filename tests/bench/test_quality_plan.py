"""The plan of bench/quality.py and what becomes of it: sweeps, a study that stops and goes on,
periods that are filled."""

import json
import math
import subprocess
import sys
from dataclasses import asdict, replace
from pathlib import Path

import pytest
from quality_results import results

pytest_plugins = "quality_toy"


def task(evidence, arm: str, is_tuned: bool = False):
    return evidence.arms.Task("toy", arm, 0, 0.002, is_tuned)


# The plan and the study


@pytest.mark.parametrize("optimum", [1e-4, 1.1e-3, 3e-3, 0.1, math.inf])
def test_a_sweep_ends_with_its_best_rate_inside(evidence, optimum):
    plan, losses = evidence.plan, {}
    for _ in range(40):
        rates = plan.next_rates("75", losses)
        if not rates:
            break
        for rate in rates:
            is_high = rate > 0.05 if math.isfinite(optimum) else rate > 0.003
            losses[rate] = math.inf if is_high and optimum != 0.1 else abs(math.log(rate / 1e-3))
            if math.isfinite(optimum) and losses[rate] < math.inf:
                losses[rate] = abs(math.log(rate / optimum))
    best = plan.best_rate("75", losses)
    assert min(losses) < best < max(losses) and len(losses) >= plan.TRIED


def test_each_arm_is_tried_at_as_many_rates(evidence):
    """Also where the best one of four lies between two others that were tried before it."""
    losses = {2e-3: 3.279, 4e-3: 3.270, 5.66e-3: 3.263, 8e-3: 3.282}
    assert evidence.plan.next_rates("small-normed", losses) == [6.73e-3]
    assert evidence.plan.best_rate("small-normed", losses) is None
    assert evidence.plan.best_rate("small-normed", losses | {6.73e-3: 3.27}) == 5.66e-3


def test_arms_with_a_norm_follow_arms_with_a_norm(evidence):
    plan = evidence.plan
    for arm in plan.ARMS.values():
        for other in filter(None, (arm.rate_of, arm.start)):
            assert plan.ARMS[other].is_normed == arm.is_normed
    for order in plan.PLAN[2:4] + plan.PLAN[5:6] + plan.PLAN[7:8]:
        told = {*order.swept, *order.arms, *(n for p in order.predictions for n in (p.a, p.b))}
        assert all(plan.ARMS[name].is_normed for name in told)


def test_arms_of_equal_flops_are_equal(evidence):
    plan = evidence.plan
    for size in (plan.SIZES["S"], plan.SIZES["M"]):
        sparse, small, short = (plan.ARMS[n].flops(size) for n in ("75", "small", "short"))
        assert small == pytest.approx(sparse, rel=0.04) and small > sparse
        assert short == pytest.approx(sparse, rel=1e-3)
    for order in [order for orders in plan.PLANS.values() for order in orders]:
        assert {*order.arms, *order.swept} <= plan.ARMS.keys() and order.size in plan.SIZES
        for p in order.predictions:
            assert {p.a, p.b} <= plan.ARMS.keys() and p.low <= p.high


def test_a_size_without_sweeps_takes_a_share_of_the_best_rate_of_another(evidence, tmp_path):
    study, (order,) = evidence.study, evidence.study.chosen(evidence.plan.PLAN, ["7"])
    made = study.Study([order], "text", tmp_path, [], {})
    assert made.without_rate() == [f"M {arm}" for arm in sorted(order.arms)]
    for i, rate in enumerate((1e-3, 2e-3, 4e-3, 5.66e-3, 8e-3)):
        done = {"size": "S", "arm": "75-scaled", "seed": evidence.plan.SWEEP_SEED, "rate": rate}
        made.results[str(i)] = done | {"pretrained": {"dev": abs(rate - 4e-3)}}
    assert {t.rate for t in made.waiting()} == {2e-3} and len(made.waiting()) == 6


def test_orders_are_chosen_by_name_whole_or_in_part(evidence):
    plan = evidence.plan
    first, second, third = evidence.study.chosen(plan.PLAN, ["1:75", "7", "2:small,75"])
    assert (first.swept, first.arms) == (("75",), ()) and second == plan.PLAN[6]
    assert third.arms == ("75", "small") and third.seeds == plan.PLAN[1].seeds
    assert evidence.study.chosen(plan.PLAN, []) == [*plan.PLAN]
    for name, words in (("11", "some of 1, 2"), ("1:rigl", "got rigl"), ("1:", "dense, 75, small")):
        with pytest.raises(ValueError, match=f"orders: expected .*{words}"):
            evidence.study.chosen(plan.PLAN, [name])


def test_a_task_of_two_orders_is_made_once(evidence, tmp_path):
    plan = evidence.plan
    orders = evidence.study.chosen(plan.PLAN, ["1:75", "1"])
    waiting = evidence.study.Study(orders, "text", tmp_path, [], {}).waiting()
    assert [task.arm for task in waiting] == ["75"] * 3 + ["dense"] * 3 + ["small"] * 3


def test_compiled_code_that_cannot_be_read_is_told_and_not_used(evidence, tmp_path, capsys):
    (tmp_path / "compiled-0.xz").write_bytes(b"no xz")
    evidence.worker.load_compiled(tmp_path)
    assert "compiled-0.xz: not used: LZMAError" in capsys.readouterr().out


class InProcess:
    """In place of the pool: `most` runs in this process."""

    device, gpu, began, workers = "this processor", "", 0.0, ()

    def __init__(self, runner, answer, most=1000):
        self.runner, self.answer, self.most = runner, answer, most

    def run(self, choose, finish):
        for _ in range(self.most):
            job = choose("", [])
            if job is None:
                return
            message = {"key": job.key, "settings": job.settings, "deadline": math.inf}
            finish(job, self, self.answer(self.runner, message))


def test_a_study_stops_goes_on_and_does_nothing_twice(evidence, runner, folder, tmp_path):
    study, plan = evidence.study, evidence.plan
    order = plan.Order(1, "toy", "?", ("75",), ("75", "two-way"), (0,), False)

    def made(most: int) -> "study.Study":
        found = study.Study([order], "text", tmp_path, [], {"commit": "", "date": "", "torch": ""})
        evidence.period.Period(found, runner.folder, {}).run(
            InProcess(runner, evidence.worker.answer, most)
        )
        return found

    first = made(2)
    rates = [f"toy 75 rate {rate:g}" for rate in plan.FIRST_RATES[:2]]
    assert [r["key"] for r in first.results.values()] == rates
    last = made(1000)
    assert first.without_rate() == ["toy 75", "toy two-way"]
    assert not last.waiting() and not last.failed and not last.without_rate()
    assert list(last.results)[:2] == list(first.results)
    best = plan.best_rate("75", last.losses("toy", "75"))
    assert {last.results[f"toy {a} seed 0"]["rate"] for a in order.arms} == {best}
    lines = (tmp_path / "results.jsonl").read_text()
    made(1000)
    assert (tmp_path / "results.jsonl").read_text() == lines
    pace = evidence.pace.Pace(last.results.values(), {})
    assert pace.seconds(evidence.arms.Task("toy", "75", 1, best, False)) > 0
    with pytest.raises(ValueError, match="expected the text text of earlier results, got other"):
        study.Study([order], "other", tmp_path, [], {})
    (tmp_path / "results.jsonl").write_text(lines + "half a li")
    with pytest.raises(ValueError, match="expected a result"):
        made(1)
    for broken, words in ((b"5", "line 1"), (b'{"key": "a"}', "it lacks arm"), (b"\xff", "line 1")):
        (tmp_path / "results.jsonl").write_bytes(broken + b"\n")
        with pytest.raises(ValueError, match=words):
            made(1)


def test_results_of_another_plan_are_not_used(evidence, runner, tmp_path, monkeypatch):
    study, plan = evidence.study, evidence.plan
    order = plan.Order(1, "toy", "?", ("75",), ("75",), (0,), False)

    def made(most: int = 0) -> "study.Study":
        found = study.Study([order], "text", tmp_path, [], {"commit": "", "date": "", "torch": ""})
        evidence.period.Period(found, runner.folder, {}).run(
            InProcess(runner, evidence.worker.answer, most)
        )
        return found

    whole = made(1000)
    assert whole.results["toy 75 seed 0"]["recipe"] == task(evidence, "75").recipe
    with monkeypatch.context() as patch:
        patch.setitem(plan.ARMS, "75", replace(plan.ARMS["75"], title="other words"))
        made()  # the same runs
        patch.setitem(plan.ARMS, "75", replace(plan.ARMS["75"], sparsity=plan.Sparsity("set", 0.5)))
        with pytest.raises(
            ValueError, match="plan: expected recipe .* it was made by another plan"
        ):
            made()
    # Nor what is left of a run at another rate.
    lines = (tmp_path / "results.jsonl").read_text().splitlines()
    with monkeypatch.context() as patch:
        patch.setattr(study.Study, "rate", lambda *_: 0.5)
        with pytest.raises(ValueError, match="plan: expected rate 0.5 of the earlier result"):
            made().waiting()
        (tmp_path / "results.jsonl").write_text("\n".join(lines[:-1]) + "\n")
        assert made(1).results["toy 75 seed 0"]["pretrained"] != json.loads(lines[-1])["pretrained"]


def test_old_results_stay_those_of_the_plan(evidence, monkeypatch):
    """The names that results of the first runs have, made before arms could start from others."""
    monkeypatch.setattr(evidence.masks, "UPDATE_EVERY", 100)
    named = {
        (arm, is_tuned): evidence.arms.Task(size, arm, 0, 0.001, is_tuned).recipe
        for size, arm, is_tuned in [
            ("S5", "75", False),
            ("S5", "two-way", False),
            ("S", "75", True),
        ]
    }
    assert list(named.values()) == ["3175e4301c9a", "653a18581768", "868d2561a16f"]


@pytest.mark.parametrize(
    ("costs", "left", "first"),
    [
        ([100, 80, 20], 1000, 0),
        ([100, 80, 20], 105, 0),
        ([100, 80, 30, 25], 112, 1),  # 80 and 30 leave less
        ([100, 80], 90, 1),
        ([100, 80], 70, None),
        ([], 70, None),
        ([100, 80], math.inf, 0),
        ([0, 0], 10, 0),
    ],
)
def test_runs_fill_the_time_that_is_left(evidence, costs, left, first):
    assert evidence.pace.best_fit(costs, left) == first


def test_a_period_without_a_resume_is_packed(evidence, tmp_path, monkeypatch):
    """Runs on two GPUs whose clock is made up: none is cut off, and little time is lost."""
    study, plan, clock = evidence.study, evidence.plan, [0.0]
    monkeypatch.setattr(study.time, "monotonic", lambda: clock[0])
    monkeypatch.setattr(study.Study, "rate", lambda self, size, arm: 0.01)
    orders = [
        plan.Order(1, "S5", "?", (), ("75", "two-way"), tuple(range(8)), False),
        plan.Order(2, "S", "?", (), ("dense", "more-25", "more-50", "short"), (0, 1, 2), False),
    ]
    made = study.Study(orders, "text", tmp_path, [], {"device": ""})
    known = results(evidence, {"dense": [2.0]})[0] | {"seconds": 100.0, "is_tuned": False}
    known["pretrained"] |= {"step_s": 0.01, "steps": 8000}
    made.results["known"] = known
    period = evidence.period.Period(made, tmp_path, {"code": 64}, 500.0)
    under_way: dict[str, tuple] = {}
    done = []
    while True:
        for gpu in "01":
            job = period.choose(gpu, [job for _, job, _ in under_way.values()])
            if gpu not in under_way and job:
                pace = evidence.pace.Pace(made.results.values(), {"code": 64})
                cost = period.cost(pace, gpu, evidence.arms.Task(**job.settings))
                under_way[gpu] = clock[0] + cost, job, clock[0]
        if not under_way:
            break
        gpu = min(under_way, key=lambda gpu: under_way[gpu][0])
        clock[0], job, began = under_way.pop(gpu)
        done.append(job.key)
        own = {"pretrained": known["pretrained"], "setup_s": 30.0, "seconds": clock[0] - began}
        worker = type("Worker", (), {"gpu": gpu, "device": "GPU", "began": began})
        period.finish(job, worker, {"result": own})
    assert len(done) == len(set(done)) and "S5 75 seed 0" in done and not period.spent["lost"]
    assert clock[0] <= 500 and period.spent["whole"] > 0.9 * 2 * (500 - evidence.period.MARGIN_S)


def test_a_sweep_that_was_begun_is_not_put_off_to_fill_the_time(evidence, tmp_path, monkeypatch):
    study, plan = evidence.study, evidence.plan
    monkeypatch.setattr(study.time, "monotonic", lambda: 0.0)
    orders = [
        plan.Order(1, "S", "?", ("75",)),
        plan.Order(2, "S5", "?", (), ("dense",), tuple(range(8)), False),
    ]
    monkeypatch.setattr(study.Study, "rate", lambda self, size, arm: 0.01)
    made = study.Study(orders, "text", tmp_path, [], {})
    period = evidence.period.Period(made, tmp_path, {}, 125 + evidence.period.MARGIN_S)
    monkeypatch.setattr(period, "cost", lambda _, gpu, t: 100.0 if t.size == "S" else 30.0)
    assert period.choose("0", []).key == "S5 dense seed 0"  # four of them leave less
    tried = evidence.arms.Task("S", "75", plan.SWEEP_SEED, 4e-3, False)
    found = asdict(tried) | {"recipe": tried.recipe, "pretrained": {"dev": 3.0}}
    made.results[tried.key] = found | {"key": tried.key}
    assert period.choose("0", []).key == "S 75 rate 0.008"


def test_what_was_begun_goes_on_first_and_models_are_trained_once(evidence, tmp_path, monkeypatch):
    study, plan, arms, period = evidence.study, evidence.plan, evidence.arms, evidence.period
    monkeypatch.setattr(study.Study, "rate", lambda self, size, arm: 0.01)
    order = plan.Order(1, "S", "?", (), ("more-25", "pruned-84-25", "75"), (0, 1), False)
    made = study.Study([order], "text", tmp_path, [], {})
    now = period.Period(made, tmp_path, {})
    first = now.choose("0", [])
    second = now.choose("1", [first])  # not the one whose dense model the first one trains
    third = now.choose("2", [first, second])
    assert [j.key for j in (first, second, third)] == [
        "S more-25 seed 0",
        "S 75 seed 0",
        "S more-25 seed 1",
    ]
    start = arms.folder_of(tmp_path, arms.Task(**first.settings).start)
    start.mkdir()
    (start / arms.MODEL).touch()
    assert now.choose("1", [first]).key == "S pruned-84-25 seed 0"
    begun = arms.folder_of(tmp_path, arms.Task("S", "75", 1, 0.01, False))
    begun.mkdir()
    (begun / arms.DONE).write_text('{"seconds": 5.0}')
    assert now.choose("0", []).key == "S 75 seed 1"


def test_two_runs_in_one_folder_are_one_too_many(evidence, tmp_path):
    import quality

    with quality.alone("out", tmp_path / "a"), quality.alone("work", tmp_path / "a/work"):
        with pytest.raises(ValueError, match="work: expected a folder of its own"):
            with quality.alone("work", tmp_path / "a/work"):
                pass
    with quality.alone("out", tmp_path / "a"):
        assert not list((tmp_path / "a/work").iterdir())


def test_a_rate_that_is_too_high_is_a_result(evidence, runner, tmp_path):
    settings = {"size": "toy", "arm": "dense", "seed": 100, "rate": 1e30, "is_tuned": False}
    message = {"key": "a", "settings": settings, "deadline": math.inf}
    assert "loss is" in evidence.worker.answer(runner, message)["result"]["diverged"]
    broken = message | {"settings": settings | {"arm": "none"}}
    assert "KeyError" in evidence.worker.answer(runner, broken)["failed"]


def test_a_machine_that_runs_need_not_have_scipy():
    bench = Path(__file__).parents[2] / "bench"
    code = "import sys; sys.modules['scipy'] = None; sys.path.insert(0, sys.argv[1]); "
    subprocess.run([sys.executable, "-c", code + "import quality", bench], check=True)
