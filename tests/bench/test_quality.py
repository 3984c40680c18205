"""The harness of bench/quality.py at toy size: rows are what they say, arms keep to their sparsity,
a run that is stopped goes on."""

import json
import math
import random
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from sparsekern.gpt.data import ByteTokenizer
from sparsekern.sparsity import Static

LENGTH = 17
WORDS = "the of and to in is that model weight zero mask train loss good bad film novel".split()

pytest_plugins = "quality_toy"


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


@pytest.mark.parametrize(
    "arm", ["75", "75-normed", "75-dense", "gradual", "rigl", "set", "two-way"]
)
def test_an_arm_keeps_to_its_sparsity(evidence, runner, arm):
    given = task(evidence, arm)
    engine = runner.engine(given)
    size, sparsity = runner.data.size("toy"), evidence.plan.ARMS[arm].sparsity
    program = runner.data.pretraining(size, evidence.plan.ARMS[arm], 0, 0.01)
    first = sparsity.first(engine.weights, 0)
    engine.begin(evidence.plan.ARMS[arm].shape(size).weights(0), first, program)
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


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_queries_and_keys_are_normed(evidence, dtype):
    """However large the weights are that make them. All else is as without a norm."""
    shape = replace(evidence.plan.SIZES["toy"].shape, vocab_size=50, context=LENGTH)
    plain, normed = shape.model(), replace(shape, is_normed=True).model()
    unmatched = normed.load_state_dict(shape.weights(0), strict=False)
    plain.load_state_dict(shape.weights(0))
    assert unmatched.missing_keys == [f"blocks.0.attention.qkv.norms.{i}.weight" for i in (0, 1)]
    qkv = [model.blocks[0].attention.qkv for model in (plain, normed)]
    x = torch.randn(2, LENGTH, 32)
    with torch.no_grad(), torch.autocast("cpu", dtype, enabled=dtype != torch.float32):
        qkv[1].weight[:64] *= 100
        qkv[1].norms[1].weight *= 2
        expected, found = (layer(x).unflatten(-1, (3, 2, 16)) for layer in qkv)
        assert found.dtype == expected.dtype == dtype
        assert torch.equal(found[:, :, 2], expected[:, :, 2])
        for part, scale in ((0, 1), (1, 2)):
            each = expected[:, :, part].float()
            each = scale * each / each.square().mean(-1, keepdim=True).sqrt()
            torch.testing.assert_close(found[:, :, part].float(), each, rtol=0.02, atol=0.02)


def test_arms_with_norms_are_recipes_of_their_own(evidence, monkeypatch):
    """Results from before there were norms keep theirs."""
    monkeypatch.setattr(evidence.masks, "UPDATE_EVERY", 100)  # as it is outside of these tests
    kept = evidence.study.read([Path(__file__).parents[2] / "bench" / "results" / "quality.jsonl"])
    evidence.study.check_plan(kept)
    normed = [name for name, arm in evidence.plan.ARMS.items() if arm.is_normed]
    names = [*normed, *(name.removesuffix("-normed") for name in normed)]
    recipes = {evidence.arms.Task("S", name, 0, 0.004, False).recipe for name in names}
    assert normed and len(recipes) == len(names)


def test_first_weights_and_rates_are_scaled_by_density(evidence, runner):
    """Of linear layers alone: weights by the root of 1 / density, rates by 1 / density."""
    first, moved = {}, {}
    begin = evidence.engine.Engine.begin
    for arm in ("75", "75-scaled"):
        given, weights = task(evidence, arm), {}
        made = runner.data.pretraining(runner.data.size("toy"), evidence.plan.ARMS[arm], 0, 1e-3)
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(
                evidence.engine.Engine,
                "begin",
                lambda self, w, *a, known=weights: known.update(w) or begin(self, w, *a),
            )
            runner._pretrain(given, runner._folder(given), math.inf)
        engine = runner.engine(given)
        first[arm] = {name: weights[f"{name}.weight"] for name in engine.weights}
        engine.begin(weights, evidence.masks.dense(engine.weights), made)
        before = engine.copy()
        engine.run(1)
        moved[arm] = {n: (w - before[n]).abs().mean().item() for n, w in engine.copy().items()}
    for name, weight in first["75"].items():
        assert torch.allclose(first["75-scaled"][name], 2 * weight)
    for name, step in moved["75"].items():
        times = 4 if name.removesuffix(".weight") in first["75"] else 1
        assert moved["75-scaled"][name] == pytest.approx(times * step, rel=0.1, abs=1e-9), name


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
    assert evidence.check.check(folder, tmp_path, "cpu", "toy", {}) == 0
    found = json.loads((tmp_path / "check.json").read_text())
    assert found["is_resumed_exactly"] and found["is_same"] and found["sparse_step_s"] > 0


def test_a_run_that_is_stopped_goes_on(evidence, folder, tmp_path, monkeypatch):
    arms, given = evidence.arms, task(evidence, "75", is_tuned=True)
    monkeypatch.setattr(arms, "CHUNK", 5)
    monkeypatch.setattr(evidence.plan, "FIRST_TUNING_RATES", (1e-3,))
    monkeypatch.setattr(evidence.plan, "LEAST_TUNING_RATE", 4e-4)
    monkeypatch.setattr(evidence.plan, "MOST_TUNING_RATE", 1e-3)
    whole = evidence.worker.runner(evidence.build.load(folder), tmp_path / "whole", "cpu").run(
        given, math.inf
    )
    assert set(whole["tuned"]) == {
        f"{t} {way}" for t in ("sentiment", "webnlg", "code") for way in ("dense", "sparse")
    }
    assert 0 <= whole["pretrained"]["blimp"]["percent"] <= 100
    assert len(arms.unpacked(whole["tuned"]["sentiment dense"]["items"])) == 8
    # In other processes, each of which is stopped at its first look at the clock.
    stops = []
    for _ in range(40):
        stopped = evidence.worker.runner(evidence.build.load(folder), tmp_path / "parts", "cpu")
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
def test_the_captured_step_is_that_of_the_host(evidence, folder, tmp_path):
    assert evidence.check.check(folder, tmp_path, "cuda", "toy", {}) == 0
    losses = {}
    for device in ("cpu", "cuda"):
        made = evidence.worker.runner(evidence.build.load(folder), tmp_path / device, device)
        for arm in ("rigl", "75-dense"):
            found = made.run(task(evidence, arm, is_tuned=True), math.inf)
            losses[device, arm] = found["pretrained"]["held-out"]
            assert found["pretrained"]["density"] == (1 if arm == "75-dense" else 0.25)
            assert set(found["tuned"]) == {f"{t} dense" for t in ("sentiment", "webnlg", "code")}
    for arm in ("rigl", "75-dense"):
        assert losses["cuda", arm] == pytest.approx(losses["cpu", arm], abs=0.05)
