"""Dense and sparse for the same minutes on a CPU (bench/evidence/clock.py)."""

import math
from argparse import Namespace

import pytest

pytest_plugins = "quality_toy"


def test_dense_and_sparse_for_the_same_seconds(evidence, folder, tmp_path, monkeypatch):
    clock, kept = evidence.clock, tmp_path / "cpu.jsonl"
    monkeypatch.setattr(clock, "SHAPE", evidence.plan.SIZES["toy"].shape)
    corpus = evidence.build.load(folder)
    for arm in (*clock.ARMS, "dense"):
        found = clock.run(corpus, arm, 0.3 / 60, 0.002, 0)
        assert 0.3 <= found["seconds"] < 30 and found["steps"] >= 1
        assert found["tokens"] == 2 * 16 * found["steps"] and 0 < found["held-out"] < 9
        clock.keep(kept, found | {"device": "CPU", "torch": "2", "date": "day", "commit": "abc"})
    assert len(clock.read(kept)) == 2
    page = evidence.page.text([], clock.read(kept))
    last = max(order.number for order in evidence.plan.PLAN) + 1
    section = page.split(f"## {last}.")[1].split("##")[0]
    assert "Not run yet" not in section and "**open, one seed** (" in section
    assert f"on a CPU?** (section {last})\n\n75 % zeros beside dense after 0.005" in page
    assert "written after a rough probe" in section
    assert "CPU, torch 2" in page


@pytest.mark.parametrize("best", [1e-3, 5e-3, 0.05])
def test_arms_take_turns_on_cores_with_as_many_rates(evidence, tmp_path, best):
    clock, swept, path = evidence.clock, evidence.plan.SWEEP_SEED, tmp_path / "cpu.jsonl"
    worker = type("Worker", (), {"device": "CPU"})
    given = path, "text", [0, 1], 5.0, [0, 1, 2], {"torch": "2", "date": "", "commit": ""}
    made, order, jobs_made = clock.Turns(*given), [], []
    for _ in range(60):
        jobs = []
        for core in "01":
            if job := made.choose(core, jobs):
                jobs.append(job)
        if not jobs:
            break
        jobs_made += jobs
        for job in jobs:
            own = dict(job.settings)
            assert own.pop("core") in (0, 1)
            loss = abs(math.log(own["rate"] / (best if own["arm"] == "75" else 4e-3)))
            own |= {"dev": loss, "held-out": loss, "threads": 1, "corpus": "text"}
            made.finish(job, worker, {"result": own | {"tokens": 9, "tokens_per_s": 9.0}})
            order.append((job.settings["arm"], job.settings["seed"], job.settings["core"]))
        if len(order) == 4:
            made = clock.Turns(*given)  # killed and begun again
    for pair in range(0, len(order), 2):
        (one, seed, core), (other, other_seed, other_core) = order[pair : pair + 2]
        assert {one, other} == {*clock.ARMS} and seed == other_seed
        assert core != other_core
    assert len({core for arm, _, core in order if arm == "75"}) == 2
    of = {arm: clock.losses(made.results, arm) for arm in clock.ARMS}
    assert len(of["75"]) == len(of["dense"]) >= clock.TRIED
    for arm, tried in of.items():
        best_of = min(tried, key=tried.get)
        assert min(tried) < best_of < max(tried)
        last = [r for r in made.results if r["arm"] == arm and r["seed"] != swept]
        assert [(r["seed"], r["rate"], r["minutes"]) for r in last] == [
            (seed, best_of, 5.0) for seed in (0, 1, 2)
        ]
    assert "75 % zeros beside dense after 5 minutes each: **" in evidence.page.text(
        [], clock.read(path)
    )
    assert not clock.Turns(*given).coming()
    for at, name, value in ((1, "data", "other"), (3, "minutes", 4.0)):
        with pytest.raises(ValueError, match=f"^{name}: expected .*, got {value}"):
            clock.Turns(*given[:at], value, *given[at + 1 :])
    # Of a pair that was stopped both are made again.
    lines = path.read_text().splitlines()
    path.write_text("\n".join(lines[:-1]))
    again = clock.Turns(*given).coming()
    assert [(run["arm"], run["seed"]) for run in again] == [("dense", 2), ("75", 2)]
    path.write_text("\n".join([*lines, '{"arm": ']))
    with pytest.raises(ValueError, match=f"line {len(lines) + 1}: expected a result"):
        clock.Turns(*given)
    with pytest.raises(RuntimeError, match="why"):
        made.finish(jobs_made[0], worker, {"failed": "why", "is_final": True})


def test_a_clock_that_could_not_keep_its_word_does_not_start(evidence, folder, monkeypatch):
    """Two arms at once want a core each; a run that is reported is none of a sweep."""
    import quality

    given = {"data": folder, "commit": "", "minutes": 1.0, "seeds": [0]}
    swept = evidence.plan.SWEEP_SEED
    for name, value in (("minutes", 0.0), ("minutes", math.nan), ("seeds", [0, swept])):
        with pytest.raises(ValueError, match=f"^{name}: expected "):
            quality.by_clock(Namespace(**given | {name: value}))
    monkeypatch.setattr(quality.os, "sched_getaffinity", lambda _: {3})
    with pytest.raises(ValueError, match="^cores: expected one for each arm, 2, got 1"):
        quality.by_clock(Namespace(**given))
