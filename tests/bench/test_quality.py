"""The harness of bench/quality.py at toy size: arms are what they say, a study stops and goes on,
and the page says what its results say."""

import json
import math
import random
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from scipy import stats

from sparsekern.gpt.data import ByteTokenizer
from sparsekern.sparsity import Static

BENCH = Path(__file__).parents[2] / "bench"
LENGTH = 17
WORDS = "the of and to in is that model weight zero mask train loss good bad film novel".split()


@pytest.fixture(scope="module")
def evidence():
    """The package bench/evidence, with toy runs of a few steps."""
    torch.set_num_threads(1)
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(BENCH)
        import evidence.arms
        import evidence.check
        import evidence.differences
        import evidence.page
        import evidence.study
        import evidence.worker  # noqa: F401

        small = evidence.plan.SIZES["toy"]
        small = replace(small, tokens=12 * small.shape.batch * (LENGTH - 1))
        patch.setitem(evidence.plan.SIZES, "toy", small)
        patch.setattr(evidence.masks, "UPDATE_EVERY", 3)
        yield evidence
    for name in [
        n for n in sys.modules if n.partition(".")[0] in ("evidence", "workers", "quality")
    ]:
        del sys.modules[name]


def text(rng: random.Random, count: int) -> str:
    return " ".join(rng.choice(WORDS) for _ in range(count))


@pytest.fixture(scope="module")
def folder(evidence, tmp_path_factory) -> Path:
    """A corpus, as build.save writes one."""
    rng, rows, build = random.Random(0), evidence.rows, evidence.build
    tokenizer = ByteTokenizer()
    documents = [(str(i), text(rng, 100)) for i in range(20)]
    arrays = {"training": build.encode(tokenizer, evidence.corpus.joined(documents))}
    for domain in ("manuals", "novels"):
        tokens = build.encode(tokenizer, text(rng, 150))
        arrays[f"held-out/{domain}"] = rows.cut(tokens, LENGTH)
    pairs = [(text(rng, 5), rng.choice([" good", " bad"])) for _ in range(24)]
    pieces = rows.items(tokenizer, pairs, LENGTH)
    for task in ("sentiment", "webnlg", "code"):
        arrays[f"{task}/training"] = rows.together(pieces[:8], LENGTH)
        arrays[f"{task}/dev"] = rows.padded(pieces[8:16], LENGTH)
        arrays[f"{task}/test"] = rows.padded(pieces[16:], LENGTH)
    pairs = [("", text(rng, 4)) for _ in range(12)]
    arrays["blimp"] = rows.padded(rows.items(tokenizer, pairs, 12), 12)
    arrays["cloze"] = rows.padded(pieces, LENGTH)
    path = tmp_path_factory.mktemp("quality")
    build.save(path, arrays, tokenizer, {"sources": []}, lambda told: None)
    return path


@pytest.fixture
def runner(evidence, folder, tmp_path):
    return evidence.worker.runner(folder, tmp_path / "work", "cpu")


def task(evidence, arm: str, is_tuned: bool = False):
    return evidence.arms.Task("toy", arm, 0, 0.002, is_tuned)


# Text and rows


def test_prose_is_kept_once_and_whole_documents_are_held_out(evidence):
    corpus = evidence.corpus
    prose = (
        "This is the text of a paragraph that has enough words to be read as prose by the filter."
    )
    other = prose.replace("paragraph", "chapter")
    code = "for (int i = 0; i < n; i++) { a[i] = b[i] * c[i] + d[i]; } // 0x7fff 0x8000 0x8001 =="
    raw = f"{prose}\n\n{code}\n\nToo short.\n\n{prose.upper()}\n \n{other}"
    assert list(corpus.Paragraphs().of(raw)) == [prose, other]
    split, seen = corpus.Split(), corpus.Paragraphs()
    documents = [
        (f"file {i}", prose.replace("words", chr(97 + i % 26) * (i + 3))) for i in range(60)
    ]
    corpus.add(split, seen, "novels", iter(documents))
    names = {name for name, _ in split.held_out["novels"]}
    assert 0 < len(names) < 20 and len(names) + len(split.training["novels"]) == 60


def test_what_the_training_text_gives_away_is_not_scored(evidence):
    corpus, mark = evidence.corpus, int(evidence.rows.NOT_A_TARGET)
    rng = np.random.default_rng(0)
    training, held_out = (rng.integers(0, 8000, 500).astype(np.uint16) for _ in range(2))
    held_out[100:120] = training[40:60]
    held_out[200:212] = training[80:92]  # one less than a window
    found = corpus.without_known(held_out, np.unique(corpus.windows(training)))
    assert np.array_equal(np.flatnonzero(found & mark), np.arange(100, 120))
    assert np.array_equal(found & (mark - 1), held_out)


def test_rows_score_answers_alone(evidence):
    rows = evidence.rows
    tokenizer = ByteTokenizer()
    short, long = rows.items(tokenizer, [("a prompt", " yes"), ("b" * 50, " no")], 12)
    answer = tokenizer.encode(" yes").numpy()
    assert np.array_equal(short[short < rows.NOT_A_TARGET], answer) and len(long) == 12
    padded = rows.padded([short, long], 12)
    assert padded.shape == (2, 12) and (padded[0, len(short) :] == rows.NOT_A_TARGET).all()
    assert rows.together([short, short, long], 2 * len(short)).shape == (2, 2 * len(short))
    stream = np.arange(50, dtype=np.uint16)
    cut = rows.cut(stream, 8)
    assert np.array_equal(cut[:, 1:].ravel(), stream[1:50])  # each one is a target once


def test_cloze_asks_for_words_that_stood_before(evidence):
    rng = random.Random(1)
    before = [rng.choice(WORDS) for _ in range(200)]
    passage = " ".join([*before[:100], "Marzipan", *before[100:], "marzipan.", "And", "more."])
    assert [answer for _, answer in evidence.tasks.cloze_items(passage)] == [" marzipan"]


def test_readers_of_packages(evidence):
    sources = evidence.sources
    html = b"<html><head><title>No</title></head><p>One <b>two</b> &amp; three<p>Four</html>"
    (_, found), *_ = sources.of_html(iter([("a", html)]))
    assert [part.strip() for part in found.split("\n\n") if part.strip()] == [
        "One two & three",
        "Four",
    ]
    pod = b"=head1 NAME\n\nUse L<strict|the pragma> and B<more>."
    assert "NAME\n\nUse" in next(sources.of_pod(iter([("a", pod)])))[1]
    line = b"00001740 03 n 02 entity 0 thing_x 0 000 | what is known  \n"
    assert next(sources.of_wordnet(iter([("a", line)])))[1] == "entity, thing x: what is known"


def test_a_corpus_that_is_not_whole_is_refused(evidence, folder, tmp_path):
    build = evidence.build
    with pytest.raises(ValueError, match="quality.py corpus makes it"):
        build.load(tmp_path)
    for path in folder.iterdir():
        (tmp_path / path.name).write_bytes(path.read_bytes())
    assert build.load(tmp_path).id == build.identity(folder)
    (tmp_path / "blimp-0.xz").write_bytes(b"other")
    with pytest.raises(ValueError, match="blimp-0.xz is not the file"):
        build.load(tmp_path)
    (tmp_path / "blimp-0.xz").unlink()
    with pytest.raises(ValueError, match="blimp-0.xz is missing"):
        build.load(tmp_path)


# Arms


@pytest.mark.parametrize("arm", ["75", "75-dense", "gradual", "rigl", "set", "two-way"])
def test_an_arm_keeps_to_its_sparsity(evidence, runner, arm):
    given = task(evidence, arm)
    engine = runner.engine(given)
    size, sparsity = runner.data.size("toy"), evidence.plan.ARMS[arm].sparsity
    program = runner.data.pretraining(size, evidence.plan.ARMS[arm], 0, 0.01)
    first = sparsity.first(engine.weights, 0)
    engine.begin(size.shape.weights(0), first, program)
    densities = []
    while not engine.is_done:
        engine.run(engine.steps + 1)
        densities.append(engine.density())
        for name, weight in engine.weights.items():
            assert not weight.detach()[engine.masks[name] == 0].any()
    moved = any(not torch.equal(first[n], m.bool().cpu()) for n, m in engine.masks.items())
    assert moved == (arm in ("75-dense", "gradual", "rigl", "set"))
    assert densities[0] == (1 if arm == "gradual" else 0.25)
    assert densities[-1] == (1 if arm == "75-dense" else 0.25)
    assert densities == sorted(densities, reverse=arm == "gradual")
    if arm == "75":
        weights = {n: w.detach() for n, w in engine.weights.items()}
        expected = Static(0.75, seed=0).masks(weights)
        assert all(torch.equal(mask, first[name]) for name, mask in expected.items())


@pytest.mark.parametrize("arm", ["gradual", "75-dense", "rounds-84-25"])
def test_mean_density_is_that_of_the_steps(evidence, arm):
    sparsity, weights = evidence.plan.ARMS[arm].sparsity, {"a": torch.rand(40, 50)}
    steps, masks, total = 8000, sparsity.first(weights, 0), 0.0
    changes = sparsity.changes(steps, 0)
    for step in range(1, steps + 1):
        total += float(masks["a"].float().mean())
        if step in changes:
            masks = changes[step](step, weights, {}, masks)
    assert total / steps == pytest.approx(sparsity.density(steps), abs=0.01)


@pytest.mark.parametrize("arm", ["more-25", "pruned-84-25", "rounds-84-25"])
def test_a_trained_model_is_pruned_and_trained_on(evidence, runner, monkeypatch, arm):
    """It begins with the dense model of its seed, which is trained once, and with other text."""
    arms, trained = evidence.arms, []
    pretrain = arms.Runner._pretrain
    monkeypatch.setattr(
        arms.Runner, "_pretrain", lambda self, t, *a: trained.append(t) or pretrain(self, t, *a)
    )
    seed = evidence.plan.SWEEP_SEED
    given, begun = arms.Task("toy", arm, seed, 0.004, False, 0.002), {}
    begin = evidence.engine.Engine.begin

    def watched(self, weights, masks, program):
        begun.update(weights=weights, masks=masks, starts=program.starts)
        begin(self, weights, masks, program)

    monkeypatch.setattr(evidence.engine.Engine, "begin", watched)
    dense = runner.run(given.start, math.inf)
    first = begun["starts"]
    model = {name: t.clone() for name, t in runner.engine(given).model.state_dict().items()}
    found = runner.run(given, math.inf)
    assert [t.arm for t in trained] == ["dense", arm] and found["setup_s"] < 1
    assert found["pretrained"]["steps"] == 3 and dense["pretrained"]["steps"] == 12
    assert found["pretrained"]["density"] == pytest.approx(
        1 if arm == "more-25" else 0.162, abs=1e-3
    )
    assert all(torch.equal(begun["weights"][name], model[name]) for name in model)
    assert not np.isin(begun["starts"], first).all()
    if arm == "pruned-84-25":
        for name, mask in begun["masks"].items():
            sizes = model[f"{name}.weight"].abs()
            assert sizes[mask].min() >= sizes[~mask].max()
    # Without the dense model it is trained for this, and the second time nothing is.
    again = replace(given, start_rate=0.001)
    once = runner.run(again, math.inf)
    assert [t.arm for t in trained[2:]] == ["dense", arm]
    assert runner.run(again, math.inf)["pretrained"] == once["pretrained"] and len(trained) == 4


def test_the_sparse_kernels_follow_the_same_losses(evidence, folder, tmp_path):
    assert evidence.check.check(folder, tmp_path, "cpu", "toy") == 0
    found = json.loads((tmp_path / "check.json").read_text())
    assert found["is_resumed_exactly"] and found["is_same"]


def test_a_run_that_is_stopped_goes_on(evidence, folder, tmp_path, monkeypatch):
    arms, given = evidence.arms, task(evidence, "75", is_tuned=True)
    monkeypatch.setattr(arms, "CHUNK", 5)
    monkeypatch.setattr(evidence.plan, "FIRST_TUNING_RATES", (1e-3,))
    monkeypatch.setattr(evidence.plan, "LEAST_TUNING_RATE", 4e-4)
    monkeypatch.setattr(evidence.plan, "MOST_TUNING_RATE", 1e-3)
    whole = evidence.worker.runner(folder, tmp_path / "whole", "cpu").run(given, math.inf)
    assert set(whole["tuned"]) == {
        f"{t} {way}" for t in ("sentiment", "webnlg", "code") for way in ("dense", "sparse")
    }
    assert 0 <= whole["pretrained"]["blimp"]["percent"] <= 100
    assert len(arms.unpacked(whole["tuned"]["sentiment dense"]["items"])) == 8
    # In other processes, each of which is stopped at its first look at the clock.
    stops = []
    for _ in range(40):
        stopped = evidence.worker.runner(folder, tmp_path / "parts", "cpu")
        clock = iter([0.0] * (9 if stops else 2) + [9.0] * 1000)
        with monkeypatch.context() as patch:
            patch.setattr(arms.time, "monotonic", lambda clock=clock: next(clock))
            try:
                parts = stopped.run(given, 5.0)
                break
            except arms.OutOfTime as error:
                stops.append(str(error))
    assert stops[0] == "stopped at step 5 of 12" and len(stops) > 1
    for name in ("held-out", "domains", "curve"):
        assert parts["pretrained"][name] == whole["pretrained"][name]
    assert parts["tuned"] == whole["tuned"]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_loss_and_its_gradient_are_those_of_autograd(evidence, dtype):
    y = torch.randint(0, 97, (50,))
    y[::7] = evidence.engine.IGNORED
    logits = (4 * torch.randn(50, 97)).to(dtype).requires_grad_()
    expected = F.cross_entropy(logits.float(), y)
    expected.backward()
    loss, gradient = evidence.engine.loss_and_gradient(logits.detach(), y)
    torch.testing.assert_close(loss, expected.detach())
    torch.testing.assert_close(gradient, logits.grad, rtol=0, atol=1e-8)


@pytest.mark.parametrize("name", ["blimp", "cloze", "sentiment/test", "held-out/manuals"])
def test_scores_are_those_of_whole_rows(evidence, runner, name):
    engine, rows = runner.engine(task(evidence, "dense")), runner.data.rows[name]
    engine.begin(
        runner.data.size("toy").shape.weights(3),
        evidence.masks.dense(engine.weights),
        evidence.engine.Program(np.empty((0, 1)), np.empty(0), {}),
    )
    found = engine.score(rows)
    ids = torch.from_numpy((rows & evidence.rows.IDS).astype(np.int64))
    is_target = torch.from_numpy(rows[:, 1:] < evidence.rows.NOT_A_TARGET)
    with torch.no_grad():
        logits = engine.model(ids[:, :-1])[0]
    nats = F.cross_entropy(logits.transpose(1, 2), ids[:, 1:], reduction="none") * is_target
    assert found.nats == pytest.approx(nats.sum(1).numpy(), rel=1e-5)
    assert np.array_equal(found.targets, is_target.sum(1).numpy())
    right = (logits.argmax(-1) == ids[:, 1:]) | ~is_target
    assert np.array_equal(found.right, right.all(1).numpy())
    # A row without targets has none right and none wrong.
    empty = engine.score(rows[:2] | evidence.rows.NOT_A_TARGET)
    assert not empty.nats.any() and not empty.targets.any() and empty.right.all()


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no NVIDIA GPU")
def test_the_captured_step_is_that_of_the_host(evidence, folder, tmp_path):
    assert evidence.check.check(folder, tmp_path, "cuda", "toy") == 0
    losses = {}
    for device in ("cpu", "cuda"):
        made = evidence.worker.runner(folder, tmp_path / device, device)
        for arm in ("rigl", "75-dense"):
            found = made.run(task(evidence, arm, is_tuned=True), math.inf)
            losses[device, arm] = found["pretrained"]["held-out"]
            assert found["pretrained"]["density"] == (1 if arm == "75-dense" else 0.25)
            assert set(found["tuned"]) == {f"{t} dense" for t in ("sentiment", "webnlg", "code")}
    for arm in ("rigl", "75-dense"):
        assert losses["cuda", arm] == pytest.approx(losses["cpu", arm], abs=0.05)


# The plan and the study


@pytest.mark.parametrize("optimum", [1e-4, 1.1e-3, 3e-3, 0.1, math.inf])
def test_a_sweep_ends_with_its_best_rate_inside(evidence, optimum):
    plan, losses = evidence.plan, {}
    for _ in range(40):
        rates = plan.next_rates(losses)
        if not rates:
            break
        for rate in rates:
            is_high = rate > 0.05 if math.isfinite(optimum) else rate > 0.003
            losses[rate] = math.inf if is_high and optimum != 0.1 else abs(math.log(rate / 1e-3))
            if math.isfinite(optimum) and losses[rate] < math.inf:
                losses[rate] = abs(math.log(rate / optimum))
    best = plan.best_rate(losses)
    assert min(losses) < best < max(losses) and len(losses) >= plan.TRIED


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
        found = study.Study(
            [order], "text", tmp_path, [], {"commit": "", "date": "", "torch": ""}, {}
        )
        found.run(InProcess(runner, evidence.worker.answer, most), math.inf, False)
        return found

    first = made(2)
    rates = [f"toy 75 rate {rate:g}" for rate in plan.FIRST_RATES[:2]]
    assert [r["key"] for r in first.results.values()] == rates
    last = made(1000)
    assert first.without_rate() == ["toy 75", "toy two-way"]
    assert not last.waiting() and not last.failed and not last.without_rate()
    assert list(last.results)[:2] == list(first.results)
    best = plan.best_rate(last.losses("toy", "75"))
    assert {last.results[f"toy {a} seed 0"]["rate"] for a in order.arms} == {best}
    lines = (tmp_path / "results.jsonl").read_text()
    made(1000)
    assert (tmp_path / "results.jsonl").read_text() == lines
    pace = evidence.pace.Pace(last.results.values(), {})
    assert pace.seconds(evidence.arms.Task("toy", "75", 1, best, False)) > 0
    with pytest.raises(ValueError, match="expected the text text of earlier results, got other"):
        study.Study([order], "other", tmp_path, [], {}, {})
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
        found = study.Study(
            [order], "text", tmp_path, [], {"commit": "", "date": "", "torch": ""}, {}
        )
        found.run(InProcess(runner, evidence.worker.answer, most), math.inf, False)
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
    orders = [
        plan.Order(1, "S5", "?", (), ("75", "two-way"), tuple(range(8)), False),
        plan.Order(2, "S", "?", (), ("dense", "more-25", "more-50", "short"), (0, 1, 2), False),
    ]
    rates = {"dense": 0.01, "75": 0.01, "more-25": 0.01}
    monkeypatch.setattr(study.Study, "rate", lambda self, size, arm: rates["dense"])
    made = study.Study(orders, "text", tmp_path, [], {"device": ""}, {"code": 64})
    known = results(evidence, {"dense": [2.0]})[0] | {"seconds": 100.0, "is_tuned": False}
    known["pretrained"] |= {"step_s": 0.01, "steps": 8000}
    made.results["known"] = known
    made.is_whole, made.deadline = True, 500.0
    ends: dict[str, tuple] = {}
    done = []
    while True:
        for gpu in "01":
            if gpu not in ends and (job := made.choose(gpu, [e[1] for e in ends.values()])):
                task = evidence.arms.Task(**job.settings)
                pace = evidence.pace.Pace(made.results.values(), made.rows)
                ends[gpu] = clock[0] + made.cost(pace, gpu, task), job, clock[0]
        if not ends:
            break
        gpu = min(ends, key=lambda gpu: ends[gpu][0])
        clock[0], job, began = ends.pop(gpu)
        done.append(job.key)
        worker = type("Worker", (), {"gpu": gpu, "device": "GPU", "began": began})
        own = json.loads(json.dumps({"pretrained": known["pretrained"], "setup_s": 30.0}))
        made.finish(job, worker, {"result": own | {"seconds": clock[0] - began}})
    assert clock[0] <= 500 and made.spent["whole"] > 0.9 * 2 * (500 - study.MARGIN_S)
    assert len(done) == len(set(done)) and "S5 75 seed 0" in done
    assert not made.spent["lost"]


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


# Statistics and the page


def results(evidence, losses: dict[str, list[float]]) -> list[dict]:
    """Results of order 2 with these losses on code."""
    rng, items, found = np.random.default_rng(0), evidence.arms.items, []
    about = {
        "corpus": "text",
        "is_tuned": True,
        "device": "GPU",
        "torch": "2",
        "date": "day",
        "commit": "abc",
    }
    for arm, each in losses.items():
        for seed, loss in enumerate(each):
            right = items(rng.random(200) < 0.8)
            pretrained = {"held-out": loss + 1, "dev": loss, "cloze": right}
            pretrained |= {"blimp": {"percent": right["percent"]}}
            pretrained |= {"tokens": 2e6, "passes": 2, "steps": 10, "step_s": 0.5}
            tuned = {"sentiment dense": {"items": right}, "code dense": {"loss": loss}}
            own = {"key": f"S {arm} seed {seed}", "size": "S", "arm": arm, "seed": seed}
            own |= {"recipe": evidence.arms.Task("S", arm, seed, 0.001, True).recipe}
            own |= {"rate": 0.001, "pretrained": pretrained, "tuned": tuned, "seconds": 9.0}
            found.append(own | about)
    return found


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
    assert "+0.1000 (1 of 3 seeds)" in primary and "one seed says nothing of 0.02" in primary
    second = page.split("\n## 2. ")[1].split("\n## ")[0]
    assert second.splitlines()[4].startswith("| dense |") and "|   0-1 |" in second
    assert "Not run yet, with their FLOPs: small dense, FLOPs of 75 % (0.52); dense" in second
    assert "| webnlg |" not in second  # nobody has it
    assert evidence.page.numbers([5, 0, 2, 1]) == "0-2, 5"


def test_the_page_is_what_its_results_make(evidence):
    kept = BENCH / "results" / "quality.jsonl"
    made = evidence.page.text(evidence.study.read([kept] if kept.exists() else []))
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
        evidence.page.publish(kept, page, [tmp_path / "new.jsonl"])
    assert len(kept.read_text().splitlines()) == 1 and "GPU" in page.read_text()
    (tmp_path / "other.jsonl").write_text(json.dumps(new[0] | {"key": "b", "recipe": "old"}) + "\n")
    with pytest.raises(ValueError, match="made by another plan"):
        evidence.page.publish(kept, page, [tmp_path / "other.jsonl"])
